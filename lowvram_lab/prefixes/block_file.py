"""One block on disk: a safetensors file, mapped, and checked whole before anything of it is used.

Derived in: notebooks/10_remember.ipynb
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save

from lowvram_lab.errors import LowvramError

SUFFIX = ".safetensors"
PARTIAL = ".partial"
IDS = "ids"
"""Name of the block's tokens among its tensors."""

_LONGEST_HEADER = 1 << 20
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8"}
_DTYPES |= {torch.int32: "I32"}


class UnusableError(LowvramError):
    """Why a file cannot be used, in words."""


def data_of(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, str]) -> bytes:
    """A block's file: its tensors, and what is said of them, with a checksum over both.

    Args:
        tensors: Name → tensor, on the CPU.
        facts: Name → text.
    """
    plain = save(dict(tensors))
    entries, payload = _parsed(memoryview(plain))
    return save(dict(tensors), {**facts, "crc32": _checksum(entries, facts, payload)})


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
    with _opened(path) as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if not 0 < length <= _LONGEST_HEADER:
            raise UnusableError("no header")
        return _header(file.read(length)).get("__metadata__", {})


def read(path: Path, wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[dict, dict[str, str]]:
    """Maps a file and checks all of it.

    Args:
        path: The file.
        wanted: Name → dtype and shape of each tensor.

    Returns:
        Name → tensor, and what is said of them.

    Raises:
        UnusableError: It is not there, or not this user's, or damaged, or holds other tensors.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise UnusableError(f"{size} bytes: cut short")
        # a private mapping: torch takes only memory that can be written to
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    view = memoryview(mapped)
    entries, payload = _parsed(view)
    facts = entries.pop("__metadata__", {})
    found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    if found != {name: (_DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in wanted.items()}:
        raise UnusableError("it holds tensors of other shapes")
    said = {name: value for name, value in facts.items() if name != "crc32"}
    if facts.get("crc32") != _checksum(entries, said, payload):
        raise UnusableError("its checksum is another: damaged")
    begin = len(view) - len(payload)
    tensors = {}
    for name, (dtype, shape) in wanted.items():
        first, last = entries[name]["data_offsets"]
        tensors[name] = torch.frombuffer(mapped, dtype=torch.uint8, offset=begin + first, count=last - first)
        tensors[name] = tensors[name].view(dtype).view(shape)
    return tensors, said


def _opened(path: Path):
    """The file, if it is a plain one of this user's that no other may write to."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb")
    except OSError as error:
        raise UnusableError(f"it cannot be opened ({error.strerror})") from error
    found = os.fstat(file.fileno())
    ours = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o022)
    if not stat.S_ISREG(found.st_mode) or not ours:
        file.close()
        raise UnusableError("it is no plain file of this user's, or others may write to it")
    return file


def _parsed(view: memoryview) -> tuple[dict, memoryview]:
    """Header and payload of a file.

    Raises:
        UnusableError: They do not go together.
    """
    length = struct.unpack("<Q", view[:8])[0]
    if not 0 < length <= min(_LONGEST_HEADER, len(view) - 8):
        raise UnusableError("its header is cut short, or none")
    entries, payload = _header(bytes(view[8 : 8 + length])), view[8 + length :]
    try:
        places = sorted(tuple(e["data_offsets"]) for name, e in entries.items() if name != "__metadata__")
        ends = [0, *(last for _, last in places)]
        whole = [first for first, _ in places] == ends[:-1] and ends[-1] == len(payload)
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableError("its header is damaged") from error
    if not whole:
        raise UnusableError("it is cut short, or longer than its header says")
    return entries, payload


def _header(text: bytes) -> dict:
    try:
        entries = json.loads(text)
        plain = all(isinstance(entry, dict) for entry in entries.values())
    except (ValueError, AttributeError, RecursionError) as error:
        raise UnusableError("its header is damaged") from error
    if not plain:
        raise UnusableError("its header is damaged")
    return entries


def _checksum(entries: dict, facts: Mapping[str, str], payload: memoryview) -> str:
    """Over header and tensors: 32 bits, in hexadecimal digits, at the speed of memory.

    It is for accidents; that nobody else writes here is what the file's mode is for.
    """
    said = json.dumps([{k: v for k, v in entries.items() if k != "__metadata__"}, dict(facts)], sort_keys=True)
    return f"{zlib.crc32(payload, zlib.crc32(said.encode())):08x}"
