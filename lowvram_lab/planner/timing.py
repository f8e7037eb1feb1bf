"""Time calls side by side, see when other work disturbs it, and try again. Knows nothing of models."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch

from lowvram_lab.planner.rates import Circumstances

ROUND_S = 0.01
"""Seconds of a turn; at least one call."""

ROUNDS = 12

ATTEMPTS = 3
"""How often a disturbed timing is repeated; the least disturbed one counts."""


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
