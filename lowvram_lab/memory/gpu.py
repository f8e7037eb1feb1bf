"""The GPU with a byte budget, one interface for CUDA (``cuda.py``), a dry run (``dry_run.py``) and the stand-in in RAM.

Everything above says ``gpu`` or ``cpu`` and moves tensors with ``Gpu.move``; only these files know what they mean here.
Out of memory is said in words: who asked for how much, what was free, and who held the rest.
"""

import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lowvram_lab.memory.allocator import CachingAllocator
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.card import Card, this_card
from lowvram_lab.memory.meter import Meter, OutOfMemory
from lowvram_lab.memory.recording import OomEvent, Recording
from lowvram_lab.units import format_bytes


class StandInOutOfMemoryError(torch.OutOfMemoryError):
    """Out of memory on the simulated GPU. Caught by ``except torch.OutOfMemoryError``, like CUDA's own.

    Attributes:
        lowvram: What was asked, by which module, in which phase, and who held the memory.
    """

    def __init__(self, message: str, found: OutOfMemory):
        super().__init__(message)
        self.lowvram = found


class Gpu:
    """A GPU with a budget. Use ``open_gpu``.

    Attributes:
        budget: Total and context bytes, and these kernels; or ``None`` for no limit.
        kernels: Whose kernels GPU modules run: ``"cuda"``, or ``"cpu"`` on the stand-in.
        card_bytes: Memory of the card that the budget is a cap on; ``None`` where there is none.
        simulated: Whether figures come from a stand-in or a dry run.
        meter: Counts what is live.
        recording: What was measured since the latest model was loaded.
    """

    name = "gpu"
    kernels = "cpu"
    simulated = True
    meta = False
    goes_on = False
    card_bytes: int | None = None
    _tensor_device: str | torch.device = "cpu"

    def __init__(self, budget: GpuBudget | None):
        self.budget = replace(budget, kernels=self.kernels) if budget else None
        self.recording = Recording()
        self.lock = threading.RLock()
        self._local = threading.local()
        self._paused = False
        capacity = budget.usable_bytes if budget else None
        self.meter = Meter(allocator=CachingAllocator(capacity), on_oom=self._out_of_memory)

    @property
    def card(self) -> Card:
        """What decides which of CUDA's kernels run: this machine's card."""
        return this_card()

    def kernels_of(self, place: str) -> str:
        """Whose kernels run modules at a place: ``"cuda"`` or ``"cpu"``."""
        return self.kernels if place == "gpu" else "cpu"

    @contextmanager
    def active(self):
        """Meters everything inside. May be nested; each thread enters for itself."""
        depth = getattr(self._local, "depth", 0)
        self._local.depth = depth + 1
        try:
            with nullcontext() if depth or self._paused else self.meter:
                yield self
        finally:
            self._local.depth = depth

    @contextmanager
    def unmetered(self):
        """Lets a timing run without the meter, which slows small models down. Tensors made inside are not counted."""
        earlier, self._paused = self._paused, True
        try:
            with _disable_current_modes() if getattr(self._local, "depth", 0) else nullcontext():
                yield self
        finally:
            self._paused = earlier

    def unwatched(self):
        """A context for decoding, also inside of a measured phase: no dispatch mode looks on.

        So torch allocates as in a chat: some operators write over their argument only there. A dry run counts on.
        """
        return self.unmetered()

    def watching(self):
        """A context in which the meter sees everything, also where it is not needed to count (CUDA)."""
        return self.active()

    @contextmanager
    def phase(self, name: str):
        """Measures a named phase on the GPU; yields its ``PhaseMemory``, complete when the block ends."""
        with self.active(), self.meter.phase(name) as record:
            self.recording.phases.append(record)
            yield record

    def check_room(self, size_bytes: int) -> None:
        """Refuses what no longer fits beside other processes (``BudgetError``); a stand-in shares with none."""

    @property
    def free_bytes(self) -> int | None:
        """What may still be allocated, as far as that is known; ``None`` without a limit."""
        return None if self.budget is None else self.budget.usable_bytes - self.meter.allocated["gpu"]

    def reset_peak(self) -> None:
        """Lets ``peak_allocated_bytes`` start again from what is live now."""
        self.meter.peak_allocated = self.meter.allocated["gpu"]

    @property
    def peak_reserved_bytes(self) -> int:
        """Most bytes the caching allocator ever held, without the CUDA context."""
        return self.meter.allocator.peak_reserved

    @property
    def peak_allocated_bytes(self) -> int:
        """Most GPU bytes live at once since ``reset_peak``, without the CUDA context."""
        return self.meter.peak_allocated

    @property
    def moves(self) -> bool:
        """Whether moving a tensor does anything now: a stand-in that is not metered has no places."""
        return not (self._paused and self.simulated)

    def move(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        """The tensor at ``place``: itself if it is there, else a counted copy."""
        source = self.meter.place_of(tensor)
        if source == place or not self.moves:
            return tensor
        self.recording.transfers[source, place] += tensor.nbytes
        with self.active(), self.meter.scope(place=place, force=True):
            return self._copy(tensor, place)

    def _copy(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        return tensor.clone()

    def buffer(self, size_bytes: int) -> torch.Tensor:
        """Bytes on the GPU, uninitialised."""
        with self.meter.scope(place="gpu"):
            return torch.empty(size_bytes, dtype=torch.uint8, device=self._tensor_device)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, place: str) -> torch.Tensor:
        """A tensor of zeros at a place."""
        with self.meter.scope(place=place):
            device = self._tensor_device if place == "gpu" or self.meta else "cpu"
            return torch.zeros(shape, dtype=dtype, device=device)

    def copy_ahead(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], after: object = None) -> object:
        """Copies CPU tensors into GPU ones beside the computation, where the GPU can do both at once.

        Args:
            pairs: GPU tensors, and the CPU tensors of the same shape and dtype that are to be in them.
            after: From ``mark``: not before what it marks has ended.

        Returns:
            What ``wait_for`` wants.
        """
        for target, source in pairs:
            self.recording.transfers["cpu", "gpu"] += source.nbytes
            target.copy_(source)

    def graphs(self) -> object | None:
        """What a decoder's CUDA graphs are captured with (``CudaGraphs``), where there are any."""

    def mark(self) -> object:
        """A mark behind all work given to the GPU so far."""

    def wait_for(self, mark: object) -> None:
        """Lets what is computed from here on wait for a mark."""

    def settle(self, wait: bool = False) -> None:
        """Lets what follows come after every copy begun; with ``wait``, this very thread."""

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as this GPU's kind of memory holds it; the dry run turns real tensors into meta ones."""
        return tensor

    @contextmanager
    def noting_oom(self, loaded: object = None, block: str = "") -> Iterator[None]:
        """Puts on an out-of-memory error that passes what ``explain_oom`` needs: the state of the model that runs.

        It keeps what is said of it first, nearest to where it happened. Of a ``block`` that runs inside, the very
        module is named, which on CUDA nobody counts.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            if not hasattr(error, "lowvram"):
                error.lowvram = OutOfMemory(self.meter.oom_event())
            if error.lowvram.event.module == block:
                error.lowvram.event.module = ".".join(filter(None, (block, _module_in(error))))
            error.lowvram.gpu = self
            error.lowvram.loaded = error.lowvram.loaded or loaded
            raise

    def _out_of_memory(self, event: OomEvent) -> None:
        self.recording.first_oom = self.recording.first_oom or event
        if self.goes_on:  # a forecast wants the whole peak
            return
        raise StandInOutOfMemoryError(oom_message(event, self.budget), OutOfMemory(event, self))


class StandInGpu(Gpu):
    """RAM that counts as a GPU: metered, and out of memory where CUDA's allocator would be. Always *simulated*."""

    name = "stand-in GPU (simulated)"


