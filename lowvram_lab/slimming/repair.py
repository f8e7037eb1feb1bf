"""What removed layers added, regressed on what the last kept one knows, and folded into its weight: no new parameters.

The layer before a gap ends with a linear module that writes into the residual stream (``down_proj``). What the gap's
layers added there is approximated by a linear map of that module's input, by least squares over calibration tokens,
and the map is added to its weight. The target is the whole model's own state behind the gap, so that what earlier gaps
left wrong is made up for, too. Each token counts by the reciprocal of that state's length, since the norm of the next
layer divides by it: else a few tokens with huge states would be all that is fitted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from lowvram_lab.errors import LowvramError
from lowvram_lab.weights.cholesky import factor_, solved
from lowvram_lab.weights.layerwise import LayerByLayer
from lowvram_lab.weights.moments import accumulate, captured_inputs
from lowvram_lab.weights.states_on_disk import StatesOnDisk

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the mean diagonal; which one is chosen on windows that the map was not fitted to."""


@dataclass(frozen=True)
class Repair:
    """Weights that make up for removed layers, as far as a linear map can.

    Attributes:
        weights: Parameter name → its new value ``(out, in)``, float32.
        explained: Index of the layer before each gap → the share of what the gap added that the map gives back, on
            windows that it was not fitted to (weighted as above); 0 where no map gives any back, and the weight stays
            as it is. A gap before the first layer has none.
        tokens: Fitted to.
    """

    weights: dict[str, torch.Tensor]
    explained: dict[int, float]
    tokens: int


@torch.no_grad()
def repair(
    stream: LayerByLayer,
    removed: Collection[int],
    ids: torch.Tensor,
    *,
    scratch: Path | None = None,
    progress: bool = True,
) -> Repair:
    """Finds for the last layer before each gap the weight that makes up for it best.

    Args:
        stream: The whole model.
        removed: Indices of the layers that go.
        ids: Tokens ``(windows, tokens)``; half of the windows choose how strongly to regularise.
        scratch: A directory for the whole model's hidden states, ``tokens x hidden x 4`` bytes; by default a temporary
            one, which on some systems is in RAM.
        progress: Show a progress bar.

    Raises:
        LowvramError: See ``refuse_unrepairable``.
    """
    refuse_unrepairable(stream, ids)
    with tempfile.TemporaryDirectory() if scratch is None else nullcontext(scratch) as folder:
        file = Path(folder) / "whole.bin"  # always the same one: a run that is killed leaves no second
        try:
            return _repair(stream, removed, StatesOnDisk(stream.embed(ids), file), progress)
        finally:
            file.unlink(missing_ok=True)


def _repair(stream: LayerByLayer, removed: Collection[int], whole: StatesOnDisk, progress: bool) -> Repair:
    """``whole`` is what the first layer is given."""
    slim, weights, explained = None, {}, {}  # the model with fewer layers: up to the first gap it is the whole one
    layers = iter(tqdm(range(len(stream)), desc="repair", unit="layer", disable=not progress, leave=False))
    for index in layers:
        gap = gap_behind(removed, index, len(stream))
        if slim is None and (gap or index in removed):
            slim = whole.read()
        with stream.layer(index) as layer:
            whole.run(stream, layer)
        if slim is None or index in removed:  # a gap before the first layer: nothing can make up for it
            continue
        for _ in gap:
            with stream.layer(next(layers)) as layer:
                whole.run(stream, layer)
        name, change = stream.names(index)[-1], None
        last = stream.model.get_submodule(name)
        if gap:
            with stream.layer(index) as layer:
                halves = _halves(stream, layer, last, slim, whole)
            change, explained[index] = _solve(*halves)  # without the layer: both take room
            del halves
        with stream.layer(index) as layer:
            if change is not None:
                weights[f"{name}.weight"] = last.weight.data.add_(change).clone()
            stream.run_in_place(layer, slim)
    return Repair(weights, explained, whole.tokens)


def gap_behind(removed: Collection[int], index: int, count: int) -> list[int]:
    """The removed layers behind one, up to the first that is kept."""
    found = []
    for later in range(index + 1, count):
        if later not in removed:
            break
        found.append(later)
    return found


