"""Which layers seem to matter: how far each turns what flows through it. It proposes what to leave out, no more.

A layer that hardly turns the hidden states may still be the one that everything after it relies on; what leaving it out
costs, ``choose_layers`` measures.

Source: block influence, Men et al. 2024, arXiv:2403.03853; angular distance of a run of layers, Gromov et al. 2024,
arXiv:2403.17887.
"""

import math
from collections import deque
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F  # noqa: N812
from tqdm.auto import tqdm

from lowvram_lab.weights.layerwise import LayerByLayer

LONGEST_RUN = 8
"""Layers of the longest run whose angle is measured."""


@dataclass(frozen=True)
class Influence:
    """How far layers turn the hidden states.

    Attributes:
        table: ``layer``, ``influence`` (1 less the mean cosine of what goes in and what comes out: 0 for a layer that
            does nothing) and ``angle`` (mean angle between the two, a share of 180 degrees). A DataFrame.
        runs: The angle of what goes into a layer (row) and what comes out after so many layers (column, from 1 on);
            NaN where there are no more. A DataFrame.
        tokens: Measured on.
    """

    table: pd.DataFrame
    runs: pd.DataFrame
    tokens: int

    def _repr_html_(self) -> str:
        shown = self.table.to_html(index=False, float_format="{:.4f}".format)
        return f"<b>Layers' influence</b> over {self.tokens} tokens<br>{shown}"


@torch.no_grad()
def layer_influence(
    stream: LayerByLayer, ids: torch.Tensor, *, longest_run: int = LONGEST_RUN, progress: bool = True
) -> Influence:
    """Measures how far each layer, and each run of layers, turns the hidden states.

    Args:
        stream: The model.
        ids: Tokens ``(windows, tokens)``.
        longest_run: Layers of the longest run; its states are held at once, ``tokens x hidden x 4`` bytes each.
        progress: Show a progress bar.
    """
    hidden, count = stream.embed(ids), len(stream)
    before = deque([hidden.clone()], maxlen=longest_run)
    influence, runs = [], torch.full((count, longest_run), math.nan)
    for index in tqdm(range(count), desc="influence", unit="layer", disable=not progress, leave=False):
        with stream.layer(index) as layer:
            stream.run_in_place(layer, hidden)
        influence.append(1 - F.cosine_similarity(before[-1], hidden, dim=-1).mean().item())
        for back, states in enumerate(reversed(before)):
            runs[index - back, back] = angle(states, hidden)
        before.append(hidden.clone())
    table = pd.DataFrame({"layer": range(count), "influence": influence, "angle": runs[:, 0].tolist()})
    columns = range(1, longest_run + 1)
    return Influence(table, pd.DataFrame(runs.numpy(), columns=columns), ids.numel())


def angle(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean angle between hidden states ``(..., hidden)``, a share of 180 degrees."""
    cosine = F.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
    return (torch.arccos(cosine) / math.pi).mean().item()
