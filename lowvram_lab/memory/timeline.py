"""Every allocation and release of a run in order, with the module that made it: what was live at any moment, and whose.

Written by the meter, real run or dry run alike. Time is counted in events, not in seconds.
"""

from collections import Counter
from dataclasses import dataclass, field

CATEGORIES = ("weights", "kv", "activations", "workspace")


@dataclass(frozen=True)
class Event:
    """One allocation (``size`` above 0) or release (below 0).

    Attributes:
        size: Bytes in allocator blocks.
        place: ``"gpu"`` or ``"cpu"``.
        owner: Path of the module that allocated it.
        category: ``"weights"``, ``"kv"``, ``"activations"`` or ``"workspace"``.
        phase: Phase it happened in.
        reserved_bytes: What the GPU's allocator held just after (simulated unless on CUDA).
    """

    size: int
    place: str
    owner: str
    category: str
    phase: str
    reserved_bytes: int = 0


@dataclass
class Timeline:
    """The events of a run.

    Attributes:
        events: In order.
    """

    events: list[Event] = field(default_factory=list, repr=False)
    _open: dict = field(default_factory=dict, repr=False)

    def allocate(self, key: int, event: Event) -> None:
        """Called by the meter when a storage appears."""
        self._open[key] = event
        self.events.append(event)

    def release(self, key: int, phase: str, reserved_bytes: int) -> None:
        """Called by the meter when a storage dies."""
        born = self._open.pop(key, None)
        if born is not None:  # else it was there before the timeline began
            self.events.append(Event(-born.size, born.place, born.owner, born.category, phase, reserved_bytes))

    def table(self, place: str = "gpu"):
        """Live bytes by category after every event of a place, with its phase and owner. A DataFrame."""
        import pandas as pd

        rows, live = [], dict.fromkeys(CATEGORIES, 0)
        for event in self.events:
            if event.place == place:
                live[event.category] += event.size
                rows.append((*live.values(), event.reserved_bytes, event.phase, event.owner, event.size))
        table = pd.DataFrame(rows, columns=[*CATEGORIES, "reserved", "phase", "owner", "size"])
        return table.assign(allocated=table[list(CATEGORIES)].sum(axis=1))

    def peak_index(self, place: str = "gpu") -> int:
        """Index among ``events`` of the (first) moment when most bytes of a place were live."""
        live = most = index = 0
        for position, event in enumerate(self.events):
            if event.place == place:
                live += event.size
                if live > most:
                    most, index = live, position
        return index

    def live_at(self, index: int, place: str = "gpu"):
        """Who held what just after an event: one row a module and category, largest first. A DataFrame."""
        import pandas as pd

        totals = Counter()
        for event in self.events[: index + 1]:
            if event.place == place:
                totals[event.owner, event.category] += event.size
        rows = [(owner, category, size) for (owner, category), size in totals.most_common() if size]
        return pd.DataFrame(rows, columns=["module", "category", "bytes"])
