"""Decode by the high planes, and a token at which they are unsure by both: small when it may be, exact where it counts.

Unsure is where the two likeliest tokens are near each other: the low planes move logits by some amount, and only there
can that change which is the largest. How near is said by a rate of flips: on a text that both have read, tokens are
sorted by that distance, and the threshold is where those above it flip as seldom as was asked for.

Derived in: notebooks/08_precision_on_demand.ipynb
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from lowvram_lab.decoding.decision import HIGH_PLANE, Decision
from lowvram_lab.decoding.decode import Decoder
from lowvram_lab.decoding.speculate import (
    UNSURE,
    Drafting,
    Guess,
    HighPlane,
    Pace,
    Speculation,
    came_true,
    seen_tokens,
)
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError
from lowvram_lab.sampling import Sampling, distribution, penalised


@dataclass(frozen=True)
class Margins:
    """How sure the high planes are on a text, and where both say something else.

    Attributes:
        margins: ``(tokens,)`` float32, of the high planes' logits the largest less the second, the largest first.
        flips: ``(tokens,)`` bool, in the same order: whether both planes have another likeliest token.
    """

    margins: torch.Tensor
    flips: torch.Tensor

    @classmethod
    def of(cls, high: torch.Tensor, both: torch.Tensor) -> Margins:
        """From logits ``(tokens, vocab)`` by the high planes and by both."""
        return cls.joined([cls(margin(high), high.argmax(dim=-1) != both.argmax(dim=-1))])

    @classmethod
    def joined(cls, parts: list[Margins]) -> Margins:
        """Those of several texts, in order."""
        margins, flips = (torch.cat([getattr(part, name) for part in parts]) for name in ("margins", "flips"))
        order = margins.argsort(descending=True, stable=True)
        return cls(margins[order], flips[order])

    @property
    def flip_rate(self) -> float:
        """Share of the tokens at which the high planes alone would say something else."""
        return self.flips.float().mean().item()

    def threshold(self, flip_rate: float) -> float:
        """The margin from which on the high planes are believed, so that they flip at this share of all tokens.

        Raises:
            LowvramError: The rate is none.
        """
        check_flip_rate(flip_rate)
        allowed = flip_rate * len(self.flips)
        beyond = (self.flips.cumsum(0) > allowed).nonzero()
        return 0.0 if not len(beyond) else self.margins[beyond[0, 0]].item() + 1e-6

    def escalated(self, threshold: float) -> float:
        """Share of the tokens that both planes would compute."""
        return (self.margins < threshold).float().mean().item()


def check_flip_rate(rate: float) -> None:
    """Refuses, by a ``LowvramError``, what is no share of tokens."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
        raise LowvramError(f"expected a flip rate from 0 to 1, such as 0.01 for one token in a hundred, found {rate!r}")


def _entropy(logits: torch.Tensor) -> float:
    """Of the distribution that logits ``(1, vocab)`` stand for, in nats."""
    log_chances = torch.log_softmax(logits.float(), dim=-1)
    return -(log_chances.exp() * log_chances).sum().item()


def margin(logits: torch.Tensor) -> torch.Tensor:
    """How far the likeliest token is ahead of the second, in nats: ``(tokens, vocab)`` → ``(tokens,)`` float32."""
    first, second = logits.float().topk(2, dim=-1).values.unbind(-1)
    return first - second


@torch.inference_mode()
def read_margins(model: torch.nn.Module, ids: torch.Tensor, first: int = 0) -> Margins:
    """Lets a model of two planes read ids ``(tokens,)`` twice, by the high planes and by both.

    Of what they predict, that from the token at ``first`` on counts, but for what would come behind the last.
    """
    planes, found = loaded(model).planes, {}
    for both in (False, True):
        with planes.taking(both):
            found[both] = model(ids[None], use_cache=False).logits[0, first:-1]
    return Margins.of(found[False], found[True])


@torch.no_grad()
def escalate(  # noqa: PLR0913  (those of ``speculate``, and one)
    decoder: Decoder,
    ids: torch.Tensor,
    *,
    threshold: float,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
    seen: torch.Tensor | None = None,
    pace: Pace | None = None,
    drafting: Drafting | None = None,
) -> Iterator[int]:
    """Generates as ``speculate`` does, but believes the high planes where their margin is no less than a threshold.

    What they are sure of is not verified. Where they are not, what they guess is, with a few guesses more: these cost
    little beside the pass by both planes that is needed anyway.

    Args:
        decoder: Of weights in two planes.
        ids: See ``generate``, as the arguments down to ``seen``. They are read by both.
        threshold: See ``Margins.threshold``.
        max_new_tokens: See there.
        stop_ids: See there.
        sampling: See there.
        seen: See ``speculate``, as the arguments that follow.
        pace: See there.
        drafting: See there.

    Yields:
        Token ids.
    """
    work = Escalation(decoder, threshold, sampling, pace, drafting)
    yield from work.answer(ids, ids if seen is None else seen, max_new_tokens, stop_ids)


