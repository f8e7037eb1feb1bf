"""The low planes of a converted model: a file beside the others, named in ``config.json``, that may be absent.

Without it the directory is an int4 model. With it every module that ``config.json`` names is one in two planes; that
the file belongs to the very conversion, and is whole, its hash says.
"""

from collections.abc import Mapping
from pathlib import Path

from lowvram_lab.errors import CheckpointError
from lowvram_lab.model.formats import FORMATS

KEY = "low_plane"
"""In ``config.json``: what is said of the file, see ``block``."""

FILE = "low_plane.safetensors"


def block(sha256: str, modules: list[str]) -> dict:
    """What ``config.json`` says of a low plane.

    Args:
        sha256: Of its file.
        modules: That have one.
    """
    return {"file": FILE, "sha256": sha256, "modules": modules}


def checked_block(values: Mapping, where: str) -> dict | None:
    """What a config says of a low plane, or ``None``.

    Raises:
        CheckpointError: It says it in another way than ``block``.
    """
    found = values.get(KEY)
    if found is None:
        return None
    names = found.get("modules") if isinstance(found, dict) else None
    plain = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not plain or found.get("file") != FILE or not isinstance(found.get("sha256"), str):
        raise CheckpointError(
            f"{where}: expected {KEY} with file {FILE}, sha256 and modules, found {found!r}"[:300] + "; convert again"
        )
    return found


def in_two_planes(stored: dict[str, str], found: dict | None) -> dict[str, str]:
    """Formats by module, with the low planes that a config says there are."""
    nested = {fmt.plane.name: fmt.name for fmt in FORMATS.values() if fmt.planes > 1}
    named = set(found["modules"]) if found else ()
    return {name: nested.get(fmt, fmt) if name in named else fmt for name, fmt in stored.items()}


def is_missing(directory: Path) -> bool:
    """Whether a directory that holds a converted model's weights lacks the file. One with its config alone does not."""
    return any(directory.glob("*.safetensors")) and not (directory / FILE).is_file()
