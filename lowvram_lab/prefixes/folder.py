"""Remembered blocks on disk: one folder, one file a block, never more bytes than the budget.

Whoever writes holds the folder's lock, adds up what is really there, and makes room before it writes. A process that
is killed leaves at most a file under a temporary name, which the next writer removes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowvram_lab.errors import LowvramError
from lowvram_lab.files import cache_dir
from lowvram_lab.prefixes import block_file
from lowvram_lab.prefixes.block_file import PARTIAL, SUFFIX, UnusableError
from lowvram_lab.prefixes.keys import name_of
from lowvram_lab.prefixes.worth import Worth

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 10
"""For another process that writes; then what was to be kept is not."""

INDEX = "index.json"
INDEX_ROOM = 320
"""Bytes that the index may take for a block: its name twice and a number, and as much again while it is written."""

LOCK = ".lock"


@dataclass(frozen=True)
class Entry:
    """A block that is on disk.

    Attributes:
        name: Of its file, without the suffix.
        size: In bytes.
        facts: What is said of it.
    """

    name: str
    size: int
    facts: Mapping[str, str] = field(repr=False)

    @property
    def parent(self) -> str:
        """Name of the block before it; empty for the first."""
        before = self.facts.get("parent", "")
        return before and name_of(before, self.facts.get("root", ""))

    @property
    def seconds(self) -> float:
        """What reading its tokens took."""
        with contextlib.suppress(ValueError, KeyError):
            return float(self.facts["seconds"])
        return 0.0


def default_folder() -> Path:
    """Where prompts are remembered."""
    return cache_dir() / "prefixes"


class Folder:
    """The folder.

    Args:
        path: Where; made where there is none, for this user alone.
        budget: Most bytes of all that lies there; ``None`` where nothing is written.

    Raises:
        LowvramError: It cannot be made, or is somebody else's.
    """

    def __init__(self, path: Path | None = None, budget: int | None = None):
        self.path, self.budget = path or default_folder(), budget
        self._known: dict[str, Entry] = {}
        self._said: set[str] = set()
        self._make()

    def _make(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
        except OSError as error:
            raise LowvramError(
                f"{self.path}: prompts cannot be remembered there ({error.strerror}); set LOWVRAM_CACHE to a folder "
                "that can be written to, or remember nothing"
            ) from error
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o077):
            raise LowvramError(
                f"{self.path}: expected a folder that this user alone can open, found mode {found.st_mode & 0o777:o} "
                f"of user {found.st_uid}: what is remembered can be turned back into text; chmod 700 it, or remove it"
            )

    def file(self, name: str) -> Path:
        """The file of a block."""
        return self.path / f"{name}{SUFFIX}"

    def read(self, name: str, wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[dict, dict[str, str]]:
        """The tensors of a block, checked whole, and what is said of it; see ``block_file.read``."""
        return block_file.read(self.file(name), wanted)

    def entries(self) -> list[Entry]:
        """What is there, in the order of names; what is no block's file is left out."""
        found = {}
        for name, size in self._sizes(SUFFIX).items():
            before = self._known.get(name)
            if before is None or before.size != size:
                with contextlib.suppress(UnusableError):
                    before = Entry(name, size, block_file.facts_of(self.file(name)))
            found[name] = before or Entry(name, size, {})
        self._known = found
        return list(found.values())

    @property
    def bytes(self) -> int:
        """Bytes of all that lies there."""
        return sum(self._sizes("").values())

    @property
    def pinned(self) -> set[str]:
        """Names of the blocks that stay."""
        return self._index()[1]

    def write(self, name: str, data: bytes, kept: Collection[str]) -> bool:
        """Writes a block, unless it is there or there is no room; whether it is there now.

        Args:
            name: Its name.
            data: Its file.
            kept: Names of blocks that are not to make room: those before it.
        """
        if self.budget is None:
            return False
        try:
            self._make()  # it may have been removed while it was in use
            with self._locked():
                if self.file(name).exists():
                    return True
                if not self._make_room(len(data), kept):
                    return False
                block_file.write(self.file(name), data)
                return True
        except (OSError, LowvramError) as error:
            self._say(f"what was read is not remembered: {getattr(error, 'strerror', None) or error}")
            return False

    def used(self, found: Mapping[str, float]) -> None:
        """Notes which blocks were used or written, with the seconds that each saves."""
        if not found or self.budget is None:
            return
        try:
            with self._locked():
                worth, pinned = self._index()
                sizes = self._sizes(SUFFIX)
                for name, seconds in found.items():
                    if name in sizes:
                        worth.used(name, seconds, sizes[name])
                worth.forget_all_but(sizes)
                self._write_index(worth, pinned & set(sizes))
        except (OSError, LowvramError) as error:
            self._say(f"what was used is not noted: {getattr(error, 'strerror', None) or error}")

    def pin(self, names: Collection[str]) -> None:
        """Lets blocks stay, whatever else needs room."""
        with self._locked():
            worth, pinned = self._index()
            self._write_index(worth, pinned | set(names))

    def remove(self, names: Collection[str] | None = None) -> int:
        """Removes blocks, or all that is there; returns how many bytes that were."""
        before = self.bytes
        with self._locked():
            for file in self.path.iterdir():
                if file.name != LOCK and (names is None or file.name.removesuffix(SUFFIX) in names):
                    file.unlink(missing_ok=True)
        return before - self.bytes

    def _make_room(self, needed: int, kept: Collection[str]) -> bool:
        """Removes what is worth least until there is room; whether there is. Nothing goes where that cannot help."""
        for stale in self.path.glob(f".*{PARTIAL}"):  # whoever wrote it is gone: this process has the lock
            stale.unlink(missing_ok=True)
        entries = {entry.name: entry for entry in self.entries()}
        worth, pinned = self._index()
        stay = {*kept, *self._with_those_before(pinned, entries)}
        over = needed + sum(e.size for e in entries.values()) + INDEX_ROOM * (len(entries) + 2) - self.budget
        if over > sum(entry.size for entry in entries.values() if entry.name not in stay):
            return False
        parents = {name: entry.parent for name, entry in entries.items()}
        gone = False
        while over > 0 and (name := worth.least(parents, stay)) is not None:
            self.file(name).unlink(missing_ok=True)
            worth.given_up(name)
            over -= entries[name].size + INDEX_ROOM
            parents.pop(name)
            gone = True
        if gone:
            self._write_index(worth, pinned)
        return over <= 0

    @staticmethod
    def _with_those_before(names: Collection[str], entries: Mapping[str, Entry]) -> set[str]:
        """Blocks, and all that they follow."""
        found = set()
        for name in names:
            while name in entries and name not in found:
                found.add(name)
                name = entries[name].parent
        return found

    def _sizes(self, suffix: str) -> dict[str, int]:
        """Size of each file whose name ends so, by name."""
        sizes = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.path) as found:
            for each in found:
                if each.name.endswith(suffix):
                    with contextlib.suppress(FileNotFoundError):  # another process removed it
                        sizes[each.name.removesuffix(suffix)] = each.stat(follow_symlinks=False).st_size
        return dict(sorted(sizes.items()))

    def _index(self) -> tuple[Worth, set[str]]:
        """What blocks are worth, and which are pinned. One that is damaged says nothing, which costs no answer."""
        try:
            found = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
            of = {str(name): float(value) for name, value in found["worth"].items()}
            return Worth(float(found["level"]), of), {str(name) for name in found["pinned"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return Worth(), set()

    def _write_index(self, worth: Worth, pinned: set[str]) -> None:
        values = {name: float(f"{value:.6g}") for name, value in worth.of.items()}
        found = {"level": worth.level, "worth": values, "pinned": sorted(pinned)}
        block_file.write(self.path / INDEX, json.dumps(found).encode())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Raises OSError where another process holds it for long."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.path / LOCK, timeout=LONGEST_WAIT_S, mode=0o600):
                yield
        except Timeout as error:
            raise OSError(0, f"another process has been writing there for {LONGEST_WAIT_S} s") from error

    def _say(self, text: str) -> None:
        """Each line once."""
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s: %s", self.path, text)
