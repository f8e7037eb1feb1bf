"""A trace of CUDA's allocator, recorded and replayed through the simulator: every block and segment, step by step.

A trace is what ``torch.cuda.memory._snapshot()["device_traces"]`` holds after ``_record_memory_history()``: entries
with ``action``, ``addr``, ``size``, ``stream`` and ``pool_id``, in order. It does not say when the cache was emptied
from outside (only what that freed, which the allocator also does by itself when memory runs out): ``Recorder`` adds it.
"""

import bisect
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lowvram_lab.memory.allocator import CachingAllocator, OutOfCapacity
from lowvram_lab.memory.expandable import ExpandableAllocator
from lowvram_lab.units import MiB

EMPTIED = {"action": "empty_cache"}
TAKEN, GIVEN_BACK = ("segment_alloc", "segment_map"), ("segment_free", "segment_unmap")
NO_GRAPH = (0, 0)


class Event(NamedTuple):
    """Something the allocator did.

    Attributes:
        what: ``"segment"`` (memory taken from the card or given back), ``"block"`` (handed out), ``"refused"``.
        segment: Which, by order of creation.
        offset: Bytes from its start.
        size: Bytes; below 0 where they were given back. Of a block, as asked.
        reserved: Bytes held of the card's from here on.
    """

    what: str
    segment: int
    offset: int
    size: int
    reserved: int


@dataclass(frozen=True)
class TraceReplay:
    """A recorded trace beside its replay.

    Attributes:
        recorded: What the real allocator did.
        simulated: What the simulator did.
        allocated: Bytes in use at the end, in the simulator.
        peak_allocated: Most bytes in use.
        peak_reserved: Most bytes held of the card's.
    """

    recorded: list[Event]
    simulated: list[Event]
    allocated: int
    peak_allocated: int
    peak_reserved: int

    @property
    def difference(self) -> str:
        """Where the two part, or nothing."""
        for step, pair in enumerate(zip(self.recorded, self.simulated, strict=False)):
            if pair[0] != pair[1]:
                return f"step {step} of {len(self.recorded)}: recorded {pair[0]}, simulated {pair[1]}"
        if len(self.recorded) != len(self.simulated):
            return f"recorded {len(self.recorded)} steps, simulated {len(self.simulated)}"
        return ""

    def count(self, what: str) -> int:
        """How many recorded events are of a kind."""
        return sum(event.what == what for event in self.recorded)


class Recorder:
    """Records what PyTorch's allocator does inside its block.

    Attributes:
        trace: The entries, when the block has ended, with ``EMPTIED`` wherever ``torch.cuda.empty_cache`` was called,
            and ``"graph_gone"`` wherever the last CUDA graph of a pool was let go.
    """

    def __enter__(self):
        self._notes, self._empty, self._graph = [], torch._C._cuda_emptyCache, torch.cuda.CUDAGraph
        self._start, self._alive = self._steps(), Counter()
        torch._C._cuda_emptyCache = self._empty_noted
        torch.cuda.CUDAGraph = self._noted_graph()
        torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=10_000_000)
        return self

    def __exit__(self, *error):
        torch._C._cuda_emptyCache, torch.cuda.CUDAGraph = self._empty, self._graph
        found = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
        torch.cuda.memory._record_memory_history(enabled=None)
        self.trace, notes, steps = [], iter(self._notes), 0
        after, note = next(notes, (math.inf, None))
        for entry in [*found, {"action": "end"}]:
            while after <= steps and entry["action"] != "free_completed":
                self.trace.append(note)
                after, note = next(notes, (math.inf, None))
            steps += entry["action"] in ("alloc", "free_requested", "oom")
            self.trace.append(entry)
        self.trace.pop()

    def _note(self, entry):
        self._notes.append((self._steps() - self._start, entry))

    def _empty_noted(self):
        self._note(EMPTIED)
        self._empty()

    def _gone(self, pool: tuple[int, int]):
        self._alive[pool] -= 1
        if not self._alive[pool]:
            self._note({"action": "graph_gone", "pool_id": pool})

    def _noted_graph(self) -> type:
        recorder = self

        class Graph(self._graph):
            def capture_begin(self, pool=None, **options):
                pool = pool or torch.cuda.graph_pool_handle()
                self.of_pool = tuple(pool)
                recorder._alive[self.of_pool] += 1
                weakref.finalize(self, recorder._gone, self.of_pool)
                super().capture_begin(pool=pool, **options)

        return Graph

    @staticmethod
    def _steps() -> int:
        stats = torch.cuda.memory_stats_as_nested_dict()
        if not stats:
            return 0
        return stats["allocation"]["all"]["allocated"] + stats["allocation"]["all"]["freed"] + stats["num_ooms"]


def emptied_where_freed(trace: list[dict]) -> list[dict]:
    """A trace that was recorded without a limit: then only ``empty_cache`` gives segments back."""
    marked, before = [], None
    for entry in trace:
        if entry["action"] in GIVEN_BACK and before not in GIVEN_BACK:
            marked.append(EMPTIED)
        marked.append(entry)
        before = entry["action"]
    return marked


