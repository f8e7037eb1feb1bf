"""What a remembered prompt is worth: the first token cold and warm, bytes on disk, an answer that was given before.

    python benchmarks/remember.py --directory int4/ --threads 1
    python benchmarks/remember.py --shape qwen1.5-4b --threads 2 --rounds 2

``--directory`` is a converted model; ``--shape`` makes one of random weights in int4, whose answers mean nothing and
whose times do. Cold and warm take turns within a round: the same prompt, a prefix and 8 tokens behind it, read whole,
put back from disk (which the system's page cache holds) and from RAM. The logits must be equal in every bit, else there
is no result. Kept by model and threads in results/remember_cpu.json.
"""

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from kept import keep

from lowvram_lab.chat.first_token import break_even, first_token_table
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.engine.load import load
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.prefixes.store import Remember
from tests.helpers.checkpoints import RandomCheckpoint

RESULTS = Path(__file__).parent / "results"
QUESTIONS = (
    "Explain in a few sentences how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper and a storm.",
    "List the steps for planting a tree in a garden.",
)


def answers(model, tokenizer, rounds: int) -> dict:
    """Tokens a second of a question asked the first time and again; the text must be the same."""
    with tempfile.TemporaryDirectory() as folder:
        ratios, kept = [], {"first": [], "again": []}
        for turn in range(rounds + 1):
            for question in QUESTIONS:
                wanted = Remember(disk="1GiB", folder=Path(folder, str(turn)))
                session = ChatSession(model, tokenizer, max_new_tokens=160, remember=wanted)
                texts, rates = [], []
                for _ in kept:
                    session.history = []
                    texts.append(session.ask(question))
                    rates.append(session.turns[-1].tokens_per_s)
                if texts[0] != texts[1]:
                    raise SystemExit(f"{question}: another text")
                if turn:
                    ratios.append(rates[1] / rates[0])
                    kept["first"].append(rates[0])
                    kept["again"].append(rates[1])
    found = {f"{name}_tokens_per_s": statistics.median(rates) for name, rates in kept.items()}
    return {**found, "again_over_first": statistics.median(ratios)}


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--directory", type=Path)
    which.add_argument("--shape", help="a model known by name, whose weights are made up")
    parser.add_argument("--name", help="what to call the directory's model in the JSON; by default its name")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--kv", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "remember_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = find_source(args.directory or args.shape)
    spec = source.spec()
    weights = RandomCheckpoint(spec) if args.shape else None
    found = {}
    for kv_format in args.kv:
        plan = Plan.uniform(spec, "int4" if args.shape else "stored", context=max(args.lengths) + 256)
        plan = replace(plan, threads=args.threads, kv_format=kv_format)
        model = load(plan, open_gpu(), checkpoint=weights, progress=False)
        table = first_token_table(model, args.lengths, args.rounds, progress=False)
        print(f"{kv_format}\n{table.to_string(index=False)}", flush=True)
        if not table["same"].all():
            raise SystemExit("logits differ cold and warm")
        found[kv_format] = {"first_token": table.to_dict("records"), "break_even_tokens": break_even(table)}
        even, shortest = found[kv_format]["break_even_tokens"], table["tokens"].min()
        drawn_out = f" (lines drawn out: the shortest tried is {shortest})" if even < shortest else ""
        print(f"break-even at {even:.1f} tokens{drawn_out}", flush=True)
        if args.directory:
            found[kv_format]["answers"] = answers(model, source.tokenizer(), args.rounds)
            print(found[kv_format]["answers"], flush=True)
    keep(args.output, f"{args.shape or args.name or args.directory.name}, {args.threads} threads", found)


if __name__ == "__main__":
    main()
