"""How keys and values of a block lie in a row of bytes: of all layers that are alike, one tensor each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.rules import BLOCK_TOKENS


@dataclass(frozen=True)
class Part:
    """One tensor of a block.

    Attributes:
        name: What the cache calls it, and a number where layers are of several shapes.
        kind: What the cache calls it.
        dtype: Of the tensor.
        shape: ``(layers, heads, …)``.
        layers: Which of the cache's layers that keep something.
        at: Where it begins, in bytes.
    """

    name: str
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    layers: tuple[int, ...]
    at: int

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The tensors of a block, one behind the other without gaps."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, cache: PreallocatedCache) -> Layout:
        """Of a cache for one sequence."""
        alike: dict[tuple, list[int]] = {}
        for index, layer in enumerate(cache.held):
            for kind, view in layer.span(0, BLOCK_TOKENS).items():
                alike.setdefault((kind, view.dtype, tuple(view.shape[1:])), []).append(index)
        kinds = [kind for kind, _, _ in alike]
        parts, at = [], 0
        for (kind, dtype, shape), layers in alike.items():
            name = kind if kinds.count(kind) == 1 else f"{kind}.{layers[0]}"
            parts.append(Part(name, kind, dtype, (len(layers), *shape), tuple(layers), at))
            at += parts[-1].size
        return cls(tuple(parts))

    @property
    def size(self) -> int:
        """Of a block, in bytes: the plan's ``block_bytes``."""
        return sum(part.size for part in self.parts)

    def views(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in a row of bytes, ``(size,)`` uint8."""
        return {p.name: block[p.at : p.at + p.size].view(p.dtype).view(p.shape) for p in self.parts}

    def take(self, cache: PreallocatedCache, start: int, into: dict[str, torch.Tensor], gpu: Gpu) -> None:
        """Copies the block that begins at a token out of a cache."""
        for view, row in self._pairs(cache, start, into, gpu):
            # what lies on a card is gathered there: a copy between places would do so too, out of sight
            row.copy_(gpu.move(view.contiguous(), "cpu") if gpu.meter.place_of(view) == "gpu" else view)

    def put(self, tensors: dict[str, torch.Tensor], cache: PreallocatedCache, start: int, gpu: Gpu) -> None:
        """Copies a block into a cache, behind ``start`` tokens; the cache does not count it yet."""
        for view, row in self._pairs(cache, start, tensors, gpu):
            view.copy_(gpu.move(row, gpu.meter.place_of(view)))

    def _pairs(
        self, cache: PreallocatedCache, start: int, tensors: dict[str, torch.Tensor], gpu: Gpu
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each layer and kind what the cache holds of a block, and what the block's tensors do.

        Those that lie in RAM come first. Views, and copies within RAM, are out of the meter's sight: it has nothing to
        count there, and to look at each takes longer than to copy it.
        """
        with gpu.unmetered():
            spans = [layer.span(start, start + BLOCK_TOKENS) for layer in cache.held]
            pairs = [
                (spans[index][part.kind][0], row)
                for part in self.parts
                for row, index in zip(tensors[part.name], part.layers, strict=True)
            ]
            on_card = [gpu.meter.place_of(view) == "gpu" for view, _ in pairs]
            yield from (pair for pair, there in zip(pairs, on_card, strict=True) if not there)
        yield from (pair for pair, there in zip(pairs, on_card, strict=True) if there)
