"""The GPU with a byte budget: CUDA with a real cap, a metered stand-in in RAM, or a dry run on meta. One interface.

Everything above says ``gpu`` or ``cpu`` and moves tensors with ``Gpu.move``; only this file knows what they mean here.
"""

import os
import re
import threading
from collections import Counter
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lowvram_lab.errors import BudgetError
from lowvram_lab.memory.allocator import CachingAllocator
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.expandable import ExpandableAllocator
from lowvram_lab.memory.meter import Meter, OomEvent, PhaseMemory
from lowvram_lab.memory.nvml import process_bytes
from lowvram_lab.memory.oom import oom_message
from lowvram_lab.memory.replay import MetaResults
from lowvram_lab.units import KiB, MiB, format_bytes

_MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def cublas_workspace_bytes() -> int:
    """What the first matrix product on CUDA allocates for good (``parseChosenWorkspaceSize`` in ATen's CUDABlas.cpp).

    32 MiB on Hopper and Blackwell, 2 x 4096 + 8 x 16 KiB on other cards, which is assumed where there is none; what
    ``CUBLAS_WORKSPACE_CONFIG`` says comes first.
    """
    stated = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if stated:
        return sum(int(size) * int(count) for size, count in stated) * KiB
    large = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
    return 32 * MiB if large else (2 * 4096 + 8 * 16) * KiB


class StandInOutOfMemoryError(torch.OutOfMemoryError):
    """Out of memory on the simulated GPU. Caught by ``except torch.OutOfMemoryError``, like CUDA's own.

    Attributes:
        event: What was asked, by which module, in which phase, and who held the memory.
    """

    def __init__(self, message: str, event: OomEvent):
        super().__init__(message)
        self.event = event


class Gpu:
    """A GPU with a budget. Use ``open_gpu``.

    Attributes:
        budget: Total and context bytes, or ``None`` for no limit.
        kernels: Whose kernels GPU modules run: ``"cuda"``, or ``"cpu"`` on the stand-in.
        simulated: Whether figures come from a stand-in or a dry run.
        meter: Counts what is live.
        transfers: (from, to) → bytes moved so far.
        phases: Every phase measured so far, oldest first.
        plan: The plan loaded last, and ``spec`` its model's, or ``None``.
    """

    name = "gpu"
    kernels = "cpu"
    simulated = True
    meta = False
    _tensor_device: str | torch.device = "cpu"

    def __init__(self, budget: GpuBudget | None):
        self.budget = budget
        self.transfers: Counter = Counter()
        self.phases: list[PhaseMemory] = []
        self.plan = self.spec = None
        self.lock = threading.RLock()
        self._local = threading.local()
        self._paused = False
        capacity = budget.usable_bytes if budget else None
        self.meter = Meter(allocator=CachingAllocator(capacity), on_oom=self._out_of_memory)

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

    def watching(self):
        """A context in which the meter sees everything, also where it is not needed to count (CUDA)."""
        return self.active()

    @contextmanager
    def phase(self, name: str):
        """Measures a named phase on the GPU; yields its ``PhaseMemory``, complete when the block ends."""
        with self.active(), self.meter.phase(name) as record:
            self.phases.append(record)
            yield record

    def check_room(self, size_bytes: int) -> None:
        """Refuses what no longer fits beside other processes (``BudgetError``); a stand-in shares with none."""

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
        self.transfers[source, place] += tensor.nbytes
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

    def copy_ahead(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], after=None):
        """Copies CPU tensors into GPU ones beside the computation, where the GPU can do both at once.

        Args:
            pairs: GPU tensors, and the CPU tensors of the same shape and dtype that are to be in them.
            after: From ``mark``: not before what it marks has ended.

        Returns:
            What ``wait_for`` wants.
        """
        for target, source in pairs:
            self.transfers["cpu", "gpu"] += source.nbytes
            target.copy_(source)

    def mark(self):
        """A mark behind all work given to the GPU so far."""

    def wait_for(self, mark) -> None:
        """Lets what is computed from here on wait for a mark."""

    def settle(self, wait: bool = False) -> None:
        """Lets what follows come after every copy begun; with ``wait``, this very thread."""

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as this GPU's kind of memory holds it; the dry run turns real tensors into meta ones."""
        return tensor

    def note_oom(self, error: torch.OutOfMemoryError) -> None:
        """Puts on an error what ``explain_oom`` needs: this GPU, and who asked and who held, if not there yet."""
        error.gpu = self
        if not hasattr(error, "event"):
            error.event = self.meter.oom_event()

    def _out_of_memory(self, event: OomEvent) -> None:
        raise StandInOutOfMemoryError(oom_message(event, self.budget), event)


