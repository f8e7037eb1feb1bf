"""Keeps what a benchmark measured beside what it measured before: one JSON, an entry a model and setting."""

import json
from datetime import UTC, datetime
from pathlib import Path

from lowvram_lab.machine import facts


def keep(path: Path, name: str, found: dict) -> None:
    """Writes an entry, with date, machine and versions, in the place of one of the same name; others stay.

    Args:
        path: The JSON.
        name: Of the entry.
        found: What was measured.
    """
    kept = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    kept[name] = {"date": datetime.now(UTC).date().isoformat(), "machine": facts(), **found}
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
