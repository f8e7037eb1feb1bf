"""Which layers to leave out: one after the other, each time the one whose absence changes the prediction least.

Influence and angle only propose; what decides is measured. All candidates go through the layers side by side, each from
the layer that it leaves out, so that a model is read once for each step and never held whole.
"""

from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F  # noqa: N812
from tqdm.auto import tqdm

from lowvram_lab.errors import LowvramError
from lowvram_lab.slimming.divergence import divergences
from lowvram_lab.slimming.influence import angle
from lowvram_lab.weights.calibration import evenly
from lowvram_lab.weights.layerwise import LayerByLayer

CHOICE_TOKENS = 2048
"""Of a text, that candidates are tried on."""

PROPOSALS = 6
"""Layers that are tried at each step; each takes ``tokens x hidden x 4`` bytes and half a pass through the model."""


@dataclass(frozen=True)
class LayerChoice:
    """What was left out, and why.

    Attributes:
        removed: Indices of the layers, in the order in which they went.
        kl: Mean KL to the whole model in nats a token, after each of them.
        tried: ``step``, ``layer``, ``influence``, ``angle`` and ``kl`` of each candidate, in the model that was left
            when it was tried. A DataFrame.
        tokens: Measured on.
    """

    removed: tuple[int, ...]
    kl: tuple[float, ...]
    tried: pd.DataFrame
    tokens: int

    def summary(self) -> str:
        """One line."""
        steps = ", ".join(f"{layer} ({kl:.3f})" for layer, kl in zip(self.removed, self.kl, strict=True))
        return f"layers left out, and KL after each, over {self.tokens} tokens: {steps}"

    def _repr_html_(self) -> str:
        shown = self.tried.to_html(index=False, float_format="{:.4f}".format)
        return f"<b>Layers</b> {self.summary()}<br>{shown}"


@torch.no_grad()
def choose_layers(
    stream: LayerByLayer, ids: torch.Tensor, count: int, *, proposals: int = PROPOSALS, progress: bool = True
) -> LayerChoice:
    """Chooses layers to leave out, greedily, by the KL that leaving each out is measured to cost.

    Args:
        stream: The model.
        ids: Tokens ``(windows, tokens)`` to measure on.
        count: How many layers.
        proposals: How many are tried at each step: those that turn the hidden states least.
        progress: Show a progress bar.

    Raises:
        LowvramError: There are not so many layers, less one, or fewer than one is to be tried.
    """
    if not 1 <= count < len(stream):
        raise LowvramError(
            f"expected 1 to {len(stream) - 1} layers to leave out ({stream.spec.name} has {len(stream)}), found {count}"
        )
    if proposals < 1:
        raise LowvramError(f"expected one layer or more to try at each step, found {proposals}")
    kept, removed, costs, rows = list(range(len(stream))), [], [], []
    with tqdm(total=count + 1, desc="choosing layers", unit="step", disable=not progress, leave=False) as bar:
        whole, turns, _ = _run(stream, ids, kept, [])
        bar.update()
        for step in range(1, count + 1):
            candidates = _proposed(turns, proposals)
            _, later, states = _run(stream, ids, kept, candidates)
            found = divergences(stream, whole, states)
            rows += [(step, layer, *later[layer], found[layer]) for layer in candidates]
            gone = min(candidates, key=found.__getitem__)
            removed.append(gone)
            costs.append(found[gone])
            kept.remove(gone)
            turns = {layer: turn for layer, turn in later.items() if layer != gone}
            bar.update()
    tried = pd.DataFrame(rows, columns=["step", "layer", "influence", "angle", "kl"])
    return LayerChoice(tuple(removed), tuple(costs), tried, ids.numel())


def choice_windows(ids: torch.Tensor) -> torch.Tensor:
    """Those of a text's windows ``(windows, tokens)`` that candidates are tried on, evenly spread over it."""
    return ids[evenly(len(ids), max(2, CHOICE_TOKENS // ids.shape[1]))]


def _proposed(turns: dict[int, tuple[float, float]], count: int) -> list[int]:
    """The layers that turn the hidden states least, by either measure in turns; in their order in the model."""
    by_measure = [sorted(turns, key=lambda layer, at=at: turns[layer][at]) for at in (0, 1)]
    in_turns = [layer for pair in zip(*by_measure, strict=True) for layer in pair]
    return sorted(list(dict.fromkeys(in_turns))[:count])


def _run(
    stream: LayerByLayer, ids: torch.Tensor, kept: list[int], left_out: list[int]
) -> tuple[torch.Tensor, dict[int, tuple[float, float]], dict[int, torch.Tensor]]:
    """A model of the layers that are kept, and for each candidate the same without it.

    Returns:
        Final states of the first; influence and angle of each of its layers; final states of the others, by candidate.
    """
    hidden, turns, others = stream.embed(ids), {}, {}
    for index in kept:
        before = hidden.clone()
        with stream.layer(index) as layer:
            for states in others.values():
                stream.run_in_place(layer, states)
            stream.run_in_place(layer, hidden)
        turns[index] = 1 - F.cosine_similarity(before, hidden, dim=-1).mean().item(), angle(before, hidden)
        if index in left_out:
            others[index] = before
    return hidden, turns, others
