"""``lowvram bench``: our ways of running a model beside other engines."""

import argparse
import sys

from lowvram_lab.cli.common import dry_gpu, positive, print_json, prose, several, spec_of, tokens
from lowvram_lab.cli.plan import LONGEST, add_plan_options, chosen_plan
from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.peers.bench import BenchSettings, bench, peer_names


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``bench``."""
    add_plan_options(parser)
    parser.add_argument(
        "--against",
        metavar="A,B",
        help="of transformers, accelerate, bitsandbytes and llama.cpp (those installed); none for ours alone",
    )
    parser.add_argument(
        "--prompt-tokens", type=several(tokens), default=64, metavar="N,N", help="length of the prompt, or lengths (64)"
    )
    parser.add_argument(
        "--batch", type=several(positive), default=1, metavar="N,N", help="sequences side by side, or several such (1)"
    )
    parser.add_argument("--new-tokens", type=tokens, default=64, metavar="N", help="tokens decoded after it (64)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="turns of each engine (5)")
    parser.add_argument(
        "--gguf",
        metavar="FILE|TYPE",
        help="for llama.cpp: a file, or a type such as Q4_0 that its own tool is to quantise the same weights to (the "
        "type nearest to the format; the model's own file where it has one of as many bits)",
    )


def run_bench(args: argparse.Namespace) -> int:
    """Measures, and prints a row for each engine."""
    if args.context == LONGEST:
        raise LowvramError(
            "--context longest is for plan, chat and complete: bench needs room for its own prompt and answer"
        )
    settings = BenchSettings(args.prompt_tokens, args.new_tokens, args.rounds, args.threads, batch_size=args.batch)
    if args.context and args.context < settings.context:
        raise LowvramError(
            f"--context {args.context} is too short for prompt and answers: give it {settings.context}, or leave it out"
        )
    against = _names(args.against)
    peer_names(against, args.gguf)
    budget = GpuBudget.parse(args.gpu, args.cuda_context) if args.gpu else None
    source, spec = spec_of(args.model, runs=True)
    settings.check(spec)
    if not args.plan:
        args.context = args.context or settings.context
    # the card itself is for the engines: what fits is asked of a dry run
    plan, *_ = chosen_plan(args, spec, dry_gpu(budget))
    found = bench(
        source.name,
        budget,
        plan=plan,
        against=against,
        gguf=args.gguf,
        settings=settings,
        progress=sys.stderr.isatty(),
    )
    if args.json:
        print_json(found.to_dict())
        return 0
    say = prose(args)
    say(found.table().drop(columns="remark").to_string(index=False, na_rep="-"))
    for remark in found.remarks():
        say(remark)
    for line in found.circumstances():
        print(line, file=sys.stderr)
    say(found.summary())
    return 0


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return () if text.strip() == "none" else tuple(name.strip() for name in text.split(","))
