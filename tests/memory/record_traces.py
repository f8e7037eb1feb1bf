"""Makes traces of PyTorch's own allocator and replays each: ``python -m tests.memory.record_traces random 0 100``.

A process of its own, because a trace has to begin with nothing reserved. ``PYTORCH_CUDA_ALLOC_CONF`` chooses the kind
of segments. Prints one line of JSON; the first trace that differs ends it with exit status 1.
"""

import ctypes
import gc
import json
import random
import sys
import warnings
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch

from lowvram_lab.engine.load import load
from lowvram_lab.memory.allocator import MIN_LARGE, SMALL_SIZE
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.torch_release import torch_release
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from lowvram_lab.units import MiB
from tests.helpers.card import clean
from tests.helpers.checkpoints import RandomCheckpoint
from tests.helpers.tiny import TINY, tiny_config
from tests.memory.trace_replay import Recorder, TraceReplay, replay_trace


@dataclass
class Limits:
    """What a trace was recorded under, in bytes: the process's cap, and what the card had left."""

    cap: int | None = None
    card: int | None = None


def start_afresh() -> None:
    """Nothing reserved, and no cap."""
    clean()
    if torch.cuda.memory_reserved():
        raise SystemExit(f"expected nothing reserved, found {torch.cuda.memory_reserved()} bytes of an earlier trace")


def set_cap(size: int) -> int:
    """Caps this process at so many bytes, give or take the rounding of a fraction; the cap in whole bytes."""
    total = torch.cuda.mem_get_info()[1]
    fraction = (size + 0.5) / total
    torch.cuda.set_per_process_memory_fraction(fraction)
    return int(fraction * total)


class Ballast:
    """Takes the card's memory but for some bytes, beside PyTorch."""

    def __init__(self, leaves: int):
        self._library, self._at = ctypes.CDLL("libcudart.so.13"), ctypes.c_void_p()
        size = torch.cuda.mem_get_info()[0] - leaves
        if self._library.cudaMalloc(ctypes.byref(self._at), ctypes.c_size_t(size)):
            raise SystemExit(f"expected {size} bytes of the card to be free")

    def drop(self) -> None:
        """Gives it back."""
        self._library.cudaFree(self._at)


def random_size(source: random.Random, repeated: list[int]) -> int:
    """Of all classes; half of them one of a few that come again, as a model's do, so that free blocks are equal."""
    if source.random() < 0.5:
        return source.choice(repeated)
    classes = [(1, SMALL_SIZE), (SMALL_SIZE + 1, MIN_LARGE), (MIN_LARGE, 40 * MiB), (40 * MiB, 300 * MiB)]
    least, most = source.choices(classes, [10, 6, 3, 0.3])[0]
    return int(least * (most / least) ** source.random())


def random_run(source: random.Random) -> tuple[list[int], list[torch.cuda.CUDAGraph]]:
    """Allocates and frees, with the cache emptied now and then, on a second stream and in a graph's capture too.

    Returns:
        What is still held: addresses of blocks, and graphs.
    """
    repeated = [int(2 ** source.uniform(6, 24.5)) for _ in range(source.randrange(2, 12))]
    repeated += [size + source.randrange(1, 512) for size in repeated[:3]]
    held, graphs, most = [], [], source.choice([10, 40, 120])
    side = torch.cuda.Stream() if source.random() < 0.2 else None
    told_apart = torch_release() >= (2, 12)  # in a trace a graph's pool is
    for _ in range(source.randrange(60, 400)):
        draw = source.random()
        if draw < 0.006:
            torch.cuda.empty_cache()
        elif draw < 0.009 and told_apart and len(graphs) < 2:
            graphs.append(random_capture(source, repeated, held))
        elif held and draw < 0.35 + 0.5 * len(held) / most:
            torch.cuda.caching_allocator_delete(held.pop(source.randrange(len(held))))
        else:
            with torch.cuda.stream(side) if side and source.random() < 0.3 else nullcontext():
                ask(random_size(source, repeated), held)
    return held, graphs


def random_capture(source: random.Random, repeated: list[int], held: list[int]) -> torch.cuda.CUDAGraph:
    """A graph whose capture allocates and frees in its own pool; what is left goes back at any time of the trace."""
    graph, inside = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(source.randrange(1, 30)):
            if inside and source.random() < 0.4:
                torch.cuda.caching_allocator_delete(inside.pop(source.randrange(len(inside))))
            else:
                ask(random_size(source, repeated), inside)
    held += inside
    return graph


