"""Profiles of other machines without a GPU: what plans and speeds are forecast for where no such machine is at hand.

A profile is a JSON file of plain figures, each with its source: ``data/targets`` has some of boards that people own,
and a user's own is checked like them. Nothing in it was measured by this library: what follows from it is *assumed*.
"""

import difflib
import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_lab.errors import LowvramError
from lowvram_lab.packaged import data_path, read_text
from lowvram_lab.rates.assumed import AssumedMachine
from lowvram_lab.rates.profile import ASSUMED, Profile

if TYPE_CHECKING:
    import pandas


class Target(Profile):
    """Another machine that plans are made for: a profile, and the rates that follow from it."""

    @property
    def machine(self) -> AssumedMachine:
        """Its rates, for ``forecast_speed(plan, machine=target.machine)``."""
        return AssumedMachine(self)


def find_target(name: str) -> Target:
    """A target by its name (``targets()`` lists them), or a profile of one's own by its path (``"my-board.json"``).

    Raises:
        LowvramError: There is none of this name; the nearest is named. Or the file is damaged: the figure is named.
    """
    if name.lower().endswith(".json") or Path(name).is_file():
        return read_target(name)
    known, plain = _packaged(), _plain(name)
    by_plain = {_plain(each): each for each in known}
    if plain in by_plain:
        return known[by_plain[plain]]
    near = difflib.get_close_matches(plain, by_plain, n=1, cutoff=0.3)
    nearest = f"; the nearest is {by_plain[near[0]]}" if near else ""
    raise LowvramError(
        f"unknown target {name!r}{nearest} (known: {', '.join(known)}; or the path of a profile of your own, a .json "
        "file)"
    )


def _plain(name: str) -> str:
    """A name without what people write in several ways: ``"Raspberry Pi 5 8GB"`` as ``"pi5-8gb"``."""
    return re.sub(r"[^a-z0-9]|raspberry", "", name.lower())


def read_target(path: str | Path) -> Target:
    """Reads a profile.

    Raises:
        LowvramError: The file cannot be read, or a figure in it is missing, unknown or out of bounds.
    """
    text = read_text(path)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LowvramError(f"{path}: expected a profile in JSON, found {error}") from error
    if not isinstance(values, dict):
        raise LowvramError(f"{path}: expected a profile, a JSON object, found {type(values).__name__}")
    names = [each.name for each in fields(Target)]
    missing = [name for name in names if name not in values and name != "sources"]
    if missing:
        raise LowvramError(f"{path}: expected {', '.join(missing)}, found no such field")
    unknown = [name for name in values if name not in names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0.0)[0]
        raise LowvramError(f"{path}: found {unknown[0]!r}, which no profile has; the nearest is {near}")
    try:
        return Target(**values)
    except LowvramError as error:
        raise LowvramError(f"{path}: {error}") from error


def targets() -> "pandas.DataFrame":
    """The targets known by name, a row each: ``target``, ``title``, sizes in bytes and rates a second. All assumed."""
    import pandas

    rows = [
        {
            "target": each.name,
            "title": each.title,
            "ram_bytes": each.ram_bytes,
            "usable_bytes": each.usable_bytes,
            "cores": each.cores,
            "memory_bytes_per_s": each.memory_bytes_per_s,
            "disk_bytes_per_s": each.disk_bytes_per_s,
            "origin": ASSUMED,
        }
        for each in _packaged().values()
    ]
    return pandas.DataFrame(rows)


@cache
def _packaged() -> dict[str, Target]:
    files = sorted((each for each in data_path("targets").iterdir() if each.name.endswith(".json")), key=str)
    found = [read_target(str(file)) for file in files]
    return {each.name: each for each in found}
