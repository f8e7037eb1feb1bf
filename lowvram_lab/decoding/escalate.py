"""Decode by the high planes, and a token at which they are unsure by both: small when it may be, exact where it counts.

Unsure is where the two likeliest tokens are near each other: the low planes move logits by some amount, and only there
can that change which is the largest. How near is said by a rate of flips: on a text that both have read, tokens are
sorted by that distance, and the threshold is where those above it flip as seldom as was asked for.

Derived in: notebooks/08_precision_on_demand.ipynb
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowvram_lab.decoding.decision import BOTH_PLANES, HIGH_PLANE, Decision
from lowvram_lab.decoding.decode import Decoder
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError
from lowvram_lab.sampling import Sampling, choose


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
def escalate(
    decoder: Decoder,
    ids: torch.Tensor,
    *,
    threshold: float,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
    seen: torch.Tensor | None = None,
    decisions: list[Decision] | None = None,
) -> Iterator[int]:
    """Generates as ``generate`` does, a token by the high planes, or by both where their margin is below a threshold.

    Args:
        decoder: Of weights in two planes.
        ids: See ``generate``, as the arguments down to ``seen``. They are read by both.
        threshold: See ``Margins.threshold``.
        max_new_tokens: See there.
        stop_ids: See there.
        sampling: See there.
        seen: See there.
        decisions: Where to note how each token was decided.

    Yields:
        Token ids.
    """
    sampling, decisions = sampling or Sampling(), [] if decisions is None else decisions
    remember = sampling.repetition_penalty != 1
    seen = ids if seen is None else seen
    logits, found, entropy, by = decoder.prefill(ids), None, None, BOTH_PLANES
    generator = None
    if sampling.temperature > 0:
        generator = torch.Generator(device=logits.device).manual_seed(sampling.seed)
    for produced in range(1, max_new_tokens + 1):
        token = choose(logits, sampling, generator, seen.to(logits.device) if remember else None).cpu()
        seen = torch.cat((seen, token), dim=-1) if remember else seen
        value = int(token)
        if value in stop_ids:
            return
        decisions.append(Decision(value, found, entropy, by))
        yield value
        if produced < max_new_tokens:
            logits, found, entropy, by = _decided(decoder, token, threshold)


def _decided(decoder: Decoder, token: torch.Tensor, threshold: float) -> tuple:
    """Logits after a token, the high planes' margin and entropy, and who made them."""
    planes, cache = loaded(decoder.model).planes, decoder.cache
    if cache.forgettable < 1:  # the high planes' key could not be taken back
        with planes.taking(both=True):
            return decoder.decode(token), None, None, BOTH_PLANES
    before = cache.get_seq_length()
    with planes.taking(both=False):
        logits = decoder.decode(token)
    log_chances = torch.log_softmax(logits.float(), dim=-1)
    entropy = -(log_chances.exp() * log_chances).sum().item()
    found = margin(logits).item()
    if found >= threshold:
        return logits, found, entropy, HIGH_PLANE
    cache.keep(before)
    with planes.taking(both=True):
        return decoder.decode(token), found, entropy, BOTH_PLANES
