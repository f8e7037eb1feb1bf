"""Exact quantize/dequantize pairs. Each takes a float weight and returns the tensors ``formats.py`` promises.

Round-to-nearest only, so far. Scales are rounded to their stored dtype before codes are chosen, so a code is the
nearest one under the scale that will really be used.
"""

from collections import Counter

import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.formats import SCALE_DTYPE, Format
from lowvram_lab.units import MiB

INT4_OFFSET = 8
"""torch's int4 kernels compute ``(code - 8) * scale + zero`` (``aten/src/ATen/native/cpu/int4mm_kernel.cpp``)."""

CHUNK_BYTES = 4 * MiB
"""Rows are quantised in chunks of this many float32 bytes: the temporaries of an embedding table would not be small.

A chunk has a multiple of 64 rows, so that no group of 64 weights, as nf4 counts them, straddles two chunks.
"""


def quantize(weight: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    """Quantises a weight, round to nearest.

    Args:
        weight: ``(out_features, in_features)`` or ``(num_embeddings, embedding_dim)``, any float dtype, finite.
        fmt: An int8, int4 or nf4 format.

    Returns:
        int8: ``weight`` int8 ``(out, in)``, ``scale`` bf16 ``(out,)``. int4: ``codes`` uint8 ``(out, in)`` of 0…15,
        ``scale_and_zero`` bf16 ``(in / group_size, out, 2)``. nf4: ``packed`` and ``absmax`` as bitsandbytes makes
        them.

    Raises:
        CheckpointError: The weight has NaN or infinite values.
    """
    if not is_finite(weight):
        raise CheckpointError(f"cannot quantise to {fmt.name}: the weight has NaN or infinite values")
    rows, step = weight.shape[0], max(64, CHUNK_BYTES // (4 * weight.shape[1]) // 64 * 64)
    result: dict[str, torch.Tensor] = {}
    filled: Counter = Counter()
    for chunk in weight.split(step):
        for name, piece in _SOLVERS[fmt.kind](chunk, fmt).items():
            along = 1 if name == "scale_and_zero" else 0  # its first dimension is the group; others begin with the row
            size = piece.shape[along]
            if name not in result:
                shape = list(piece.shape)
                shape[along] = size * rows // len(chunk)
                result[name] = piece.new_empty(shape)
            result[name].narrow(along, filled[name], size).copy_(piece)
            filled[name] += size
    return result


def is_finite(weight: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; makes no temporary of the weight's size."""
    return bool(torch.isfinite(torch.stack(weight.aminmax())).all())


def dequantize(tensors: dict[str, torch.Tensor], fmt: Format, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Restores the weight that ``quantize`` stored. Shape and meaning as there; exact in float32.

    Args:
        tensors: What ``quantize`` returned.
        fmt: The same format.
        dtype: Result dtype.
    """
    if fmt.kind == "int8":
        return tensors["weight"].to(dtype) * tensors["scale"].to(dtype).unsqueeze(1)
    if fmt.kind == "int4":
        codes = tensors["codes"]
        scale, zero = tensors["scale_and_zero"].to(dtype).transpose(0, 1).unbind(-1)  # each (out, groups)
        grouped = codes.to(dtype).sub_(INT4_OFFSET).view(codes.shape[0], -1, fmt.group_size)
        return (grouped * scale.unsqueeze(-1) + zero.unsqueeze(-1)).view(codes.shape)
    raise NotImplementedError(f"{fmt.name} is dequantised by bitsandbytes, inside its layer")


def _int8(weight: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    scale = (weight.abs().amax(dim=1).float() / 127).clamp_(min=torch.finfo(SCALE_DTYPE).tiny).to(SCALE_DTYPE)
    codes = (weight.float() / scale.float().unsqueeze(1)).round_().clamp_(-127, 127)
    return {"weight": codes.to(torch.int8), "scale": scale}


def _int4(weight: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    groups = weight.float().view(weight.shape[0], -1, fmt.group_size)  # (out, groups, group_size)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).clamp_(min=torch.finfo(SCALE_DTYPE).tiny).to(SCALE_DTYPE).float()
    zero = (low + INT4_OFFSET * scale).to(SCALE_DTYPE).float()
    codes = ((groups - zero) / scale + INT4_OFFSET).round_().clamp_(0, 15).to(torch.uint8)
    scale_and_zero = torch.cat((scale, zero), dim=-1).transpose(0, 1).to(SCALE_DTYPE).contiguous()
    return {"codes": codes.view(weight.shape), "scale_and_zero": scale_and_zero}


def _nf4(weight: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
        weight.contiguous(), fmt.group_size, "nf4", torch.uint8
    )
    return {"packed": packed, "absmax": absmax}


_SOLVERS = {"int8": _int8, "int4": _int4, "nf4": _nf4}
