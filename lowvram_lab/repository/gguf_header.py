"""The header of a ``.gguf`` file: its metadata, and where its tensors lie, in one file or in several parts.

Parsed here rather than with ``gguf.GGUFReader``, which takes seconds over a vocabulary and meets tensor data that runs
past the end of the file only when it is used.

Source: the GGUF specification, ggml-org/ggml ``docs/gguf.md``; parts, llama.cpp's ``gguf-split``.
"""

from __future__ import annotations

import functools
import math
import mmap
import re
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lowvram_lab.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGML_F32, _GGML_F16 = 0, 1
_STRING, _ARRAY, _FLOAT32 = 8, 9, 6
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})")
_COUNT, _NUMBER, _ALL = "split.count", "split.no", "split.tensors.count"
_DAMAGED = OSError, ValueError, KeyError, struct.error, OverflowError

FIRST_BYTES = 1 << 20
"""Read of a file elsewhere at first; where the header goes on, four times as many and so on."""

MOST_BYTES = 1 << 26
"""No vocabulary takes so many: a header that goes on is damaged."""


class _PastTheEnd(ValueError):
    """What is read goes on behind the bytes that are there."""


class Place(NamedTuple):
    """Where a tensor lies.

    Attributes:
        kind: Its GGML type.
        start: Its first byte.
        file: In which file.
    """

    kind: int
    start: int
    file: Path


@dataclass(frozen=True)
class GgufHeader:
    """What a file, or the parts of one, say of themselves.

    Attributes:
        metadata: By key; of several parts the first one's.
        tensors: The shape of each, outermost dimension first.
        places: Where each lies.
        files: The file, or its parts in order.
        small: The bytes of small tensors, of a file that is not on this machine.
    """

    metadata: dict
    tensors: dict[str, tuple[int, ...]]
    places: dict[str, Place]
    files: tuple[Path, ...]
    small: dict[str, bytes] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """Such as ``"llama"`` or ``"qwen2"``."""
        return self.metadata["general.architecture"]

    @property
    def dtype(self) -> str:
        """What holds its matrices exactly where they are floats; bfloat16 where some are quantised."""
        kinds = {self.places[name].kind for name, shape in self.tensors.items() if len(shape) > 1}
        if kinds == {_GGML_F16}:
            return "float16"
        return "float32" if kinds <= {_GGML_F32, _GGML_F16} else "bfloat16"

    def type_name(self, name: str) -> str:
        """GGML's name for the type of a tensor, such as ``"Q4_K"``."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.places[name].kind).name


def part_names(name: str) -> list[str]:
    """The names of all parts of a split GGUF, of which ``name`` is one; of a whole file its own alone."""
    stem, suffix = name[: -len(".gguf")], name[-len(".gguf") :]
    match = _PART.fullmatch(stem)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [name]
    return [f"{match[1]}-{number:05}-of-{match[3]}{suffix}" for number in range(1, int(match[3]) + 1)]


def whole_stem(name: str) -> str:
    """A file's name without its suffix, and without what says which part it is."""
    stem = name[: -len(".gguf")]
    match = _PART.fullmatch(stem)
    return match[1] if match else stem


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads metadata and the tensor table, and checks that every tensor lies within the file.

    Args:
        path: The file; of several parts any one, beside which the others lie.

    Raises:
        CheckpointError: Not a GGUF file, an unknown version, truncated, or damaged; or a part is missing or of another
            file.
    """
    files = [path.with_name(name) for name in part_names(path.name)] if path.suffix.lower() == ".gguf" else [path]
    if missing := [file.name for file in files if not file.is_file()] if len(files) > 1 else []:
        raise CheckpointError(
            f"{path}: one of {len(files)} parts, of which {missing[0]} is missing; download all of them into one folder"
        )
    try:
        stamps = tuple((facts.st_size, facts.st_mtime_ns) for facts in (file.stat() for file in files))
    except OSError as error:
        raise _damaged(path, error) from error
    return _read_files(path, tuple(file.absolute() for file in files), stamps)


def whole_header(path: Path, parts: list[GgufHeader]) -> GgufHeader:
    """The header of a file from those of its parts.

    Args:
        path: The file, for messages.
        parts: In order; of a whole file one.

    Raises:
        CheckpointError: They are not the parts of one file.
    """
    header = parts[0] if len(parts) == 1 else _joined(path, parts)
    if not isinstance(header.metadata.get("general.architecture"), str):
        raise CheckpointError(
            f"{path}: damaged or truncated GGUF (no general.architecture in its metadata); download the file again"
        )
    count = header.metadata.get(_COUNT, 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise CheckpointError(f"{path}: damaged GGUF ({_COUNT} is {str(count)[:80]}); download the file again")
    if count not in (0, len(parts)):
        raise CheckpointError(
            f"{path}: one of {count} parts, under another name; expected names that end in -00001-of-{count:05}.gguf "
            "and so on"
        )
    return header


def _joined(path: Path, parts: list[GgufHeader]) -> GgufHeader:
    """One header of the parts' own."""
    tensors, places = {}, {}
    for number, part in enumerate(parts):
        if (part.metadata.get(_NUMBER), part.metadata.get(_COUNT)) != (number, len(parts)):
            raise CheckpointError(f"{part.files[0]}: expected part {number + 1} of {len(parts)}; download it again")
        if twice := tensors.keys() & part.tensors.keys():
            raise CheckpointError(f"{part.files[0]}: holds {min(twice)}, which another part holds too; download again")
        tensors |= part.tensors
        places |= part.places
    if parts[0].metadata.get(_ALL, len(tensors)) != len(tensors):
        raise CheckpointError(
            f"{path}: expected {parts[0].metadata[_ALL]} tensors in its parts, found {len(tensors)}; they are of "
            "several conversions: download all of one"
        )
    small = {name: data for part in parts for name, data in part.small.items()}
    return GgufHeader(parts[0].metadata, tensors, places, tuple(part.files[0] for part in parts), small)