class StandInGpu(Gpu):
    """RAM that counts as a GPU: metered, and out of memory where CUDA's allocator would be. Always *simulated*."""

    name = "stand-in GPU (simulated)"


class DryRunGpu(Gpu):
    """A GPU of meta tensors: nothing is computed, everything is counted. It records the first OOM and goes on.

    Args:
        budget: The card.
        kernels: Whose kernels to imitate: ``"cuda"`` or ``"cpu"`` (the stand-in's).
        expandable_segments: Imitate the allocator's other mode.
    """

    name = "dry run"
    meta = True
    _tensor_device = "meta"

    def __init__(self, budget: GpuBudget | None, kernels: str, expandable_segments: bool = False):
        super().__init__(budget)
        if expandable_segments:
            self.meter.allocator = ExpandableAllocator(self.meter.allocator.capacity)
        self.kernels = kernels
        self.meter.run, self.meter.by_block = self._run, kernels == "cuda"
        self._results = MetaResults()
        self._workspace = None

    def _run(self, func, args, kwargs):
        """Runs an operator on meta; before the first matrix product on CUDA, cuBLAS' workspace is there."""
        wanted = self.kernels == "cuda" and self._workspace is None and func in _MATRIX_PRODUCTS
        if wanted and self.meter.place_of(args[-1]) == "gpu":
            with self.meter.scope(owner="cuBLAS", category="workspace"):
                self._workspace = torch.empty(cublas_workspace_bytes(), dtype=torch.uint8, device="meta")
                self.meter.count(self._workspace, "gpu")
        try:
            return self._results(func, args, kwargs)
        except (RuntimeError, NotImplementedError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            where = self.meter.owner or "the model"
            raise RuntimeError(f"{where} needs data: {func} on meta says: {reason}") from error

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's shape and dtype on meta."""
        return torch.empty_like(tensor, device="meta")

    def _out_of_memory(self, event: OomEvent) -> None:
        """Goes on, without a limit: the forecast wants the whole peak."""


class CudaGpu(Gpu):
    """A CUDA card, capped for this process so that a small card's OOM is real on any card.

    The meter is not run over CUDA work outside ``phase``: CUDA's own counters are the truth and cost nothing.

    Args:
        budget: The card to be, or ``None`` for all of it.
        set_cap: Whether to set this process's cap; a measurement beside a loaded model leaves it as it is.
    """

    kernels = "cuda"
    simulated = False

    def __init__(self, budget: GpuBudget | None, set_cap: bool = True):
        super().__init__(budget)
        self.meter = Meter(by_device=True)
        self.device = self._tensor_device = torch.device("cuda", torch.cuda.current_device())
        self._side_stream = None
        self.name = torch.cuda.get_device_name(self.device)
        card_bytes = torch.cuda.mem_get_info(self.device)[1]
        if budget and budget.total_bytes > card_bytes:
            raise BudgetError(
                f"asked for a {format_bytes(budget.total_bytes)} GPU, found {self.name} with "
                f"{format_bytes(card_bytes)}; give a smaller budget"
            )
        if not set_cap:
            return
        # the allocator truncates fraction * total to bytes: one more keeps the cap from falling a byte short
        fraction = min(1.0, (budget.usable_bytes + 1) / card_bytes) if budget else 1.0
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(fraction, self.device)

    def watching(self):
        """See ``Gpu``."""
        return super().active()

    @contextmanager
    def active(self):
        """Nothing to do: CUDA counts by itself."""
        yield self

    @contextmanager
    def phase(self, name: str):
        """Measures a phase with CUDA's own counters; the meter runs beside them only to name who holds the memory."""
        torch.cuda.synchronize(self.device)
        if name == "load":
            torch.cuda.empty_cache()  # what an earlier model left reserved is not this one's
        torch.cuda.reset_peak_memory_stats(self.device)
        record = PhaseMemory(name)
        self.phases.append(record)
        try:
            with self.watching(), self.meter.phase(name) as metered:
                yield record
        finally:
            torch.cuda.synchronize(self.device)
            record.peak_allocated_bytes = torch.cuda.max_memory_allocated(self.device)
            record.end_allocated_bytes = torch.cuda.memory_allocated(self.device)
            record.peak_reserved_bytes = torch.cuda.max_memory_reserved(self.device)
            record.process_bytes = process_bytes(self.device.index)
            # what CUDA counted and the meter did not see: cuBLAS' workspace, temporaries inside kernels
            unseen = record.peak_allocated_bytes - sum(metered.breakdown.values())
            record.breakdown = {**metered.breakdown, "workspace": unseen}
            fragmentation = record.peak_reserved_bytes - record.peak_allocated_bytes
            record.reserved_breakdown = {**record.breakdown, "fragmentation": fragmentation}

    def check_room(self, size_bytes: int) -> None:
        """See ``Gpu``."""
        free, total = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        usable = self.budget.usable_bytes if self.budget else total
        if free + unused < size_bytes <= usable:  # more than the card ever has is an honest out of memory
            raise BudgetError(
                f"the weights take {format_bytes(size_bytes)} of {self.name}, found {format_bytes(free + unused)} "
                "free: other processes, or other models of this one, hold the rest; end them, or plan for what is free"
            )

    def reset_peak(self) -> None:
        """See ``Gpu``."""
        torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def peak_reserved_bytes(self) -> int:
        """CUDA's own counter."""
        return torch.cuda.max_memory_reserved(self.device)

    @property
    def peak_allocated_bytes(self) -> int:
        """CUDA's own counter."""
        return torch.cuda.max_memory_allocated(self.device)

    def copy_ahead(self, pairs, after=None):
        """See ``Gpu``: on a stream of its own. Only from page-locked memory does it run beside the computation."""
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._side_stream):
            if after is not None:
                self._side_stream.wait_event(after)
            for target, source in pairs:
                self.transfers["cpu", "gpu"] += source.nbytes
                target.copy_(source, non_blocking=True)
            return self._side_stream.record_event()

    def mark(self):
        """See ``Gpu``."""
        return torch.cuda.current_stream(self.device).record_event()

    def wait_for(self, mark) -> None:
        """See ``Gpu``."""
        torch.cuda.current_stream(self.device).wait_event(mark)

    def settle(self, wait: bool = False) -> None:
        """See ``Gpu``."""
        if self._side_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side_stream)
            if wait:
                self._side_stream.synchronize()

    def _copy(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        return tensor.to(self.device if place == "gpu" else "cpu")


def open_gpu(size: str | int | GpuBudget | None = None, cuda_context: str | int | None = None) -> Gpu:
    """Opens the GPU of this machine with a byte budget: CUDA where there is one, else the simulated stand-in.

    Args:
        size: The card to be, e.g. ``"4GiB"``; ``None`` for no limit.
        cuda_context: See ``GpuBudget.parse``.

    Raises:
        UnitError: The size cannot be read.
        BudgetError: The size is too small, or larger than the card.
    """
    budget = None if size is None else GpuBudget.parse(size, cuda_context)
    return CudaGpu(budget) if torch.cuda.is_available() else StandInGpu(budget)
