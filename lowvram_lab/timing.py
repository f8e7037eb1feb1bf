"""Time calls side by side, see when other work disturbs it, and try again. Knows nothing of models."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch

ROUND_S = 0.01
"""Seconds of a turn; at least one call."""

ROUNDS = 12

ATTEMPTS = 3
"""How often a disturbed timing is repeated; the least disturbed one counts."""


@dataclass(frozen=True)
class Circumstances:
    """When rates were measured, and how steadily.

    Attributes:
        measured_at: Seconds since the epoch.
        spread: Median round over the least disturbed one, of the least steady timing; 1 is perfectly steady.
        others: Cores that other work of the machine held meanwhile, on average.
    """

    measured_at: float
    spread: float = 1.0
    others: float = 0.0

    STEADY_SPREAD = 1.25
    STEADY_OTHERS = 0.25

    @property
    def steady(self) -> bool:
        """Whether the figures are the machine's own: rounds agree, and nothing else held its cores."""
        return self.spread <= self.STEADY_SPREAD and self.others <= self.STEADY_OTHERS

    def words(self, now: float) -> str:
        """How old and how steady, in words."""
        age = max(0.0, now - self.measured_at)
        unit, name = next(((s, n) for s, n in ((86400, "d"), (3600, "h"), (60, "min")) if age >= s), (1, "s"))
        disturbed = "" if self.steady else f", disturbed: other work held {self.others:.1f} cores"
        return f"measured {age / unit:.0f} {name} ago, rounds within {self.spread - 1:.0%}{disturbed}"


@dataclass(frozen=True)
class Timing:
    """Seconds of calls that were measured side by side.

    Attributes:
        seconds: A call, by name: the least disturbed round.
        usual_seconds: The median round. Memory's bandwidth is shared with whoever else computes on the machine, and a
            whole answer never gets the best of it.
        circumstances: When, and how steady.
    """

    seconds: dict[object, float]
    usual_seconds: dict[object, float]
    circumstances: Circumstances


def time_calls(calls: Mapping[object, Callable[[], object]], place: str = "cpu") -> Timing:
    """Times calls in rounds, in each of which every call has its turn.

    What is subtracted from each other is then measured side by side: a disturbance outlasts a turn, seldom all rounds.
    Where the rounds disagree, or other work held the cores, all of it is done again.

    Args:
        calls: What to call, by name.
        place: Where it computes, ``"gpu"`` (a CUDA card, waited for) or ``"cpu"``.
    """
    wait = torch.cuda.synchronize if place == "gpu" else lambda: None
    for call in calls.values():
        call()
        wait()
    found = []
    for _ in range(ATTEMPTS):
        found.append(_attempt(calls, wait))
        if found[-1].circumstances.steady:
            break
    return min(found, key=lambda timing: (not timing.circumstances.steady, timing.circumstances.spread))


def _attempt(calls: Mapping[object, Callable[[], object]], wait: Callable[[], object]) -> Timing:
    rounds: dict[object, list[float]] = {name: [] for name in calls}
    busy, began = _busy_seconds(), time.perf_counter()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            done, started = 0, time.perf_counter()
            while True:
                call()
                done += 1
                if time.perf_counter() - started >= ROUND_S:
                    break
            wait()
            rounds[name].append((time.perf_counter() - started) / done)
    others = (_busy_seconds() - busy) / (time.perf_counter() - began)
    least = {name: min(values) for name, values in rounds.items()}
    usual = {name: statistics.median(values) for name, values in rounds.items()}
    spread = max(usual[name] / least[name] for name in rounds)
    return Timing(least, usual, Circumstances(time.time(), spread, max(0.0, others)))


def _busy_seconds() -> float:
    """Seconds of processor time that anything but this process has taken since the machine began."""
    everyone = psutil.cpu_times()
    idle = everyone.idle + getattr(everyone, "iowait", 0.0)
    guests = getattr(everyone, "guest", 0.0) + getattr(everyone, "guest_nice", 0.0)  # in user and nice already
    own = os.times()
    return sum(everyone) - idle - guests - own.user - own.system
