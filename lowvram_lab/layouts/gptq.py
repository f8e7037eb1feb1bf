"""GPTQ's and AWQ's files: codes packed along the inputs or the outputs, zero points packed along the outputs.

Source: GPTQ, ``QuantLinear.pack`` in AutoGPTQ (``auto_gptq/nn_modules/qlinear``) and, for zero points that are stored
as they are (``gptq_v2``), GPTQModel's; AWQ, ``WQLinear_GEMM`` in AutoAWQ (``awq/modules/linear/gemm.py``).
"""

from dataclasses import dataclass

import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.layouts.layout import FLOATS, Integers, Read, Stored
from lowvram_lab.layouts.packing import unpack

_AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
"""Which of eight columns the nibbles of a word hold, the lowest first."""

_NIBBLES = 8


@dataclass(frozen=True)
class Gptq(Integers):
    """``qweight`` ``(columns * bits / 32, rows)``, ``qzeros`` ``(groups, rows * bits / 32)``, ``scales``.

    Attributes:
        one_less: Whether zero points are stored less one, as all did before ``gptq_v2``.
    """

    one_less: bool = True

    def tensors(self) -> dict[str, Stored]:
        """See ``Layout``."""
        words = (torch.int32,)
        return {
            "qweight": Stored((self.columns * self.bits // 32, self.rows), words),
            "qzeros": Stored((self.groups, self.rows * self.bits // 32), words),
            "scales": Stored((self.groups, self.rows), FLOATS),
            "g_idx": Stored((self.columns,), (torch.int32, torch.int64), optional=True),
        }

    def codes(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``.

        Raises:
            CheckpointError: Zero points that the config denies.
        """
        if not self.shifted and bool(self.shifts(read, rows).any()):
            raise CheckpointError("its zero points are not the middle code, as its config (sym) says; fetch it anew")
        return unpack(read("qweight")[:, rows].T.contiguous(), self.bits)

    def scales(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``."""
        return read("scales")[:, rows].T.float()

    def shifts(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``; a zero point is stored without its sign, as a code is."""
        return (unpack(read("qzeros").contiguous(), self.bits).float() + self.one_less)[:, rows].T

    def order(self, read: Read) -> torch.Tensor | None:
        """See ``Integers``."""
        found = read("g_idx")
        if found is None or torch.equal(found.long(), torch.arange(self.columns) // self.group_size):
            return None
        return found.long()


@dataclass(frozen=True)
class Awq(Integers):
    """``qweight`` ``(columns, rows / 8)``, ``qzeros`` ``(groups, rows / 8)``, eight codes of four bits a word."""

    def tensors(self) -> dict[str, Stored]:
        """See ``Layout``."""
        words = (torch.int32,)
        return {
            "qweight": Stored((self.columns, self.rows // _NIBBLES), words),
            "qzeros": Stored((self.groups, self.rows // _NIBBLES), words),
            "scales": Stored((self.groups, self.rows), FLOATS),
        }

    def codes(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``."""
        return self._rows(read("qweight"), rows)

    def scales(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``."""
        return read("scales")[:, rows].T.float()

    def shifts(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``."""
        return self._rows(read("qzeros"), rows).float()

    def _rows(self, words: torch.Tensor, rows: slice) -> torch.Tensor:
        """Some rows of what is packed along them, signed: ``(rows, columns or groups)``."""
        start, stop, _ = rows.indices(self.rows)
        first, last = start // _NIBBLES, -(-stop // _NIBBLES)
        # a word alone is a row of eight codes to ``unpack``, which wants words that fill a multiple of 32
        nibbles = unpack(words[:, first:last].contiguous().view(-1, 1), 4).view(len(words), -1, _NIBBLES)
        placed = torch.empty_like(nibbles)
        placed[..., _AWQ_ORDER] = nibbles
        return placed.view(len(words), -1)[:, start - first * _NIBBLES : stop - first * _NIBBLES].T.contiguous()
