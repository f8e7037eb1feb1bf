"""Files and folders that are written whole or not at all: the cache folder, its markers, locks and hashes.

This module knows nothing about models. It holds the one rule every download and conversion here follows: build under a
temporary name beside the target, write a marker that lists the size of each file, rename into place.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from lowvram_lab.errors import LowvramError

logger = logging.getLogger(__name__)

MARKER = "lowvram.json"
_CHUNK_BYTES = 1 << 20


def expanded(path: str | Path) -> Path:
    """A path with ``~`` written out.

    Raises:
        LowvramError: It begins with the name of a user that this machine does not have.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise LowvramError(
            f"{path}: expected the home of a user that this machine has, found none; write the whole path"
        ) from error


def cache_dir() -> Path:
    """The folder for converted and downloaded models: ``LOWVRAM_CACHE``, else the platform's cache folder."""
    if override := os.environ.get("LOWVRAM_CACHE"):
        return expanded(override)
    if sys.platform == "darwin":
        base = _home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    return base / "lowvram_lab"


def _home() -> Path:
    """The user's; one without a home gets a folder that nothing can be written to, which is then said."""
    try:
        return Path.home()
    except RuntimeError:  # neither HOME nor an entry in the system's list of users, as in some containers
        return Path("/nonexistent")


def writable(folder: Path) -> Path:
    """Makes a folder of the cache where there is none, and returns it.

    Raises:
        LowvramError: Nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise LowvramError(_not_writable(folder, error)) from error


def _not_writable(folder: Path, error: OSError) -> str:
    return (
        f"cannot write to the cache folder {folder}: {error.strerror}; set LOWVRAM_CACHE to a folder that can be "
        "written to"
    )


@functools.lru_cache(maxsize=64)
def not_kept(folder: Path) -> str:
    """Why nothing can be kept in a folder of the cache, or ``""``. Makes none; one that is there may be read-only."""
    try:
        if folder.is_dir():
            return ""
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return _not_writable(folder, error)


def remember(path: Path, text: str) -> None:
    """Keeps a small result in the cache folder; where that cannot be written to, it is found anew the next time."""
    try:
        writable(path.parent)
        write_atomically(path, text)
    except LowvramError:
        _say_not_kept(cache_dir())


@functools.lru_cache(maxsize=64)
def _say_not_kept(folder: Path) -> None:
    """One line, however much would be kept."""
    logger.warning("what is measured here is not kept for the next time: cannot write to the cache folder %s", folder)


def read_marker(directory: Path) -> dict | None:
    """What a finished directory was made from, or None where it is unfinished, damaged, or not made by this library.

    Returns:
        The marker: ``source``, ``sha256`` (of the file it was made from), ``library`` (version), ``files``
        (name to size in bytes), plus whatever the maker added.
    """
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        sizes = {name: (directory / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return marker if sizes == marker["files"] else None


def is_finished(directory: Path, identity: dict) -> bool:
    """Whether the directory's marker holds all of ``identity`` and every file still has its recorded size."""
    marker = read_marker(directory)
    return marker is not None and identity.items() <= marker.items()


def build_directory(target: Path, identity: dict, fill: Callable[[Path], None], **notes) -> Path:
    """Makes ``target`` by calling ``fill`` on an empty directory beside it, unless it is finished already.

    Safe against interruption (nothing half-written is ever called ``target``) and against a second process
    (a lock file beside the target; whoever comes second finds it finished).

    Args:
        target: The directory wanted.
        identity: What the marker must say for an existing directory to count, e.g. ``{"sha256": ...}``.
        fill: Writes the files; whatever it raises passes through, after the temporary directory is removed.
        **notes: More for the marker, not compared; JSON values, like ``identity``.

    Returns:
        ``target``, finished.

    Raises:
        LowvramError: The folder of ``target`` cannot be written to.
    """
    if is_finished(target, identity):
        return target
    writable(target.parent)
    with locked(target):
        if is_finished(target, identity):
            return target
        if target.exists():
            logger.warning("%s does not match its marker (interrupted or changed): building it again", target)
            shutil.rmtree(target)
        _remove_partial(target)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            fill(partial)
            _write_marker(partial, {**notes, **identity})
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def discard_partial(target: Path) -> None:
    """Removes what a killed process has left of ``build_directory``, unless another is at work on ``target``."""
    from filelock import FileLock, Timeout

    if target.parent.is_dir():
        with contextlib.suppress(Timeout), FileLock(_lock_path(target), timeout=0):
            _remove_partial(target)