@functools.lru_cache(maxsize=4)  # of a vocabulary, parsed whenever a spec is asked for
def _read_files(path: Path, files: tuple[Path, ...], _stamps: tuple) -> GgufHeader:
    return whole_header(path, [_read_part(file) for file in files])


def _read_part(path: Path) -> GgufHeader:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data, path, len(data))
    except _DAMAGED as error:
        raise _damaged(path, error) from error


def read_part_elsewhere(
    path: Path, read: Callable[[int, int], tuple[bytes, int]], small: Collection[str] = ()
) -> GgufHeader:
    """The header of a file, or of a part of one, that is not on this machine; nothing else of it is read.

    Args:
        path: Its name, for messages.
        read: The bytes from one position up to another, or to the file's end; and how many the file has.
        small: Names of small tensors that are read as well, where it holds them.

    Raises:
        CheckpointError: See ``read_gguf_header``.
    """
    data, size = read(0, FIRST_BYTES)
    while True:
        try:
            header = _parse(data, path, size)
            break
        except (_PastTheEnd, struct.error) as error:
            if len(data) >= min(size, MOST_BYTES):
                raise _damaged(path, error) from error
        except _DAMAGED as error:
            raise _damaged(path, error) from error
        more, _ = read(len(data), 4 * len(data))  # a vocabulary takes megabytes
        if not more:
            raise _short(path, size, len(data))
        data += more
    for name in header.tensors.keys() & set(small):
        kind, start, _ = header.places[name]
        wanted = _tensor_bytes(name, header.tensors[name], kind)
        header.small[name], _ = read(start, start + wanted)
        if len(header.small[name]) != wanted:
            raise _short(path, wanted, len(header.small[name]))
    return header


def _short(path: Path, expected: int, found: int) -> CheckpointError:
    return CheckpointError(f"{path}: expected {expected:,} bytes of the server, found {found:,}; try again")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or truncated GGUF ({error or 'unreadable'}); download the file again")


