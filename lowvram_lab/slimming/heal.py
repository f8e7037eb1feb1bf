"""Low-rank changes that bring a model with fewer layers back to the states of the whole one, layer by layer.

Each kept layer from the one before the first gap on is given what the layers before it really say, and learns to say
what the whole model has there. Only a change of low rank to each linear module is learnt, and added to its weight: no
new parameters. A token's error counts as a share of the whole model's state, as the next norm sees it.

Source: low-rank changes as in Hu et al. 2021, arXiv:2106.09685; healing after layers were left out as in Gromov et al.
2024, arXiv:2403.17887, there by the loss of the whole model, here layer by layer: with gradients and activations of one
at a time, and the new weights of all.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from tqdm.auto import tqdm

from lowvram_lab.errors import LowvramError
from lowvram_lab.slimming.repair import gap_behind
from lowvram_lab.weights.layerwise import LayerByLayer

RANK, PASSES = 8, 4
"""Of each change, and how often all windows are seen."""

RATE = 2e-3
"""Largest step of the optimiser; it falls to nothing by half a cosine."""

Keep = Callable[[int, Callable[[], dict[str, torch.Tensor]]], dict[str, torch.Tensor]]
"""Gives the weights of a layer: those that an earlier run has kept, else what the call makes."""


@dataclass(frozen=True)
class Healed:
    """What was learnt.

    Attributes:
        weights: Parameter name → its new value, float32.
        table: ``layer``, ``before`` and ``after``: the mean error, as a share of the whole model's state, with the
            weights as they were and with those learnt (layers before it healed in both). A DataFrame.
        tokens: Learnt on.
    """

    weights: dict[str, torch.Tensor]
    table: pd.DataFrame
    tokens: int


def heal(
    whole: LayerByLayer,
    slim: LayerByLayer,
    removed: Collection[int],
    ids: torch.Tensor,
    *,
    rank: int = RANK,
    passes: int = PASSES,
    keep: Keep | None = None,
    progress: bool = True,
) -> Healed:
    """Learns low-rank changes of every kept layer from the one before the first gap on.

    Args:
        whole: The whole model.
        slim: The same with the weights that are to be healed, as ``repair`` made them.
        removed: Indices of the layers that go.
        ids: Tokens ``(windows, tokens)`` to learn on.
        rank: Of each change.
        passes: How often all windows are seen.
        keep: See ``Keep``: what lets a run that was killed go on; by default nothing is kept.
        progress: Show a progress bar.

    Raises:
        LowvramError: A rank or a number of passes below one.
    """
    if rank < 1 or passes < 1:
        raise LowvramError(f"expected a rank and a number of passes of one or more, found {rank} and {passes}")
    target, states, weights, rows = whole.embed(ids), slim.embed(ids), {}, []
    first = min(removed, default=len(whole))
    _run(whole, range(first - 1), target)  # up to there both models are one
    states.copy_(target)
    if first == 0:  # a gap before the first kept layer: it is the whole model's all the same
        _run(whole, [0, *gap_behind(removed, 0, len(whole))], target)
    kept = [index for index in range(max(first - 1, 0), len(whole)) if index not in removed]
    for index in tqdm(kept, desc="healing", unit="layer", disable=not progress, leave=False):
        _run(whole, [index, *gap_behind(removed, index, len(whole))], target)
        with slim.layer(index) as layer:
            before = _error(slim, layer, states, target)
            make = _Learning(slim, layer, index, states, target, rank, passes)
            found = keep(index, make) if keep else make()
            for name, weight in found.items():
                slim.model.get_submodule(name.removesuffix(".weight")).weight.data.copy_(weight)
            rows.append((index, before, _error(slim, layer, states, target)))
            weights |= found
            slim.run_in_place(layer, states)
    return Healed(weights, pd.DataFrame(rows, columns=["layer", "before", "after"]), ids.numel())


def _run(stream: LayerByLayer, layers: Iterable[int], states: torch.Tensor) -> None:
    for index in layers:
        with stream.layer(index) as layer:
            stream.run_in_place(layer, states)


class _Learning:
    """Of one layer, when it is called: parameter name → new weight. The layer's own weights stay as they are."""

    def __init__(
        self,
        stream: LayerByLayer,
        layer: torch.nn.Module,
        index: int,
        states: torch.Tensor,
        target: torch.Tensor,
        rank: int,
        passes: int,
    ):
        self._stream, self._layer, self._states, self._target = stream, layer, states, target
        self._passes, self._rank, self._index = passes, rank, index
        self._modules = {name: stream.model.get_submodule(name) for name in stream.names(index)}

    def __call__(self) -> dict[str, torch.Tensor]:
        changes = self._changes()
        optimiser = torch.optim.Adam([part for pair in changes.values() for part in pair], lr=RATE)
        steps = self._passes * len(self._states)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        order = torch.Generator().manual_seed(self._index)
        with _changed(self._modules, changes), torch.enable_grad():
            for _ in range(self._passes):
                for at in torch.randperm(len(self._states), generator=order).tolist():
                    optimiser.zero_grad()
                    said = self._stream.run(self._layer, self._states[at : at + 1])
                    _shares(said, self._target[at : at + 1]).mean().backward()
                    optimiser.step()
                    schedule.step()
        with torch.no_grad():
            return {f"{n}.weight": self._modules[n].weight + right @ left for n, (left, right) in changes.items()}

    def _changes(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Module name → ``(rank, in)``, drawn, and ``(out, rank)``, zero: nothing is changed at first."""
        found, draw = {}, torch.Generator().manual_seed(self._index)
        for name, module in self._modules.items():
            out, width = module.weight.shape
            left = torch.randn(self._rank, width, generator=draw) / width**0.5
            found[name] = left.requires_grad_(), torch.zeros(out, self._rank, requires_grad=True)
        return found


@contextmanager
def _changed(modules: dict, changes: dict) -> Iterator[None]:
    """Modules say what they would with changed weights, while the block runs."""

    def hook(pair):
        left, right = pair
        return lambda module, inputs, output: output + inputs[0] @ left.T @ right.T

    handles = [module.register_forward_hook(hook(changes[name])) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shares(said: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of each token the square of the error as a share of the wanted state's."""
    return (said - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)


@torch.no_grad()
def _error(stream: LayerByLayer, layer: torch.nn.Module, states: torch.Tensor, target: torch.Tensor) -> float:
    """Mean over all tokens of ``_shares``, a window at a time."""
    pairs = zip(states.split(1), target.split(1), strict=True)
    return sum(_shares(stream.run(layer, one), other).mean().item() for one, other in pairs) / len(states)
