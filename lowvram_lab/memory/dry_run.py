"""A GPU of meta tensors, for forecasts: every operator is counted as the real run would allocate, nothing is computed.

A decoder's layers are alike: of some ten thousand operator calls in a forecast a few hundred differ. torch works each
of them out in Python (0.1 to 1 ms); what it returned is remembered by shape, for the forecasts that follow too: a
search makes a hundred of one model.
"""

import functools
import os
import re
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from lowvram_lab.memory.allocator import Pool
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.card import Card, this_card
from lowvram_lab.memory.expandable import ExpandableAllocator
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.memory.recording import OomEvent
from lowvram_lab.memory.torch_release import seeds_of_graphs, torch_release
from lowvram_lab.units import KiB, MiB

aten = torch.ops.aten


_CUBLAS, _CUBLASLT = "cuBLAS", "cuBLASLt"
_MATRIX_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}

CUBLASLT_WORKSPACE = 1 * MiB
"""What products with a bias kept beside it before torch 2.12 (``_parseChosenWorkspaceSize``, cuBLASLt's, there)."""


def cublas_workspace_bytes(card: Card) -> int:
    """What the first matrix product on CUDA allocates for good (``parseChosenWorkspaceSize`` in ATen's CUDABlas.cpp).

    32 MiB on Hopper and Blackwell, 2 x 4096 + 8 x 16 KiB on others; what
    ``CUBLAS_WORKSPACE_CONFIG`` says comes first.
    """
    stated = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if stated:
        return sum(int(size) * int(count) for size, count in stated) * KiB
    return 32 * MiB if card.capability >= (9, 0) else (2 * 4096 + 8 * 16) * KiB


