"""One measure for fewer tokens, fewer layers and fewer bits: how far a model's predictions are from the whole one's.

Where tokens went, their probability went to those that stayed. So the whole model's prediction is first shared out
among these, which costs ``-log Z`` nats, ``Z`` what they had of it: KL(shared out || whole), to the digit. From there
a model's own divergence counts, KL(shared out || model). The figure is the sum of the two; where no token went the
first is 0 and the second is the KL to the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from lowvram_lab.errors import LowvramError
from lowvram_lab.repository.text import equal_windows
from lowvram_lab.weights.head import HEAD_TOKENS
from lowvram_lab.weights.layerwise import LayerByLayer

WINDOW = 128
"""Tokens that see each other. Windows are what an interval is drawn from: a small text should have a dozen."""

_DRAWS = 2000


@dataclass(frozen=True)
class Distance:
    """How far a model is from the whole one, on one text.

    Attributes:
        by_window: The mean of each window, nats a token.
        tokens: Measured on.
    """

    by_window: tuple[float, ...]
    tokens: int

    @property
    def kl(self) -> float:
        """The mean, nats a token."""
        return sum(self.by_window) / len(self.by_window)

    @property
    def interval(self) -> tuple[float, float]:
        """Where the mean lies for 95 % of texts made of such windows: drawn again, with some of them twice."""
        return _interval(self.by_window)

    def closer_than(self, other: Distance) -> bool:
        """Whether this is less on the same windows, by more than what the choice of windows makes of it.

        Args:
            other: Measured on the same text.

        Raises:
            LowvramError: It was not.
        """
        if len(self.by_window) != len(other.by_window) or self.tokens != other.tokens:
            raise LowvramError(
                f"expected two distances on one text, found {self.tokens} tokens and {other.tokens}; measure both anew"
            )
        return _interval([mine - theirs for mine, theirs in zip(self.by_window, other.by_window, strict=True)])[1] < 0

    def to_dict(self) -> dict:
        """Plain data."""
        return {"kl": self.kl, "interval": list(self.interval), "tokens": self.tokens, "windows": len(self.by_window)}

    def summary(self) -> str:
        """In a few words."""
        low, high = self.interval
        return f"{self.kl:.4f} nats a token ({low:.4f} to {high:.4f})"


class Yardstick:
    """The whole model's predictions on one text, to measure others against.

    Args:
        whole: The model. It is run here, once.
        ids: Tokens ``(windows, tokens)`` that nothing is fitted to.
        progress: Show progress bars.
    """

    def __init__(self, whole: LayerByLayer, ids: torch.Tensor, *, progress: bool = False):
        self._whole, self._ids, self._progress = whole, ids, progress
        self._states = whole.final_states(ids, progress=progress)

    @property
    def tokens(self) -> int:
        """That are measured on."""
        return self._ids.numel()

    @torch.no_grad()
    def distance(
        self,
        other: LayerByLayer | None = None,
        kept: Sequence[int] | None = None,
        layers: Iterable[int] | None = None,
    ) -> Distance:
        """How far a model is from the whole one.

        Args:
            other: The model; by default the whole one, without the tokens that are not kept.
            kept: Old id of each of its tokens, where it has fewer; all ids of the text must be among them.
            layers: Those of it that are run; by default all.

        Raises:
            LowvramError: The text has tokens that were not kept.
        """
        predict = self._whole.predictor()
        states = theirs = None
        if other is not None:
            theirs = other.predictor()
            ids = self._ids if kept is None else renumbered(self._ids, kept)
            states = other.final_states(ids, layers, progress=self._progress)
        stays = None if kept is None else torch.tensor(kept)
        found = []
        for at, window in enumerate(self._states):
            pieces = window.split(HEAD_TOKENS)
            others = [None] * len(pieces) if states is None else states[at].split(HEAD_TOKENS)
            total = 0.0
            for mine, its in zip(pieces, others, strict=True):
                shared_out, cost = _shared_out(predict(mine), stays)
                total += cost
                if its is not None:
                    total += F.kl_div(theirs(its), shared_out, reduction="sum", log_target=True).item()
            found.append(total / len(window))
        return Distance(tuple(found), self.tokens)


@torch.no_grad()
def nats_a_byte(model: LayerByLayer, ids: torch.Tensor, first: Sequence[int], text: str, progress: bool) -> float:
    """What a model needs to predict a text, whatever its tokens are.

    Args:
        model: The model.
        ids: The text's own, ``(tokens,)``.
        first: What begins a window, see ``repository.text``.
        text: The same text, to count its bytes in UTF-8.
        progress: Show a progress bar.
    """
    windows, predict = equal_windows(ids, list(first), WINDOW), model.predictor()
    states, total = model.final_states(windows, progress=progress)[:, :-1], 0.0
    for window, targets in zip(states, windows[:, 1:], strict=True):
        for piece, target in zip(window.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True):
            total -= predict(piece).gather(1, target.unsqueeze(1)).sum().item()
    return total / windows[:, 1:].numel() * len(ids) / len(text.encode())


def renumbered(ids: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """The same text in a vocabulary of fewer tokens.

    Args:
        ids: Of any shape.
        kept: Old id of each token that is left.

    Raises:
        LowvramError: One of the ids is not among them.
    """
    new = torch.full((max(int(ids.max()), *kept) + 1,), -1)
    new[torch.tensor(kept)] = torch.arange(len(kept))
    if bool((new[ids] < 0).any()):
        raise LowvramError(
            f"expected a text all of whose tokens stayed, found {int((new[ids] < 0).sum())} of {ids.numel()} that did "
            "not; measure on a text like the one they were chosen by"
        )
    return new[ids]


def _shared_out(prediction: torch.Tensor, kept: torch.Tensor | None) -> tuple[torch.Tensor, float]:
    """Log-probabilities of the tokens that stayed, and what that costs, summed over tokens."""
    if kept is None:
        return prediction, 0.0
    left = prediction[:, kept]
    share = left.logsumexp(-1, keepdim=True)
    return left - share, -share.sum().item()


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % of the means of as many values drawn from these, with replacement."""
    known = torch.tensor(values, dtype=torch.float64)
    draw = torch.randint(len(known), (_DRAWS, len(known)), generator=torch.Generator().manual_seed(0))
    low, high = known[draw].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
