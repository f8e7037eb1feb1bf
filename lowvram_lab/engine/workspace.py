"""How many bytes one decoded token needs beside weights and cache: the lean decoder's functions, replayed on meta.

The lean decoder keeps so many bytes for itself from the start, as a CUDA graph keeps its pool, so that decoding can
run out of memory nowhere else than where it begins. Run operator by operator the temporaries are exactly these; a
compiled library writes down less, since what stands between two products becomes one loop (``_WRITTEN``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram_lab.memory.allocator import round_size

aten = torch.ops.aten

_PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._weight_int4pack_mm_for_cpu.default,
    aten._weight_int8pack_mm.default,
}
_WRITTEN = _PRODUCTS | {
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.mean.dim,
    aten.cat.default,
}
"""Operators whose results a compiled library writes to memory; the others are computed where they are read."""


class _Temporaries(TorchDispatchMode):
    """Follows the storages that operators make, in the allocator's blocks of 512 bytes.

    Args:
        compiled: Count only what a compiled library writes: results of products and reductions, what products read.

    Attributes:
        peak_bytes: Most that were live at once.
    """

    def __init__(self, compiled: bool):
        super().__init__()
        self.compiled, self.peak_bytes = compiled, 0
        self._live: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operator, then counts what it made."""
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, list | tuple) else [result]
        if self.compiled:
            made = [*(made if func in _WRITTEN else ()), *(args if func in _PRODUCTS else ())]
        for tensor in made:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or not storage.nbytes():
            return
        self._live[key] = round_size(storage.nbytes())
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.peak_bytes = max(self.peak_bytes, sum(self._live.values()))

    def exempt(self, tensor: torch.Tensor) -> None:
        """Never counts a tensor that was there before."""
        storage = tensor.untyped_storage()
        self._live[storage._cdata] = 0
        self._references[storage._cdata] = weakref.ref(storage)

    def _forget(self, key: int) -> None:
        self._live.pop(key, None)
        self._references.pop(key, None)


def token_bytes(run: Callable[[list, list | None], torch.Tensor], tensors: list, *, compiled: bool) -> int:
    """Most bytes that are live at once in a function of tensors, its result included, beside the tensors themselves.

    Args:
        run: The function, of a list of tensors and of a list for loops' inputs (``None`` where it is not compiled).
        tensors: What it is called with, real or on meta; only their shapes matter.
        compiled: Whether it will be a compiled library.
    """
    seen = _Temporaries(compiled)
    arguments = [torch.empty_like(each, device="meta") if isinstance(each, torch.Tensor) else each for each in tensors]
    for each in arguments:
        if isinstance(each, torch.Tensor):
            seen.exempt(each)
    loops = [] if compiled else None
    with torch.inference_mode(False), torch.no_grad(), seen:
        result = run(arguments, loops)
        for tensor in (result, *(loops or ())):  # a library returns these inputs
            seen.count(tensor)
    return seen.peak_bytes
