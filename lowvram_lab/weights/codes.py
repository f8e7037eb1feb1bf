"""Codes of 2 to 8 bits packed tight into 32-bit words, and back.

The layout is compressed-tensors' ``pack-quantized``: a signed code is stored as ``code + 2^(bits-1)``; code ``i`` of a
row begins at bit ``i * bits`` and may straddle two words, so 32 codes fill exactly ``bits`` words. What lies on disk is
what lies in memory. A test holds it to that library's own functions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowvram_lab.errors import PlanError
from lowvram_lab.model.formats import Format

PACK_CODES = 32
"""Codes that fill a whole number of words, whatever their width."""


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs signed codes.

    Args:
        codes: ``(rows, columns)`` int8, each in ``-2^(bits-1) … 2^(bits-1) - 1``; columns a multiple of 32.
        bits: 2 to 8.

    Returns:
        ``(rows, columns * bits / 32)`` int32.
    """
    rows, columns = codes.shape
    blocks = codes.view(rows, columns // PACK_CODES, PACK_CODES)
    words = torch.zeros(rows, columns // PACK_CODES, bits, dtype=torch.int32)
    for lane in range(PACK_CODES):
        word, shift = divmod(lane * bits, 32)
        code = blocks[..., lane].to(torch.int32).add_(1 << (bits - 1))
        words[..., word] |= code << shift
        if shift + bits > 32:
            words[..., word + 1] |= code >> (32 - shift)
    return words.view(rows, columns // PACK_CODES * bits)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes from packed words.

    Args:
        words: ``(rows, words)`` int32, as ``pack`` makes them.
        bits: 2 to 8.

    Returns:
        ``(rows, 32 * words / bits)`` int8.
    """
    rows, common = words.shape[0], math.gcd(bits, 8)
    mask, offset = (1 << bits) - 1, 1 << (bits - 1)
    # in bytes, the lowest of a word first: fewer codes than of words fill a whole number of them
    span, lanes = bits // common, 8 // common
    blocks = words.view(torch.uint8).view(rows, 4 * words.shape[1] // span, span)
    codes = blocks.new_empty(rows, blocks.shape[1], lanes)
    for lane in range(lanes):
        byte, shift = divmod(lane * bits, 8)
        code = blocks[..., byte] >> shift
        if shift + bits > 8:
            code |= blocks[..., byte + 1] << (8 - shift)
        codes[..., lane] = (code & mask) - offset  # below zero it wraps around, and read as int8 is right
    return codes.view(torch.int8).view(rows, lanes * blocks.shape[1])


INT4_OFFSET = 8
"""torch's int4 kernels compute ``(code - 8) * scale + zero`` (``aten/src/ATen/native/cpu/int4mm_kernel.cpp``)."""


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as integers: ``codes * scale (+ zero)``, group by group.

    Attributes:
        codes: ``(out, in)`` int8, signed.
        scale: ``(out, groups)`` in ``SCALE_DTYPE``; may be negative.
        zero: ``(out, groups)`` in ``SCALE_DTYPE``, or ``None`` for a symmetric solution.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``(out, in)``; exact in float32."""
        groups = self.codes.to(dtype).view(*self.scale.shape, -1).mul_(self.scale.to(dtype).unsqueeze(-1))
        if self.zero is not None:
            groups = groups.add_(self.zero.to(dtype).unsqueeze(-1))
        return groups.view(self.codes.shape)

    def tensors(self, fmt: Format) -> dict[str, torch.Tensor]:
        """What a layer of the format holds.

        Returns:
            int8: ``weight`` int8 ``(out, in)``, ``scale`` ``(out,)`` or, with groups, ``(out, groups)``. int4:
            ``codes`` uint8 ``(out, in)`` of 0…15 (the layer packs them as its kernel likes), ``scale_and_zero``
            ``(groups, out, 2)``. Packed formats: ``packed`` int32, ``scale`` ``(out, groups)``.

        Raises:
            PlanError: Zero points, in a format without a place for them.
        """
        if fmt.kind != "int4" and self.zero is not None:
            raise PlanError(f"{fmt.name} has no place for zero points; give it a symmetric solution")
        if fmt.kind == "int8":
            return {"weight": self.codes, "scale": self.scale if fmt.group_size else self.scale.squeeze(1)}
        if fmt.kind == "int4":
            zero = torch.zeros_like(self.scale) if self.zero is None else self.zero
            pairs = torch.stack((self.scale.T, zero.T), dim=-1).contiguous()
            return {"codes": (self.codes + INT4_OFFSET).to(torch.uint8), "scale_and_zero": pairs}
        return {"packed": pack(self.codes, fmt.bits), "scale": self.scale}


def rows_of(solution: IntegerWeight, select: slice | torch.Tensor) -> IntegerWeight:
    """Some rows of a solution, by slice or index."""
    zero = solution.zero[select] if solution.zero is not None else None
    return IntegerWeight(solution.codes[select], solution.scale[select], zero)


def joined(pieces: Sequence[IntegerWeight]) -> IntegerWeight:
    """One solution of solutions of some rows each."""
    codes, scale = (torch.cat([getattr(piece, name) for piece in pieces]) for name in ("codes", "scale"))
    return IntegerWeight(codes, scale, None if pieces[0].zero is None else torch.cat([piece.zero for piece in pieces]))
