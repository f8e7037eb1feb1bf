"""The tensors of a ``.gguf`` file by the names of a model's parameters, read from the file when they are due.

No copy of the weights is made, on disk or in RAM: a tensor is read in floats, some rows at a time, or as the codes that
the file holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.repository.gguf_blocks import KEPT, codes_of
from lowvram_lab.repository.gguf_config import ROPE_FACTORS, is_read_here
from lowvram_lab.repository.gguf_header import GgufHeader, Place, row_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROWS_AT_ONCE = 1 << 22
"""Weights that are restored at once: 16 MiB in float32."""

_PERMUTED = ("attn_q", "attn_k")


def kept_formats(header: GgufHeader, names: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """In which formats a file's matrices can be held as they lie.

    Args:
        header: Of the file.
        names: Module name → what GGUF calls its weight, of the matrices.

    Returns:
        Module name → format; what the file holds in floats is not among them. And the types that no format takes: where
        there are any, the file is read in floats.
    """
    kinds = {module: header.type_name(name) for module, name in names.items()}
    if other := sorted(set(kinds.values()) - KEPT.keys() - {"F32", "F16", "BF16"}):
        return {}, other
    return {module: KEPT[kind].format for module, kind in kinds.items() if kind in KEPT}, []


def tensor_names(header: GgufHeader, parameters: Iterable[str], layers: int) -> dict[str, str]:
    """A model's parameters → what GGUF calls them, of those that a file holds.

    Args:
        header: Of the file.
        parameters: Names of the model's.
        layers: It has so many.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    known, found = get_tensor_name_map(number, layers), {}
    for parameter in parameters:
        module, _, key = parameter.rpartition(".")
        for path in (module, module.partition(".")[2]):  # some were converted from the model without its head
            name = f"{known.get_name(path)}.{key}"
            if name in header.tensors:
                found.setdefault(parameter, name)
    return found


def refuse_incomplete(path: Path, header: GgufHeader, missing: Sequence[str], known: set[str]) -> None:
    """Refuses a file that does not hold a model's tensors, all of them and no others.

    Args:
        path: The file, for messages.
        header: Of it.
        missing: Parameters of the model that it has no tensor for.
        known: GGUF's names of the model's tensors.

    Raises:
        CheckpointError: It lacks tensors, or holds some that the model has no place for.
    """
    if missing:
        raise CheckpointError(f"{path}: lacks {len(missing)} tensors, first {missing[0]}; download the file again")
    read = {ROPE_FACTORS} if is_read_here(header) else set()  # which are in the config
    if dropped := sorted(header.tensors.keys() - known - read):
        raise CheckpointError(
            f"{path}: holds {len(dropped)} tensors that a {header.architecture} model has no place for, first "
            f"{dropped[0]}; pick a plain conversion of the model"
        )


