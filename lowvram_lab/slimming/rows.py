"""A checkpoint copied tensor by tensor into shards, but for the rows of tokens that went."""

import math

import torch

from lowvram_lab.conversion.resumable import PartialDirectory
from lowvram_lab.model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from lowvram_lab.units import MiB

_SHARD_BYTES = 512 * MiB  # held at once, as read and as written


class FewerRows:
    """A checkpoint's tensors with the rows of the tokens that stay, read one at a time.

    Attributes:
        source_nbytes: Of the tensors before.
        nbytes: Of what is left of them.
    """

    def __init__(self, checkpoint: Checkpoint, rows: torch.Tensor, cut: frozenset[str]):
        self._checkpoint, self._rows, self._cut = checkpoint, rows, cut
        self._sizes = {name: self._nbytes(name, len(rows) if name in cut else None) for name in checkpoint}
        self.source_nbytes = sum(self._nbytes(name) for name in checkpoint)
        self.nbytes = sum(self._sizes.values())

    def write(self, partial: PartialDirectory, progress: bool) -> None:
        """Writes the shards that are not finished yet, and their index where there are several."""
        from tqdm.auto import tqdm

        shards, weight_map = self._shards(), {}
        for number, names in enumerate(tqdm(shards, desc="writing weights", disable=not progress), 1):
            shard = SINGLE_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= dict.fromkeys(names, shard)
            if not partial.finished(shard):
                partial.save_tensors(shard, {name: self._read(name) for name in names})
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            partial.save_json(INDEX_NAME, index)

    def _read(self, name: str) -> torch.Tensor:
        value = self._checkpoint.read(name)
        return value[self._rows] if name in self._cut else value

    def _nbytes(self, name: str, rows: int | None = None) -> int:
        """Of a tensor, or of so many rows of it."""
        shape = self._checkpoint.shape(name)
        shape = shape if rows is None else (rows, *shape[1:])
        return math.prod(shape) * self._checkpoint.dtype(name).itemsize

    def _shards(self) -> list[list[str]]:
        """Names of the tensors in each file, in the order in which they lie on disk."""
        shards, size = [[]], 0
        for name, nbytes in self._sizes.items():
            if shards[-1] and size + nbytes > _SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += nbytes
        return shards
