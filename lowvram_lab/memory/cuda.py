"""CUDA with a real cap: the allocator's limit, what the driver says this process holds, and page-locked memory.

Page-locked ("pinned") memory is what a card can fetch from by itself, beside whatever else is going on. Not
``Tensor.pin_memory``: its allocator rounds every size up to a power of two, which for a model's layers can be nearly
twice their bytes of RAM that nothing else may use. Whole pages are taken from the system and locked as they are.
"""

import contextlib
import functools
import itertools
import logging
import mmap
import os
import threading
import weakref
from collections import defaultdict
from contextlib import contextmanager

import torch

from lowvram_lab.errors import BudgetError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.card import this_card
from lowvram_lab.memory.gpu import Gpu, StandInGpu
from lowvram_lab.memory.meter import Meter
from lowvram_lab.memory.odd_cards import no_kernels, remarks, shut_out, why_no_card
from lowvram_lab.memory.recording import PhaseMemory
from lowvram_lab.memory.torch_release import seeds_of_graphs
from lowvram_lab.units import format_bytes

TORCHS_STREAMS = 32
"""``kStreamsPerPool`` in c10's CUDAStream.h."""

logger = logging.getLogger(__name__)


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
        card_bytes = self.card_bytes = torch.cuda.mem_get_info(self.device)[1]
        if budget and budget.total_bytes > card_bytes:
            raise BudgetError(
                f"asked for a {format_bytes(budget.total_bytes)} GPU, found {self.name} with "
                f"{format_bytes(card_bytes)}; give a smaller budget"
            )
        if budget and budget.card.capability != this_card().capability:
            raise BudgetError(
                f"asked for a card with {budget.card}, found {self.name} with {this_card()}; "
                "another card can be forecast, not run"
            )
        if not set_cap:
            return
        if text := no_kernels():
            raise BudgetError(text)
        for text in remarks().values():
            _say_once(text)
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
        self.recording.phases.append(record)
        try:
            with self.watching(), self.meter.phase(name) as metered:
                yield record
        finally:
            torch.cuda.synchronize(self.device)
            record.peak_allocated_bytes = torch.cuda.max_memory_allocated(self.device)
            record.end_allocated_bytes = torch.cuda.memory_allocated(self.device)
            record.peak_reserved_bytes = torch.cuda.max_memory_reserved(self.device)
            record.process_bytes = process_bytes(self.device.index)
            # what CUDA counted and the meter did not see: cuBLAS' workspace, graphs' pools, temporaries inside kernels
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

    @property
    def free_bytes(self) -> int:
        """See ``Gpu``; what other processes hold is not free."""
        free, _ = torch.cuda.mem_get_info(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        free += torch.cuda.memory_reserved(self.device) - allocated
        return min(free, self.budget.usable_bytes - allocated) if self.budget else free

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

    def copy_ahead(self, pairs: list[tuple[torch.Tensor, torch.Tensor]], after: torch.cuda.Event | None = None):
        """See ``Gpu``: on a stream of its own. Only from page-locked memory does it run beside the computation."""
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._side_stream):
            if after is not None:
                self._side_stream.wait_event(after)
            for target, source in pairs:
                self.recording.transfers["cpu", "gpu"] += source.nbytes
                target.copy_(source, non_blocking=True)
            return self._side_stream.record_event()

    def mark(self) -> torch.cuda.Event:
        """See ``Gpu``."""
        return torch.cuda.current_stream(self.device).record_event()

    def wait_for(self, mark: torch.cuda.Event) -> None:
        """See ``Gpu``."""
        torch.cuda.current_stream(self.device).wait_event(mark)

    def graphs(self) -> "CudaGraphs":
        """See ``Gpu``."""
        return CudaGraphs(self.device)

    def settle(self, wait: bool = False) -> None:
        """See ``Gpu``."""
        if self._side_stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side_stream)
            if wait:
                self._side_stream.synchronize()

    def move(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        """See ``Gpu``. One without data, by which temporaries are measured beforehand, has no place."""
        return tensor if tensor.is_meta else super().move(tensor, place)

    def _copy(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        if place == "cpu":
            return tensor.cpu()
        # CUDA has read pageable memory when the call returns; page-locked memory may be written over before it is read
        return tensor.to(self.device, non_blocking=not tensor.is_pinned())


_streams = defaultdict(dict)
"""By device: streams that graphs were captured on, and whether some still are. Before torch 2.12 each keeps a cuBLAS
workspace for good: they are used again."""
_streams_lock = threading.Lock()


class CudaGraphs:
    """Where a decoder's CUDA graphs are captured: one memory pool for all of them, and a stream of their own.

    A stream is not shared with another decoder's graphs. All that are captured on one look at the same cuBLAS
    workspace, and the first graph to go gives it back, whoever else still uses it (torch 2.12 and later;
    https://github.com/pytorch/pytorch/issues/193402).

    Args:
        device: The card.
    """

    def __init__(self, device: torch.device):
        self._stream, self._graphs, self._pool = _take_stream(device), [], torch.cuda.graph_pool_handle()
        # at the interpreter's end graphs and streams go with the process
        weakref.finalize(self, _give_stream_back, self._graphs, self._stream).atexit = False

    @contextmanager
    def warming_up(self):
        """Runs what will be captured on the graphs' stream, as capturing asks for."""
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
            torch.cuda.empty_cache()  # the runs' own blocks are of no use to any other stream

    @contextmanager
    def capturing(self):
        """Captures what is run inside; yields the graph, whose ``replay`` runs it again."""
        self._find_room_to_begin()
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            yield graph

    def _find_room_to_begin(self) -> None:
        """Runs out of memory now, if capturing would as it begins: torch would not leave off capturing then."""
        where = seeds_of_graphs()
        if where != "none":
            with torch.cuda.stream(self._stream if where == "capturing" else None):
                _seed, _offset = (torch.empty(1, dtype=torch.int64, device=self._stream.device) for _ in range(2))


def _take_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that no graphs use: an idle one, or another; torch has 32, and hands them out again and again."""
    with _streams_lock:
        streams = _streams[device]
        others = (torch.cuda.Stream(device) for _ in range(TORCHS_STREAMS))
        unused = (stream for stream in itertools.chain(streams, others) if not streams.get(stream))
        stream = next(unused, None) or torch.cuda.Stream(device)
        streams[stream] = True
        return stream


def _give_stream_back(graphs: list[torch.cuda.CUDAGraph], stream: torch.cuda.Stream) -> None:
    """First no graph may be left on it that could take the next one's workspace away."""
    for graph in graphs:
        graph.reset()
    _streams[stream.device][stream] = False


def open_gpu(size: str | int | GpuBudget | None = None, cuda_context: str | int | None = None) -> Gpu:
    """Opens the GPU of this machine with a byte budget: CUDA where there is one, else the simulated stand-in.

    Args:
        size: The card to be, e.g. ``"4GiB"``; ``None`` for no limit.
        cuda_context: See ``GpuBudget.parse``.

    Raises:
        UnitError: The size cannot be read.
        BudgetError: The size is too small, or larger than the card, or torch has no kernels for the card.
    """
    budget = None if size is None else GpuBudget.parse(size, cuda_context)
    if torch.cuda.is_available():
        return CudaGpu(budget)
    if shut_out():
        _say_once(f"the card cannot be used, the GPU is simulated in RAM: {why_no_card()}")
    return StandInGpu(budget)


@functools.cache
def _say_once(text: str) -> None:
    """A card stays as it is: once a process is enough."""
    logger.warning("%s", text)


def process_bytes(device_index: int) -> int | None:
    """GPU memory of this process in bytes, by NVML (package ``nvidia-ml-py``), or ``None`` where it cannot be known.

    It cannot where the package is missing, and in containers whose process ids the driver does not know.

    Args:
        device_index: CUDA device; ``CUDA_VISIBLE_DEVICES`` is taken into account.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # missing package, missing library and missing driver each fail in their own way
        return None
    try:
        uuid = torch.cuda.get_device_properties(device_index).uuid
        kind = "MIG" if " MIG " in torch.cuda.get_device_name(device_index) else "GPU"
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid():
                return process.usedGpuMemory
        return None
    except Exception:  # asked at the end of a measurement, whose own outcome matters more than this figure
        return None
    finally:
        pynvml.nvmlShutdown()


class PinnedBlock:
    """A block of RAM, page-locked for CUDA if the system lets it. Ordinary memory, and slower to copy from, if not.

    Args:
        size_bytes: Its size.

    Attributes:
        tensor: The bytes, ``(size_bytes,)`` uint8, uninitialised.
        locked: Whether they are page-locked.
    """

    refused = False  # once the system has said no, it is not asked again

    def __init__(self, size_bytes: int):
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        self.tensor, self.locked = torch.frombuffer(mmap.mmap(-1, size_bytes, **private), dtype=torch.uint8), False
        if not torch.cuda.is_available() or PinnedBlock.refused:
            return
        status = int(torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), size_bytes, 0))
        self.locked = status == 0
        if not self.locked:
            PinnedBlock.refused = True
            with contextlib.suppress(RuntimeError):  # CUDA would report the refusal at the next launch: let it be this
                torch.zeros(1, device="cuda")
            logger.warning("could not page-lock %d bytes of RAM (CUDA error %d): copies are slower", size_bytes, status)

    def unlock(self) -> None:
        """Gives the pages back to the system's discretion. The tensor stays valid."""
        if self.locked:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self.locked = False
