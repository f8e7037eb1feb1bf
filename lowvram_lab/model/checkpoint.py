"""Read safetensors one tensor at a time. Headers are checked on opening; nothing is ever unpickled."""

import copy
import functools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lowvram_lab.errors import CheckpointError, SourceError, first_line
from lowvram_lab.files import known_sha256
from lowvram_lab.model.low_plane import FILE as LOW_PLANE
from lowvram_lab.model.low_plane import checked_block
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.units import MiB


class ShapesOnly:
    """Stands for a checkpoint in a dry run: the right shapes, on meta, no bytes."""

    def __init__(self, spec: ModelSpec):
        self.spec = spec
        self._shapes = {f"{m.name}.{key}": shape for m in spec.modules for key, shape in m.parameters.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self._shapes[name]

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def read(self, name: str) -> torch.Tensor:
        """An empty meta tensor of the parameter's shape, in 16 bits as checkpoints are."""
        return torch.empty(self._shapes[name], dtype=torch.bfloat16, device="meta")


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_SHARD_NAME = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
STAYS_MAPPED = 64 * MiB
"""A smaller table is mapped once, and all of its pages may be in RAM."""

_TILE_ELEMENTS = 2**22  # compared at once: 16 MiB in float32
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# safetensors' own header check names the file's defect, not the file; these are the ways reading it can fail
_READ_ERRORS = (SafetensorError, OSError, ValueError, KeyError, TypeError)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Checkpoint:
    """The tensors of a directory of safetensors files, read by name: the files' own, until they are ``renamed``.

    Attributes:
        directory: Where the files lie.
        files: The safetensors files in use, in the order of their names.
        unknown: Names of tensors that were left out when it was renamed.
    """

    def __init__(self, directory: Path, files: list[Path] | None = None):
        """Reads the index and the headers, no weights.

        Args:
            directory: Holds ``model.safetensors``, or else shards with ``model.safetensors.index.json`` (this order is
                transformers' own), or else other ``*.safetensors`` files.
            files: Which to take instead.

        Raises:
            CheckpointError: No weights, a missing shard, a truncated or damaged file, a name held twice.
            SourceError: Only pickled weights.
        """
        self.directory = Path(directory)
        self.unknown: tuple[str, ...] = ()
        index = None if files or (self.directory / SINGLE_NAME).is_file() else _read_index(self.directory)
        self.files = files or _find_files(self.directory, index)
        self._stored_names: dict[str, str] = {}
        self._stamps = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in self.files)
        self._file_of: dict[str, Path] = {}
        self._facts: dict[str, dict] = {}
        for file in self.files:
            for name, facts in _read_header(file).items():
                if name in self._file_of:
                    raise CheckpointError(
                        f"{self.directory}: tensor {name} is held by both {self._file_of[name].name} and {file.name}; "
                        "expected each name once: remove the file that does not belong to this checkpoint"
                    )
                self._file_of[name] = file
                self._facts[name] = facts
        for name, file_name in (index or {}).items():
            if name not in self._file_of or self._file_of[name].name != file_name:
                raise CheckpointError(
                    f"{self.directory}: {INDEX_NAME} places {name} in {file_name}, which does not hold it; "
                    "the shards are from different checkpoints: download them again"
                )

    def __contains__(self, name: str) -> bool:
        return name in self._facts

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.directory)!r}: {len(self)} tensors in {len(self.files)} files)"

    def keys(self) -> list[str]:
        """The names, in the order in which the tensors lie on disk, so that reading them all reads forwards."""
        return list(self._facts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._fact(name)["shape"])

    def where(self, name: str) -> str:
        """The file that holds a tensor and the tensor's name there, in words."""
        return f"{self._file_of[name]}: tensor {self._stored_names.get(name, name)}"

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, from the header alone."""
        stored = self._fact(name)["dtype"]
        if stored not in _DTYPES:
            raise CheckpointError(f"{self.where(name)} has dtype {stored}, which torch cannot hold")
        return _DTYPES[stored]

    def renamed(self, stored_names: dict[str, str], unknown: tuple[str, ...] = ()) -> "Checkpoint":
        """The same files under other names.

        Args:
            stored_names: New name → present name; tensors that it does not name are left out.
            unknown: The names of those left out that deserve to be told.
        """
        renamed = copy.copy(self)
        renamed.unknown = unknown
        renamed._stored_names = {new: self._stored_names.get(old, old) for new, old in stored_names.items()}
        order = {name: at for at, name in enumerate(self._facts)}
        pairs = sorted(stored_names.items(), key=lambda pair: order[pair[1]])
        renamed._facts = {new: self._facts[old] for new, old in pairs}
        renamed._file_of = {new: self._file_of[old] for new, old in pairs}
        return renamed

    @functools.cached_property
    def low_plane(self) -> "Checkpoint":
        """The file of a converted model's low planes.

        Raises:
            CheckpointError: Missing, damaged, or from another conversion.
        """
        try:
            values = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.directory}: config.json is not readable: {error}") from error
        file, found = self.directory / LOW_PLANE, checked_block(values, str(self.directory / "config.json"))
        instead = "fetch or convert the model anew, or go without it (precision fast)"
        if found is None or not file.is_file():
            raise CheckpointError(
                f"{self.directory}: expected {LOW_PLANE} beside its config.json, found none; {instead}"
            )
        if known_sha256(file) != found["sha256"]:
            raise CheckpointError(f"{file}: damaged, or from another conversion than config.json; {instead}")
        return Checkpoint(self.directory, files=[file])

    def same_values(self, name: str, other: str) -> bool:
        """Whether two tensors are equal in shape and in every value, whatever their dtypes; read a tile at a time."""
        if self.shape(name) != self.shape(other):
            return False
        first, second = ((self._file_of[one], self._stored_names.get(one, one)) for one in (name, other))
        return first == second or _same_values(first, second, self._stamps)

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, in its stored dtype.

        The tensor is a private (copy-on-write) view of the mapped file: pages are loaded when touched, and are
        given back when the tensor goes. Do not overwrite the file while the tensor is in use.

        Raises:
            CheckpointError: No such tensor, or the file was damaged since it was opened.
        """
        return self.read_together([name])[name]

    def read_together(self, names: list[str]) -> dict[str, torch.Tensor]:
        """``read`` of several tensors of one file, which is opened once: its header may be long."""
        for name in names:
            self._fact(name)
        (file,) = {self._file_of[name] for name in names}
        found = _read_tensors(file, [self._stored_names.get(name, name) for name in names])
        return dict(zip(names, found, strict=True))

    def rows(self, name: str) -> Callable[[slice | torch.Tensor], torch.Tensor]:
        """What gives some rows of a tensor, by slice or index.

        For a large table the file is mapped anew each time: where all rows are used one after another, only those in
        use take RAM. Of a small one that would cost more time than it saves room.
        """
        if math.prod(self.shape(name)) * self.dtype(name).itemsize < STAYS_MAPPED:
            return self.read(name).__getitem__
        return lambda select: self.read(name)[select]

    def _fact(self, name: str) -> dict:
        try:
            return self._facts[name]
        except KeyError:
            raise CheckpointError(f"{self.directory}: no tensor named {name} among its {len(self)}") from None


