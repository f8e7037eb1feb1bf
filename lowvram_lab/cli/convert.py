"""``lowvram convert``: quantise a model once, into a directory."""

import argparse
import sys

from lowvram_lab.cli.common import print_json, prose, share, spec_of, tokens
from lowvram_lab.cli.evaluate import stated_format
from lowvram_lab.conversion.convert import convert
from lowvram_lab.errors import LowvramError
from lowvram_lab.planner.card_recipe import CardBudget
from lowvram_lab.repository.text import windows_in_words
from lowvram_lab.units import format_bytes
from lowvram_lab.weights.recipe import WeightBudget


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``convert``."""
    parser.add_argument("--input", required=True, dest="model", metavar="MODEL", help="a 16-bit model, by name or path")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty directory")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--weight-bytes", metavar="SIZE", help="what the weights may take in memory, e.g. 1.9GiB")
    size.add_argument("--reduce", type=share, metavar="SHARE", help="of the 16-bit bytes to save, e.g. 70%%")
    size.add_argument("--gpu", metavar="SIZE", help="the card that weights, KV cache and workspace are to share")
    size.add_argument("--format", metavar="NAME", help="one format for the whole model, e.g. int4 or int4+4")
    size.add_argument("--plan", metavar="FILE", help="formats from a plan's JSON")
    parser.add_argument("--context", type=tokens, metavar="N", help="tokens to plan for, with --gpu (2048)")
    parser.add_argument("--formats", metavar="A,B", help="choose among these only, e.g. int8,int4,int4-g128")
    parser.add_argument(
        "--own-formats",
        action="store_true",
        help="allow an embedding below 8 bits, which this library opens and stock transformers does not yet",
    )
    parser.add_argument("--calibration", metavar="FILE", help="a text like what the model will read (the library's)")
    parser.add_argument("--solver", default="gptq", metavar="NAME", help="gptq, clip or rtn (gptq)")


def run_convert(args: argparse.Namespace) -> int:
    """Converts, and prints sizes and measured loss."""
    say = prose(args)
    if args.context and not args.gpu:
        raise LowvramError("--context goes with --gpu: bytes of weights do not depend on it")
    if args.formats and (args.format or args.plan):
        raise LowvramError("--formats goes with a size (--reduce, --weight-bytes, --gpu): a plan has its formats")
    source, spec = spec_of(args.model)
    source.require_tokenizer()
    made = convert(
        args.model,
        args.output,
        plan=stated_format(args, spec) or _budget(args),
        calibration=args.calibration,
        solver=args.solver,
        progress=sys.stderr.isatty(),
    )
    found = made.measured
    say(f"{made.output}: {format_bytes(made.weight_bytes)} of weights, {made.reduction:.1%} less than in 16 bits")
    say(
        f"perplexity {found['perplexity']:.3f}, the original's {found['reference_perplexity']:.3f}; KL "
        f"{found['kl_mean']:.4f}, same most likely token {found['top1_agreement']:.1%} "
        f"({found['tokens']} tokens {windows_in_words(found['window'], found['begins_with'])})"
    )
    if both := found.get("both_planes"):
        say(
            f"that is the high plane alone; both: perplexity {both['perplexity']:.3f}, KL {both['kl_mean']:.4f}, "
            f"same most likely token {both['top1_agreement']:.1%}"
        )
    say(made.effort)
    say(f"next: lowvram chat {made.output}")
    if args.json:
        print_json(made.to_dict())
    return 0


def _budget(args: argparse.Namespace):
    """What makes the recipe within --gpu, --weight-bytes or --reduce."""
    formats = tuple(name.strip() for name in args.formats.split(",")) if args.formats else None
    stock = not args.own_formats
    if args.gpu:
        return CardBudget(args.gpu, context=args.context, formats=formats, stock=stock)
    return WeightBudget(weight_bytes=args.weight_bytes, reduction=args.reduce, formats=formats, stock=stock)
