"""Hidden states of a calibration text in a file: a wide model's are hundreds of MiB, and little is used at once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from lowvram_lab.errors import LowvramError
from lowvram_lab.weights.layerwise import LayerByLayer, windows_at_once


class StatesOnDisk:
    """Hidden states ``(windows, tokens, hidden)``, float32, of which one forward pass's are in RAM.

    Args:
        states: What they are at first.
        file: Where to keep them; what is there is written over. Whoever made its directory removes it.

    Raises:
        LowvramError: They cannot be written.
    """

    def __init__(self, states: torch.Tensor, file: Path):
        if states.dtype != torch.float32:
            raise LowvramError(f"expected hidden states in float32, found {states.dtype}")
        self._file, self._shape = file, tuple(states.shape)
        try:
            states.numpy().tofile(file)
        except OSError as error:
            file.unlink(missing_ok=True)
            raise LowvramError(f"cannot write {file}: {error}; make room, then run the same command again") from error

    @property
    def tokens(self) -> int:
        """Of all windows."""
        windows, tokens, _ = self._shape
        return windows * tokens

    def read(self) -> torch.Tensor:
        """All of them, in RAM."""
        return torch.from_numpy(np.fromfile(self._file, np.float32)).view(self._shape)

    def windows(self, at_once: int | None = None) -> Iterator[torch.Tensor]:
        """Some windows ``(at_once, tokens, hidden)`` after the other; what is written to them is in the file.

        Args:
            at_once: How many; by default those of a forward pass.
        """
        count, tokens, hidden = self._shape
        step = at_once or windows_at_once(tokens)
        nbytes = tokens * hidden * np.dtype(np.float32).itemsize
        for first in range(0, count, step):
            shape = (min(step, count - first), tokens, hidden)
            # mapped anew each time: pages that were used leave RAM with the tensor
            yield torch.from_numpy(np.memmap(self._file, np.float32, "r+", first * nbytes, shape))

    def run(self, stream: LayerByLayer, layer: torch.nn.Module) -> None:
        """All of them through one layer."""
        for windows in self.windows():
            stream.run_in_place(layer, windows)
