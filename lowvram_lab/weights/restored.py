"""Quantised weights as plain ones, restored as they are read: what lets a stream run a model of any formats.

The arithmetic is then the stream's own, in float32: what is off is off by the codes alone, not by any kernel.
"""

from __future__ import annotations

import functools
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
        tied = {module.name for module in spec.modules if module.tied_to}
        self._formats = {f"{name}.weight": get_format(fmt) for name, fmt in formats.items() if name not in tied}
        self._rounds = plan is not None

    def __getattr__(self, name: str):
        return getattr(self._checkpoint, name)

    def __contains__(self, name: str) -> bool:
        return name in self._formats or name in self._checkpoint

    def quantized(self, name: str) -> bool:
        """Whether a tensor is read from codes."""
        return name in self._formats

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
            return _rounded(self._checkpoint.rows(name), self.shape(name), fmt)
        return read_stored(name.removesuffix(".weight"), fmt, self._checkpoint.read)

    def rows(self, name: str) -> Callable[[slice | torch.Tensor], torch.Tensor]:
        """See ``Checkpoint``; of a quantised table the codes stay in RAM, and rows are restored when they are due."""
        fmt, plain = self._formats.get(name), self._checkpoint.rows
        if fmt is None:
            return plain(name)
        codes = functools.cache(lambda: self.codes(name))

        def look_up(select: slice | torch.Tensor) -> torch.Tensor:
            if self._rounds and isinstance(select, torch.Tensor):  # tokens' own rows, and each is rounded by itself
                return round_to_nearest(plain(name)(select), fmt).dequantize()
            return rows_of(codes(), select).dequantize()

        return look_up


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
        """See ``LayerByLayer``; a quantised table is not read whole to be checked: its scales are."""
        return self.checkpoint.rows(name) if self.checkpoint.quantized(name) else super().rows(name)


def _formats(plan: Plan) -> dict[str, str]:
    """Module name → format, of those that a plan rounds."""
    modules = [module for module in plan.spec.modules if module.kind != "other"]
    chosen = {module.name: plan.modules[module.name].format for module in modules}
    return {name: fmt for name, fmt in chosen.items() if get_format(fmt).kind != "float"}


def _rounded(rows: Callable[[slice], torch.Tensor], shape: tuple[int, ...], fmt: Format) -> IntegerWeight:
    """To nearest, some rows at a time: each is rounded by itself, in float32."""
    codes, scales = torch.empty(shape, dtype=torch.int8), []
    for start, into in zip(range(0, shape[0], HEAD_ROWS), codes.split(HEAD_ROWS), strict=True):
        piece = round_to_nearest(rows(slice(start, start + HEAD_ROWS)), fmt)
        into.copy_(piece.codes)
        scales.append(piece.scale)
    return IntegerWeight(codes, torch.cat(scales))
