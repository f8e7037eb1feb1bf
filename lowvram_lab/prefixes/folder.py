"""Remembered blocks on disk: one folder, one file a block, never more bytes than the budget.

Whoever writes holds the folder's lock, adds up what is really there, and makes room before it writes. A process that
is killed leaves at most a file under a temporary name, which the next writer removes. Files of other names count and
are left alone: the folder may hold something of the user's own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowvram_lab.errors import LowvramError
from lowvram_lab.files import cache_dir
from lowvram_lab.prefixes import block_file
from lowvram_lab.prefixes.block_file import PARTIAL, SUFFIX, UnusableError
from lowvram_lab.prefixes.keys import DIGITS, name_of
from lowvram_lab.prefixes.worth import Worth
from lowvram_lab.units import format_bytes

logger = logging.getLogger(__name__)

LONGEST_WAIT_S = 10
"""For another process that writes, where a user asked for something to be pinned or removed."""

LONGEST_WAIT_TO_WRITE_S = 2
"""The same where a chat keeps what it read; then that is not kept, and the next does not wait."""

LONGEST_WAIT_TO_NOTE_S = 1
"""The same where it is only noted what was used: the end of an answer waits for that."""

INDEX = "index.json"
INDEX_ROOM = 320
"""Bytes that the index may take for a block: its name twice and a number, and as much again while it is written.

What it says beside blocks has as much.
"""

LOCK = ".lock"

_BLOCK = re.compile(rf"([0-9a-f]{{{DIGITS}}}-[0-9a-f]{{{DIGITS // 2}}}){re.escape(SUFFIX)}")
_LEFTOVER = re.compile(rf"\.({_BLOCK.pattern}|{re.escape(INDEX)})\.[0-9a-f]+{re.escape(PARTIAL)}")


@dataclass(frozen=True)
class Entry:
    """A block that is on disk.

    Attributes:
        name: Of its file, without the suffix.
        size: In bytes.
        facts: What is said of it.
        inode: Of its file, which is another once it was written anew.
    """

    name: str
    size: int
    facts: Mapping[str, str] = field(repr=False)
    inode: int = field(default=0, repr=False)

    @property
    def parent(self) -> str:
        """Name of the block before it; empty for the first."""
        before = self.facts.get("parent", "")
        return before and name_of(before, self.facts.get("root", ""))

    @property
    def seconds(self) -> float:
        """What reading its tokens took."""
        return seconds_of(self.facts)


def seconds_of(facts: Mapping[str, str]) -> float:
    """What reading a block's tokens took, by what is said of it; 0 where no such number is."""
    with contextlib.suppress(ValueError):
        found = float(facts.get("seconds", ""))
        return found if 0 <= found < math.inf else 0.0
    return 0.0


def default_folder() -> Path:
    """Where prompts are remembered."""
    return cache_dir() / "prefixes"


