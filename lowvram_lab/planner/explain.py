"""Explain an out-of-memory error: what was asked, by whom, when, who held the memory, and what would make it fit.

Derived in: notebooks/01_analyze_the_oom.ipynb
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lowvram_lab.engine.loaded import Loaded
from lowvram_lab.memory.gpu import Gpu, describe_holders
from lowvram_lab.memory.recording import OomEvent
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.suggest import Suggestion, suggest
from lowvram_lab.units import format_bytes

TOP = 10


class OomExplanation:
    """What ``explain_oom`` found; empty while nothing has failed.

    Attributes:
        message: The error's own words.
        event: What was asked, by which module, in which phase, who held the memory; ``None`` for an error from code
            that this library did not load.
        suggestions: Changes that make the plan fit, each verified by a forecast, gentlest first.
        within_forecast: The plan fits by its own forecast: what failed was a run longer than it was made for.
    """

    def __init__(self):
        self.message: str | None = None
        self.event: OomEvent | None = None
        self.gpu: Gpu | None = None
        self.loaded: Loaded | None = None
        self.suggestions: list[Suggestion] = []
        self.within_forecast = False

    @property
    def happened(self) -> bool:
        """Whether there was an out-of-memory error."""
        return self.message is not None

    @property
    def fragmentation_bytes(self) -> int:
        """What the allocator held without using it."""
        return self.event.reserved_bytes - self.event.allocated_bytes if self.event else 0

    def table(self):
        """The ten modules that held most. A DataFrame."""
        import pandas as pd

        holders = self.event.holders[:TOP] if self.event else []
        return pd.DataFrame(
            [(name or "(outside any module)", size) for name, size in holders], columns=["module", "bytes"]
        )

    def summary(self) -> str:
        """The explanation in a few lines."""
        if not self.happened:
            return "no out-of-memory error happened"
        if self.event is None:
            return f"{self.message}\nThe model was not loaded by lowvram_lab: who held the memory is not known."
        event, budget = self.event, self.gpu.budget if self.gpu else None
        asked = format_bytes(event.requested_bytes) if event.requested_bytes else "memory"
        simulated = " (simulated)" if self.gpu and self.gpu.simulated else ""
        lines = [
            f"Out of memory{simulated} during {event.phase}: {event.module or 'the model'} asked for {asked}.",
            f"Held then: {format_bytes(event.allocated_bytes)}, by {describe_holders(event.holders)}.",
            f"Reserved but unused (fragmentation): {format_bytes(self.fragmentation_bytes)}"
            + (f"; CUDA context {format_bytes(budget.context_bytes)}." if budget else "."),
        ]
        if self.within_forecast:
            lines.append(f"The plan's forecast fits at its context of {self.loaded.plan.context}: this run was longer.")
        lines += [f"Would fit: {suggestion}" for suggestion in self.suggestions]
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Plain data."""
        return {
            "message": self.message,
            "event": vars(self.event) if self.event else None,
            "fragmentation_bytes": self.fragmentation_bytes,
            "suggestions": [suggestion.to_dict() for suggestion in self.suggestions],
        }

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return "<br>".join(self.summary().split("\n")) + (self.table().to_html(index=False) if self.event else "")


@contextmanager
def explain_oom(*, suggestions: bool = True) -> Iterator[OomExplanation]:
    """Catches an out-of-memory error, CUDA's or the stand-in's, and explains it instead of raising it.

    Args:
        suggestions: Look for changes that make the plan fit; takes a forecast or ten.

    Yields:
        An ``OomExplanation``; ask ``happened`` after the block. Errors of other kinds pass.
    """
    found = OomExplanation()
    try:
        yield found
    except torch.OutOfMemoryError as error:
        found.message = str(error)
        if (noted := getattr(error, "lowvram", None)) is not None:
            found.event = noted.event
            found.gpu = noted.gpu
            found.loaded = noted.loaded
    if found.happened and suggestions and found.loaded is not None and found.gpu.budget:
        gpu = found.gpu
        plan = found.loaded.plan
        found.within_forecast = forecast(plan, gpu).fits
        found.suggestions = [] if found.within_forecast else suggest(plan, gpu)
