"""The blocks of a ``.gguf`` file's quantised tensors: integers, scales and zeros as they lie, and weights in floats.

A weight is ``code * scale + zero``, with one scale, and perhaps a zero, for every group of codes. Where codes look up
values that are whole numbers, or several share a code that looks them up together (IQ1 to IQ3), those numbers are the
codes here, of more bits. Scales of scales are multiplied out.

Source: ggml's ``ggml-common.h`` and ``ggml-quants.c`` (ggml-org/llama.cpp), where the blocks are described; a test
holds every type to ``gguf.quants``, another reader of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch


class Kept(NamedTuple):
    """A type of block whose codes a format takes as they lie; scales and zeros are rounded to the format's.

    Attributes:
        format: The format's name.
        read: ``(rows, bytes of a row)`` → codes, scales and zeros, block by block.
    """

    format: str
    read: Callable[[torch.Tensor], tuple]


def codes_of(kind: str, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zeros of some rows.

    Args:
        kind: GGML's name of a type, of ``KEPT``.
        data: ``(rows, bytes of a row)`` uint8.

    Returns:
        Codes ``(rows, columns)`` int8, signed and of the format's bits; scales and zeros ``(rows, groups)`` float32,
        the latter ``None`` for types that have none.
    """
    rows = data.shape[0]
    codes, scale, zero = KEPT[kind].read(data)
    shape = rows, -1
    return codes.reshape(shape), scale.reshape(shape), None if zero is None else zero.reshape(shape)


def _q4_0(data: torch.Tensor) -> tuple:
    scale, nibbles = _parts(data, 2, 16)
    return _nibbles(nibbles).sub_(8), _floats(scale), None


def _q4_1(data: torch.Tensor) -> tuple:
    scale, least, nibbles = _parts(data, 2, 2, 16)
    scale = _floats(scale)
    return _nibbles(nibbles).sub_(8), scale, _floats(least) + 8 * scale


def _q5_0(data: torch.Tensor) -> tuple:
    scale, fifth, nibbles = _parts(data, 2, 4, 16)
    return (_nibbles(nibbles) + 16 * _bits(fifth)).sub_(16), _floats(scale), None


def _q5_1(data: torch.Tensor) -> tuple:
    scale, least, fifth, nibbles = _parts(data, 2, 2, 4, 16)
    scale = _floats(scale)
    return (_nibbles(nibbles) + 16 * _bits(fifth)).sub_(16), scale, _floats(least) + 16 * scale


def _q8_0(data: torch.Tensor) -> tuple:
    scale, codes = _parts(data, 2, 32)
    return codes.view(torch.int8), _floats(scale), None


def _q4_k(data: torch.Tensor) -> tuple:
    scale, least, packed, nibbles = _parts(data, 2, 2, 12, 128)
    scales, least_codes = _six_bits(packed)
    scale, least = _floats(scale) * scales, _floats(least) * least_codes
    # 32 bytes hold 64 weights: the lower halves the first 32, the upper halves the others
    codes = _nibbles(nibbles.reshape(*nibbles.shape[:-1], 4, 32))
    return codes.sub_(8), scale, 8 * scale - least


def _q5_k(data: torch.Tensor) -> tuple:
    scale, least, packed, fifth, nibbles = _parts(data, 2, 2, 12, 32, 128)
    scales, least_codes = _six_bits(packed)
    scale, least = _floats(scale) * scales, _floats(least) * least_codes
    lower = _nibbles(nibbles.reshape(*nibbles.shape[:-1], 4, 32)).flatten(-2)
    return (lower + 16 * _planes(fifth, 1).flatten(-2)).sub_(16), scale, 16 * scale - least


def _q6_k(data: torch.Tensor) -> tuple:
    lower, upper, scales, scale = _parts(data, 128, 64, 16, 2)
    # a half of the block has 64 and 32 bytes: lower halves of the first are 64 weights, the upper ones the next 64
    lower = _nibbles(lower.reshape(*lower.shape[:-1], 2, 64)).flatten(-2)
    upper = _planes(upper.reshape(*upper.shape[:-1], 2, 32), 2).flatten(-3)
    return (lower + 16 * upper).sub_(32), _floats(scale) * scales.view(torch.int8).float(), None


def _q3_k(data: torch.Tensor) -> tuple:
    third, lower, packed, scale = _parts(data, 32, 64, 12, 2)
    lower = _planes(lower.reshape(*lower.shape[:-1], 2, 32), 2).flatten(-3)
    return (lower + 4 * _planes(third, 1).flatten(-2)).sub_(4), _floats(scale) * _sixteen_six_bits(packed), None


