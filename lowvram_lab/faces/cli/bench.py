"""``lowvram bench``: our ways of running a model beside other engines."""

import argparse
import sys

import torch

from lowvram_lab.errors import LowvramError
from lowvram_lab.faces.cli.common import positive, print_json, prose, spec_of, tokens
from lowvram_lab.faces.cli.plan import LONGEST, add_plan_options, chosen_plan
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.peers.bench import BenchSettings, bench


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``bench``."""
    add_plan_options(parser, budget_required=False)
    parser.add_argument(
        "--against",
        metavar="A,B",
        help="of transformers, accelerate, bitsandbytes and llama.cpp (those installed); none for ours alone",
    )
    parser.add_argument("--prompt-tokens", type=tokens, default=64, metavar="N", help="length of the prompt (64)")
    parser.add_argument("--new-tokens", type=tokens, default=64, metavar="N", help="tokens decoded after it (64)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="turns of each engine (5)")
    parser.add_argument("--gguf", metavar="FILE", help="the file for llama.cpp (the model's own, or an export in Q4_1)")


def run_bench(args: argparse.Namespace) -> int:
    """Measures, and prints a row for each engine."""
    if args.context == LONGEST:
        raise LowvramError(
            "--context longest is for plan, chat and complete: bench needs room for its own prompt and answer"
        )
    budget = GpuBudget.parse(args.gpu, args.cuda_context) if args.gpu else None
    source, spec = spec_of(args.model, runs=True)
    settings = BenchSettings(args.prompt_tokens, args.new_tokens, args.rounds, args.threads)
    if not args.plan:
        args.context = args.context or settings.context
    # the card itself is for the engines: what fits is asked of a dry run
    plan, *_ = chosen_plan(args, spec, DryRunGpu(budget, "cuda" if torch.cuda.is_available() else "cpu"))
    found = bench(
        source.name,
        budget,
        plan=plan,
        against=_names(args.against),
        gguf=args.gguf,
        settings=settings,
        progress=sys.stderr.isatty(),
    )
    if args.json:
        print_json(found.to_dict())
        return 0
    say = prose(args)
    shown = found.table()
    remarks = shown.pop("remark")
    say(shown.to_string(index=False, na_rep="-"))
    for engine, remark in zip(shown["engine"], remarks, strict=True):
        if remark:
            say(f"{engine}: {remark}")
    for line in found.circumstances():
        print(line, file=sys.stderr)
    say(found.summary())
    return 0


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return () if text.strip() == "none" else tuple(name.strip() for name in text.split(","))
