"""Replay a recorded trace of CUDA's allocator through the simulator, and compare segments.

The trace is that of ``torch.cuda.memory._snapshot()`` after ``_record_memory_history()``, as plain data (JSON; a
pickled snapshot is refused like any pickle): ``device_traces`` holds, in order, entries with ``action``, ``addr`` and
``size``.
"""

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lowvram_lab.errors import CheckpointError
from lowvram_lab.memory.allocator import CachingAllocator, OutOfCapacity
from lowvram_lab.memory.expandable import ExpandableAllocator


@dataclass(frozen=True)
class TraceReplay:
    """A recorded trace beside its replay.

    Attributes:
        recorded_segments: Segments the recording allocated, by size in bytes.
        simulated_segments: Segments the simulator allocated, by size in bytes.
        recorded_reserved_bytes: Segments allocated minus segments freed, at the end of the recording.
        simulated_reserved_bytes: The same of the simulator.
        peak_allocated_bytes: Most bytes in blocks in use, in the simulator.
        peak_reserved_bytes: Most bytes in segments, in the simulator.
        out_of_memory: How often the simulator, given a capacity, could not serve a request.
    """

    recorded_segments: Counter
    simulated_segments: Counter
    recorded_reserved_bytes: int
    simulated_reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    out_of_memory: int

    @property
    def agrees(self) -> bool:
        """Whether number and size of all segments are equal (of mapped bytes, where segments are expandable)."""
        return (
            self.recorded_segments == self.simulated_segments
            and self.recorded_reserved_bytes == self.simulated_reserved_bytes
        )


class _Counting(CachingAllocator):
    """A caching allocator that remembers every segment it ever made.

    Its segments lie where the recorded ones do: of free blocks equal in size CUDA takes the one at the lowest address.
    """

    def __init__(self, capacity, addresses):
        super().__init__(capacity)
        self.made: Counter = Counter()
        self._numbers = zip(itertools.chain(addresses, itertools.repeat(1 << 64)), itertools.count(), strict=False)

    def _new_segment(self, size, small):
        block = super()._new_segment(size, small)
        self.made[block.size] += 1
        return block


def read_snapshot(path: str | Path) -> dict:
    """Reads a snapshot saved as JSON.

    Raises:
        CheckpointError: Not JSON (a pickle, say), or without ``device_traces``.
    """
    try:
        snapshot = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a memory snapshot saved as JSON; pickles are not opened. "
            "Save one with json.dump(torch.cuda.memory._snapshot(), file)"
        ) from error
    if not isinstance(snapshot, dict) or not isinstance(snapshot.get("device_traces"), list):
        raise CheckpointError(f"{path}: expected a memory snapshot with device_traces, found other JSON")
    for trace in snapshot["device_traces"]:
        if not isinstance(trace, list) or not all(map(_is_entry, trace)):
            raise CheckpointError(
                f"{path}: expected a memory snapshot whose traces hold action, addr and size, found another shape"
            )
    return snapshot


def _is_entry(entry) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("action"), str):
        return False
    return all(isinstance(entry.get(key, 0), int) for key in ("addr", "size"))


def replay_trace(snapshot: dict, device: int = 0, capacity: int | None = None) -> TraceReplay:
    """Replays one device's trace.

    Args:
        snapshot: As ``torch.cuda.memory._snapshot()`` returns it; recorded from the process's first allocation on.
        device: Index of the CUDA device.
        capacity: Bytes the simulator may reserve, or ``None`` for no limit.

    Returns:
        Segments and bytes, recorded beside simulated.

    Raises:
        CheckpointError: No such device, or a free of an address that was never allocated: the recording began too late.
    """
    traces = snapshot["device_traces"]
    if not 0 <= device < len(traces):
        raise CheckpointError(f"expected a trace of device {device}, found {len(traces)} traces in the snapshot")
    trace = traces[device]
    expandable = any(entry["action"] in ("segment_map", "segment_unmap") for entry in trace)
    addresses = [entry["addr"] for entry in trace if entry["action"] == "segment_alloc"]
    allocator = ExpandableAllocator(capacity) if expandable else _Counting(capacity, addresses)
    recorded, recorded_reserved, live, refused, missed = Counter(), 0, {}, set(), 0
    for entry in trace:
        action, address, size = entry["action"], entry.get("addr"), entry.get("size", 0)
        if action == "alloc":
            try:
                live[address] = allocator.allocate(size)
            except OutOfCapacity:
                missed += 1
                refused.add(address)
        elif action == "free_completed":
            if address in refused:
                refused.discard(address)
            elif address in live:
                allocator.free(live.pop(address))
            else:
                raise CheckpointError(
                    f"the trace frees address {address:#x}, which it never allocated: "
                    "record from the start of the process"
                )
        elif action in ("segment_alloc", "segment_map"):
            recorded[size] += 1
            recorded_reserved += size
        elif action in ("segment_free", "segment_unmap"):
            recorded_reserved -= size
            if capacity is None:  # without a limit of its own the simulator gives back when the recording did
                allocator.empty_cache()
    if expandable:  # pages are mapped in runs of any length: only their sum can be compared
        recorded = simulated = Counter()
    else:
        simulated = allocator.made
    return TraceReplay(
        recorded,
        simulated,
        recorded_reserved,
        allocator.reserved,
        allocator.peak_allocated,
        allocator.peak_reserved,
        missed,
    )
