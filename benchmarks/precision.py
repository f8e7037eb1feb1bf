"""Precision on demand, measured: the same tokens, how much sooner, how often unsure, how quickly switched.

    python benchmarks/precision.py --directory planes/ --threads 1 --calibration valid.txt --text test.txt

``--directory`` is what ``lowvram convert --format int4+4`` makes. In one process, in turns: tokens by both planes one
after the other (``plain``), drafted and verified (``precise``), ``auto``, ``fast``, over the library's small tasks; the
16-bit original by the same decoder; how often ``auto`` says something else than both planes on a text that its
threshold was not found on, at three rates, the threshold found on the library's own text and on ``--calibration``; and
what a switch takes. Kept by threads in results/precision_cpu.json.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import pandas
import torch
from kept import keep

from lowvram_lab.chat.margins import MOST_TOKENS, WINDOW, margins_of, tokens_for
from lowvram_lab.chat.prompt import chat_ids
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.chat.tasks import task_table, tasks
from lowvram_lab.decoding.decode import generate
from lowvram_lab.decoding.escalate import Margins, read_margins
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.decoding.speculate import Drafting, speculate
from lowvram_lab.engine.load import load
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import PRECISIONS
from lowvram_lab.model.source import find_source
from lowvram_lab.repository.text import equal_windows, first_ids, plain_ids

RESULTS = Path(__file__).parent / "results"
RATES = (0.005, 0.01, 0.03)
SWITCHES = 50


def questions(tokenizer) -> list[torch.Tensor]:
    """The small tasks' prompts, ``(1, tokens)`` each."""
    asked = [question for several in tasks().values() for question in several]
    return [torch.tensor([chat_ids(tokenizer, [{"role": "user", "content": text}], {})]) for text in asked]


def differing(model, tokenizer, wanted: int) -> dict:
    """Greedy tokens by drafts beside those one after the other, to the end of the longest answer, until enough."""
    decoder, drafting, counted, other = decoder_for(model, progress=False), Drafting(), 0, 0
    for ids in questions(tokenizer):
        if counted >= wanted:
            break
        found = []
        for drafted in (False, True):
            decoder.cache.keep(0)
            stream = speculate(decoder, ids, max_new_tokens=160, drafting=drafting) if drafted else None
            found.append(list(stream or generate(decoder, ids, max_new_tokens=160)))
        counted += len(found[0])
        other += sum(a != b for a, b in zip(*found, strict=True))
    decoder.release()
    return {"tokens": counted, "differing": other, "acceptance": drafting.acceptance}


def sixteen_bits(name: str, tokenizer, threads: int) -> float:
    """Tokens a second of the original in bfloat16 by the same decoder, over the same questions; the median."""
    spec = find_source(name).spec()
    model = load(replace(Plan.uniform(spec, "bf16", context=512), threads=threads), open_gpu(), progress=False)
    decoder, rates = decoder_for(model, progress=False), []
    for ids in questions(tokenizer):
        decoder.cache.keep(0)
        stream = generate(decoder, ids, max_new_tokens=64)
        next(stream)
        began = time.perf_counter()
        rates.append(len(list(stream)) / (time.perf_counter() - began))
    return statistics.median(rates)


def flips(model, tokenizer, text: str, calibration: str | None) -> list[dict]:
    """What ``auto`` says otherwise than both planes on a text, at thresholds found on another."""
    windows = equal_windows(plain_ids(tokenizer, text), first_ids(tokenizer), WINDOW)[: MOST_TOKENS // WINDOW]
    met = Margins.joined([read_margins(model, window) for window in windows])
    rows = []
    for rate in RATES:
        known = margins_of(model, tokenizer, calibration, tokens=tokens_for(rate), progress=False)
        threshold = known.threshold(rate)
        believed = met.margins >= threshold
        rows.append(
            {
                "calibrated_on": "the library's text" if calibration is None else "a text of its kind",
                "stated": rate,
                "threshold": threshold,
                "found": (met.flips & believed).float().mean().item(),
                "escalated": met.escalated(threshold),
                "tokens": len(met.flips),
            }
        )
    return rows


def switches(model, tokenizer) -> dict:
    """Seconds that the next piece of an answer takes after a switch, and others; and whether a chat keeps its cache."""
    session = ChatSession(model, tokenizer, max_new_tokens=4 * SWITCHES, progress=False)
    for precision in PRECISIONS:  # margins are read, passes timed
        session.precision = precision
        session.ask("Tell me a story about a fox.")
    answer, took = session.send("Tell me a story about a river and a bridge."), {"set": [], "next": [], "ordinary": []}
    next(answer)

    def timed(name: str, call) -> None:
        began = time.perf_counter()
        call()
        took[name].append(time.perf_counter() - began)

    for at in range(SWITCHES):
        timed("set", lambda at=at: setattr(session, "precision", PRECISIONS[at % 3]))
        timed("next", lambda: next(answer))
        timed("ordinary", lambda: next(answer))
    answer.close()
    session.precision = "precise"
    session.ask("And then?")
    medians = {f"{name}_s": statistics.median(values) for name, values in took.items()}
    return {"switches": SWITCHES, **medians, "cached_after": session.turns[-1].cached_tokens}


def main() -> None:
    """Measures, prints, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--original", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calibration", type=Path, help="of the same kind as --text")
    parser.add_argument("--text", type=Path, help="held out; without one flips are not measured")
    parser.add_argument("--tokens", type=int, default=2000, help="greedy tokens that are compared")
    parser.add_argument("--output", type=Path, default=RESULTS / "precision_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = find_source(args.directory)
    tokenizer = source.tokenizer()
    plan = replace(Plan.uniform(source.spec(), "stored", context=1024), threads=args.threads)
    model = load(plan, open_gpu(), progress=False)
    found = {"same": differing(model, tokenizer, args.tokens)}
    print(found["same"], flush=True)
    found["tasks"] = task_table(model, tokenizer, progress=False).to_dict("records")
    print(pandas.DataFrame(found["tasks"]).to_string(index=False, float_format="{:.3f}".format), flush=True)
    found["sixteen_bits_tokens_per_s"] = sixteen_bits(args.original, tokenizer, args.threads)
    known = [None, *([args.calibration.read_text("utf-8")] if args.calibration else [])]
    held_out = args.text.read_text("utf-8") if args.text else None
    found["flips"] = [row for each in known for row in flips(model, tokenizer, held_out, each)] if held_out else []
    print(pandas.DataFrame(found["flips"]).to_string(index=False), flush=True)
    found["switches"] = switches(model, tokenizer)
    print(found["sixteen_bits_tokens_per_s"], found["switches"])
    keep(args.output, f"{args.original}, {args.threads} threads", found)


if __name__ == "__main__":
    main()
