"""A linear layer in two planes of int4: the high one is a weight by itself, the low one what that is off by.

``y = x H^T + x L^T``: without the second product it is the int4 layer that it would be without a low plane, to the bit.
Which products are done is said for all layers of a model at once (``Planes``), so precision changes in no time. The low
plane may lie elsewhere, farther from the card: then it multiplies there, and only activations cross.

Derived in: notebooks/08_precision_on_demand.ipynb
Source: nested precision from one set of weights, Park et al. 2024 (Any-Precision LLM), arXiv:2402.10517.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from lowvram_lab.engine.layers import Int4Linear, Move, QuantizedLinear
from lowvram_lab.memory.card import Card
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.formats import Format
from lowvram_lab.weights.solvers import low_plane, quantize


@dataclass(eq=False)
class Planes:
    """Which planes a model's layers multiply by.

    Attributes:
        both: The low plane too, where there is one.
    """

    both: bool = True

    @contextmanager
    def taking(self, both: bool) -> Iterator[None]:
        """Multiplies by these planes in this block."""
        before, self.both = self.both, both
        try:
            yield
        finally:
            self.both = before


@dataclass(frozen=True)
class Elsewhere:
    """Where a low plane computes that does not lie beside the high one.

    Attributes:
        gpu: What moves activations, and counts them.
        place: Where the low plane is.
        home: Where the high plane is.
    """

    gpu: Gpu
    place: str
    home: str


class NestedLinear(Int4Linear):
    """``y = x (H + L)^T + b``, H being this layer's own codes and L those of ``low``.

    Args:
        low: The low plane's layer, empty.
        planes: Whether it is multiplied by.
        elsewhere: Where it computes, if not where the high one does.

    For the others, and for shapes, see ``QuantizedLinear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fmt: Format,
        kernels: str,
        low: QuantizedLinear,
        planes: Planes,
        elsewhere: Elsewhere | None = None,
        card: Card | None = None,
    ):
        super().__init__(in_features, out_features, fmt, kernels, card=card)
        self.low, self.planes, self.elsewhere = low, planes, elsewhere

    def store(self, weight: torch.Tensor, move: Move, solver: str = "rtn", move_low: Move | None = None) -> None:
        """Quantises a weight, and what its high plane is off by; see ``Quantized``."""
        if weight.is_meta:
            super().store(weight, move)
            self.low.store(weight, move_low or move)
            return
        high = quantize(weight, self.format.plane, solver=solver)
        low = low_plane(weight, high, self.format)
        self.fill(high, move)
        self.low.fill(low, move_low or move)

    def by_high(self, rows: torch.Tensor) -> torch.Tensor:
        """``multiply`` by the high plane alone."""
        return super().multiply(rows)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """By the high plane, and by the low one where both are asked for."""
        return self.by_both(rows) if self.planes.both else self.by_high(rows)

    def by_both(self, rows: torch.Tensor) -> torch.Tensor:
        """``multiply`` by both planes."""
        if self.elsewhere is None:
            return self.by_high(rows) + self.low.multiply(rows)
        gpu, place, home = self.elsewhere.gpu, self.elsewhere.place, self.elsewhere.home
        there = gpu.move(rows, place)  # before the card is given its product: the CPU computes beside it
        found = self.by_high(rows)
        with gpu.meter.scope(place=place):
            correction = self.low.multiply(there)
        return found + gpu.move(correction, home)
