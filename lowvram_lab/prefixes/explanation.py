"""Why a prompt is remembered as far as it is: what was found of it, for reading.

Derived in: notebooks/10_remember.ipynb
"""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass

from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.prefixes.store import DISK, RAM


@dataclass(frozen=True)
class Explanation:
    """How much of a prompt is remembered, and why no more.

    Attributes:
        tokens: Of the prompt.
        hit_tokens: How many of them, from the first on, need not be read.
        places: Of each block of 128 tokens that is there, ``"RAM"`` or ``"disk"``, in order.
        reason: Why no more of it is, in words; ``None`` where only the rest is left: a block at most, always read.
        differs_at: Place of the first token that is another than in what is remembered, where that is the reason.
        differs_text: That token of the prompt as text.
        drift: Why what was said before in this chat is no longer read as it was, in words: the first token that is
            another, and what of the template did it; ``None`` where it is.
        answer_tokens: Tokens of the answer that is remembered, which the model verifies; 0 where there is none.
    """

    tokens: int
    hit_tokens: int
    places: tuple[str, ...]
    reason: str | None
    differs_at: int | None = None
    differs_text: str | None = None
    drift: str | None = None
    answer_tokens: int = 0

    @property
    def text(self) -> str:
        """In one or two sentences."""
        counts = {"in RAM": self.places.count(RAM), "on disk": self.places.count(DISK)}
        where = " and ".join(f"{count} {place}" for place, count in counts.items() if count)
        blocks = f" (in blocks of {BLOCK_TOKENS}: {where})" if where else ""
        found = f"{self.hit_tokens} of {self.tokens} prompt tokens are remembered{blocks}"
        if self.answer_tokens:
            found += f", and {self.answer_tokens} of an answer"
        if self.drift is not None:
            found += f"; this chat is no longer what it was: {self.drift}"
        if self.reason is None:
            return f"{found}; the rest is at most a block, and always read"
        token = "" if self.differs_text is None else f" (the prompt has {self.differs_text!r} there)"
        return f"{found}; not those from token {self.hit_tokens} on: {self.reason}{token}"

    def to_dict(self) -> dict:
        """Plain data."""
        return {**asdict(self), "places": list(self.places)}

    def _repr_html_(self) -> str:
        return f"<b>Remembered</b> {html.escape(self.text)}"
