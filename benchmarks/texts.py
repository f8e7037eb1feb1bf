"""The texts that a benchmark reads: the library's own bilingual one, and files that are named on the command line."""

import argparse

from lowvram_lab.packaged import read_text, sample_text


def add_text_option(parser: argparse.ArgumentParser) -> None:
    """``--text NAME=FILE``, as often as there are files."""
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="beside the bilingual one")


def named_texts(args: argparse.Namespace) -> dict[str, str]:
    """Name → text, of what ``--text`` says and the library's own, which nothing is fitted to."""
    named = (text.partition("=") for text in args.text)
    return {"bilingual": sample_text()} | {name: read_text(file) for name, _, file in named}