class Escalation(Speculation):
    """Verifies only what the high planes are unsure of; the arguments are those of ``escalate``."""

    def __init__(
        self,
        decoder: Decoder,
        threshold: float,
        sampling: Sampling | None = None,
        pace: Pace | None = None,
        drafting: Drafting | None = None,
    ):
        super().__init__(decoder, sampling, pace, drafting)
        self._threshold = threshold

    def cycle(self, text: list[int], left: int) -> list[Decision]:
        """See ``Speculation``; one token where the high planes are sure of it.

        Where verifying a guess is expected to be faster than asking margins, as in a text that repeats itself or that
        they are unsure all along, that is done; of the high plane's guesses margins are asked now and then anyway.
        """
        cache, began = self.decoder.cache, self.pace.clock()
        most = min(left, cache.forgettable) - 1
        if cache.forgettable < 1:  # the high planes' key could not be taken back
            return self.verified(text, None, began)
        self.n_grams.reads(text)
        kind, length, rate = self.promise(most)
        if not self.pace.asks_margins(kind, rate):
            decisions = self.verified(text, self.made(kind, length, text), began)
            if kind in HighPlane.kinds:
                self.pace.came_of(kind, length, rate, len(decisions), self.pace.clock() - began)
            return decisions
        before = cache.get_seq_length()
        try:
            logits = self.decoder.decode_fast(torch.tensor([text[-1:]]))
            seen = seen_tokens(self.sampling, text, logits)  # a penalty may bring the second token near
            found, entropy = margin(penalised(logits, self.sampling, seen)).item(), _entropy(logits)
            if found >= self._threshold:
                token = self.chosen(logits, text)
                self._note_by_margins([token], began)
                self.pace.gave(None, 1, self.pace.clock() - began)
                return [Decision(token, found, entropy, HIGH_PLANE)]
            guess = self._unsure(text, logits, most)
        except BaseException:  # Ctrl-C too: what the high planes made of a token must not be taken for what both make
            cache.keep(before)
            raise
        cache.keep(before)
        first, *others = self.verified(text, guess, began)
        self._note_by_margins([decision.token for decision in (first, *others)], began)
        return [replace(first, margin=found, entropy=entropy), *others]

    def _note_by_margins(self, tokens: list[int], began: float) -> None:
        """Notes what these tokens took, and how many of them n-grams would have guessed: that costs no pass."""
        self.pace.decided(len(tokens), self.pace.clock() - began)
        guess = self.n_grams.guess(len(tokens))
        if guess is not None:
            self.pace.learns(guess.kind, len(guess.tokens), came_true(guess.tokens, tokens))

    def _unsure(self, text: list[int], logits: torch.Tensor, most: int) -> Guess | None:
        """An unsure token with as many more guesses as are worth their time; nothing where it alone is not.

        Args:
            text: Up to the token before.
            logits: Of the high planes.
            most: Tokens at most.
        """
        further = self.pace.further(most)
        if further is None:
            return None
        token, drawn_from = self.chosen(logits, text), None
        if self.generator is not None:  # before the logits are written over
            drawn_from = [distribution(logits, self.sampling, seen_tokens(self.sampling, text, logits))[0]]
        if not further:
            return Guess(UNSURE, [token], drawn_from)
        began = self.pace.clock()
        others = self.high_plane.guess([*text, token], further, self.sampling, self.generator)
        self.pace.took("draft", (self.pace.clock() - began) / further)
        return Guess(UNSURE, [token, *others.tokens], drawn_from and [*drawn_from, *others.chances])

    def _learn(self, guess: Guess, accepted: int) -> None:
        """See ``Speculation``: the first token of an unsure guess is of another kind than those behind it."""
        if guess.kind != UNSURE:
            super()._learn(guess, accepted)
            return
        first = min(accepted, 1)
        self._count(UNSURE, 1, first)
        if first and len(guess.tokens) > 1:
            self._count(*HighPlane.kinds, len(guess.tokens) - 1, accepted - 1)