def _module_in(error: BaseException) -> str:
    """Path of the module whose forward raised, from the first whose forward is in the traceback; or nothing."""
    frames = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    modules = [module for module in frames if isinstance(module, torch.nn.Module)]
    first, last = (modules[0], modules[-1]) if modules else (torch.nn.Module(), None)
    return next((path for path, module in first.named_modules() if module is last), "")


def oom_message(event: OomEvent, budget: GpuBudget) -> str:
    """An out-of-memory message in CUDA's order of facts, plus what CUDA leaves out: who asked, who held.

    Args:
        event: The allocation that did not fit.
        budget: The card's.
    """
    free = max(0, budget.usable_bytes - event.reserved_bytes)
    context = f", {format_bytes(budget.context_bytes)} of it the CUDA context" if budget.context_bytes else ""
    return (
        f"simulated GPU out of memory. Tried to allocate {format_bytes(event.requested_bytes)} for "
        f"{event.module or 'the model'} during {event.phase}. The GPU has a total capacity of "
        f"{format_bytes(budget.total_bytes)}{context}, of which {format_bytes(free)} is free. "
        f"{format_bytes(event.allocated_bytes)} is allocated by tensors and "
        f"{format_bytes(event.reserved_bytes - event.allocated_bytes)} is reserved but unallocated. "
        f"Held by: {describe_holders(event.holders)}."
    )


def describe_holders(holders: list[tuple[str, int]], top: int = 4) -> str:
    """Holders in one line, decoder layers joined: ``model.layers.0-21 (137.0 MiB), model.embed_tokens (54.0 MiB)``."""
    totals, layers = Counter(), {}
    for owner, size in holders:
        parts = owner.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = ".".join(parts[:index]) if index is not None else owner or "other"
        totals[key] += size
        if index is not None:
            layers.setdefault(key, set()).add(int(parts[index]))
    named = []
    for key, size in totals.most_common(top):
        span = layers.get(key)
        label = f"{key}.{min(span)}-{max(span)}" if span and len(span) > 1 else key + (f".{min(span)}" if span else "")
        named.append(f"{label} ({format_bytes(size)})")
    return ", ".join(named) or "nothing"
