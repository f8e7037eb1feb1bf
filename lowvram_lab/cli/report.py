"""``lowvram report``: an article's effect table beside what this machine forecasts and measures."""

import argparse
import json
import sys
from html import escape
from pathlib import Path

from lowvram_lab.cli.common import print_json, prose, require_cache, tokens
from lowvram_lab.errors import LowvramError
from lowvram_lab.evaluation.effect_report import EffectReport
from lowvram_lab.evaluation.effects import effects
from lowvram_lab.files import expanded, write_atomically
from lowvram_lab.model.source import find_source

ENDINGS = (".md", ".html", ".json")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``report``."""
    parser.add_argument("model", metavar="MODEL", help="a 16-bit model: name, hub id, directory or .gguf file")
    parser.add_argument("--gpu", required=True, metavar="SIZE", help="the card to be, e.g. 4GiB")
    parser.add_argument("--context", type=tokens, metavar="N", help="tokens to plan for (2048)")
    parser.add_argument("--medium", metavar="DIR", help="measure this directory from lowvram convert --reduce 60%%")
    parser.add_argument("--deep", metavar="DIR", help="the same from lowvram convert --reduce 70%%")
    parser.add_argument("--output", metavar="FILE", help="write the table into a .md, .html or .json file")


def run_report(args: argparse.Namespace) -> int:
    """Forecasts, measures, prints the table, and writes it where that is asked for."""
    output = _output(args.output)
    require_cache(find_source(args.model))

    report = effects(
        args.model,
        args.gpu,
        context=args.context,
        converted={"medium": args.medium, "deep": args.deep},
        progress=sys.stderr.isatty(),
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    say = prose(args)
    say(repr(report))
    if args.json:
        print_json(report.to_dict())
    if output:
        write_report(report, output)
        say(f"written: {output}")
    return 0


def write_report(report: EffectReport, path: Path) -> None:
    """Writes a report whole or not at all, as its file's name ends: in one of ``ENDINGS``.

    Raises:
        LowvramError: Another ending, or a file that cannot be written.
    """
    ending = _output(path).suffix.lower()
    if ending == ".json":
        page = json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n"
    elif ending == ".md":
        page = report.to_markdown()
    else:
        head = f'<meta charset="utf-8"><title>Effect table: {escape(report.model)}</title>'
        page = f"<!DOCTYPE html>\n<html><head>{head}</head><body>\n{report._repr_html_()}\n</body></html>\n"
    write_atomically(path, page)


def _output(path: str | Path | None) -> Path | None:
    """The file to write, refused before minutes are spent on what would go there."""
    if path is None:
        return None
    path = expanded(path)
    if path.suffix.lower() not in ENDINGS:
        raise LowvramError(f"expected a report's name ending in {', '.join(ENDINGS)}, found {str(path)!r}")
    if path.is_dir():
        raise LowvramError(f"cannot write {path}: it is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise LowvramError(f"cannot write {path}: its folder does not exist; make it first")
    return path