def refuse_misfits(path: Path, header: GgufHeader, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuses a file whose tensors are of other sizes than its metadata says.

    Args:
        path: The file, for messages.
        header: Of it.
        shapes: GGUF's name of a tensor → the shape that its metadata asks for.

    Raises:
        CheckpointError: Names the first.
    """
    for name, shape in shapes.items():
        if tuple(header.tensors[name]) != tuple(shape):
            raise CheckpointError(
                f"{path}: tensor {name}: expected shape {tuple(shape)} by the file's metadata, found "
                f"{tuple(header.tensors[name])}; download the file again, or pick another conversion of the model"
            )


class GgufWeights:
    """A file's tensors by the names of a model's parameters.

    Of an architecture whose config is read here (``gguf_config.is_read_here``): its tensors are the model's own, but
    for the order of rows.

    Args:
        path: The file.
        header: Of it.
        shapes: Parameter name → shape, of the parameters that are the model's own.
        config: The model's.
        directory: Where the model's small files lie.

    Attributes:
        directory: See above.
        files: The file, or its parts.

    Raises:
        CheckpointError: It holds a tensor that the model has no place for, or lacks one.
    """

    def __init__(
        self,
        path: Path,
        header: GgufHeader,
        shapes: dict[str, tuple[int, ...]],
        config: PretrainedConfig,
        directory: Path,
    ):
        self.files, self.directory = list(header.files), directory
        self._path, self._header = path, header
        self._heads = config.num_attention_heads, config.num_key_value_heads
        self._names = tensor_names(header, shapes, config.num_hidden_layers)
        missing = [parameter for parameter in shapes if parameter not in self._names]
        refuse_incomplete(path, header, missing, set(self._names.values()))
        refuse_misfits(path, header, {self._names[parameter]: shape for parameter, shape in shapes.items()})

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"GgufWeights({str(self._path)!r}: {len(self)} tensors)"

    def keys(self) -> list[str]:
        """The parameters' names, in the order in which the tensors lie in the file."""
        return sorted(self._names, key=lambda name: (self._place(name).file, self._place(name).start))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._header.tensors[self._names[name]]

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is read in: as transformers reads it, the dtype of the file's own floats, else bfloat16."""
        return getattr(torch, self._header.dtype)

    def where(self, name: str) -> str:
        """The file and the tensor's name there, in words."""
        return f"{self._place(name).file}: tensor {self._names[name]}"

    def read(self, name: str) -> torch.Tensor:
        """A tensor in floats."""
        if len(self.shape(name)) == 1:
            return self.rows(name)(slice(None))
        rows, columns = self.shape(name)
        found, look_up = torch.empty(rows, columns, dtype=self.dtype(name)), self.rows(name)
        step = max(1, ROWS_AT_ONCE // columns)
        for start in range(0, rows, step):
            found[start : start + step] = look_up(slice(start, start + step))
        return found

    def rows(self, name: str) -> Callable[[slice | torch.Tensor], torch.Tensor]:
        """What gives some rows of a tensor in floats, by slice or index: no others are read."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(self._place(name).kind)
        order, dtype = self._order(name), self.dtype(name)

        def look_up(select: slice | torch.Tensor) -> torch.Tensor:
            data = self._data(name)[select if order is None else order[select]]
            return torch.from_numpy(np.ascontiguousarray(dequantize(data.numpy(), kind))).to(dtype)

        if len(self.shape(name)) > 1:
            return look_up
        whole = torch.from_numpy(dequantize(self._data(name).numpy(), kind)).to(dtype)
        return (whole if order is None else whole[order]).__getitem__

    def held_format(self, name: str) -> str | None:
        """The name of the format that takes a tensor's ``integers`` as they lie, if there is one."""
        kept = KEPT.get(self._header.type_name(self._names[name]))
        return kept.format if kept else None

    def integers(self, name: str, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Some rows of a matrix as the codes, scales and zeros that the file holds, see ``codes_of``."""
        order, data = self._order(name), self._data(name)
        kind = self._header.type_name(self._names[name])
        return codes_of(kind, data[rows if order is None else order[rows]])

    def _data(self, name: str) -> torch.Tensor:
        """``(rows, bytes of a row)`` of a matrix or the bytes of a vector, mapped; pages go when the tensor does."""
        shape, (kind, start, file) = self.shape(name), self._place(name)
        rows = shape[0] if len(shape) > 1 else 1
        width = row_bytes(self._names[name], shape, kind)
        try:
            mapped = torch.from_file(str(file), shared=False, size=start + rows * width, dtype=torch.uint8)
        except RuntimeError as error:  # gone, or shorter than when its header was read
            raise CheckpointError(f"{self.where(name)}: cannot be read any more; download the file again") from error
        data = mapped[start : start + rows * width]
        return data.view(rows, width) if len(shape) > 1 else data

    def _place(self, name: str) -> Place:
        return self._header.places[self._names[name]]

    def _order(self, name: str) -> torch.Tensor | None:
        """Which row of the file is each of the model's; ``None`` where they are in one order.

        A llama's queries and keys are stored with the two halves that turn together side by side.

        Source: ``permute`` in convert_hf_to_gguf.py (ggml-org/llama.cpp), undone.
        """
        stored = self._names[name].split(".")[-2]
        if self._header.architecture != "llama" or stored not in _PERMUTED:
            return None
        heads = self._heads[_PERMUTED.index(stored)]
        return torch.arange(self.shape(name)[0]).view(heads, -1, 2).transpose(1, 2).flatten()