def read_gguf_tensor(header: GgufHeader, name: str) -> np.ndarray:
    """A small tensor, in float32, shaped as in the header."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    shape, (kind, start, file) = header.tensors[name], header.places[name]
    if name in header.small:
        data = np.frombuffer(header.small[name], np.uint8)
    else:
        data = np.fromfile(file, np.uint8, _tensor_bytes(name, shape, kind), offset=start)
    return dequantize(data, GGMLQuantizationType(kind)).reshape(shape)


def _parse(data: mmap.mmap | bytes, path: Path, size: int) -> GgufHeader:
    """The header that ``data`` begins with, of a file of ``size`` bytes."""
    if not b"GGUF".startswith(data[:4]):
        raise CheckpointError(f"{path}: is no GGUF file: expected the letters GGUF at its start; name another file")
    version, tensor_count, key_count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(f"expected GGUF version 2 or 3, little-endian, found {version}")
    metadata, tensors = {}, {}
    position = 24
    for _ in range(key_count):
        key, position = _string(data, position)
        (kind,) = struct.unpack_from("<I", data, position)
        metadata[key], position = _value(data, position + 4, kind)
    for _ in range(tensor_count):
        name, position = _string(data, position)
        (rank,) = struct.unpack_from("<I", data, position)
        *shape, kind, offset = struct.unpack_from(f"<{rank}QIQ", data, position + 4)
        position += 4 + 8 * rank + 12
        if name in tensors:
            raise ValueError(f"tensor {name} appears twice")
        tensors[name] = (tuple(reversed(shape)), kind, offset)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-position // alignment) * alignment
    for name, (shape, kind, offset) in tensors.items():
        if (end := start + offset + _tensor_bytes(name, shape, kind)) > size:
            raise ValueError(f"tensor {name} ends at byte {end:,}, the file at {size:,}")
    places = {name: Place(kind, start + offset, path) for name, (_, kind, offset) in tensors.items()}
    return GgufHeader(metadata, {name: shape for name, (shape, _, _) in tensors.items()}, places, (path,))


def row_bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor's row.

    Raises:
        ValueError: An unknown type, or a row that is no whole number of blocks.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in GGMLQuantizationType.__members__.values():
        raise ValueError(f"tensor {name} has the unknown type {kind}")
    block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape and shape[-1] % block_elements:
        raise ValueError(f"tensor {name} has rows of {shape[-1]} weights, expected blocks of {block_elements}")
    return (shape[-1] if shape else 1) // block_elements * block_bytes


def _tensor_bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    return math.prod(shape[:-1]) * row_bytes(name, shape, kind)


def _string(data: mmap.mmap | bytes, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, position)
    end = position + 8 + length
    if end > len(data):
        raise _PastTheEnd(f"a string of {length:,} bytes runs past its end")
    return data[position + 8 : end].decode("utf-8", errors="replace"), end


def _value(data: mmap.mmap | bytes, position: int, kind: int):
    if kind == _STRING:
        return _string(data, position)
    if kind == _ARRAY:
        element, count = struct.unpack_from("<IQ", data, position)
        position += 12
        if element == _STRING:
            values = []
            for _ in range(count):
                text, position = _string(data, position)
                values.append(text)
            return values, position
        code = f"<{count}{_scalar(element)}"
        if position + struct.calcsize(code) > len(data):
            raise _PastTheEnd(f"an array of {count:,} values runs past its end")
        return list(struct.unpack_from(code, data, position)), position + struct.calcsize(code)
    code = "<" + _scalar(kind)
    (value,) = struct.unpack_from(code, data, position)
    # a float32 such as 1e-5 is stored as 9.999999747e-06: its shortest decimal is what the model's author wrote
    value = float(str(np.float32(value))) if kind == _FLOAT32 else value
    return value, position + struct.calcsize(code)


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of the unknown type {kind}")
    return _SCALARS[kind]