def replay_trace(trace: list[dict], capacity: int | None = None, card_bytes: int | None = None) -> TraceReplay:
    """Replays a trace.

    Args:
        trace: Entries; recorded from a state in which nothing was reserved.
        capacity: Of the recording's cap, or ``None`` where it had none.
        card_bytes: What the card had left, or ``None`` for more than enough.

    Returns:
        What was done, recorded beside simulated.
    """
    if any(entry["action"] == "segment_map" for entry in trace):
        allocator = _logging(ExpandableAllocator)(capacity, card_bytes or 1 << 60)
    else:
        addresses = [entry["addr"] for entry in trace if entry["action"] == "segment_alloc"]
        limits = [limit for limit in (capacity, card_bytes) if limit is not None]
        allocator = _logging(CachingAllocator)(min(limits, default=None), _numbered(addresses))
    pools, live = {(0, NO_GRAPH): allocator.pool}, {}
    for entry in trace:
        action, address, size = entry["action"], entry.get("addr"), entry.get("size", 0)
        if action in ("alloc", "oom"):
            key = entry.get("stream", 0), tuple(entry.get("pool_id", NO_GRAPH))
            if key not in pools:
                pools[key] = allocator.new_pool(kept=key[1] != NO_GRAPH)
            with allocator.inside(pools[key]):
                live[address] = allocator.asked(size)
        elif action == "free_completed":
            block = live.pop(address)
            if block is not None:
                allocator.free(block)
        elif action == "graph_gone":
            for (_, pool_id), pool in pools.items():
                pool.kept = pool.kept and pool_id != entry["pool_id"]
        elif action == "empty_cache":
            allocator.empty_cache()
    return TraceReplay(
        list(_recorded(trace)), allocator.log, allocator.allocated, allocator.peak_allocated, allocator.peak_reserved
    )


def _numbered(addresses: list[int]) -> Iterator[tuple[int, int]]:
    """The addresses, each a different key also where two segments had the same one after the other."""
    number = -1
    for number, address in enumerate(addresses):
        yield address, number
    while True:  # more than were recorded: wherever the two differ by then
        number += 1
        yield 1 << 64, number


def _logging(kind: type[CachingAllocator]) -> type:
    class Logging(kind):
        """An allocator that notes what it does."""

        def __init__(self, *options):
            self.log, self._ordinals, self._made = [], {}, 0
            super().__init__(*options)

        def _count(self, block, size):
            if size > 0 and not self.segments.get(block.segment):
                self._ordinals[block.segment] = self._made
                self._made += 1
            super()._count(block, size)
            self.log.append(Event("segment", self._ordinals[block.segment], block.offset, size, self.reserved))

        def asked(self, size):
            """A block, or ``None`` where it was refused."""
            try:
                block = self.allocate(size)
            except OutOfCapacity:
                self.log.append(Event("refused", 0, 0, 0, self.reserved))
                return None
            self.log.append(Event("block", self._ordinals[block.segment], block.offset, size, self.reserved))
            return block

    return Logging


class _Segments:
    """Where the recorded segments lie."""

    def __init__(self):
        self.bases, self.ordinals, self.held, self.made, self.growing = [], {}, {}, 0, {}

    def base_of(self, address: int) -> int:
        """The start of the segment that an address is in."""
        return self.bases[bisect.bisect_right(self.bases, address) - 1]

    def taken(self, entry: dict) -> int:
        """Notes memory taken; the start of its segment, which may be new."""
        if entry["action"] == "segment_map":
            pool = entry["stream"], tuple(entry.get("pool_id", NO_GRAPH)), entry["size"] == 2 * MiB
            base = self.growing.setdefault(pool, entry["addr"])
            if base in self.held:
                self.held[base] += entry["size"]
                return base
        base = entry["addr"]
        bisect.insort(self.bases, base)
        self.ordinals[base], self.held[base] = self.made, entry["size"]
        self.made += 1
        return base

    def given_back(self, entry: dict) -> int:
        """Notes memory given back; the start of its segment, which ends with the last of it."""
        base = self.base_of(entry["addr"])
        self.held[base] -= entry["size"]
        if not self.held[base]:
            self.bases.remove(base)
            del self.held[base]
            self.growing = {pool: start for pool, start in self.growing.items() if start != base}
        return base


def _recorded(trace: list[dict]) -> Iterator[Event]:
    segments, reserved = _Segments(), 0
    for entry in trace:
        action, size = entry["action"], entry.get("size", 0)
        if action in TAKEN or action in GIVEN_BACK:
            change = size if action in TAKEN else -size
            base = segments.taken(entry) if action in TAKEN else segments.given_back(entry)
            reserved += change
            yield Event("segment", segments.ordinals[base], entry["addr"] - base, change, reserved)
        elif action == "alloc":
            base = segments.base_of(entry["addr"])
            yield Event("block", segments.ordinals[base], entry["addr"] - base, size, reserved)
        elif action == "oom":
            yield Event("refused", 0, 0, 0, reserved)