class DryRunGpu(Gpu):
    """A GPU of meta tensors: nothing is computed, everything is counted. It records the first OOM.

    Args:
        budget: The card, or ``None`` for no limit.
        kernels: Whose kernels to imitate: ``"cuda"`` or ``"cpu"`` (the stand-in's); by default the budget's, or CUDA's.
        expandable_segments: Imitate the allocator's other mode.
        card_bytes: Where the budget is a cap on a larger card: what that has (``ExpandableAllocator``).
        goes_on: Whether to go on after the first OOM, or to raise it.

    Attributes:
        watched: Whether the run that is forecast is one that a meter watches.
    """

    name = "dry run"
    meta = True
    _tensor_device = "meta"

    def __init__(
        self,
        budget: GpuBudget | None,
        kernels: str | None = None,
        expandable_segments: bool = False,
        goes_on: bool = True,
        card_bytes: int | None = None,
    ):
        self.goes_on = goes_on
        self.kernels = kernels or (budget.kernels if budget else "cuda")
        super().__init__(budget)
        if expandable_segments:
            self.meter.allocator = ExpandableAllocator(self.meter.allocator.capacity, card_bytes)
        self.meter.run, self.meter.by_block = self._run, self.kernels == "cuda"
        self._results = _results_of(torch.get_default_dtype())
        self._held, self._idle_streams = {}, []
        self._seeds_of_all = lambda: None
        self._multiplying, self._keeps_lt = "", torch_release() < (2, 12)
        self._capturing = False
        self.watched = True

    @property
    def card(self) -> Card:
        """See ``Gpu``: also one that this machine has not."""
        return self.budget.card if self.budget else this_card()

    def _take_workspaces(self, func: torch._ops.OpOverload) -> None:
        """What a stream's first product allocates for good, on that stream."""
        if _CUBLAS not in self._held:
            self._keep(_CUBLAS, cublas_workspace_bytes(self.card))
        if self._keeps_lt and func is aten.addmm.default and _CUBLASLT not in self._held:
            self._keep(_CUBLASLT, CUBLASLT_WORKSPACE)

    def _keep(self, library: str, size: int) -> None:
        self._multiplying = self.meter.owner
        with self.meter.scope(owner=library, category="workspace"):
            self._held[library] = self._hold(torch.uint8, size)

    def _hold(self, dtype: torch.dtype, count: int = 1) -> torch.Tensor:
        """A tensor that the meter counts on the GPU, for what torch allocates by itself."""
        held = torch.empty(count, dtype=dtype, device="meta")
        self.meter.count(held, "gpu")
        return held

    def _run(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict):
        """Runs an operator on meta; the first matrix product on CUDA takes cuBLAS' workspace after its result."""
        multiplies = self.kernels == "cuda" and func in _MATRIX_PRODUCTS
        try:
            result = self._results(func, args, kwargs)
        except (RuntimeError, NotImplementedError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            where = self.meter.owner or "the model"
            raise RuntimeError(f"{where} needs data: {func} on meta says: {reason}") from error
        if multiplies and self.meter.place_of(args[-1]) == "gpu":
            self.meter.count(result, "gpu")
            self._take_workspaces(func)
        return result

    @contextmanager
    def unwatched(self):
        """See ``Gpu``: everything is counted, as it is allocated where nobody counts."""
        earlier, self.watched = self.watched, False
        try:
            yield
        finally:
            self.watched = earlier

    def graphs(self) -> "DryGraphs":
        """See ``Gpu``."""
        return DryGraphs(self)

    def _out_of_memory(self, event: OomEvent) -> None:
        if self._capturing:
            raise torch.OutOfMemoryError("no room for a CUDA graph")
        if event.module in (_CUBLAS, _CUBLASLT):
            event.module = self._multiplying
        super()._out_of_memory(event)

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's shape and dtype on meta."""
        return torch.empty_like(tensor, device="meta")


class _Seeds(list):
    """Seed and offset of some graphs; no weak reference to a mere list can be had."""


class DryGraphs:
    """Counts what capturing allocates; see ``CudaGraphs``, which allocates it."""

    def __init__(self, gpu: DryRunGpu):
        self._gpu, self._pool, self._seeds = gpu, gpu.meter.allocator.new_pool(kept=True), _Seeds()
        self._begun = []  # a word for each graph: the finalizer may not hold ``self``
        idle = gpu._idle_streams
        self._stream, self._held = idle.pop() if idle else (gpu.meter.allocator.new_pool(), {})
        weakref.finalize(self, _give_stream_back, self._begun, self._pool, self._stream, self._held, idle)

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """See ``CudaGraphs``."""
        try:
            with self._on_its_stream(self._stream):
                yield
        finally:
            self._gpu.meter.allocator.empty_cache()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """See ``CudaGraphs``."""
        with self._without_failing():
            self._hold_seeds()  # whether there is room; then torch empties the cache
            self._gpu.meter.allocator.empty_cache()
            self._take_seeds()
        self._begun.append("graph")
        with self._on_its_stream(self._pool):
            yield

    def _take_seeds(self) -> None:
        """See ``seeds_of_graphs``; those of all graphs live as long as one of them."""
        known = self._gpu._seeds_of_all() if seeds_of_graphs() == "capturing" else None
        self._seeds = known or _Seeds([*self._seeds, *self._hold_seeds()])
        self._gpu._seeds_of_all = weakref.ref(self._seeds)

    def _hold_seeds(self) -> list[torch.Tensor]:
        """Seed and offset of a graph, where it has some."""
        gpu, where = self._gpu, seeds_of_graphs()
        scope, pool = gpu.meter.scope(category="workspace", place="gpu"), gpu.meter.allocator.pool
        with scope, gpu.meter.allocator.inside(self._stream if where == "capturing" else pool):
            return [] if where == "none" else [gpu._hold(torch.int64) for _ in range(2)]

    @contextmanager
    def _on_its_stream(self, pool: Pool) -> Iterator[None]:
        """Allocates in a pool, beside what NVIDIA's libraries keep for the stream."""
        gpu = self._gpu
        outside, gpu._held = gpu._held, self._held
        try:
            with self._without_failing(), gpu.meter.allocator.inside(pool):
                yield
        finally:
            gpu._held = outside

    @contextmanager
    def _without_failing(self) -> Iterator[None]:
        """What finds no room in it is no failure of the run: whoever captures can do without a graph."""
        self._gpu._capturing = True
        try:
            yield
        finally:
            self._gpu._capturing = False


def _give_stream_back(begun: list, pool: Pool, stream: Pool, held: dict, idle: list) -> None:
    """A decoder's graphs go: their pool can be given back, and another decoder's may use the stream.

    What NVIDIA's libraries kept for it goes with the first graph (``CUDAGraph::reset`` in ATen), from torch 2.12 on.
    """
    pool.kept = False
    if begun and torch_release() >= (2, 12):
        held.clear()
    idle.append((stream, held))


MOST_REMEMBERED = 100_000
"""Calls that are remembered, some 1 KiB each; then all are forgotten."""


class MetaResults:
    """Runs operators over meta tensors, answering repeated calls from memory.

    Remembered are results with storage of their own, and that an in-place operator gave its first argument back as it
    was. Views say so in their schema; one (``_unsafe_view``) does not, so the storages are compared too.
    """

    def __init__(self):
        self._known: dict[torch._ops.OpOverload, tuple[str, dict]] = {}
        self._count = 0

    def __call__(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict):
        """The operator's result: equal in shape, strides and dtype to what ``func(*args, **kwargs)`` gives on meta."""
        kind, layouts = self._known.get(func) or self._known.setdefault(func, (_kind_of(func), {}))
        if kind == "other":
            return func(*args, **kwargs)
        key = (_signature(args), _signature(sorted(kwargs.items())) if kwargs else ())
        layout = layouts.get(key)
        if layout is None:
            result = func(*args, **kwargs)
            layout = _remembered(kind, args, result)
            in_the_key = all(tensor.is_meta for tensor in _tensors((*args, *kwargs.values())))  # values are not
            if layout is not None and in_the_key and (kind == "fresh" or _signature(result) == key[0][0]):
                self._remember(layouts, key, layout)
            return result
        if layout is _ITS_FIRST_ARGUMENT:
            return args[0]
        return _empty(layout) if isinstance(layout, tuple) else tuple(_empty(one) for one in layout)

    def _remember(self, layouts: dict, key: tuple, layout: object) -> None:
        if self._count >= MOST_REMEMBERED:
            self._known.clear()
            self._count = 0
        layouts[key] = layout
        self._count += 1


_ITS_FIRST_ARGUMENT = object()


@functools.cache
def _results_of(default_dtype: torch.dtype) -> MetaResults:
    """What is remembered in this process; a result may depend on the default dtype, which no argument says."""
    return MetaResults()


def _kind_of(func: torch._ops.OpOverload) -> str:
    """``"fresh"`` for an operator that returns new tensors, ``"in place"`` for one that writes its first argument."""
    schema = func._schema
    written = [a.alias_info is not None for a in schema.arguments]
    returned = [r.alias_info is not None for r in schema.returns]
    if not all(str(r.type) == "Tensor" for r in schema.returns):
        return "other"
    if not any(written + returned):
        return "fresh"
    one = len(returned) == 1 and returned[0] and schema.returns[0].alias_info.is_write
    in_place = one and written[0] and not any(written[1:]) and torch.Tag.inplace_view not in func.tags
    return "in place" if in_place else "other"


def _remembered(kind: str, args: tuple, result: object) -> object | None:
    """What stands for an operator's result from here on; ``None`` where only the operator itself can make it."""
    if kind == "in place":
        same = args and result is args[0] and result.is_meta
        return _ITS_FIRST_ARGUMENT if same else None
    return None if _shares_storage(result, args) else _layout(result)


def _signature(value: object) -> tuple:
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device.type, value.shape, value.stride())
    if isinstance(value, list | tuple):
        return tuple(_signature(item) for item in value)
    return (type(value), value)  # 1 and 1.0 and True are equal as keys, and promote differently


def _layout(result: object) -> tuple | list[tuple] | None:
    if isinstance(result, torch.Tensor):
        return (result.shape, result.stride(), result.dtype) if result.is_meta else None
    if isinstance(result, tuple) and all(isinstance(item, torch.Tensor) and item.is_meta for item in result):
        return [(item.shape, item.stride(), item.dtype) for item in result]
    return None


def _shares_storage(result: object, args: tuple) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
    return any(tensor.untyped_storage()._cdata in storages for tensor in _tensors((result,)))


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _empty(layout: tuple) -> torch.Tensor:
    shape, stride, dtype = layout
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
