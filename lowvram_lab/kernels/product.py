"""Products with quantised weights on the CPU, as the operator ``lowvram::quantized_products``.

The kernel (``product.cpp``) reads the codes as they lie, and multiplies with the input in bfloat16 (on processors
without AVX-512 in float32), summing in float32.
"""

import ctypes

import torch

from lowvram_lab.kernels.library import CONTIGUOUS, opened_for
from lowvram_lab.model.formats import Format

MOST_ROWS = 8
"""Rows of an input that share one pass over the codes. For more the kernel dequantises 32 rows of the weight at
a time to bfloat16 (but for int4 in blocks), where the processor multiplies pairs of it; elsewhere that is torch's."""

DTYPES = (torch.bfloat16, torch.float32)
"""Of an input and its product, and of a weight that is dequantised."""

BLOCK_ROWS = 64
"""Rows of a weight that torch's int4 packing interleaves for processors with AVX-512, which the kernel reads too."""

INT4_BLOCKS = 64
"""How the kernel calls that layout; other formats see ``format_number``."""

C_DECLARATION = (
    "int32_t aoti_torch_cpu_quantized_products(AtenTensorHandle rows, "
    "const AtenTensorHandle* codes, int64_t codes_len, const AtenTensorHandle* scales, int64_t scales_len, "
    "const int64_t* features, int64_t features_len, const int64_t* formats, int64_t formats_len, "
    "AtenTensorHandle* result)"
)
"""The operator as a library made by torch's compiler calls it, which finds it among the process's symbols."""


def format_number(fmt: Format) -> int:
    """How the kernel calls a format: the bits of its codes, 0 for nf4."""
    return 0 if fmt.kind == "nf4" else fmt.bits


def format_as_tensor(format: int) -> torch.Tensor:
    """A tensor whose length says the format: what a compiled layer reads off a shape need not be compiled anew."""
    return _LENGTHS[: format + _SHORTEST]


def format_of(tensor: torch.Tensor) -> int:
    """What ``format_as_tensor`` was given."""
    return tensor.shape[0] - _SHORTEST


_SHORTEST = 2  # torch's exporter takes 0 and 1 for other cases
LONGEST_FORMAT = INT4_BLOCKS + _SHORTEST
"""Length of the longest such tensor."""

_LENGTHS = torch.zeros(LONGEST_FORMAT, dtype=torch.uint8)
_BITS = {0: 4, INT4_BLOCKS: 4}
_BFLOAT16, _FLOAT32, _WITH_ZEROS = range(3)
_HALF_UNIT = 16  # the smallest group: two are read together, and none is of 4 bits


