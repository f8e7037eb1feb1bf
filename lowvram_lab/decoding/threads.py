"""How many CPU threads decode a token where a plan does not say: what the tokens themselves show to be the fastest.

More threads are not always faster: one that shares its core with other work makes all others wait at the end of every
product, 8 ms each time on Linux. So a few tokens are decoded with each number, the least first; and a number that lost
is tried again now and then, the more it lost the later. When tokens suddenly take longer, all are tried at once.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowvram_lab.machine import cpu_threads

TRIAL = 3
"""Tokens of a trial, of which the median counts; it ends with one that takes longer than they do now."""

KEPT = 5
"""Latest tokens, whose median is what a token takes."""

SOONEST = 16
"""Fewest tokens until a number that lost is tried again."""

SHARE = 0.02
"""Of the time of all tokens that trials may lose."""

FASTER = 0.95
"""Of what a token takes, below which another number takes over."""

SUDDENLY = 1.5
"""Times what a token took before; two such in a row, and all numbers are tried."""


def thread_counts() -> list[int]:
    """One, half of torch's number, all of it: what ``OMP_NUM_THREADS`` or the caller allowed torch is the most."""
    most = torch.get_num_threads()
    return sorted({1, max(1, most // 2), most})


class FastestThreads:
    """Chooses the number of threads for each token.

    Args:
        counts: Numbers to choose from, the least first.

    Attributes:
        best: The fastest that is known.
    """

    def __init__(self, counts: list[int]):
        self.best = counts[0]
        self._recent: deque[float] = deque(maxlen=KEPT)  # seconds of tokens with the best
        self._tried: list[float] = []  # of those in the trial
        self._due = dict.fromkeys(counts, 0)  # token from which on a number is tried
        self._tokens = self._slow = 0

    @property
    def count(self) -> int:
        """Threads of the next token."""
        waiting = [count for count in self._due if count != self.best and self._due[count] <= self._tokens]
        return waiting[0] if waiting and len(self._recent) >= TRIAL else self.best

    @contextmanager
    def token(self) -> Iterator[None]:
        """Decodes a token in this block with ``count`` threads, and learns from it."""
        with cpu_threads(self.count):
            began = time.perf_counter()
            yield
            self.took(time.perf_counter() - began)

    def took(self, seconds: float) -> None:
        """Notes how long the token took that ``count`` was for."""
        count = self.count
        self._tokens += 1
        if self._tokens == 1:  # caches were cold
            return
        if count == self.best:
            self._watch(seconds)
            return
        usual = statistics.median(self._recent)
        self._tried.append(seconds)
        if seconds < usual and len(self._tried) < TRIAL:
            return
        if seconds < usual and statistics.median(self._tried) < FASTER * usual:
            self._due[self.best] = self._tokens + SOONEST
            self.best, self._recent = count, deque(self._tried, maxlen=KEPT)
        else:
            lost = max(0.0, seconds - usual)
            self._due[count] = self._tokens + max(SOONEST, math.ceil(lost / (SHARE * usual)))
        self._tried = []

    def _watch(self, seconds: float) -> None:
        """A token with the best number."""
        slower = bool(self._recent) and seconds > SUDDENLY * statistics.median(self._recent)
        self._slow = self._slow + 1 if slower else 0
        if self._slow < 2:
            self._recent.append(seconds)
            return
        self._slow, self._recent = 0, deque([seconds] * TRIAL, maxlen=KEPT)
        self._due = dict.fromkeys(self._due, self._tokens)
