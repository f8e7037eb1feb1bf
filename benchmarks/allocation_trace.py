"""Records what PyTorch's allocator did on a CUDA card, allocation by allocation, for a small model in four formats.

    python benchmarks/allocation_trace.py [--output FILE] [--against FILE]

Four layers in Qwen1.5-0.5B's widths, random weights; loading, a prompt of 1500 tokens, decoded tokens by graphs, a
second turn. ``--against`` a trace recorded elsewhere (the fake CUDA runtime beside a card of the same capability, with
the same torch) prints the first difference.
"""

import argparse
import itertools
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from forecast_accuracy import RandomCheckpoint, clean, machine, phase_bytes, runtime, small_spec

from lowvram_lab.engine.load import load
from lowvram_lab.memory.card import this_card
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload

MODEL, CONTEXT = "qwen1.5-0.5b", 2048
FORMATS = ("fp16", "int8", "int4", "nf4")
WORKLOAD = Workload(1500, 3, follow_up_tokens=100)
ACTIONS = {"alloc": "+", "free_completed": "-", "segment_alloc": "S", "segment_free": "F"}
MOST_EVENTS = 1_000_000


def record(recipe: str) -> dict:
    """A run from its first allocation on: ``events`` are (action, address above the lowest, bytes, stream)."""
    spec = small_spec(find_source(MODEL).spec())
    plan = Plan.uniform(spec, recipe, context=CONTEXT)
    clean()
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=MOST_EVENTS)
    gpu = open_gpu(None)
    run = run_workload(load(plan, gpu, checkpoint=RandomCheckpoint(spec), progress=False), WORKLOAD)
    entries = torch.cuda.memory._snapshot()["device_traces"][gpu.device.index]
    torch.cuda.memory._record_memory_history(enabled=None)
    kept = [entry for entry in entries if entry["action"] in ACTIONS]
    lowest = min(entry["addr"] for entry in kept)
    streams = {stream: number for number, stream in enumerate(dict.fromkeys(entry["stream"] for entry in kept))}
    events = [(ACTIONS[e["action"]], e["addr"] - lowest, e["size"], streams[e["stream"]]) for e in kept]
    return {"format": recipe, "phases": {phase.name: phase_bytes(phase) for phase in run.phases}, "events": events}


def first_difference(mine: dict, theirs: dict) -> str | None:
    """Where two runs part, in words; addresses are a matter of the machine."""
    ours, others = ([(event[0], event[2]) for event in run["events"]] for run in (mine, theirs))
    for number, (one, other) in enumerate(itertools.zip_longest(ours, others)):
        if one != other:
            return f"event {number} of {len(ours)} and {len(others)}: {one} here, {other} there"
    return None


def main() -> int:
    """Records, writes the JSON, compares; exit status 1 where the two differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("allocation_trace.json"))
    parser.add_argument("--against", type=Path, help="a trace recorded elsewhere")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("allocation_trace.py: expected a CUDA card, found none", file=sys.stderr)
        return 2
    runs = [record(recipe) for recipe in FORMATS]
    card = this_card()
    result = {
        "benchmark": "allocation_trace",
        "mode": runtime(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "card": {"capability": card.capability, "multiprocessors": card.multiprocessors},
        "model": MODEL,
        "context": CONTEXT,
        "runs": runs,
    }
    options.output.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    print(", ".join(f"{run['format']} {len(run['events'])} events" for run in runs), f"written to {options.output}")
    if options.against is None:
        return 0
    theirs = json.loads(options.against.read_text(encoding="utf-8"))
    found = {one["format"]: first_difference(one, other) for one, other in zip(runs, theirs["runs"], strict=True)}
    for name, difference in found.items():
        print(f"{name}: {difference or 'equal'}")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
