"""The meter: every storage that is live now, by place and by module. It runs over real and over meta tensors.

A ``TorchDispatchMode`` sees the result of every operator, follows its storage by weak reference, and counts it in
blocks of 512 bytes as CUDA's allocator does. It does not see temporaries inside a kernel; neither does the dry run.

Where there is no CUDA both "gpu" and "cpu" tensors lie in RAM. Then a result's place follows its inputs, as a CUDA
result's device would, and mixing places is refused with CUDA's reason.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram_lab.memory.allocator import CachingAllocator, OutOfCapacity, round_size
from lowvram_lab.memory.recording import OomEvent, PhaseMemory
from lowvram_lab.memory.timeline import Event, Timeline

aten = torch.ops.aten
_MAY_MIX = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}
_FACTORIES = {aten.lift_fresh.default, aten.lift_fresh_copy.default}


@dataclass
class OutOfMemory:
    """What is hung on an out-of-memory error as ``error.lowvram``, for whoever explains it.

    Attributes:
        event: Who asked, when, and who held the memory.
        gpu: The ``Gpu`` that was full.
        loaded: The state of the model that ran, as whoever loaded it keeps it.
    """

    event: OomEvent
    gpu: object = None
    loaded: object = None


@dataclass(eq=False)
class Window:
    """GPU bytes at the start, at the peak and at the end of a stretch of a run."""

    start: int
    peak: int
    end: int = 0


@dataclass(eq=False)
class _Live:
    place: str
    size: int
    owner: str
    category: str
    reference: object
    handle: object = None


class Meter(TorchDispatchMode):
    """Counts live bytes by place, module and category (weights, kv, activations).

    Args:
        by_device: Take a tensor's place from its device (CUDA) instead of from its inputs (stand-in, dry run).
        allocator: Model of the GPU's allocator, asked for every GPU block.
        on_oom: Called with an ``OomEvent`` when the allocator is out of capacity. If it returns, the run goes on
            without a limit: that is how a forecast sees past the first failure.

    Attributes:
        allocated: Place → live bytes.
        run: Called with operator, arguments and keyword arguments instead of the operator itself; see ``dry_run.py``.
        by_block: Count a GPU tensor as the allocator's whole block, as ``torch.cuda.memory_allocated`` does: a large
            block that is not worth splitting is counted with its unused end.
    """

    def __init__(
        self,
        *,
        by_device: bool = False,
        allocator: CachingAllocator | None = None,
        on_oom: Callable[[OomEvent], None] | None = None,
    ):
        super().__init__()
        self.by_device = by_device
        self.allocator = allocator
        self.on_oom = on_oom
        self.run, self.by_block = None, False
        self.allocated = Counter()
        self.peak_allocated = 0
        self.timeline: Timeline | None = None
        self.windows: list[Window] = []
        self._phase: PhaseMemory | None = None
        self._live: dict[int, _Live] = {}
        self._simple: set[torch._ops.OpOverload] = set()
        self._taking, self._died = False, []
        self._categories = Counter()
        self._owner = ""
        self._place = "cpu"
        self._category = "activations"
        self._forced = False

    @contextmanager
    def scope(
        self, owner: str | None = None, place: str | None = None, category: str | None = None, force: bool = False
    ) -> Iterator[None]:
        """Charges what is allocated inside to a module, a place, a category; ``None`` leaves each as it was.

        Args:
            owner: Module path.
            place: ``"gpu"`` or ``"cpu"``, for operators without tensor inputs.
            category: ``"weights"``, ``"kv"`` or ``"activations"``.
            force: Use ``place`` for results of tensors elsewhere too: this scope is a transfer.
        """
        saved = self._owner, self._place, self._category, self._forced
        self._owner = self._owner if owner is None else owner
        self._place = self._place if place is None else place
        self._category = self._category if category is None else category
        self._forced = force
        try:
            yield
        finally:
            self._owner, self._place, self._category, self._forced = saved

    @contextmanager
    def phase(self, name: str):
        """Measures a named phase; the ``PhaseMemory`` it yields is complete when the block ends, also by an error."""
        record, outer = PhaseMemory(name), self._phase
        self._phase = record
        self._note_peak()
        try:
            yield record
        finally:
            self._phase = outer
            record.end_allocated_bytes = self.allocated["gpu"]

    @contextmanager
    def window(self):
        """Follows the GPU peak while the block runs; windows may overlap and nest. Yields a ``Window``."""
        window = Window(self.allocated["gpu"], self.allocated["gpu"])
        self.windows.append(window)
        try:
            yield window
        finally:
            self.windows.remove(window)
            window.end = self.allocated["gpu"]

    def count(self, tensor: torch.Tensor, place: str) -> None:
        """Counts a tensor made out of the meter's sight, as of now."""
        self._see(tensor, place)

    def place_of(self, tensor: torch.Tensor) -> str:
        """Where a tensor counts as being: ``"gpu"`` or ``"cpu"``. One the meter never saw is on the CPU."""
        if self.by_device:
            return "gpu" if tensor.device.type == "cuda" else "cpu"
        live = self._live.get(tensor.untyped_storage()._cdata)
        return live.place if live else "cpu"

    @property
    def owner(self) -> str:
        """Path of the module that allocations are charged to now."""
        return self._owner

    def holders(self, place: str = "gpu") -> list[tuple[str, int]]:
        """Who holds the memory of a place: (module path, bytes), largest first."""
        totals = Counter()
        for live in self._live.values():
            if live.place == place:
                totals[live.owner] += live.size
        return totals.most_common()

    def category_bytes(self, category: str) -> int:
        """GPU bytes live now in a category."""
        return self._categories[category]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operator, then counts each storage among its results that was not there before."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func not in self._simple:
            with self:  # composite operators arrive whole here; look inside them
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self._simple.add(func)
        place = None if self.by_device else self._place_for(func, args, kwargs)
        try:
            result = self.run(func, args, kwargs) if self.run else func(*args, **kwargs)
        except torch.OutOfMemoryError as error:  # CUDA's own: only here is it known which module asked
            if not hasattr(error, "lowvram"):
                error.lowvram = OutOfMemory(self.oom_event())
            raise
        if isinstance(result, torch.Tensor):
            self._see(result, place)
        elif isinstance(result, list | tuple):
            for item in result:
                if isinstance(item, torch.Tensor):
                    self._see(item, place)
        return result

    def _place_for(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> str:
        if self._forced or func in _FACTORIES:
            return self._place
        places = set()
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, torch.Tensor) and item.numel() > 0:
                    found = self.place_of(item)
                    if item.dim() > 0 or found == "gpu":  # CUDA lets a scalar on the CPU into any operator
                        places.add(found)
        if len(places) > 1:
            if func not in _MAY_MIX:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two, gpu and cpu, in {func} "
                    f"under {self._owner or 'the model'} (simulated: CUDA would refuse this too)"
                )
            first = next(value for value in args if isinstance(value, torch.Tensor))
            return self.place_of(first)
        return places.pop() if places else self._place

    def _see(self, tensor: torch.Tensor, place: str | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        if size == 0:
            return
        if place is None:
            place = "gpu" if tensor.device.type == "cuda" else "cpu"
        live = _Live(place, round_size(size), self._owner, self._category, None)
        if place == "gpu" and self.allocator is not None:
            live.handle = self._take(size)
            if self.by_block:
                live.size = live.handle.size
        live.reference = weakref.ref(storage, lambda _, key=key: self._release(key))
        self._live[key] = live
        self.allocated[place] += live.size
        if place == "gpu":
            self._categories[live.category] += live.size
            self.peak_allocated = max(self.peak_allocated, self.allocated["gpu"])
            for window in self.windows:
                window.peak = max(window.peak, self.allocated["gpu"])
            self._note_peak()
        if self.timeline is not None:
            phase = self._phase.name if self._phase else ""
            event = Event(live.size, place, live.owner, live.category, phase, self._reserved())
            self.timeline.allocate(key, event)

    def _take(self, size: int):
        self._taking = True  # garbage collection may run inside, and must not free blocks of a half-made list
        try:
            return self.allocator.allocate(size)
        except OutOfCapacity:
            event = self.oom_event(round_size(size))
            if self.on_oom:
                self.on_oom(event)
            self.allocator.lift_limits()
            return self.allocator.allocate(size)
        finally:
            self._taking = False
            while self._died:
                self._release(self._died.pop())

    def oom_event(self, requested_bytes: int | None = None) -> OomEvent:
        """Who asks now, in which phase, and who holds the memory."""
        phase = self._phase.name if self._phase else "run"
        allocated = torch.cuda.memory_allocated() if self.by_device else self.allocated["gpu"]
        return OomEvent(phase, self._owner, requested_bytes, allocated, self._reserved(), self.holders())

    def _reserved(self) -> int:
        if self.by_device:
            return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
        return self.allocator.reserved if self.allocator else 0

    def _note_peak(self) -> None:
        record, allocated = self._phase, self.allocated["gpu"]
        if record is None:
            return
        if allocated >= record.peak_allocated_bytes:
            record.peak_allocated_bytes = allocated
            record.breakdown = dict(self._categories)
        reserved = self.allocator.reserved if self.allocator else 0
        most, unused = record.peak_reserved_bytes, record.reserved_breakdown.get("fragmentation", float("inf"))
        if reserved > most or (reserved == most and reserved - allocated < unused):
            record.peak_reserved_bytes = reserved
            record.reserved_breakdown = {**self._categories, "fragmentation": reserved - allocated}

    def _release(self, key: int) -> None:
        if self._taking:
            self._died.append(key)
            return
        live = self._live.pop(key, None)
        if live is None:
            return
        self.allocated[live.place] -= live.size
        if live.place == "gpu":
            self._categories[live.category] -= live.size
            if live.handle is not None:
                self.allocator.free(live.handle)
        if self.timeline is not None:
            self.timeline.release(key, self._phase.name if self._phase else "", self._reserved())
