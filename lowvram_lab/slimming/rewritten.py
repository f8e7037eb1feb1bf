"""A checkpoint's tensors written anew: some under other names, some changed, one at a time, and the rest left out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from lowvram_lab.conversion.resumable import PartialDirectory
from lowvram_lab.model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.units import MiB, format_bytes

logger = logging.getLogger(__name__)

SHARD_BYTES = 512 * MiB
"""Of a file, which is held at once, as read and as written."""


@dataclass(frozen=True)
class Changed:
    """What becomes of a tensor.

    Attributes:
        shape: Its new shape.
        change: Makes it of what the checkpoint has, in the same dtype.
    """

    shape: tuple[int, ...]
    change: Callable[[torch.Tensor], torch.Tensor]


class Rewritten:
    """What is to be written of a checkpoint; by the old names it is read as a checkpoint itself.

    Args:
        checkpoint: Its tensors.
        names: Old name → new name of those that stay; by default all stay and keep theirs.
        changed: Old name → what becomes of it; others stay to the bit.

    Attributes:
        original: The checkpoint.
        source_nbytes: Of all tensors before.
        nbytes: Of what is written.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Mapping[str, str] | None = None,
        changed: Mapping[str, Changed] | None = None,
    ):
        self.original, self._changed = checkpoint, changed or {}
        self._names = {name: name for name in checkpoint} if names is None else names
        self.source_nbytes = sum(self._nbytes(name, checkpoint.shape(name)) for name in checkpoint)
        self._sizes = {name: self._nbytes(name, self.shape(name)) for name in self._names}
        self.nbytes = sum(self._sizes.values())

    def __getattr__(self, name: str):
        return getattr(self.original, name)

    def __contains__(self, name: str) -> bool:
        return name in self.original

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's new shape, by its old name."""
        return self._changed[name].shape if name in self._changed else self.original.shape(name)

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it will be written, by its old name."""
        value = self.original.read(name)
        return self._changed[name].change(value) if name in self._changed else value

    def rows(self, name: str) -> Callable[[slice | torch.Tensor], torch.Tensor]:
        """See ``Checkpoint``; a changed tensor stays in RAM."""
        return self.read(name).__getitem__ if name in self._changed else self.original.rows(name)

    def write(self, partial: PartialDirectory, progress: bool) -> None:
        """Writes the shards that are not finished yet, and their index where there are several."""
        shards, weight_map = self._shards(), {}
        for number, names in enumerate(tqdm(shards, desc="writing weights", disable=not progress, leave=False), 1):
            shard = SINGLE_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map |= {self._names[name]: shard for name in names}
            if not partial.finished(shard):
                partial.save_tensors(shard, {self._names[name]: self.read(name) for name in names})
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
            partial.save_json(INDEX_NAME, index)

    def _nbytes(self, name: str, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.original.dtype(name).itemsize

    def _shards(self) -> list[list[str]]:
        """Names of the tensors in each file, in the order in which they lie on disk."""
        shards, size = [[]], 0
        for name, nbytes in self._sizes.items():
            if shards[-1] and size + nbytes > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += nbytes
        return shards


def say_held(spec: ModelSpec) -> None:
    """Says so where the files hold fewer bits than the 16 that are written."""
    if spec.held:
        held = format_bytes(Plan.uniform(spec, "stored", context=2).weight_bytes())
        logger.warning("%s: its files hold %s of quantised weights; what is written is in 16 bits", spec.name, held)
