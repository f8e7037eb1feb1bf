"""Who decided a token, of weights in two planes."""

from dataclasses import dataclass

ONE_PLANE, HIGH_PLANE, BOTH_PLANES = "the only plane", "the high plane", "both planes"
GUESS_OF_HIGH_PLANE, GUESS_BY_N_GRAMS = "a guess of the high plane", "a guess by n-grams"
GUESS_OF_MEMORY = "an answer remembered"


@dataclass(frozen=True)
class Decision:
    """How a token was decided.

    Attributes:
        token: Its id.
        margin: Of the high planes' logits; ``None`` where they were not asked.
        entropy: Of the high planes' distribution, in nats; ``None`` where they were not asked.
        by: ``"the high plane"`` alone, ``"both planes"``, ``"a guess of the high plane"``, ``"a guess by n-grams"`` or
            ``"an answer remembered"`` that both planes, or all there are, found right; ``"the only plane"`` of weights
            in one.
    """

    token: int
    margin: float | None
    entropy: float | None
    by: str

    @property
    def both(self) -> bool:
        """Whether both planes computed it."""
        return self.by not in (ONE_PLANE, HIGH_PLANE)
