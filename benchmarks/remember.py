"""What a remembered prompt is worth: the first token cold and warm, bytes on disk, an answer that was given before.

    python benchmarks/remember.py --directory int4/ --threads 1
    python benchmarks/remember.py --shape qwen1.5-4b --threads 2 --rounds 2

``--directory`` is a converted model; ``--shape`` makes one of random weights in int4, whose answers mean nothing and
whose times do. Cold and warm take turns within a round: the same prompt, a prefix and 16 tokens behind it, read whole,
put back from disk (in the system's page cache, and out of it), and put back from RAM. The logits must be equal in every
bit, else there is no result. Kept by model and threads in results/remember_cpu.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas
import torch

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.decoding.decode import Decoder
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.machine import facts
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.model.source import find_source
from lowvram_lab.prefixes.store import Remember, Remembered
from lowvram_lab.units import GiB
from tests.helpers.checkpoints import RandomCheckpoint

RESULTS = Path(__file__).parent / "results"
BEHIND = 16
"""Tokens of the question behind a prefix."""

QUESTIONS = (
    "Explain in a few sentences how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper and a storm.",
    "List the steps for planting a tree in a garden.",
)


def first_token(model, lengths: list[int], rounds: int) -> list[dict]:
    """Seconds from a prompt to its logits, cold and warm, by length of the prefix; medians."""
    decoder, rows = decoder_for(model, progress=False), []
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.lowvram.plan.spec.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        plan = model.lowvram.plan
        on_disk = Remembered(model, decoder.cache, folder=Path(folder))
        model.lowvram.plan = replace(
            plan, remember=None, remember_ram=plan.block_bytes * (max(lengths) // BLOCK_TOKENS)
        )
        in_ram = Remembered(model, decoder.cache)
        model.lowvram.plan = plan
        for length in lengths:
            ids = torch.randint(9, vocabulary, (length + BEHIND,), generator=generator).tolist()
            times = {name: [] for name in ("cold", "disk", "cold disk", "RAM")}
            for turn in range(rounds + 1):
                for name in times:
                    store = {"cold": None, "RAM": in_ram}.get(name, on_disk)
                    if name == "cold disk":
                        _drop_pages(on_disk)
                    seconds, logits = _read(decoder, ids, store)
                    if name == "cold":
                        exact = logits
                        on_disk.keep(decoder.cache, ids[:length], seconds)
                        in_ram.keep(decoder.cache, ids[:length], seconds)
                    elif not torch.equal(exact.view(torch.int16), logits.view(torch.int16)):
                        raise SystemExit(f"{name}: logits differ behind {length} tokens")
                    if turn:
                        times[name].append(seconds)
            found = {f"{name.replace(' ', '_')}_s": statistics.median(each) for name, each in times.items()}
            ratio = statistics.median(a / b for a, b in zip(times["cold"], times["disk"], strict=True))
            size = plan.block_bytes * (length // BLOCK_TOKENS)
            rows.append({"tokens": length, **found, "cold_over_warm": ratio, "bytes": size})
            print(rows[-1], flush=True)
    return rows


def _read(decoder: Decoder, ids: list[int], store: Remembered | None) -> tuple[float, torch.Tensor]:
    """Seconds to a prompt's logits, and these."""
    decoder.cache.keep(0)
    with decoder.model.lowvram.gpu.unmetered():
        began = time.perf_counter()
        held = store.restore(decoder.cache, ids) if store else 0
        logits = decoder.prefill(torch.tensor([ids[held:]]))
        return time.perf_counter() - began, logits.clone()


def _drop_pages(store: Remembered) -> None:
    """Lets the system forget what it holds of the files; they were written long enough ago to be on the disk."""
    for file in store.folder.path.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def break_even(rows: list[dict]) -> dict:
    """From how many tokens on putting back takes less than reading, by a line through each; and both rates."""
    tokens = torch.tensor([[row["tokens"], 1.0] for row in rows], dtype=torch.float64)
    lines = {}
    for name in ("cold", "disk"):
        seconds = torch.tensor([[row[f"{name}_s"]] for row in rows], dtype=torch.float64)
        lines[name] = torch.linalg.lstsq(tokens, seconds).solution.flatten().tolist()
    (cold, begin_cold), (warm, begin_warm) = lines["cold"], lines["disk"]
    crossing = max(0.0, (begin_warm - begin_cold) / (cold - warm))
    return {"tokens": crossing, "cold_tokens_per_s": 1 / cold, "warm_tokens_per_s": 1 / warm}


def answers(model, tokenizer, rounds: int) -> dict:
    """Tokens a second of a question asked the first time and again; the text must be the same."""
    with tempfile.TemporaryDirectory() as folder:
        ratios, kept = [], {"first": [], "again": []}
        for turn in range(rounds + 1):
            for question in QUESTIONS:
                wanted = Remember(disk="1GiB", folder=Path(folder, str(turn)))
                session = ChatSession(model, tokenizer, max_new_tokens=160, remember=wanted)
                session._live.begun()
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
        plan = replace(plan, threads=args.threads, kv_format=kv_format, remember=16 * GiB)
        model = load(plan, open_gpu(), checkpoint=weights)
        print(kv_format, flush=True)
        rows = first_token(model, args.lengths, args.rounds)
        found[kv_format] = {"first_token": rows, "break_even": break_even(rows)}
        print(found[kv_format]["break_even"], flush=True)
        if args.directory:
            found[kv_format]["answers"] = answers(model, source.tokenizer(), args.rounds)
            print(found[kv_format]["answers"], flush=True)
    for kv_format, each in found.items():
        print(kv_format)
        print(pandas.DataFrame(each["first_token"]).to_string(index=False, float_format="{:.4f}".format))
    kept = json.loads(args.output.read_text("utf-8")) if args.output.is_file() else {}
    kept[f"{spec.name if args.shape else args.directory.name}, {args.threads} threads"] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": facts(),
        **found,
    }
    args.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
