"""What one token asks of a CUDA card: kernels, graphs, copies, allocations, synchronisations, counted and not timed.

    FAKE_CUDA_ARITHMETIC=1 tests/fakecuda/fakecuda PYTHON benchmarks/counts_cuda.py [--model smollm2-135m] [--tokens 8]
    … counts_cuda.py --model qwen1.5-4b --recipes int4 --gpu-layers 30 --output results/counts_fake_cuda_4b.json

Plans that lie whole on the card, that are split, and whose weights travel for long prompts; a token of a greedy answer,
a token of a sampled one (as a chat streams it) and a prompt. The counters are those of the fake CUDA runtime
(tests/fakecuda): a real card has none, so there nothing is run. Random weights.
Written to results/counts_fake_cuda.json.
"""

import argparse
import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas
import torch

from lowvram_lab.chat.live import LiveDecoder
from lowvram_lab.engine.load import load
from lowvram_lab.engine.random_weights import RandomWeights
from lowvram_lab.machine import facts
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.sampling import Sampling

RESULTS = Path(__file__).parent / "results"
SAMPLED = Sampling(temperature=0.7, top_k=40, top_p=0.9)
PROMPT = 64
COPIES = ("h2d", "d2h", "d2d")
COUNTERS = ("launches", "library_calls", "graph_launches", "graph_kernels", "memsets", "syncs", "mallocs")


def has_counters() -> bool:
    """Whether this process runs on the fake CUDA runtime."""
    return hasattr(ctypes.CDLL(None), "fakecuda_get") and torch.cuda.is_available()


def _state() -> dict[str, int]:
    get = ctypes.CDLL(None).fakecuda_get
    get.restype = ctypes.c_longlong
    names = [*COUNTERS, *COPIES, *(f"{copy}_bytes" for copy in COPIES), "h2d_pinned_bytes"]
    found = {name: get(name.encode()) for name in names}
    # by all pools, those of graphs too
    return {**found, "allocations": torch.cuda.memory_stats()["allocation.all.allocated"]}


def counted(run: Callable[[], object], steps: int = 1) -> dict[str, float]:
    """What a call asks of the card, divided by how many steps it makes.

    Returns:
        ``kernels`` launched one by one, ``graph_launches``, ``graph_kernels`` that these launch, copies and their bytes
        by direction, ``memsets``, ``allocations`` of PyTorch's allocator, ``mallocs`` of CUDA's, ``syncs``.
    """
    before = _state()
    run()
    after = _state()
    found = {name: (after[name] - before[name]) / steps for name in after}
    found["kernels"] = found.pop("launches") + found.pop("library_calls") - found["graph_kernels"]
    return found


def plans(plan: Plan, gpu_layers: int | None = None) -> dict[str, Plan]:
    """The same formats whole, split (half of the layers on the card), with weights that travel for a long prompt."""
    off_card = plan if plan.spec.tied else plan.with_modules(plan.spec.embedding, device="cpu")
    split = off_card.with_gpu_layers(plan.spec.num_hidden_layers // 2 if gpu_layers is None else gpu_layers)
    return {"whole": plan, "split": split, "travelling": replace(split, stream_from=PROMPT)}


def answering(live: LiveDecoder, sampling: Sampling, tokens: int) -> Iterator[int]:
    """An answer to a prompt that the cache does not hold, as a chat streams it."""
    live.forget()
    live.begun()
    return live.stream([5] * PROMPT, tokens, frozenset(), sampling)


def counts(model: torch.nn.Module, tokens: int) -> dict[str, dict[str, float]]:
    """Counts of a prompt with its first token, and of a later token, greedy and sampled.

    Args:
        model: From ``load``.
        tokens: How many are counted; the first ones are not, as they capture graphs.
    """
    live, found = LiveDecoder(model, progress=False), {}
    for name, sampling in (("greedy token", Sampling()), ("sampled token", SAMPLED)):
        answer = answering(live, sampling, tokens + 4)
        prompt = counted(lambda answer=answer: next(answer))
        for _ in range(3):
            next(answer)
        found[name] = counted(lambda answer=answer: [next(answer) for _ in range(tokens)], tokens)
        found.setdefault(f"prompt of {PROMPT}", prompt)
        answer.close()
    return found


def rows_of(name: str, recipe: str, tokens: int, gpu_layers: int | None) -> Iterator[dict]:
    """A row for each plan and each thing that is counted; of a number of layers on the card only the split."""
    spec = find_source(name).spec()
    placings = plans(Plan.uniform(spec, recipe, context=256), gpu_layers)
    for placed, plan in placings.items() if gpu_layers is None else [("split", placings["split"])]:
        model = load(plan, open_gpu(), checkpoint=RandomWeights(spec), progress=False)
        for step, found in counts(model, tokens).items():
            yield {"plan": placed, "weights": recipe, "step": step, **found}
        del model


def main() -> int:
    """Counts, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipes", nargs="+", default=["bf16", "int4"])
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--gpu-layers", type=int, help="layers on the card of the one plan to count, a split")
    parser.add_argument("--output", type=Path, default=RESULTS / "counts_fake_cuda.json")
    options = parser.parse_args()
    if not has_counters():
        print("counts_cuda.py: the counters are those of the fake CUDA runtime, see tests/fakecuda/README.md")
        return 0
    rows = []
    for recipe in options.recipes:
        for row in rows_of(options.model, recipe, options.tokens, options.gpu_layers):
            rows.append(row)
            print({key: value for key, value in row.items() if value}, flush=True)
    print(pandas.DataFrame(rows).to_string(index=False))
    made = {"mode": torch.cuda.get_device_name(), "date": datetime.now(UTC).date().isoformat(), "machine": facts()}
    versions = {"torch": torch.__version__, "capability": torch.cuda.get_device_capability()}
    results = {"benchmark": "counts_cuda", "model": options.model, **made, **versions, "rows": rows}
    options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
