"""Quantised weights as plain ones, restored as they are read: what lets a stream run a model of any formats.

The arithmetic is then the stream's own, in float32: what is off is off by the codes alone, not by any kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.formats import Format, get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.weights.codes import IntegerWeight, rows_of
from lowvram_lab.weights.head import HEAD_ROWS
from lowvram_lab.weights.layerwise import LayerByLayer
from lowvram_lab.weights.solvers import round_to_nearest
from lowvram_lab.weights.stored import read_stored


class Restored:
    """A checkpoint whose quantised weights are read as plain ones.

    Args:
        spec: The model; where it is a converted one, its weights are restored from their codes.
        checkpoint: Its tensors.
        plan: Of a 16-bit model: formats that its weights are rounded to as they are read, to nearest.
    """

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, plan: Plan | None = None):
        self._checkpoint = checkpoint
        self._shapes = {f"{module.name}.weight": module.weight_shape for module in spec.modules}
        formats = spec.without_low_planes().stored if plan is None else _formats(plan)
        self._formats = {f"{name}.weight": get_format(fmt) for name, fmt in formats.items()}
        self._rounds = plan is not None

    def __getattr__(self, name: str):
        return getattr(self._checkpoint, name)

    def __contains__(self, name: str) -> bool:
        return name in self._formats or name in self._checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the plain weight."""
        return self._shapes[name] if name in self._formats else self._checkpoint.shape(name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor; a quantised weight in float32."""
        codes = self.codes(name)
        return self._checkpoint.read(name) if codes is None else codes.dequantize()

    def codes(self, name: str) -> IntegerWeight | None:
        """A quantised weight's codes; ``None`` of any other tensor."""
        fmt = self._formats.get(name)
        if fmt is None:
            return None
        if self._rounds:
            return _rounded(self._checkpoint.read(name), fmt)
        return read_stored(name.removesuffix(".weight"), fmt, self._checkpoint.read)


class RestoredLayers(LayerByLayer):
    """A model of any formats, to be run layer by layer.

    Args:
        spec: See ``Restored``.
        checkpoint: See ``Restored``.
        plan: See ``Restored``.

    Raises:
        CheckpointError: See ``LayerByLayer``.
    """

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, plan: Plan | None = None):
        super().__init__(replace(spec, stored={}), Restored(spec, checkpoint, plan))

    def rows(self, name: str) -> Callable[[slice | torch.Tensor], torch.Tensor]:
        """See ``LayerByLayer``; of a quantised table the codes stay in RAM, and rows are restored when they are due."""
        codes = self.checkpoint.codes(name)
        if codes is None:
            return super().rows(name)
        return lambda select: rows_of(codes, select).dequantize()


def _formats(plan: Plan) -> dict[str, str]:
    """Module name → format, of those that a plan rounds and that own their weight."""
    owners = [module for module in plan.spec.modules if module.kind != "other" and not module.tied_to]
    chosen = {module.name: plan.modules[module.name].format for module in owners}
    return {name: fmt for name, fmt in chosen.items() if get_format(fmt).kind != "float"}


def _rounded(weight: torch.Tensor, fmt: Format) -> IntegerWeight:
    """To nearest, some rows at a time: each is rounded by itself, in float32."""
    codes, scales = torch.empty(weight.shape, dtype=torch.int8), []
    for rows, into in zip(weight.split(HEAD_ROWS), codes.split(HEAD_ROWS), strict=True):
        piece = round_to_nearest(rows, fmt)
        into.copy_(piece.codes)
        scales.append(piece.scale)
    return IntegerWeight(codes, torch.cat(scales))
