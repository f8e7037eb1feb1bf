"""``lowvram export``: a model as a file that another engine opens."""

import argparse
import sys

from lowvram_lab.cli.common import positive, print_json, prose
from lowvram_lab.conversion.gguf_export import TYPES, export_gguf
from lowvram_lab.units import format_bytes


def add_export(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``export``."""
    parser.add_argument("model", metavar="MODEL", help="a model by name or path, a converted directory too")
    parser.add_argument("--to", required=True, choices=("gguf",), help="the kind of file: gguf, which llama.cpp opens")
    parser.add_argument("--output", required=True, metavar="FILE", help="a new file, .gguf")
    parser.add_argument("--type", default="f16", choices=TYPES, help="what matrices become (f16)")
    parser.add_argument("--context", type=positive, metavar="N", help="most tokens the file is for (all the model can)")


def run_export(args: argparse.Namespace) -> int:
    """Exports, and prints what is in the file."""
    options = {"tensor_type": args.type, "context": args.context}
    made = export_gguf(args.model, args.output, **options, progress=sys.stderr.isatty())
    say = prose(args)
    held = ", ".join(f"{count} in {name}" for name, count in made.types.items())
    say(f"{made.output}: {format_bytes(made.file_bytes)}, {made.tensors} tensors ({held})")
    if made.kept_codes:
        say(f"{made.kept_codes} quantised tensors kept their integers, code for code")
    say(f"{made.seconds:.0f} s, peak resident memory {format_bytes(made.peak_rss_bytes)}")
    say(f"next: llama-cli -m {made.output}")
    if args.json:
        print_json(made.to_dict())
    return 0
