"""``lowvram convert`` and ``lowvram evaluate``: quantise a model once, and say what that cost."""

import sys
from dataclasses import replace
from pathlib import Path

from lowvram_lab.errors import LowvramError
from lowvram_lab.faces.cli.common import positive, print_json, prose, share, spec_of


def add_convert(parser) -> None:
    """Arguments of ``convert``."""
    parser.add_argument("--input", required=True, dest="model", metavar="MODEL", help="a 16-bit model, by name or path")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty directory")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--weight-bytes", metavar="SIZE", help="what the weights may take in memory, e.g. 1.9GiB")
    size.add_argument("--reduce", type=share, metavar="SHARE", help="of the 16-bit bytes to save, e.g. 70%%")
    size.add_argument("--gpu", metavar="SIZE", help="the card that weights, KV cache and workspace are to share")
    size.add_argument("--format", metavar="NAME", help="one format for the whole model, e.g. int4")
    size.add_argument("--plan", metavar="FILE", help="formats from a plan's JSON")
    parser.add_argument("--context", type=positive, metavar="N", help="tokens to plan for, with --gpu (2048)")
    parser.add_argument("--formats", metavar="A,B", help="choose among these only, e.g. int8,int4,int4-g128")
    parser.add_argument(
        "--own-formats",
        action="store_true",
        help="allow an embedding below 8 bits, which this library opens and stock transformers does not yet",
    )
    parser.add_argument("--calibration", metavar="FILE", help="a text like what the model will read (the library's)")
    parser.add_argument("--solver", default="gptq", metavar="NAME", help="gptq, clip or rtn (gptq)")


def add_evaluate(parser) -> None:
    """Arguments of ``evaluate``."""
    parser.add_argument("model", metavar="MODEL", help="a converted directory, or any model with --format or --plan")
    parser.add_argument("--reference", metavar="MODEL", help="the original (the model itself in 16 bits)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--format", metavar="NAME", help="quantise while loading: int8, int4, nf4 …")
    how.add_argument("--plan", metavar="FILE", help="a plan written by lowvram plan --output")
    parser.add_argument("--text", metavar="FILE", help="what to read (the library's own small text)")
    parser.add_argument("--tokens", type=positive, metavar="N", help="score the first N tokens only")
    parser.add_argument("--window", type=positive, default=512, metavar="N", help="tokens that see each other (512)")
    parser.add_argument("--stride", type=positive, metavar="N", help="tokens from window to window (the window)")
    parser.add_argument("--dtype", default="bf16", metavar="NAME", help="activations: bf16 or fp32 (bf16)")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads")


def run_convert(args) -> int:
    """Converts, and prints sizes and measured loss."""
    from lowvram_lab.units import format_bytes
    from lowvram_lab.weights.convert import convert

    say = prose(args)
    if args.context and not args.gpu:
        raise LowvramError("--context goes with --gpu: bytes of weights do not depend on it")
    if args.formats and (args.format or args.plan):
        raise LowvramError("--formats goes with a size (--reduce, --weight-bytes, --gpu): a plan has its formats")
    made = convert(
        args.model,
        args.output,
        plan=_plan(args, spec_of(args.model)[1]) or _budget(args),
        calibration=args.calibration,
        solver=args.solver,
        progress=sys.stderr.isatty(),
    )
    found = made.measured
    say(f"{made.output}: {format_bytes(made.weight_bytes)} of weights, {made.reduction:.1%} less than in 16 bits")
    say(
        f"perplexity {found['perplexity']:.3f}, the original's {found['reference_perplexity']:.3f}; KL "
        f"{found['kl_mean']:.4f}, same most likely token {found['top1_agreement']:.1%} ({found['tokens']} tokens)"
    )
    say(f"{made.seconds:.0f} s, peak resident memory {format_bytes(made.peak_rss_bytes)}")
    say(f"next: lowvram chat {made.output}")
    if args.json:
        print_json(made.to_dict())
    return 0


def _budget(args):
    """What makes the recipe within --gpu, --weight-bytes or --reduce."""
    from lowvram_lab.planner.card_recipe import CardBudget
    from lowvram_lab.weights.recipe import WeightBudget

    formats = tuple(args.formats.split(",")) if args.formats else None
    stock = not args.own_formats
    if args.gpu:
        return CardBudget(args.gpu, context=args.context, formats=formats, stock=stock)
    return WeightBudget(weight_bytes=args.weight_bytes, reduction=args.reduce, formats=formats, stock=stock)


def run_evaluate(args) -> int:
    """Loads the model and its reference, and compares their predictions."""
    from lowvram_lab.chat.fidelity import fidelity, load_reference
    from lowvram_lab.engine.load import load
    from lowvram_lab.memory.gpu import StandInGpu
    from lowvram_lab.packaged import read_text, sample_text

    shown = sys.stderr.isatty()
    text = read_text(args.text) if args.text else sample_text()
    source, spec = spec_of(args.model)
    if spec.stored and not args.reference:
        raise LowvramError(f"{args.model} holds quantised weights alone: name its original with --reference")
    _, original = spec_of(args.reference) if args.reference else (source, spec)
    if original.vocab_size != spec.vocab_size:
        raise LowvramError(
            f"expected a reference with the same vocabulary of {spec.vocab_size}, found {original.name} with "
            f"{original.vocab_size}"
        )
    window = min(args.window, spec.max_position_embeddings or args.window)
    plan = _evaluated_plan(args, spec, window)
    model = load(plan, StandInGpu(None), spec=spec, progress=shown)
    reference = load_reference(plan, original, progress=shown)
    found = fidelity(
        model,
        reference,
        source.tokenizer(),
        text,
        window=window,
        stride=args.stride,
        tokens=args.tokens,
        slice_tokens=window,
        progress=shown,
    )
    prose(args)(found.summary())
    if args.json:
        print_json(found.to_dict())
    return 0


def _evaluated_plan(args, spec, window: int):
    """The stated plan, or the model as it is, on the CPU in the dtype asked for."""
    from lowvram_lab.model.formats import get_format
    from lowvram_lab.model.plan import Plan

    plan = _plan(args, spec) or Plan.uniform(spec, "stored" if spec.stored else "bf16", context=window)
    modules = {
        name: replace(a, format=args.dtype if get_format(a.format).kind == "float" else a.format, device="cpu")
        for name, a in plan.modules.items()
    }
    plan = replace(plan, modules=modules, dtype=args.dtype, kv_format=args.dtype, threads=args.threads)
    plan.validate(spec)
    return plan


def _plan(args, spec):
    """The plan that --plan or --format states, or ``None``."""
    from lowvram_lab.model.plan import Plan

    if args.plan:
        return Plan.from_json(Path(args.plan))
    if args.format:
        return Plan.uniform(spec, args.format, context=min(2048, spec.max_position_embeddings or 2048))
    return None