def _q2_k(data: torch.Tensor) -> tuple:
    packed, codes, scale, least = _parts(data, 16, 64, 2, 2)
    scale, least = _floats(scale) * (packed & 15).float(), _floats(least) * (packed >> 4).float()
    codes = _planes(codes.reshape(*codes.shape[:-1], 2, 32), 2).flatten(-3)
    return codes.sub_(2), scale, 2 * scale - least


_IQ4 = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.int8)
"""What the codes of IQ4 stand for, in scales (``kvalues_iq4nl``)."""

_FP4 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
"""What numbers of 4 bits (e2m1) stand for, in halves (``kvalues_mxfp4``)."""


def _iq4_nl(data: torch.Tensor) -> tuple:
    scale, nibbles = _parts(data, 2, 16)
    return _IQ4[_nibbles(nibbles).int()], _floats(scale), None


def _iq4_xs(data: torch.Tensor) -> tuple:
    scale, upper, lower, nibbles = _parts(data, 2, 2, 4, 128)
    pairs = torch.arange(4, dtype=torch.uint8) * 2
    upper = ((upper.unsqueeze(-1) >> pairs) & 3).flatten(-2)
    codes = _nibbles(nibbles.reshape(*nibbles.shape[:-1], 8, 16))
    return _IQ4[codes.int()], _floats(scale) * (_pairs(lower) + 16 * upper).sub_(32), None


def _mxfp4(data: torch.Tensor) -> tuple:
    exponent, nibbles = _parts(data, 1, 16)
    return _FP4[_nibbles(nibbles).int()], torch.exp2(exponent.float() - 128), None


def _looked_up(
    kind: str, scales: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]], data: torch.Tensor
) -> tuple:
    """Of a type whose tables gguf-py has: the whole numbers that its values are of scales that are known."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values = torch.from_numpy(dequantize(data.contiguous().numpy(), GGMLQuantizationType[kind]))
    scale, zero = (each if each is None else each.reshape(data.shape[0], -1, 1) for each in scales(data))
    groups = values.view(*scale.shape[:2], -1)
    groups = groups if zero is None else groups - zero
    return torch.where(scale == 0, 0.0, groups / scale).round_().to(torch.int8), scale, zero


def _iq2_xxs(data: torch.Tensor) -> tuple:
    scale, groups = _parts(data, 2, 64)
    return _floats(scale) * _upper(groups[..., 7::8]).add_(0.5) / 4, None


def _iq2_xs(data: torch.Tensor) -> tuple:
    scale, _, fourths = _parts(data, 2, 64, 8)
    return _floats(scale) * _pairs(fourths).add_(0.5) / 4, None


def _iq2_s(data: torch.Tensor) -> tuple:
    scale, _, fourths = _parts(data, 2, 72, 8)
    return _floats(scale) * _pairs(fourths).add_(0.5) / 4, None


def _iq3_xxs(data: torch.Tensor) -> tuple:
    scale, _, groups = _parts(data, 2, 64, 32)
    return _floats(scale) * _upper(groups[..., 3::4]).add_(0.5), None  # all of its values are even


def _iq3_s(data: torch.Tensor) -> tuple:
    scale, _, fourths = _parts(data, 2, 104, 4)
    return _floats(scale) * _pairs(fourths).mul_(2).add_(1), None


def _iq1_s(data: torch.Tensor) -> tuple:
    scale, _, groups = _parts(data, 2, 32, 16)
    upper = groups[..., 1::2]
    scale = _floats(scale) * ((upper >> 4) & 7).float().mul_(2).add_(1)
    return scale, scale * torch.where(upper >> 7 == 0, 0.125, -0.125)


def _iq1_m(data: torch.Tensor) -> tuple:
    _, words = _parts(data, 48, 8)
    words = words.contiguous().view(torch.int16).int() & 0xFFFF
    places = torch.arange(4)
    scale = (words >> 12 << 4 * places).sum(-1, keepdim=True).to(torch.int16).view(torch.float16).float()
    thirds = (words.unsqueeze(-1) >> 3 * places & 7).flatten(-2).float()
    return scale * thirds.mul_(2).add_(1) / 8, None  # its values are whole numbers, and an eighth more or less


def _tq1_0(data: torch.Tensor) -> tuple:
    many, few, scale = _parts(data, 48, 4, 2)
    pieces = [_trits(many[..., :32], 5), _trits(many[..., 32:], 5), _trits(few, 4)]
    return 1 - torch.cat(pieces, dim=-1), -_floats(scale), None


def _tq2_0(data: torch.Tensor) -> tuple:
    codes, scale = _parts(data, 64, 2)
    # from 1 down, under the negative scale: two bits reach -2, which is what a fourth code would be
    return 1 - _planes(codes.reshape(*codes.shape[:-1], 2, 32), 2).flatten(-3), -_floats(scale), None


KEPT = {
    "Q4_0": Kept("int4-g32", _q4_0),
    "Q4_1": Kept("int4-g32", _q4_1),
    "Q4_K": Kept("int4-g32", _q4_k),
    "Q5_0": Kept("int5-g32", _q5_0),
    "Q5_1": Kept("int5-g32-asym", _q5_1),
    "Q8_0": Kept("int8-g32", _q8_0),
    "Q2_K": Kept("int2-g16-asym", _q2_k),
    "Q3_K": Kept("int3-g16", _q3_k),
    "Q5_K": Kept("int5-g32-asym", _q5_k),
    "Q6_K": Kept("int6-g16", _q6_k),
    "IQ1_S": Kept("int2-g32-asym", partial(_looked_up, "IQ1_S", _iq1_s)),
    "IQ1_M": Kept("int5-g16", partial(_looked_up, "IQ1_M", _iq1_m)),
    "IQ2_XXS": Kept("int8-g32", partial(_looked_up, "IQ2_XXS", _iq2_xxs)),
    "IQ2_XS": Kept("int8-g16", partial(_looked_up, "IQ2_XS", _iq2_xs)),
    "IQ2_S": Kept("int8-g16", partial(_looked_up, "IQ2_S", _iq2_s)),
    "IQ3_XXS": Kept("int6-g32", partial(_looked_up, "IQ3_XXS", _iq3_xxs)),
    "IQ3_S": Kept("int5-g32", partial(_looked_up, "IQ3_S", _iq3_s)),
    "TQ1_0": Kept("int2-g256", _tq1_0),
    "TQ2_0": Kept("int2-g256", _tq2_0),
    "IQ4_NL": Kept("int8-g32", _iq4_nl),
    "IQ4_XS": Kept("int8-g32", _iq4_xs),
    "MXFP4": Kept("int5-g32", _mxfp4),
}
"""By GGML's name of a type."""


