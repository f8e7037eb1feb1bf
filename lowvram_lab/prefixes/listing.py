"""What is remembered on disk, model by model, without loading one; and how it is removed.

Derived in: notebooks/10_remember.ipynb
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_lab.errors import LowvramError
from lowvram_lab.files import expanded
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.prefixes.folder import Entry, Folder, default_folder
from lowvram_lab.prefixes.keys import Root, difference, in_words, machine_fields
from lowvram_lab.prefixes.store import ANSWER, fields_of

if TYPE_CHECKING:
    import pandas

UNREADABLE = "its files cannot be read: damaged"
COLUMNS = ("model", "root", "formats", "kv_format", "salted")
COLUMNS += ("blocks", "pinned", "tokens", "answers", "bytes", "unusable")


def remembered_models(folder: Path | None = None) -> pandas.DataFrame:
    """What is remembered on disk: a row for each model and each root (all that decides its bits beside the tokens).

    Args:
        folder: Where; by default in the cache folder.

    Returns:
        ``model``, ``root`` (a digest), ``formats`` (of its weights), ``kv_format``, ``salted``, ``blocks``, ``pinned``
        (how many of the blocks), ``tokens`` (in blocks), ``answers`` (that were given there), ``bytes`` and
        ``unusable``: why this machine can no longer use the blocks, as far as that is known without the model, else
        ``None``. The largest first. A DataFrame.

    Raises:
        LowvramError: The folder is somebody else's.
    """
    import pandas

    found = _opened(folder)
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in found.entries() if found else ():
        # an answer's own root is shorter: other weights may use it, too
        fields = fields_of(entry.facts)
        groups[entry.facts.get("model", ""), Root(fields, b"").digest if fields else ""].append(entry)
    pinned, now = found.pinned if found else set(), machine_fields() if groups else {}
    rows = [_row(model, root, entries, pinned, now) for (model, root), entries in groups.items()]
    rows.sort(key=lambda row: -row[COLUMNS.index("bytes")])
    table = pandas.DataFrame(rows, columns=list(COLUMNS))
    return table.assign(unusable=table["unusable"].astype(object).where(table["unusable"].notna(), None))


def _row(model: str, root: str, entries: list[Entry], pinned: set[str], now: dict[str, str]) -> tuple:
    fields = fields_of(entries[0].facts)
    blocks = [entry for entry in entries if entry.facts.get("kind") != ANSWER]
    return (
        model,
        root,
        in_words(fields.get("formats", "")),
        fields.get("kv_format", ""),
        fields.get("salt", "none") != "none",
        len(blocks),
        sum(entry.name in pinned for entry in blocks),
        len(blocks) * BLOCK_TOKENS,
        len(entries) - len(blocks),
        sum(entry.size for entry in entries),
        difference(now, fields) if fields else UNREADABLE,
    )


def bytes_remembered(folder: Path | None = None) -> int:
    """Bytes of all files where prompts are remembered on disk, of which the budget is kept."""
    found = _opened(folder)
    return found.bytes if found else 0


def forget(model: str | None = None, folder: Path | None = None) -> dict[str, int]:
    """Removes what is remembered on disk, pinned or not.

    Args:
        model: Of this model alone, by the name or directory it was loaded by; by default of all.
        folder: Where; by default in the cache folder.

    Returns:
        How many bytes that were, by model; ``""`` for files that could not be read.

    Raises:
        LowvramError: Nothing of that model is remembered, or the folder is somebody else's.
        OSError: A file cannot be removed.
    """
    found = _opened(folder)
    if found is None and model is None:
        return {}
    models = _models_in(found)
    freed: dict[str, int] = defaultdict(int)
    for name, size in found.remove(_of_model(models, model)).items():
        freed[models.get(name, "")] += size
    return dict(freed)


def let_go(model: str | None = None, folder: Path | None = None) -> int:
    """Unpins blocks on disk, so that they may go where there is need of room.

    Args:
        model: See ``forget``.
        folder: See ``forget``.

    Returns:
        How many blocks that were.

    Raises:
        LowvramError: Nothing of that model is remembered, or the folder is somebody else's.
        OSError: It cannot be noted.
    """
    found = _opened(folder)
    if found is None and model is None:
        return 0
    return found.unpin(_of_model(_models_in(found), model))


def _models_in(folder: Folder | None) -> dict[str, str]:
    """Name of each block → the model that it is of; empty for one that cannot be read."""
    return {entry.name: entry.facts.get("model", "") for entry in (folder.entries() if folder else ())}


def _of_model(models: dict[str, str], asked: str | None) -> set[str] | None:
    """Which blocks are of a model, of those that are there; ``None`` for all of them."""
    if asked is None:
        return None
    names = {name for name, model in models.items() if _same_model(model, asked)}
    if not names:
        known = ", ".join(sorted({model for model in models.values() if model})) or "there is none"
        raise LowvramError(f"expected a model of which prompts are remembered ({known}), found {asked!r}")
    return names


def _opened(path: Path | None) -> Folder | None:
    """The folder, where there is one: to look at it makes none."""
    path = path or default_folder()
    return Folder(path) if path.is_dir() else None


def _same_model(name: str, asked: str) -> bool:
    """Whether two names are one, or one directory."""
    if name == asked or not name:  # a damaged file says no name
        return name == asked
    try:
        here, there = expanded(name), expanded(asked)
        return there.exists() and here.resolve() == there.resolve()
    except (LowvramError, OSError):  # ~ of a user who is not there
        return False