def _on_cpu(
    rows: torch.Tensor, codes: list[torch.Tensor], scales: list[torch.Tensor], features: list[int], formats: list[int]
) -> torch.Tensor:
    kernels = opened_for("quantized_products")
    if rows.dtype not in DTYPES:
        raise RuntimeError(f"expected rows in bfloat16 or float32, found {rows.dtype}")
    rows, codes = rows.contiguous(), [each.contiguous() for each in codes]
    result, columns, several = _on_meta(rows, codes, scales, features, formats), rows.shape[1], len(codes)
    sizes = []
    for its_scales, rows_of_it, format in zip(scales, features, formats, strict=True):
        kind, groups, step = _lie(its_scales, rows_of_it)
        if columns // groups == _HALF_UNIT and (format == 4 or columns % (2 * _HALF_UNIT)):
            raise RuntimeError(f"expected groups of {2 * _HALF_UNIT} or more of {format} bits in {columns} columns")
        sizes += [kind, rows_of_it, format, columns // groups, step]
    addresses = ctypes.c_void_p * several
    kernels.lowvram_products(
        *(rows.data_ptr(), rows.dtype == torch.bfloat16, rows.shape[0], columns, several),
        addresses(*(each.data_ptr() for each in codes)),
        addresses(*(each.data_ptr() for each in scales)),
        (ctypes.c_int64 * len(sizes))(*sizes),
        result.data_ptr(),
    )
    return result


def _lie(scales: torch.Tensor, features: int) -> tuple[int, int, int]:
    """What scales there are, how many groups a row has, and elements from a group to the next if there are zeros."""
    if scales.dim() == 3:
        return _WITH_ZEROS, scales.shape[0], scales.stride(0)
    if not scales.is_contiguous():
        raise RuntimeError(f"expected scales that lie side by side, found strides {scales.stride()}")
    return _FLOAT32 if scales.dtype == torch.float32 else _BFLOAT16, scales.numel() // features, 0


def _dequantised_on_cpu(
    codes: torch.Tensor, scales: torch.Tensor, features: int, format: int, dtype: torch.dtype
) -> torch.Tensor:
    result, codes = _dequantised_on_meta(codes, scales, features, format, dtype), codes.contiguous()
    kind, groups, step = _lie(scales, features)
    columns, wide = result.shape[1], dtype == torch.float32
    sizes = kind, features, columns, format, columns // groups, step
    opened_for("dequantized").lowvram_dequantise(codes.data_ptr(), scales.data_ptr(), *sizes, wide, result.data_ptr())
    return result


def _dequantised_on_meta(
    codes: torch.Tensor, scales: torch.Tensor, features: int, format: int, dtype: torch.dtype
) -> torch.Tensor:
    return codes.new_empty(features, 8 * codes.nbytes // (features * _BITS.get(format, format)), dtype=dtype)


def _on_meta(
    rows: torch.Tensor, codes: list[torch.Tensor], scales: list[torch.Tensor], features: list[int], formats: list[int]
) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], sum(features))


_OPERATORS = torch.library.Library("lowvram", "FRAGMENT")
_OPERATORS.define(
    "quantized_products(Tensor rows, Tensor[] codes, Tensor[] scales, int[] features, SymInt[] formats) -> Tensor",
    tags=CONTIGUOUS,
)
_OPERATORS.impl("quantized_products", _on_cpu, "CPU")
_OPERATORS.impl("quantized_products", _on_meta, "Meta")
_OPERATORS.define("dequantized(Tensor codes, Tensor scales, int features, int format, ScalarType dtype) -> Tensor")
_OPERATORS.impl("dequantized", _dequantised_on_cpu, "CPU")
_OPERATORS.impl("dequantized", _dequantised_on_meta, "Meta")

quantized_products = torch.ops.lowvram.quantized_products.default
"""Rows times several quantised weights; the products lie side by side.

Args:
    rows: ``(rows, columns)`` on the CPU, in one of ``DTYPES``.
    codes: Of each weight, row by row, as ``weights.codes.pack`` lays them; of int4 two a byte, the even one low, or in
        blocks as torch packs them; of nf4 as bitsandbytes lays them.
    scales: Of each, bfloat16 or float32: ``(features,)`` or, of nf4, ``(features * groups,)``; ``(features, groups)``;
        ``(groups, features, 2)`` of scales and zeros, in bfloat16.
    features: Rows of each; of blocks a multiple of ``BLOCK_ROWS``.
    formats: See ``format_number`` and ``INT4_BLOCKS``.

Returns:
    ``(rows, sum of features)`` in the rows' dtype. A row's result does not depend on the other rows.
"""


def quantized_product(
    rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, features: int, format: int
) -> torch.Tensor:
    """``quantized_products`` with one weight."""
    return quantized_products(rows, [codes], [scales], [features], [format])


dequantized = torch.ops.lowvram.dequantized.default
"""A weight of integers, or some rows of it.

Args:
    codes: As of ``quantized_products``, not in blocks, nor of nf4 (whose values the kernel rounds twice).
    scales: As of ``quantized_products``.
    features: Rows of the weight.
    format: See ``format_number``.
    dtype: One of ``DTYPES``.

Returns:
    ``(features, columns)`` in dtype, each value rounded once.
"""
