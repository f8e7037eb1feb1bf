"""``lowvram slim``: a model without the tokens or the layers that are not needed, or of a given size."""

import argparse
import sys

from lowvram_lab.cli.common import print_json, prose, size, tokens
from lowvram_lab.errors import LowvramError
from lowvram_lab.slimming.joint import SlimmedToSize, slim_to_size
from lowvram_lab.slimming.slim import Slimmed, slim_vocabulary
from lowvram_lab.slimming.slim_layers import CUT, HEALED, REPAIRED, SlimmedLayers, slim_layers


def add_slim(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``slim``."""
    parser.add_argument("--input", required=True, dest="model", metavar="MODEL", help="a 16-bit model, by name or path")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty directory")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--vocab",
        type=_vocab,
        metavar="N|text",
        help="tokens that stay, e.g. 16k, or text: as many as the text needs",
    )
    what.add_argument(
        "--layers",
        type=_layers,
        metavar="N|A,B,...",
        help="how many layers are left out, those that cost least; or which, e.g. 13,14,17",
    )
    what.add_argument(
        "--weight-bytes",
        type=size,
        metavar="SIZE",
        help="what the weights may take: tokens, layers and bits are then chosen together (convert: bits alone)",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="a text like what the model will read; but for --layers more than one (the library's)",
    )
    stage = parser.add_mutually_exclusive_group()
    stage.add_argument(
        "--no-repair",
        dest="stage",
        action="store_const",
        const=CUT,
        help="with --layers: leave the others as they are",
    )
    stage.add_argument(
        "--heal",
        dest="stage",
        action="store_const",
        const=HEALED,
        help="with --layers: the others learn to make up for it (minutes; a large model: hours)",
    )
    parser.add_argument(
        "--no-referee", action="store_true", help="do not measure what quantising alone reaches in the same bytes"
    )


def run_slim(args: argparse.Namespace) -> int:
    """Writes the smaller model, and prints its sizes and what they cost."""
    say, made = prose(args), _made(args)
    say(made.summary())
    say(f"next: lowvram chat {made.output}")
    if args.json:
        print_json(made.to_dict())
    return 0


def _made(args: argparse.Namespace) -> Slimmed | SlimmedLayers | SlimmedToSize:
    shown = sys.stderr.isatty()
    if args.layers is None and args.stage:
        raise LowvramError("--no-repair and --heal go with --layers: a vocabulary leaves the other weights alone")
    if args.weight_bytes is not None:
        if args.no_referee:
            raise LowvramError(
                "--no-referee goes with --vocab and --layers: --weight-bytes measures bits alone as well"
            )
        return slim_to_size(args.model, args.output, args.weight_bytes, texts=args.text, progress=shown)
    if args.layers is None:
        return slim_vocabulary(
            args.model,
            args.output,
            vocab=args.vocab,
            texts=args.text,
            referee=not args.no_referee,
            progress=shown,
        )
    if args.text and len(args.text) > 1:
        raise LowvramError(f"--layers takes one --text, found {len(args.text)}; put them into one file")
    return slim_layers(
        args.model,
        args.output,
        args.layers,
        text=args.text[0] if args.text else None,
        stage=args.stage or REPAIRED,
        referee=not args.no_referee,
        progress=shown,
    )


def _vocab(text: str) -> int | str:
    return text if text == "text" else tokens(text)


def _layers(text: str) -> int | list[int]:
    """How many, or which: ``13,14`` names two, and ``13,`` one."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts if part or len(parts) == 1):
        raise argparse.ArgumentTypeError(f"expected a number of layers or indices such as 13,14,17, found {text!r}")
    return int(parts[0]) if len(parts) == 1 else [int(part) for part in parts if part]
