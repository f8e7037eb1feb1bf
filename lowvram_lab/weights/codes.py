"""A weight as integers with a scale, and perhaps a zero, for every group of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowvram_lab.errors import PlanError
from lowvram_lab.layouts.packing import pack
from lowvram_lab.model.formats import Format

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
            ``(groups, out, 2)``. Packed formats: ``packed`` int32, and ``scale`` ``(out, groups)`` or, with zeros,
            ``scale_and_zero``.

        Raises:
            PlanError: Zero points, in a format without a place for them.
        """
        if not fmt.has_zeros and self.zero is not None:
            raise PlanError(f"{fmt.name} has no place for zero points; give it a symmetric solution")
        if fmt.kind == "int8":
            return {"weight": self.codes, "scale": self.scale if fmt.group_size else self.scale.squeeze(1)}
        scales = {"scale": self.scale}
        if fmt.has_zeros:
            zero = torch.zeros_like(self.scale) if self.zero is None else self.zero
            scales = {"scale_and_zero": torch.stack((self.scale.T, zero.T), dim=-1).contiguous()}
        if fmt.kind == "int4":
            return {"codes": (self.codes + INT4_OFFSET).to(torch.uint8), **scales}
        return {"packed": pack(self.codes, fmt.bits), **scales}


def rows_of(solution: IntegerWeight, select: slice | torch.Tensor) -> IntegerWeight:
    """Some rows of a solution, by slice or index."""
    zero = solution.zero[select] if solution.zero is not None else None
    return IntegerWeight(solution.codes[select], solution.scale[select], zero)


def joined(pieces: Sequence[IntegerWeight]) -> IntegerWeight:
    """One solution of solutions of some rows each."""
    codes, scale = (torch.cat([getattr(piece, name) for piece in pieces]) for name in ("codes", "scale"))
    return IntegerWeight(codes, scale, None if pieces[0].zero is None else torch.cat([piece.zero for piece in pieces]))
