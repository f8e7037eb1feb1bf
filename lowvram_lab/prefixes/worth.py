"""Which remembered block is given up first: the one that saves the fewest seconds a byte, the longer unused the sooner.

GreedyDual-Size: what is used gets the level plus its seconds a byte, the least is given up, and the level rises to what
that had. So a costly block stays longer than a cheap one, and none for ever; no clock is asked, which may be set back.
A block is given up before the one it follows: without that it could not be found.

Source: Cao and Irani 1997, "Cost-aware WWW proxy caching algorithms".
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field


@dataclass
class Worth:
    """What blocks are worth.

    Attributes:
        level: What the last one that was given up was worth.
        of: Name → worth; one that is not in it is worth nothing.
    """

    level: float = 0.0
    of: dict[str, float] = field(default_factory=dict)

    def used(self, name: str, seconds: float, size: int) -> None:
        """Notes that a block was written or used, which saves so many seconds and takes so many bytes.

        Seconds that are none, as a file may say them, are 0: such a block would stay for ever.
        """
        self.of[name] = self.level + (seconds / max(size, 1) if 0 <= seconds < math.inf else 0.0)

    def least(self, parents: Mapping[str, str], kept: Collection[str]) -> str | None:
        """The block to give up next: one that none follows, and that is not kept; ``None`` where there is none.

        Where files say of blocks that they follow each other in a ring, it is one of these.

        Args:
            parents: Name of each block there is → name of the one before it.
            kept: Names of those that must stay.
        """
        followed = set(parents.values())
        may_go = [name for name in parents if name not in kept]
        return min([name for name in may_go if name not in followed] or may_go, key=self._of, default=None)

    def given_up(self, name: str) -> None:
        """Notes that a block has gone."""
        self.level = max(self.level, self.of.pop(name, self.level))

    def forget_all_but(self, names: Iterable[str]) -> None:
        """Forgets blocks that are gone."""
        there = set(names)
        self.of = {name: worth for name, worth in self.of.items() if name in there}

    def _of(self, name: str) -> tuple[float, str]:
        return self.of.get(name, 0.0), name