@torch.no_grad()
def refuse_unrepairable(stream: LayerByLayer, ids: torch.Tensor) -> None:
    """Refuses what cannot be repaired, before anything that takes long; the first layer stands for all.

    Args:
        stream: The whole model.
        ids: Tokens ``(windows, tokens)``.

    Raises:
        LowvramError: Fewer than two windows, or layers that change what their last linear module says before it is
            added to the residual stream.
    """
    if len(ids) < 2:
        raise LowvramError(f"expected two windows of tokens or more, to fit and to choose on, found {len(ids)}")
    hidden, name = stream.embed(ids[:1]), stream.names(0)[-1]
    with stream.layer(0) as layer:
        before = stream.run(layer, hidden)
        handle = stream.model.get_submodule(name).register_forward_hook(lambda module, inputs, output: output + 1)
        try:
            difference = stream.run(layer, hidden) - before
        finally:
            handle.remove()
    if (difference - 1).abs().max() > 1e-2:
        raise LowvramError(
            f"{name}: expected a module whose output is added to the hidden states as it is, found one that is scaled "
            "or normed first; leave the repair out (--no-repair)"
        )


def _halves(
    stream: LayerByLayer, layer: torch.nn.Module, last: torch.nn.Module, slim: torch.Tensor, whole: StatesOnDisk
) -> tuple[_Moments, _Moments]:
    """What is missing behind a layer, with what its last module is given: of every second window, and of the others."""
    halves = _Moments(), _Moments()
    with captured_inputs({"last": last}) as seen:
        for at, (window, target) in enumerate(zip(slim.split(1), whole.windows(1), strict=True)):
            missing = target - stream.run(layer, window)
            weight = target.norm(dim=-1, keepdim=True).clamp(min=1e-6).reciprocal()
            halves[at % 2].add(seen["last"] * weight, missing * weight)
    return halves


def _solve(fitted: _Moments, held_out: _Moments) -> tuple[torch.Tensor | None, float]:
    """The change of a weight, and the share of what is missing that it explains on windows that it has not seen.

    ``None`` where each change that was tried leaves more missing there than no change.
    """
    by_ridge = {ridge: held_out.explained(fitted.map(ridge)) for ridge in RIDGES}
    best = max(by_ridge, key=by_ridge.__getitem__)
    if by_ridge[best] <= 0:
        return None, 0.0
    fitted.join(held_out)
    return fitted.map(best), by_ridge[best]


class _Moments:
    """Second moments of a regression of ``y`` ``(tokens, out)`` on ``x`` ``(tokens, in)``."""

    def __init__(self):
        self._sums: dict[str, torch.Tensor] = {}
        self.yy = 0.0

    @property
    def xx(self) -> torch.Tensor:
        """``(in, in)``, of ``x`` with itself."""
        return self._sums["xx"]

    @property
    def yx(self) -> torch.Tensor:
        """``(out, in)``, of ``y`` with ``x``."""
        return self._sums["yx"]

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds tokens."""
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        accumulate(self._sums, "xx", x, x)
        accumulate(self._sums, "yx", y, x)
        self.yy += y.double().square().sum().item()

    def join(self, other: _Moments) -> None:
        """Adds another's, in place: at a large width a matrix is hundreds of MiB."""
        for name, mine in self._sums.items():
            mine.add_(other._sums[name])
        self.yy += other.yy

    def map(self, ridge: float) -> torch.Tensor:
        """``(out, in)``: the least squares' map, held back by a share of the mean diagonal."""
        damped = self.xx.clone()
        damped.diagonal().add_(ridge * self.xx.diagonal().mean())
        factor = factor_(damped)
        if factor is None:  # rounded, the moments are no longer those of any vectors: nothing is known
            return torch.zeros_like(self.yx)
        return solved(factor, self.yx.T).T

    def explained(self, found: torch.Tensor) -> float:
        """The share of ``y``'s squares that a map of ``x`` takes away; below 0 where it adds."""
        left = self.yy - 2 * (found * self.yx).sum().item() + ((found @ self.xx) * found).sum().item()
        return 1 - left / self.yy if self.yy else 0.0
