"""Model directories and checkpoints: written as transformers does, read back, spoilt."""

import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from tests.helpers.tiny import random_state, tiny_config, tiny_state, tiny_tokenizer


class RandomCheckpoint:
    """Seeded random weights of a spec, each made when it is read: a large model is never whole in RAM."""

    def __init__(self, spec: ModelSpec, deviation: float = 0.02):
        self.deviation = deviation
        self._shapes = {f"{m.name}.{key}": tuple(shape) for m in spec.modules for key, shape in m.parameters.items()}

    def __contains__(self, name):
        return name in self._shapes

    def shape(self, name):
        return self._shapes[name]

    def read(self, name):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.empty(self._shapes[name], dtype=torch.bfloat16).normal_(generator=generator).mul_(self.deviation)
        return noise.add_(1) if "norm" in name else noise


def write_model(folder: Path, kind: str = "llama", state=None, dtype=torch.bfloat16, **changes) -> Path:
    """A model directory as transformers writes it: config, weights in ``dtype``, tokenizer.

    Args:
        folder: Made, with its parents.
        kind: Of ``TINY``.
        state: Weights by name; float32 ones are converted to ``dtype``, others are written as they are.
        dtype: Of the file.
        **changes: To the config; the weights are then random ones of those shapes.
    """
    config = tiny_config(kind, **changes)
    if state is None:
        state = random_state(ModelSpec.from_config(config, kind)) if changes else tiny_state(kind)
    config.save_pretrained(folder)
    tensors = {name: (value.to(dtype) if value.dtype == torch.float32 else value) for name, value in state.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def directory_spec(folder: Path) -> ModelSpec:
    return find_source(folder).spec()


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """A directory's tensors as they lie there."""
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint}


def restored_state(folder: Path) -> dict[str, torch.Tensor]:
    """A converted directory's weights in float32, its codes taken apart bit by bit: ``(code - 2^(bits-1)) * scale``."""
    stored, restored = read_state(folder), {}
    for name, value in stored.items():
        if name.endswith(("_scale", "_shape")):
            continue
        if name.endswith("_packed"):
            name = name.removesuffix("_packed")
            rows, columns = stored[f"{name}_shape"].tolist()
            bits = value.shape[1] * 32 // columns
            ones = np.unpackbits(value.numpy().view(np.uint8), axis=1, bitorder="little").reshape(rows, columns, bits)
            value = torch.from_numpy(ones @ (1 << np.arange(bits)) - (1 << (bits - 1)))
        if f"{name}_scale" in stored:
            scale = stored[f"{name}_scale"].float()
            value = value.float() * scale.repeat_interleave(value.shape[1] // scale.shape[1], dim=1)
        restored[name] = value.float()
    return restored


def spoilt_state(state, name, change):
    """``state`` with one tensor changed by ``change``, or without it where that is None."""
    state = dict(state)
    if change is None:
        del state[name]
    else:
        state[name] = change(state[name].clone())
    return state
