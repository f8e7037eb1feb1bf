"""Small floats with scales: fp8 with a scale a matrix, a row or a block, and four bits of two exponents (mxfp4, nvfp4).

The sixteen values of E2M1, doubled, are the integers 0, 1, 2, 3, 4, 6, 8, 12 and their negatives: five bits hold them,
and a scale that is a power of two is exact in any float, so mxfp4 has a home here to the bit.

Source: OCP Microscaling Formats (MX) 1.0; compressed-tensors' ``mxfp4`` and ``nvfp4`` compressors; fp8 in blocks,
DeepSeek-V3's ``weight_scale_inv``.
"""

from dataclasses import dataclass

import torch

from lowvram_lab.layouts.layout import FLOATS, Integers, Layout, Read, Stored

_DOUBLED = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
_BIAS = 127
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Mxfp4(Integers):
    """``weight_packed`` ``(rows, columns / 2)`` uint8, ``weight_scale`` ``(rows, groups)`` of exponents."""

    def tensors(self) -> dict[str, Stored]:
        """See ``Layout``."""
        return {
            "weight_packed": Stored((self.rows, self.columns // 2), (torch.uint8,)),
            "weight_scale": Stored((self.rows, self.groups), (torch.uint8,)),
        }

    def codes(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``; the first of two is in the lower half of a byte."""
        packed = read("weight_packed")[rows]
        return _DOUBLED[torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1).int()]

    def scales(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``: of doubled values, so half."""
        return torch.exp2(read("weight_scale")[rows].float() - (_BIAS + 1))


@dataclass(frozen=True)
class Nvfp4(Mxfp4):
    """The same in groups of 16, with scales in fp8 under one for the matrix."""

    def tensors(self) -> dict[str, Stored]:
        """See ``Layout``."""
        return super().tensors() | {
            "weight_scale": Stored((self.rows, self.groups), FP8[:1]),
            "weight_global_scale": Stored(None, FLOATS),
        }

    def scales(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Integers``."""
        return read("weight_scale")[rows].float() / (2 * read("weight_global_scale").float().flatten()[0])


@dataclass(frozen=True)
class Fp8(Layout):
    """``weight`` in fp8, and a scale that is multiplied by.

    Attributes:
        scale: The part of its name behind the module's.
        block: Rows and columns that share one.
    """

    scale: str
    block: tuple[int, int]

    @property
    def held(self) -> str:
        """See ``Layout``."""
        return self.near

    @property
    def exact(self) -> bool:
        """See ``Layout``."""
        return False

    def tensors(self) -> dict[str, Stored]:
        """See ``Layout``."""
        grid = tuple(-(-size // of) for size, of in zip((self.rows, self.columns), self.block, strict=True))
        whole = grid == (1, 1)  # a number, a list of one, or a table of one
        return {"weight": Stored((self.rows, self.columns), FP8), self.scale: Stored(None if whole else grid, FLOATS)}

    def floats(self, read: Read, rows: slice) -> torch.Tensor:
        """See ``Layout``."""
        height, width = self.block
        grid = read(self.scale).float()
        grid = grid.reshape(1, 1) if grid.numel() == 1 else grid
        start, stop, _ = rows.indices(self.rows)
        scales = grid[torch.arange(start, stop) // height][:, torch.arange(self.columns) // width]
        return read("weight")[rows].float().mul_(scales)
