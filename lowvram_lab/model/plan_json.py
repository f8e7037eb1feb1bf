"""A plan's JSON, read with care: whatever is odd is named before a plan is made of it."""

import json
from pathlib import Path

from lowvram_lab.errors import PlanError

VERSION = 1
_TYPES = {
    "model": (str, "str"),
    "fingerprint": (str, "str"),
    "dtype": (str, "str"),
    "kv_format": (str, "str"),
    "context": (int, "a whole number"),
    "threads": (int | None, "a whole number"),
    "stream_from": (int | None, "a whole number"),
    "prefill_chunk": (int | None, "a whole number"),
    "modules": (dict, "dict"),
}


def read_values(text: str | Path) -> dict:
    """The fields of a plan from its JSON text or file, ``version`` left out; each module an object of two texts.

    Raises:
        PlanError: See ``Plan.from_json``.
    """
    if isinstance(text, Path):
        try:
            text = text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"expected a plan's JSON file, found {text}: {error}") from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"expected a plan as JSON, found text that is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise PlanError(f"expected a plan as a JSON object, found {type(values).__name__}")
    if type(values.get("version")) is not int or values["version"] != VERSION:
        raise PlanError(f"expected plan version {VERSION}, found {values.get('version')!r}")
    values = {"stream_from": None, "prefill_chunk": None, **values}
    if odd := set(values) ^ {"version", *_TYPES}:
        name = sorted(odd)[0]
        raise PlanError(f"plan field {name!r} is {'missing' if name in _TYPES else 'not known'}")
    for name, (kind, words) in _TYPES.items():
        if isinstance(values[name], bool) or not isinstance(values[name], kind):
            raise PlanError(f"plan field {name!r}: expected {words}, found {values[name]!r}"[:200])
    for name, entry in values["modules"].items():
        if not isinstance(entry, dict) or set(entry) != {"format", "device"}:
            raise PlanError(f"{name}: expected an object with format and device, found {entry!r}"[:200])
        if not all(isinstance(value, str) for value in entry.values()):
            raise PlanError(f"{name}: expected format and device as text, found {entry!r}"[:200])
    del values["version"]
    return values