def _remove_partial(target: Path) -> None:
    """Whoever holds the lock may: those who wrote it are gone."""
    for stale in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def sha256_file(path: Path, progress: bool = False) -> str:
    """SHA-256 of a file as hexadecimal digits, read in pieces of 1 MiB."""
    from tqdm.auto import tqdm

    digest = hashlib.sha256()
    total = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(
            total=total, unit="B", unit_scale=True, desc=f"hashing {path.name}", disable=not progress, leave=False
        ) as bar,
    ):
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def known_sha256(path: Path, progress: bool = False) -> str:
    """Like :func:`sha256_file`, but remembers the answer for as long as path, size and times of change stay."""
    digest = recorded_sha256(path)
    if digest is None:
        facts, record = _hashed(path)
        digest = sha256_file(path, progress)
        remember(record, json.dumps(facts | {"sha256": digest}))
    return digest


def recorded_sha256(path: Path) -> str | None:
    """What :func:`known_sha256` remembers of a file, if anything."""
    facts, record = _hashed(path)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        known = json.loads(record.read_text(encoding="utf-8"))
        if facts.items() <= known.items() and isinstance(known.get("sha256"), str):
            return known["sha256"]
    return None


def _hashed(path: Path) -> tuple[dict, Path]:
    """What must be unchanged for a hash to count, and where that is recorded."""
    stat = path.stat()
    # the last of them nobody can set: a file put in its place may have the other's size and time, as from an archive
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    facts = {"path": str(path.resolve()), "size": stat.st_size, **times}
    return facts, cache_dir() / "hashes" / (hashlib.sha256(facts["path"].encode()).hexdigest()[:24] + ".json")


def _write_marker(directory: Path, facts: dict) -> None:
    files = {p.relative_to(directory).as_posix(): p.stat().st_size for p in directory.rglob("*") if p.is_file()}
    try:
        version = metadata.version("lowvram_lab")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        version = "unknown"
    marker = {**facts, "library": version, "files": dict(sorted(files.items()))}
    write_atomically(directory / MARKER, json.dumps(marker, indent=2) + "\n")


@contextlib.contextmanager
def locked(target: Path):
    """Holds a lock file beside ``target``, and yields its path; waits for another process that has it."""
    from filelock import FileLock, Timeout

    path = _lock_path(target)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is making %s: waiting for it", target)
        lock.acquire()
    try:
        yield path
    finally:
        lock.release()


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes to a temporary name in the same folder, then renames: a reader sees the old file or the new, never half.

    Raises:
        LowvramError: The folder does not exist or cannot be written to.
    """
    payload = data.encode() if isinstance(data, str) else data
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        with open(temporary, "xb") as stream:  # not tempfile: its files are readable by their owner only
            stream.write(payload)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LowvramError(
            f"cannot write {path}: {error.strerror}; choose a folder that exists and is writable"
        ) from error


def settled(target: Path) -> Path:
    """Where a directory will really be made: absolute, links followed.

    Raises:
        LowvramError: A place that no other directory can be renamed to: the current one, or a mount point.
    """
    real = expanded(target).resolve()
    if real == Path.cwd() or os.path.ismount(real):
        what = "the current directory" if real == Path.cwd() else "a mount point"
        raise LowvramError(f"{target}: expected a directory of its own for the output, found {what}; name one in it")
    return real


def refuse_occupied(target: Path) -> None:
    """Raises LowvramError unless something new can be made at ``target``, and whole."""
    target = settled(target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise LowvramError(f"{target}: expected a new or empty directory for the output, found something in it")
    if not target.parent.is_dir():
        raise LowvramError(f"cannot write {target}: its folder does not exist")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises LowvramError unless the disk of ``folder`` has ``needed`` bytes free."""
    from lowvram_lab.units import format_bytes

    free = shutil.disk_usage(folder).free
    if free < needed:
        raise LowvramError(f"{folder}: {what} needs {format_bytes(needed)} of disk, found {format_bytes(free)} free")
