"""Files of ``data/``: facts of known models' configs and texts written for this library. Knows no model's code."""

import json
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from lowvram_lab.errors import LowvramError


def data_path(*parts: str) -> Traversable:
    """A file or folder of ``data/``: inside the installed package, or beside it in a checkout."""
    packaged = resources.files("lowvram_lab").joinpath("data")
    root = packaged if packaged.is_dir() else Path(__file__).parents[1] / "data"
    return root.joinpath(*parts)


@cache
def packaged_facts() -> dict[str, dict]:
    """For each packaged model its ``hub_id``, ``license``, ``parameters`` (count) and ``source`` note.

    ``same_sizes`` lists the hub ids of its other releases that differ in weights and control tokens alone: what is
    forecast for one holds for the others.
    """
    files = (file.name for file in data_path("configs").iterdir())
    names = sorted(name.removesuffix(".json") for name in files if name.endswith(".json"))
    return {name: _read_config(name)["lowvram"] for name in names}


def packaged_config(name: str) -> dict:
    """A packaged config as plain values, without the facts about it."""
    return {key: value for key, value in _read_config(name).items() if key != "lowvram"}


def _read_config(name: str) -> dict:
    return json.loads(data_path("configs", f"{name}.json").read_text(encoding="utf-8"))


def forecast_table() -> dict:
    """Forecasts beside PyTorch's own counters, as ``benchmarks/forecast_table.py`` keeps them.

    Returns:
        ``cards``: compute capability → ``mode`` (where it was measured), ``summary`` and ``rows``. A row has its
        settings and ``phases``: name → bytes, in the order that the key ``phases`` beside ``cards`` says.

    Derived in: notebooks/02_watch_memory.ipynb
    """
    return json.loads(data_path("forecast_table.json").read_text(encoding="utf-8"))


def sample_text() -> str:
    """The library's own small English and Chinese text."""
    return data_path("bilingual.txt").read_text(encoding="utf-8")


def calibration_text(file: str | Path | None = None) -> str:
    """The text of a file, or by default the library's own (English, Chinese, code; written for this purpose).

    Raises:
        LowvramError: Not readable as UTF-8 text.
    """
    if file is not None:
        return read_text(file)
    return data_path("calibration.txt").read_text(encoding="utf-8")


def read_text(file: str | Path) -> str:
    """A user's text file.

    Raises:
        LowvramError: Not readable as UTF-8 text.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LowvramError(f"{file}: expected a text in UTF-8, found {error}") from error
