"""One block on disk: a safetensors file, mapped, and checked whole before anything of it is used.

A file holds its tokens' ids beside their keys and values: so a file under another's name is known, and it can be said
from which token on a prompt is another. They are no greater secret than the rest, as keys and values can be turned back
into text too. What keeps both from others is the mode of file and folder; a salt hides neither.

Derived in: notebooks/10_remember.ipynb
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save

from lowvram_lab.errors import LowvramError

SUFFIX = ".safetensors"
PARTIAL = ".partial"
IDS = "ids"
"""Name of the block's tokens among its tensors."""

IDS_DTYPE = torch.int32

_FACTS = "__metadata__"
"""What safetensors calls what is said of tensors."""

_POPULATE_READ = 22
"""``MADV_POPULATE_READ`` of Linux 5.14, which Python does not name."""

_LONGEST_HEADER = 1 << 20
_LARGEST_SMALL = 1 << 26
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DTYPES |= {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32}


class UnusableError(LowvramError):
    """Why a file cannot be used, in words."""


def data_of(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> bytes:
    """A block's file: its tensors, and what is said of them, with a checksum over both.

    Args:
        tensors: Name → tensor, on the CPU.
        facts: Name → text.

    Raises:
        UnusableError: Its header would be longer than readers take.
    """
    plain = save(dict(tensors))
    entries, payload = _parsed(memoryview(plain))
    data = save(dict(tensors), {**facts, "crc32": _checksum(entries, facts, payload)})
    _parsed(memoryview(data))
    return data


def write(path: Path, data: bytes) -> None:
    """Writes a file that nobody else may read, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


def facts_of(path: Path) -> dict[str, str]:
    """What a file says of its block, unchecked.

    Raises:
        UnusableError: It is no such file.
    """
    with _readable(path) as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if not 0 < length <= _LONGEST_HEADER:
            raise UnusableError("no header")
        return _header(file.read(length)).get(_FACTS, {})


def small_file(path: Path) -> bytes:
    """What lies in a small file of this user's.

    Raises:
        UnusableError: It is not there, or no plain file, or not this user's.
    """
    with _readable(path) as file:
        return file.read(_LARGEST_SMALL)


def read(path: Path, wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[dict, dict[str, str]]:
    """``read_all`` of a file that holds tensors of these names, dtypes and shapes, and no others.

    Raises:
        UnusableError: See ``read_all``; or it holds other tensors.
    """
    tensors, said = read_all(path)
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} != dict(wanted):
        raise UnusableError("it holds tensors of other shapes")
    return tensors, said


def read_all(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Maps a file and checks all of it.

    Returns:
        Name → tensor, and what is said of them.

    Raises:
        UnusableError: It is not there, or not this user's, or damaged, or of a dtype that none of ours is.
    """
    entries, said, mapped, begin = _checked(path)
    return {name: _tensor(entry, mapped, begin) for name, entry in entries.items()}, said


def ids_in(tensors: Mapping[str, torch.Tensor]) -> list[int] | None:
    """The tokens' ids among a file's tensors; ``None`` where there are none that can be."""
    ids = tensors.get(IDS)
    return ids.tolist() if ids is not None and ids.dtype == IDS_DTYPE and ids.dim() == 1 else None


def _tensor(entry: dict, mapped: mmap.mmap, begin: int) -> torch.Tensor:
    """A tensor of a mapped file whose tensors begin there.

    Raises:
        UnusableError: Its dtype is none of ours, or its place not as long as its shape takes.
    """
    (first, last), shape, dtype = entry["data_offsets"], entry["shape"], _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UnusableError("it holds tensors of another dtype")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise UnusableError("its header gives a tensor another place than its shape takes")
    if first == last:  # torch maps no memory of no bytes
        return torch.empty(0, dtype=dtype).view(shape)
    flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=begin + first, count=last - first)
    return flat.view(dtype).view(shape)


def _checked(path: Path) -> tuple[dict, dict[str, str], mmap.mmap, int]:
    """Entries of a file's tensors, what is said of them, the file as it is mapped, and where its tensors begin."""
    with _readable(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise UnusableError(f"{size} bytes: cut short")
        try:  # a private mapping: torch takes only memory that can be written to
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except ValueError as error:  # shorter than a moment ago
            raise UnusableError("it is cut short") from error
    with contextlib.suppress(OSError, ValueError):  # all pages at once, where the system can: it is read whole
        mapped.madvise(_POPULATE_READ)
    view = memoryview(mapped)
    entries, payload = _parsed(view)
    facts = entries.pop(_FACTS, {})
    said = {name: value for name, value in facts.items() if name != "crc32"}
    if facts.get("crc32") != _checksum(entries, said, payload):
        raise UnusableError("its checksum is another: damaged")
    return entries, said, mapped, len(view) - len(payload)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    """A plain file of this user's that no other may write to; that it cannot be read is an ``UnusableError``."""
    try:
        # not blocking: a pipe in its place would be waited for
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            found = os.fstat(handle)
            ours = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
            if not stat.S_ISREG(found.st_mode) or not ours:
                raise UnusableError("it is no plain file of this user's, or others may write to it")
            with open(handle, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(handle)
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else f"it cannot be read ({error.strerror})"
        raise UnusableError(why) from error


def _parsed(view: memoryview) -> tuple[dict, memoryview]:
    """Header and payload of a file.

    Raises:
        UnusableError: They do not go together.
    """
    length = struct.unpack("<Q", view[:8])[0]
    if not 0 < length <= min(_LONGEST_HEADER, len(view) - 8):
        raise UnusableError("its header is cut short, or none, or too long")
    entries, payload = _header(bytes(view[8 : 8 + length])), view[8 + length :]
    places = sorted(tuple(entry["data_offsets"]) for name, entry in entries.items() if name != _FACTS)
    ends = [0, *(last for _, last in places)]
    if [first for first, _ in places] != ends[:-1] or ends[-1] != len(payload):
        raise UnusableError("it is cut short, or longer than its header says")
    return entries, payload


def _header(text: bytes) -> dict:
    """What a header says, every entry of the kind that it must be.

    Raises:
        UnusableError: It is damaged.
    """
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnusableError("its header is damaged") from error
    if not isinstance(entries, dict) or not all(_plain(name, entry) for name, entry in entries.items()):
        raise UnusableError("its header is damaged")
    return entries


def _plain(name: str, entry: object) -> bool:
    """Whether an entry says in text what is said of tensors, or of one tensor its dtype, shape and place."""
    if not isinstance(entry, dict):
        return False
    if name == _FACTS:
        return all(isinstance(value, str) for value in entry.values())
    shape, place = entry.get("shape"), entry.get("data_offsets")
    lists = isinstance(shape, list) and isinstance(place, list) and len(place) == 2
    return lists and all(type(n) is int and n >= 0 for n in shape + place) and isinstance(entry.get("dtype"), str)


def _checksum(entries: dict, facts: Mapping[str, str], payload: memoryview) -> str:
    """Over header and tensors: 32 bits, in hexadecimal digits, at the speed of memory.

    It is for accidents; that nobody else writes here is what the file's mode is for.
    """
    said = json.dumps([{k: v for k, v in entries.items() if k != _FACTS}, dict(facts)], sort_keys=True)
    return f"{zlib.crc32(payload, zlib.crc32(said.encode())):08x}"
