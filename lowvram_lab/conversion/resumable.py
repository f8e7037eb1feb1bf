"""A directory under construction that survives ``kill -9``: finished files are kept and verified, then it is renamed.

Beside the target ``DIR`` lies ``.DIR.partial`` with the files made so far and ``state/``, which steps aside to
``.DIR.state`` while the rename is tried and goes after it. A file counts as finished once its hash is in the journal;
the journal is replaced whole.
"""

import contextlib
import fnmatch
import json
import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lowvram_lab.errors import BudgetError, CheckpointError, LowvramError, PlanError
from lowvram_lab.files import locked, refuse_occupied, settled, sha256_file, write_atomically

logger = logging.getLogger(__name__)


class PartialDirectory:
    """See the module. Use as made by ``building``.

    Attributes:
        path: Where files go.
        state: For what the work itself needs to go on.
    """

    def __init__(self, target: Path, identity: dict):
        self.target = target
        self.path, self._aside = _hidden(target, "partial"), _hidden(target, "state")
        self.state = self.path / "state"
        if self._aside.is_dir() and self.path.is_dir():  # killed before the rename
            os.replace(self._aside, self.state)
        journal = self.state / "journal.json"
        try:
            known = json.loads(journal.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None
        if not isinstance(known, dict) or known.get("identity") != identity or not isinstance(known.get("files"), dict):
            if self.path.exists():
                logger.warning("%s was left by a conversion with other settings: starting afresh", self.path)
                shutil.rmtree(self.path)
            self.state.mkdir(parents=True)
            known = {"identity": identity, "files": {}}
        self._journal = known
        self._write_journal()

    def finished(self, name: str) -> bool:
        """Whether a file is in the journal and still has its hash."""
        recorded = self._journal["files"].get(name)
        path = self.path / name
        return recorded is not None and path.is_file() and sha256_file(path) == recorded

    def save_tensors(self, name: str, tensors: dict) -> None:
        """Writes a safetensors file, flushed to disk before it counts as finished."""
        temporary = self.path / f"{name}.tmp"
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, {"format": "pt"})
        except SafetensorError as error:  # its own class for whatever the system said
            raise LowvramError(
                f"cannot write {temporary}: {error}; make room, then run the same command again"
            ) from error
        self._adopt(temporary, name)

    def save_joined(self, name: str, parts: list[str]) -> None:
        """Makes one safetensors file of finished ones, whose tensors are copied from file to file."""
        temporary = self.path / f"{name}.tmp"
        try:
            join_safetensors([self.path / part for part in parts], temporary)
        except OSError as error:
            raise LowvramError(
                f"cannot write {temporary}: {error}; make room, then run the same command again"
            ) from error
        self._adopt(temporary, name)

    def sha256(self, name: str) -> str:
        """Of a finished file."""
        return self._journal["files"][name]

    def load_tensors(self, name: str) -> dict | None:
        """A finished file's tensors, or ``None``."""
        if not self.finished(name):
            return None
        try:
            return load_file(self.path / name)
        except (SafetensorError, OSError):
            return None

    def copy(self, directory: Path, patterns: Iterable[str]) -> None:
        """Copies files of another directory whose names are like these."""
        for file in sorted(directory.iterdir()):
            if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns):
                shutil.copyfile(file, self.path / file.name)

    def save_json(self, name: str, values: dict) -> None:
        """Writes a JSON file that counts as finished."""
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        self._adopt(temporary, name)

    def load_json(self, name: str) -> dict | None:
        """A finished file's content, or ``None``."""
        return json.loads((self.path / name).read_text(encoding="utf-8")) if self.finished(name) else None

    def forget(self, name: str) -> None:
        """Removes a file that is needed no more."""
        self._journal["files"].pop(name, None)
        self._write_journal()
        (self.path / name).unlink(missing_ok=True)

    def publish(self) -> None:
        """Renames the directory to its target, without the state; where that fails, the work is kept."""
        os.replace(self.state, self._aside)
        try:
            if self.target.is_dir():
                self.target.rmdir()  # an empty one was allowed
            os.replace(self.path, self.target)
        except OSError as error:
            os.replace(self._aside, self.state)
            raise LowvramError(
                f"cannot rename {self.path} to {self.target}: {error.strerror}; see what stands in the way, then run "
                "the same command again: all files are made"
            ) from error
        shutil.rmtree(self._aside, ignore_errors=True)  # if not now, then when this target is built again

    def _adopt(self, temporary: Path, name: str) -> None:
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        digest = sha256_file(temporary)
        os.replace(temporary, self.path / name)
        self._journal["files"][name] = digest
        self._write_journal()

    def _write_journal(self) -> None:
        write_atomically(self.state / "journal.json", json.dumps(self._journal))


def join_safetensors(parts: list[Path], target: Path) -> None:
    """Writes the tensors of several safetensors files into one, without holding any of them.

    Args:
        parts: Files whose tensors bear different names.
        target: The file to write.
    """
    header, bodies, end = {"__metadata__": {"format": "pt"}}, [], 0
    for part in parts:
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            facts = json.loads(file.read(length))
        facts.pop("__metadata__", None)
        for name, fact in facts.items():
            header[name] = fact | {"data_offsets": [end + offset for offset in fact["data_offsets"]]}
        bodies.append((part, 8 + length))
        end += part.stat().st_size - 8 - length
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part, start in bodies:
            with part.open("rb") as source:
                source.seek(start)
                shutil.copyfileobj(source, file, 2**22)


@contextmanager
def building(target: Path, identity: dict):
    """Yields the partial directory of a target, locked against a second process.

    Work left there by another ``identity``, what it is made from, is discarded.

    Raises:
        LowvramError: The target holds something, or its folder is not there.
    """
    target = settled(target)
    if not _hidden(target, "state").is_dir():  # else killed while publishing: see under the lock
        refuse_occupied(target)
    with locked(target) as lock:
        if not _hidden(target, "partial").exists():  # killed between the rename and the removal of the state
            shutil.rmtree(_hidden(target, "state"), ignore_errors=True)
        refuse_occupied(target)
        partial = PartialDirectory(target, identity)
        try:
            yield partial
        except (CheckpointError, BudgetError, PlanError):  # a second run would meet it again: nothing of it stays
            shutil.rmtree(partial.path, ignore_errors=True)
            raise
        if target.exists():  # whoever waits for the lock, or makes a new one, finds the target occupied
            with contextlib.suppress(OSError):  # Windows does not remove a file that is held
                lock.unlink()


def _hidden(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.{what}")
