"""``lowvram slim``: a model without the tokens that are not needed."""

import argparse
import sys

from lowvram_lab.cli.common import print_json, prose, tokens
from lowvram_lab.slimming.slim import slim_vocabulary


def add_slim(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``slim``."""
    parser.add_argument("--input", required=True, dest="model", metavar="MODEL", help="a 16-bit model, by name or path")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument(
        "--vocab",
        required=True,
        type=_vocab,
        metavar="N|text",
        help="tokens that stay, e.g. 16k, or text: as many as the text needs",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="a text like what the model will read, may be given more than once (the library's)",
    )


def run_slim(args: argparse.Namespace) -> int:
    """Writes the smaller model, and prints its sizes."""
    made = slim_vocabulary(args.model, args.output, vocab=args.vocab, texts=args.text, progress=sys.stderr.isatty())
    say = prose(args)
    say(made.summary())
    say(f"next: lowvram chat {made.output}")
    if args.json:
        print_json(made.to_dict())
    return 0


def _vocab(text: str) -> int | str:
    return text if text == "text" else tokens(text)
