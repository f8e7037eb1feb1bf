"""bitsandbytes' files: int8 with a scale a row, and nf4 or fp4 with a scale for every 64 weights.

Source: bitsandbytes' ``functional.QuantState`` and ``Linear8bitLt``; the library itself restores scales that are
quantised again, and fp4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.layouts.layout import FLOATS, Integers, Layout, Read, Stored

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BLOCK = 64
"""Weights that share a scale in the format here, and by default there."""

_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


@dataclass(frozen=True)
class Int8(Integers):
    """``weight`` int8, ``SCB`` the largest value of every row."""

    def tensors(self) -> dict[str, Stored]:
        """See ``Layout``."""
        return {
            "weight": Stored((self.rows, self.columns), (torch.int8,)),
            "SCB": Stored((self.rows,), FLOATS),
            "weight_format": Stored(None, (torch.uint8,), optional=True),
        }

    def codes(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``."""
        return read("weight")[rows]

    def scales(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``."""
        return (read("SCB")[rows].float() / 127).unsqueeze(1)


@dataclass(frozen=True)
class FourBits(Layout):
    """``weight`` uint8 ``(rows * columns / 2, 1)``, and its state in tensors beside it.

    Attributes:
        kind: ``nf4`` or ``fp4``.
    """

    by_rows = False
    kind: str

    @property
    def held(self) -> str:
        """See ``Layout``."""
        return self.kind if self.exact else self.near

    @property
    def exact(self) -> bool:
        """See ``Layout``."""
        return self.kind == "nf4" and self.rows * self.columns % BLOCK == 0

    @property
    def _state(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.kind}"

    def tensors(self) -> dict[str, Stored]:
        """See ``Layout``."""
        return {
            "weight": Stored(((self.rows * self.columns + 1) // 2, 1), (torch.uint8,)),
            "weight.absmax": Stored((-(-self.rows * self.columns // BLOCK),), (torch.uint8, torch.float32)),
            "weight.quant_map": Stored((16,), (torch.float32,)),
            self._state: Stored(None, (torch.uint8,)),
            **{name: Stored(None, (torch.float32,), optional=True) for name in _NESTED},
        }

    def floats(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Layout``."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(read("weight").contiguous(), self.state(read)).float().view(self.rows, -1)[rows]

    def state(self, read: Read) -> QuantState:
        """bitsandbytes' own, of tensors that are there.

        Raises:
            CheckpointError: It is of another weight.
        """
        from bitsandbytes.functional import QuantState

        names = ("weight.absmax", "weight.quant_map", self._state, *_NESTED)
        found = {name.removeprefix("weight."): read(name) for name in names}
        try:
            state = QuantState.from_dict({k: v for k, v in found.items() if v is not None}, torch.device("cpu"))
        except Exception as error:  # a damaged state is met by whatever parses it
            raise CheckpointError(f"its state of quantisation cannot be read: {error}; fetch it anew") from error
        if tuple(state.shape) != (self.rows, self.columns) or state.blocksize != BLOCK:
            raise CheckpointError(
                f"its state is of a weight {tuple(state.shape)} in blocks of {state.blocksize}, expected "
                f"{(self.rows, self.columns)} in blocks of {BLOCK}; fetch it anew"
            )
        return state

    def blocks(self, read: Read) -> dict[str, torch.Tensor]:
        """Of nf4, what a layer of it holds: ``packed`` ``(weights / 2, 1)`` uint8, ``absmax`` ``(blocks,)`` float32."""
        from bitsandbytes.functional import dequantize_blockwise

        state = self.state(read)
        absmax = state.absmax
        if state.nested:
            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        return {"packed": read("weight"), "absmax": absmax.float()}
