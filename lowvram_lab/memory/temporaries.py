"""How many bytes a function's temporaries take at once, by its run on meta. Knows no model.

Run operator by operator they are exactly those that the allocator gives; a compiled library writes down less, since
what stands between two products becomes one loop, and keeps it for longer. Scratch inside a kernel (oneDNN lays 64 rows
of a bf16 weight side by side) is seen no more than by the meter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowvram_lab.memory.allocator import round_size

aten = torch.ops.aten

_KERNELS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._weight_int4pack_mm_for_cpu.default,
    aten._weight_int8pack_mm.default,
}
_WRITTEN = _KERNELS | {
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.cat.default,
}
"""Operators whose results a compiled library writes to memory; the others are computed where they are read."""


class _Temporaries(TorchDispatchMode):
    """Follows the storages that operators make, in the allocator's blocks of 512 bytes.

    Attributes:
        peak_bytes: Most that were live at once.
    """

    def __init__(self):
        super().__init__()
        self.peak_bytes = 0
        self._live: dict[int, tuple[int, weakref.ref]] = {}  # storage → bytes, and what notices its end

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operator, then counts what it made."""
        result = func(*args, **(kwargs or {}))
        self.count(result if isinstance(result, list | tuple) else [result])
        return result

    def count(self, tensors: Iterable) -> None:
        """Counts the storages of those that are tensors, unless they are counted already."""
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._live and storage.nbytes():
                reference = weakref.ref(storage, lambda _, key=key: self._forget(key))
                self._live[key] = round_size(storage.nbytes()), reference
        self.peak_bytes = max(self.peak_bytes, self._bytes())

    def exempt(self, tensor: torch.Tensor) -> None:
        """Never counts a tensor that was there before."""
        storage = tensor.untyped_storage()
        self._live[storage._cdata] = 0, weakref.ref(storage)

    def _bytes(self) -> int:
        return sum(size for size, _ in self._live.values())

    def _forget(self, key: int) -> int:
        size, _ = self._live.pop(key)
        return size


class _WrittenByALibrary(_Temporaries):
    """Counts what a compiled library writes to memory, and when it lets go of it.

    It writes results of products and reductions, and what products and loops read. All that lies between two kernels of
    torch is one function of the library, so what it has done with is freed when the next kernel is called, not before.
    """

    def __init__(self):
        super().__init__()
        self._done_with_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs the operator, and counts what a library would write for it."""
        kernel = func in _KERNELS or func.namespace == "lowvram"  # our own
        if kernel:
            self.count(args)
            self._done_with_bytes = 0
        result = func(*args, **(kwargs or {}))
        if kernel or func in _WRITTEN:
            self.count([result])
        return result

    def _bytes(self) -> int:
        return super()._bytes() + self._done_with_bytes

    def _forget(self, key: int) -> int:
        self._done_with_bytes += super()._forget(key)
        return 0


class _Loops(list):
    """Inputs of loops, which a library writes when it comes to them, and returns."""

    def __init__(self, seen: _Temporaries):
        super().__init__()
        self._seen = seen

    def append(self, tensor: torch.Tensor) -> None:
        """Counts the tensor from here on."""
        super().append(tensor)
        self._seen.count([tensor])


def temporaries_bytes(
    run: Callable[[torch.Tensor, list, list | None], torch.Tensor],
    given: torch.Tensor,
    tensors: list,
    *,
    compiled: bool,
) -> int:
    """Most bytes that are live at once in a function, its input and its result included.

    Args:
        run: The function of an input, a list of tensors, and a list for loops' inputs (``None`` where not compiled).
        given: The input: a temporary, the result of the function before; only its shape matters.
        tensors: What stays, and is not counted; only their shapes matter.
        compiled: Whether it will be a compiled library.
    """
    seen = _WrittenByALibrary() if compiled else _Temporaries()
    loops = _Loops(seen) if compiled else None
    with torch.inference_mode(False), torch.no_grad():
        given, *arguments = (_on_meta(each) for each in (given, *tensors))
        for each in arguments:
            if isinstance(each, torch.Tensor):
                seen.exempt(each)
        seen.count([given])
        with seen:
            seen.count([run(given, arguments, loops)])
    return seen.peak_bytes


def _on_meta(value: object) -> object:
    return torch.empty_like(value, device="meta") if isinstance(value, torch.Tensor) else value
