"""Weights that stay on disk: written once in the plan's formats, then mapped; the CPU computes on the mapped pages.

The system reads a page when it is touched and drops it when RAM is short, so what lies on disk takes none that anything
else needs; where RAM is plenty, a disk layer is as fast as one in RAM. The files are plain bytes, aligned: torch's CPU
int8 kernel ends the process on a weight that begins at any multiple of 8 bytes, as tensors in safetensors do. (Weights
whose format is the checkpoint's own are mapped where they are.)
"""

import os
import tempfile
import weakref
from pathlib import Path
from typing import BinaryIO

import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.files import cache_dir, writable

ALIGNMENT = 64
"""Bytes; where a tensor may begin: as torch's own allocations."""

UNNAMED = os.name == "posix"
"""Whether a mapped file may lose its name. (Windows keeps a file that is in use.)"""


class WeightsOnDisk:
    """The mapped weights of one model, in files in the cache folder.

    Where the system allows it (not on Windows) a file loses its name as soon as it is mapped, so that the disk is free
    again when the model is gone, even if its process was killed.
    """

    def __init__(self):
        self._folder = scratch_folder()
        self._named: list[Path] = []
        weakref.finalize(self, _remove, self._named)

    def map(self, module: torch.nn.Module) -> None:
        """Writes a module's own weights, and puts mapped ones in their place.

        Raises:
            CheckpointError: They cannot be written.
        """
        stores = module._parameters, module._buffers
        held = {key: store for store in stores for key, tensor in store.items() if tensor is not None}
        handle, name = tempfile.mkstemp(dir=self._folder)
        self._named.append(Path(name))
        try:
            with os.fdopen(handle, "wb") as file:
                starts = {key: _append(file, store[key]) for key, store in held.items()}
                size = file.tell()
            mapped = torch.from_file(name, shared=False, size=size, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{name}: the weights of a layer on disk cannot be written: {error}") from error
        for key, store in held.items():
            old = store[key]
            new = mapped[starts[key] : starts[key] + old.nbytes].view(old.dtype).view(old.shape)
            store[key] = torch.nn.Parameter(new, requires_grad=False) if isinstance(old, torch.nn.Parameter) else new
        if UNNAMED:
            _remove(self._named)


def scratch_folder() -> Path:
    """Where files of weights on disk lie, in the cache folder."""
    return writable(cache_dir() / "mapped")


def _append(file: BinaryIO, tensor: torch.Tensor) -> int:
    """Writes a tensor at the next aligned place; returns where."""
    file.write(bytes(-file.tell() % ALIGNMENT))
    start = file.tell()
    tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tofile(file)
    return start


def _remove(files: list[Path]) -> None:
    while files:
        files.pop().unlink(missing_ok=True)