def ask(size: int, held: list[int]) -> None:
    """Takes a block, if there is one."""
    with suppress(torch.OutOfMemoryError):
        held.append(torch.cuda.caching_allocator_alloc(size))


def record_random(seed: int) -> tuple[list[dict], Limits, int, int]:
    """One random trace: with a cap, with little left of the card, or with neither."""
    source, limits, ballast = random.Random(seed), Limits(), None
    kind = source.choice(["cap", "cap", "card", "none"])
    room = source.randrange(30, 600) * MiB
    if kind == "cap":
        limits.cap = set_cap(room + source.randrange(MiB))
    elif kind == "card":
        room -= room % (2 * MiB)
        ballast, limits.card = Ballast(room), room
    with Recorder() as recorder:
        held, graphs = random_run(source)
    reserved = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    for address in held:
        torch.cuda.caching_allocator_delete(address)
    for graph in graphs:
        graph.reset()
    if ballast:
        ballast.drop()
    return recorder.trace, limits, *reserved


def random_model(source: random.Random) -> tuple[Plan, Workload, ModelSpec]:
    """A small model and a way to run it."""
    kind, heads = source.choice(list(TINY)), source.choice([4, 8])
    size = {"hidden_size": 64 * heads, "intermediate_size": 64 * source.randrange(4, 30)}
    size |= {"num_hidden_layers": source.randrange(2, 5), "vocab_size": 1000 * source.randrange(1, 30)}
    size |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "max_position_embeddings": 4096}
    spec = ModelSpec.from_config(tiny_config(kind, **size), f"random-{kind}")
    plan = Plan.uniform(spec, source.choice(["fp16", "bf16", "int8", "int4", "nf4"]), context=2048)
    if source.random() < 0.3:
        plan = plan.with_gpu_layers(source.randrange(spec.num_hidden_layers + 1))
    prompt, follow_up = source.randrange(5, 1500), source.choice([0, 50])
    return plan, Workload(prompt, source.randrange(1, 40), follow_up_tokens=follow_up), spec


def record_model(seed: int) -> tuple[list[dict], Limits, int, int]:
    """A model loaded and run, some under a cap that it does not fit."""
    source, limits = random.Random(seed), Limits()
    plan, workload, spec = random_model(source)
    budget = None
    if source.random() < 0.4:
        budget = GpuBudget(int(plan.weight_bytes("gpu") * source.uniform(0.5, 1.1)) + source.randrange(6, 40) * MiB)
        limits.cap = budget.usable_bytes
    with Recorder() as recorder:
        model = None
        try:
            model = load(plan, open_gpu(budget), checkpoint=RandomCheckpoint(spec), progress=False)
            run_workload(model, workload)
        except torch.OutOfMemoryError as error:
            error.__traceback__ = None
        reserved = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    return recorder.trace, limits, *reserved


def replayed(record, seed: int) -> TraceReplay:
    """A trace recorded and replayed; ends the process where they differ."""
    start_afresh()
    trace, limits, reserved, allocated = record(seed)
    found = replay_trace(trace, limits.cap, limits.card)
    difference = found.difference
    if not difference and (found.recorded[-1].reserved, found.allocated) != (reserved, allocated):
        difference = f"counters say {reserved} reserved, {allocated} allocated; simulated {found.allocated} allocated"
    if difference:
        raise SystemExit(f"{record.__name__} {seed} {limits}: {difference}")
    return found


def main() -> None:
    """Records and replays the traces of the seeds from one number to another, and says what they held."""
    what, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    warnings.filterwarnings("ignore", "The CUDA Graph is empty")
    torch.cuda.init()
    gc.freeze()  # what the imports brought is looked through once, not for every trace
    counts = Counter()
    for seed in range(first, last):
        found = replayed({"random": record_random, "models": record_model}[what], seed)
        counts["traces"] += 1
        counts["blocks"] += found.count("block")
        counts["refused"] += found.count("refused")
        counts["taken"] += sum(event.what == "segment" and event.size > 0 for event in found.recorded)
        counts["given back"] += sum(event.what == "segment" and event.size < 0 for event in found.recorded)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