def check_tensor(name: str, shape: tuple[int, ...], weights: object) -> None:
    """Checks that a parameter is there, in its shape.

    Args:
        name: Of the parameter.
        shape: As the checkpoint is to store it.
        weights: A ``Checkpoint``, or what stands for one.

    Raises:
        CheckpointError: It is not; what the files hold instead is said.
    """
    if name not in weights:
        where, unknown = getattr(weights, "directory", "checkpoint"), getattr(weights, "unknown", ())
        hint = "transformers would fill it with random numbers; download it again, or name a complete checkpoint"
        if unknown:
            hint = f"{len(unknown)} of its tensors have names that are none of this model's, as {unknown[0]}"
        raise CheckpointError(f"{where}: expected a tensor {name}, found none; {hint}")
    if tuple(weights.shape(name)) != tuple(shape):
        raise misfit(name, weights, f"shape {tuple(shape)}, found {tuple(weights.shape(name))}")


def misfit(name: str, weights: object, expected: str) -> CheckpointError:
    """The error of a tensor that is not what the config says: the file that holds it, both shapes, and what to do."""
    where = weights.where(name) if hasattr(weights, "where") else name
    return CheckpointError(
        f"{where}: expected {expected}; config.json and the weights are not of one model: take both from one repository"
    )


def _find_files(directory: Path, index: dict[str, str] | None) -> list[Path]:
    if ranks := sorted(file.name for file in directory.glob("shard-*-model-*-of-*.safetensors")):
        why = f"one file a training process ({ranks[0]}), which transformers loads in place of any other"
        raise CheckpointError(f"{directory}: holds {why}; save the whole model with save_pretrained first")
    if index is not None:
        files = [directory / name for name in sorted(set(index.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(
                f"{directory}: its index names {len(files)} shards, missing {', '.join(missing)}; download them again"
            )
        return files
    if (directory / SINGLE_NAME).is_file():
        return [directory / SINGLE_NAME]
    if files := sorted(set(directory.glob("*.safetensors")) - {directory / LOW_PLANE}):
        _refuse_lost_shards(directory, [file.name for file in files])
        return files
    found = sorted(file.name for file in directory.iterdir()) if directory.is_dir() else []
    if pickled := [name for name in found if name.endswith(PICKLE_SUFFIXES)]:
        raise SourceError(refuse_pickle(f"{directory} holds only pickled weights ({', '.join(pickled)})"))
    hint = ""
    if "config.json" in found:
        without = f"lowvram forecast {directory} and lowvram plan {directory} --gpu SIZE"
        hint = f"; put them beside config.json ({without} work without weights)"
    listed = ", ".join(found[:8]) or "nothing"
    raise CheckpointError(f"{directory}: no weights: expected *.safetensors, found {listed}{hint}")


def _refuse_lost_shards(directory: Path, names: list[str]) -> None:
    """Without an index their own names still count the shards."""
    for stem, count in {found.groups() for name in names if (found := _SHARD_NAME.fullmatch(name))}:
        expected = [f"{stem}-{number:05}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
        if missing := [name for name in expected if name not in names]:
            lost = f"expected {len(expected)} shards by their names, missing {', '.join(missing[:4])}"
            raise CheckpointError(f"{directory}: {lost}; download them again")


def refuse_pickle(found: str) -> str:
    """The one sentence that says why pickled weights are not opened, and what to do."""
    return (
        f"{found}: unpickling runs whatever code the file's author put there, so it is refused; "
        "pick a repository with *.safetensors, or convert the file with the safetensors package where you trust it"
    )


def _read_index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX_NAME
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(index.values())
    except (*_READ_ERRORS, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON object with a weight_map, found none ({first_line(error)})"
        ) from error
    # a shard name is a plain file name: anything else would read outside the directory
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{path}: expected plain file names in weight_map, found {sorted(map(str, names))[:3]}")
    return index


def _read_header(file: Path) -> dict[str, dict]:
    """Name to dtype, shape and data_offsets, in the order of the data."""
    try:
        with safe_open(file, framework="pt", device="cpu"):
            pass  # opening checks that offsets cover the file exactly, so a truncated one stops here
        with file.open("rb") as handle:
            header = json.loads(
                handle.read(int.from_bytes(handle.read(8), "little")), object_pairs_hook=_refuse_repeated_names
            )
    except _READ_ERRORS as error:
        raise CheckpointError(
            f"{file}: damaged or truncated safetensors ({error}){_pointer_hint(file)}: download it again"
        ) from error
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


def _refuse_repeated_names(pairs: list[tuple]) -> dict:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"name {next(name for name in names if names.count(name) > 1)} appears twice in its header")
    return dict(pairs)


def _pointer_hint(file: Path) -> str:
    try:
        with file.open("rb") as handle:
            start = handle.read(20)
    except OSError:
        return ""
    if start.startswith(b"version https://git"):
        return "; it is a Git LFS pointer, not the weights: run git lfs pull"
    return ""


def _read_tensors(file: Path, names: list[str]) -> list[torch.Tensor]:
    # Opened anew for each module's. Measured over 8 tensors of 64 MiB (safetensors 0.8): with one handle kept open
    # the mapping keeps every page it touched (RssFile grew to 592 MiB); reopened, RSS peaks at one tensor and
    # falls back (RssFile 80 -> 144 -> 80 MiB, RssAnon +0); with .clone() two copies live at once (peak +64 MiB).
    # Reading into a torch buffer peaks the same, but as anonymous memory, which the system cannot take back.
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            return [handle.get_tensor(name) for name in names]
    except _READ_ERRORS as error:
        asked = f"tensor {names[0]}" if len(names) == 1 else f"one of the tensors {', '.join(names)}"
        raise CheckpointError(f"{file}: cannot read {asked}: {error}; download the file again") from error


@functools.lru_cache(maxsize=64)  # of tables of half a GiB, asked for whenever a spec is
def _same_values(first: tuple[Path, str], second: tuple[Path, str], _stamps: tuple) -> bool:
    one, other = (_read_tensors(file, [name])[0].flatten() for file, name in (first, second))
    tiles = zip(one.split(_TILE_ELEMENTS), other.split(_TILE_ELEMENTS), strict=True)
    if one.dtype == other.dtype and one.dtype.itemsize > 1:
        return all(torch.equal(tile, its_twin) for tile, its_twin in tiles)
    return all(torch.equal(tile.double(), its_twin.double()) for tile, its_twin in tiles)