class Folder:
    """The folder.

    Args:
        path: Where; made where there is none, for this user alone.
        budget: Most bytes of all that lies there; ``None`` where nothing is written. Where more lies there, since it
            was larger before, the next prompt that is found or kept makes it less; pinned blocks stay.

    Raises:
        LowvramError: It cannot be made, or is somebody else's, or others may open it. A link to a folder that is this
            user's alone is followed.
    """

    def __init__(self, path: Path | None = None, budget: int | None = None):
        self.path, self.budget = Path(path or default_folder()), budget
        self._known: dict[str, Entry] = {}
        self._said: set[str] = set()
        self._waited = False  # in vain, the last time: whoever has the lock may have it for long
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

    def has(self, name: str) -> bool:
        """Whether something lies where a block's file belongs; it may be damaged."""
        try:
            return os.path.lexists(self.file(name))
        except OSError:
            return False

    def entries(self) -> list[Entry]:
        """What is there, in the order of names; what is no block's file is left out."""
        found = {}
        for file, (size, inode) in self._files().items():
            if name := _block_in(file):
                known = self._known.get(name)
                same = known is not None and (known.size, known.inode) == (size, inode)
                found[name] = known if same else Entry(name, size, self._facts(name), inode)
        self._known = found
        return list(found.values())

    def _facts(self, name: str) -> dict[str, str]:
        with contextlib.suppress(UnusableError):
            return block_file.facts_of(self.file(name))
        return {}

    @property
    def bytes(self) -> int:
        """Bytes of all files that lie there."""
        return sum(size for size, _ in self._files().values())

    @property
    def pinned(self) -> set[str]:
        """Names of the blocks that stay."""
        return self._index()[1]

    def write(self, name: str, data: bytes, kept: Collection[str], anew: bool = False) -> bool:
        """Writes a block, unless it is there or there is no room; whether it is there now.

        Args:
            name: Its name.
            data: Its file.
            kept: Names of blocks that are not to make room: those before it.
            anew: Whether what lies there cannot be used, and is to be replaced.
        """
        if self.budget is None:
            return False
        try:
            with self._locked(LONGEST_WAIT_TO_WRITE_S * (not self._waited)):
                if anew:
                    self.file(name).unlink(missing_ok=True)
                elif self.has(name):
                    return True
                if not self._make_room(len(data) + INDEX_ROOM, kept, *self._index()):
                    self._say_where_none_fits(len(data))
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
            with self._locked(LONGEST_WAIT_TO_NOTE_S * (not self._waited)):
                worth, pinned = self._index()
                sizes = self._block_sizes()
                for name, seconds in found.items():
                    if name in sizes:
                        worth.used(name, seconds, sizes[name])
                self._make_room(0, (), worth, pinned)
                self._write_index(worth, pinned)
        except (OSError, LowvramError) as error:
            self._say(f"what was used is not noted: {getattr(error, 'strerror', None) or error}")

    def pin(self, names: Collection[str]) -> None:
        """Lets blocks that are there stay, whatever else needs room.

        Raises:
            OSError: It cannot be noted.
            LowvramError: The folder is gone, and cannot be made again.
        """
        with self._locked(LONGEST_WAIT_S):
            worth, pinned = self._index()
            self._write_index(worth, pinned | set(names))

    def unpin(self, names: Collection[str] | None = None) -> int:
        """Lets pinned blocks go where there is need of room, or all that are pinned; returns how many that were.

        Raises:
            OSError, LowvramError: See ``pin``.
        """
        with self._locked(LONGEST_WAIT_S):
            worth, pinned = self._index()
            loose = pinned if names is None else pinned & set(names)
            self._write_index(worth, pinned - loose)
        return len(loose)

    def remove(self, names: Collection[str] | None = None) -> dict[str, int]:
        """Removes blocks, or all that are there, pinned ones too; returns the bytes of each, by name.

        Raises:
            OSError: One cannot be removed.
            LowvramError: The folder is gone, and cannot be made again.
        """
        with self._locked(LONGEST_WAIT_S):
            gone = {name: size for name, size in self._block_sizes().items() if names is None or name in names}
            for name in gone:
                self.file(name).unlink(missing_ok=True)
            self._write_index(*self._index())
        return gone

    def _make_room(self, needed: int, kept: Collection[str], worth: Worth, pinned: set[str]) -> bool:
        """Removes what is worth least until there is room for so many bytes; whether there is.

        Where that cannot be, nothing goes but what is above the budget by itself.
        """
        entries = {entry.name: entry for entry in self.entries()}
        others = sum(size for file, (size, _) in self._files().items() if not _block_in(file) and file != INDEX)
        over = others + sum(map(_takes, entries.values())) + INDEX_ROOM - self.budget
        if over + needed <= 0:
            return True
        for entry in entries.values():  # whoever wrote it was killed before it was noted, or the index is gone
            if entry.name not in worth.of:
                worth.used(entry.name, entry.seconds, entry.size)
        pinned_too = self._with_those_before(pinned, entries)
        over = self._give_up(over, entries, worth, pinned_too)
        stay = {*kept, *pinned_too}
        if over + needed <= sum(_takes(entry) for entry in entries.values() if entry.name not in stay):
            over = self._give_up(over + needed, entries, worth, stay) - needed
        self._write_index(worth, pinned)
        return over + needed <= 0

    def _give_up(self, over: int, entries: dict[str, Entry], worth: Worth, stay: Collection[str]) -> int:
        """Removes blocks, from ``entries`` too, until so many bytes are free; returns how many are not."""
        parents = {name: entry.parent for name, entry in entries.items()}
        while over > 0 and (name := worth.least(parents, stay)) is not None:
            self.file(name).unlink(missing_ok=True)
            worth.given_up(name)
            over -= _takes(entries.pop(name))
            parents.pop(name)
        return over

    def _remove_leftovers(self) -> None:
        """Of processes that were killed while they wrote: this one has the lock."""
        for file in self._files():
            if _LEFTOVER.fullmatch(file):
                (self.path / file).unlink(missing_ok=True)

    @staticmethod
    def _with_those_before(names: Collection[str], entries: Mapping[str, Entry]) -> set[str]:
        """Blocks, and all that they follow."""
        found = set()
        for name in names:
            while name in entries and name not in found:
                found.add(name)
                name = entries[name].parent
        return found

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and inode of each file, by its whole name, in order; none where the folder cannot be read."""
        files = {}
        with contextlib.suppress(OSError), os.scandir(self.path) as found:
            for each in found:
                with contextlib.suppress(OSError):  # another process removed it
                    if not each.is_dir(follow_symlinks=False):
                        facts = each.stat(follow_symlinks=False)
                        files[each.name] = facts.st_size, facts.st_ino
        return dict(sorted(files.items()))

    def _block_sizes(self) -> dict[str, int]:
        """Size of each block's file, by the block's name."""
        return {name: size for file, (size, _) in self._files().items() if (name := _block_in(file))}

    def _index(self) -> tuple[Worth, set[str]]:
        """What blocks are worth, and which are pinned. One that is damaged says nothing, which costs no answer."""
        try:
            found = json.loads(block_file.small_file(self.path / INDEX))
            worth = Worth(float(found["level"]), {str(name): float(value) for name, value in found["worth"].items()})
            pinned = {str(name) for name in found["pinned"]}
        except (UnusableError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            return Worth(), set()
        usable = all(0 <= value < math.inf for value in (worth.level, *worth.of.values()))
        return (worth, pinned) if usable else (Worth(), pinned)

    def _write_index(self, worth: Worth, pinned: set[str]) -> None:
        """Notes what blocks that are there are worth, and which are pinned; no blocks, no index."""
        there = self._block_sizes()
        if not there:
            (self.path / INDEX).unlink(missing_ok=True)
            return
        worth.forget_all_but(there)
        found = {"level": worth.level, "worth": worth.of, "pinned": sorted(pinned & set(there))}
        block_file.write(self.path / INDEX, json.dumps(found).encode())

    @contextlib.contextmanager
    def _locked(self, wait_s: float) -> Iterator[None]:
        """Keeps other processes from writing; makes the folder where it was removed while it was in use.

        Raises:
            OSError: Another process writes for longer.
            LowvramError: There is no folder, and none can be made.
        """
        from filelock import FileLock, Timeout

        self._make()  # before the lock does, which would make it for others too
        try:
            with FileLock(self.path / LOCK, timeout=wait_s, mode=0o600):
                self._waited = False
                self._remove_leftovers()
                yield
        except Timeout as error:
            self._waited = True
            raise OSError(0, f"another process has been writing there for {wait_s} s") from error

    def _say_where_none_fits(self, size: int) -> None:
        """A budget may hold a block's keys and values and not what is said of them."""
        if (needed := size + 2 * INDEX_ROOM) > self.budget:
            found = format_bytes(self.budget)
            self._say(f"nothing is remembered: a block takes {format_bytes(needed)} on disk, found a budget of {found}")

    def _say(self, text: str) -> None:
        """Each line once."""
        if text not in self._said:
            self._said.add(text)
            logger.warning("%s: %s", self.path, text)


def _block_in(file: str) -> str:
    """Name of the block in a file of this name; empty where it is none."""
    found = _BLOCK.fullmatch(file)
    return found[1] if found else ""


def _takes(entry: Entry) -> int:
    """Bytes of a block, and those that the index may take for it."""
    return entry.size + INDEX_ROOM