def _parts(data: torch.Tensor, *sizes: int) -> tuple[torch.Tensor, ...]:
    """``(rows, blocks, bytes)`` of each part of the blocks, which follow one another without gaps."""
    return data.reshape(data.shape[0], -1, sum(sizes)).split(sizes, dim=-1)


def _floats(half: torch.Tensor) -> torch.Tensor:
    """``(…, 1)`` float32 of two bytes each."""
    return half.contiguous().view(torch.float16).float()


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """All lower halves of the last dimension's bytes, then all upper ones, int8."""
    return torch.cat((data & 15, data >> 4), dim=-1).view(torch.int8)


def _bits(data: torch.Tensor) -> torch.Tensor:
    """The bits of the last dimension's bytes, the lowest of each first, int8."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((data.unsqueeze(-1) >> shifts) & 1).flatten(-2).view(torch.int8)


def _planes(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of so many bits ``(…, 8 / bits, bytes)`` int8: the lowest of all bytes, then the next of all."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8).unsqueeze(-1)
    return ((data.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)).view(torch.int8)


def _upper(data: torch.Tensor) -> torch.Tensor:
    """The upper halves of bytes, float32."""
    return (data >> 4).float()


def _pairs(data: torch.Tensor) -> torch.Tensor:
    """The halves of bytes, the lower before the upper one of each, float32."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2).float()


def _trits(data: torch.Tensor, count: int) -> torch.Tensor:
    """So many digits to the base of three a byte, 0 to 2: the first of all bytes, then the next of all, int8.

    A byte is what they are of 243, rounded up to so many 256ths: multiplied by three, each digit comes out on top.
    """
    shifted = data.unsqueeze(-2).int() * torch.tensor([[3**place] for place in range(count)]) & 255
    return (shifted * 3 >> 8).to(torch.int8).flatten(-2)


def _sixteen_six_bits(packed: torch.Tensor) -> torch.Tensor:
    """Sixteen signed scales of 6 bits, ``(rows, blocks, 16)``, from their 12 bytes.

    The halves of bytes 0 to 7 are the four lower bits, all lower halves first; bytes 8 to 11 hold the two upper ones.
    """
    lower, upper = packed.split((8, 4), dim=-1)
    return (_nibbles(lower) + 16 * _planes(upper, 2).flatten(-2)).float().sub_(32)


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight least values of 6 bits each, ``(rows, blocks, 8)``, from their 12 bytes.

    The first four of each are the lower bits of bytes 0 to 3 and 4 to 7; of the last four these bytes hold the two
    upper bits, and bytes 8 to 11 the four lower ones: the scales' below, the least values' above.
    """
    first, second, third = packed.split(4, dim=-1)
    scales = torch.cat((first & 63, (third & 15) | (first >> 6 << 4)), dim=-1)
    least = torch.cat((second & 63, (third >> 4) | (second >> 6 << 4)), dim=-1)
    return scales.float(), least.float()
