"""Layers that hold quantised weights and run them over kernels other people wrote.

CPU: ``_weight_int8pack_mm`` and ``_weight_int4pack_mm_for_cpu``, bfloat16 activations only (other dtypes are 20 times
slower, so they are cast around the call). CUDA: ``_weight_int4pack_mm`` on Ampere or later, bitsandbytes for nf4. Where
no kernel serves, a tile of the weight is dequantised at a time, so that the temporary stays small (nf4: all of it).

A layer on meta imitates the kernels it is told to (``kernels=``): that is how a forecast knows their temporaries.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lowvram_lab.formats import Format
from lowvram_lab.quantize.solvers import INT4_OFFSET, quantize
from lowvram_lab.units import MiB

TILE_BYTES = 16 * MiB
"""Largest dequantised temporary: small beside any budget, large enough to keep a matrix product efficient."""

DEQUANTIZE_ROWS = 64
"""From this many tokens on, torch's CPU int8 kernel is slower than dequantise + matmul (measured, 2560 to 6912)."""

NF4_FUSED_ROWS = 4
"""Up to this many tokens bitsandbytes always runs its fused kernel on CUDA (``_GEMM_4BIT_CUSTOM_FLOOR_M``); beyond it
the card decides, so there the weight is dequantised in the open, where it is counted."""

CUDA_INNER_K_TILES = 8
_CUDA_INT4_K = CUDA_INNER_K_TILES * 16


class QuantizedLinear(nn.Module):
    """``y = x W^T + b`` with W stored in a quantised format.

    Args:
        in_features: Columns of W.
        out_features: Rows of W.
        fmt: The format.
        kernels: ``"cpu"`` or ``"cuda"``: whose kernels the layer runs, or imitates on meta.

    Shapes: x ``(..., in_features)``, result ``(..., out_features)`` in x's dtype.
    """

    def __init__(self, in_features: int, out_features: int, fmt: Format, kernels: str):
        super().__init__()
        self.in_features, self.out_features, self.format, self.kernels = in_features, out_features, fmt, kernels
        self.bias = None

    def store(self, weight: torch.Tensor, move) -> None:
        """Quantises ``weight`` ``(out, in)`` and keeps the result where ``move`` puts it.

        Args:
            weight: Float weight, on the CPU or on meta.
            move: Tensor → the tensor at its final place.

        Raises:
            CheckpointError: The weight is not finite.
        """
        tensors = _shapes_only(weight, self.format) if weight.is_meta else quantize(weight, self.format)
        for name, tensor in tensors.items():
            self.register_buffer(name, move(tensor))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.in_features}, {self.out_features}, {self.format.name}, bias={self.bias is not None}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies and adds the bias."""
        rows = x.reshape(-1, self.in_features)
        result = self.multiply(rows)
        if self.bias is not None:
            result = result + self.bias
        return result.view(*x.shape[:-1], self.out_features)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """``(tokens, in_features)`` → ``(tokens, out_features)``."""
        raise NotImplementedError

    def weight_tile(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows ``start:stop`` of the dequantised weight, ``(stop - start, in_features)``."""
        raise NotImplementedError

    def multiply_by_tiles(self, rows: torch.Tensor) -> torch.Tensor:
        """Dequantise + matmul, a bounded tile of output features at a time."""
        step = max(1, TILE_BYTES // (rows.element_size() * self.in_features))
        if step >= self.out_features:
            return F.linear(rows, self.weight_tile(0, self.out_features, rows.dtype))
        result = rows.new_empty(rows.shape[0], self.out_features)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            result[:, start:stop] = F.linear(rows, self.weight_tile(start, stop, rows.dtype))
        return result


class Int8Linear(QuantizedLinear):
    """One int8 code a weight, one bf16 scale an output feature."""

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """CPU kernel for few tokens, dequantised tiles for many and on CUDA."""
        if self.kernels == "cpu" and rows.shape[0] < DEQUANTIZE_ROWS:
            product = torch.ops.aten._weight_int8pack_mm(rows.to(torch.bfloat16), self.weight, self.scale)
            return product.to(rows.dtype)
        return self.multiply_by_tiles(rows)

    def weight_tile(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """See ``QuantizedLinear``."""
        return self.weight[start:stop].to(dtype).mul_(self.scale[start:stop].to(dtype).unsqueeze(1))


class Int4Linear(QuantizedLinear):
    """Four-bit codes; a bf16 scale and zero for every ``group_size`` inputs of an output feature.

    ``layout`` says how the codes lie: ``"cpu"`` and ``"cuda"`` are what torch's own packing makes (they differ by
    machine, so they never go to disk), ``"nibbles"`` is two codes a byte, the even column low.
    """

    def __init__(self, in_features: int, out_features: int, fmt: Format, kernels: str):
        super().__init__(in_features, out_features, fmt, kernels)
        if kernels == "cpu" and out_features % 16 == 0:
            self.layout = "cpu"
        elif kernels == "cuda" and in_features % _CUDA_INT4_K == 0 and out_features % 8 == 0 and _ampere():
            self.layout = "cuda"
        else:
            self.layout = "nibbles"

    def store(self, weight: torch.Tensor, move) -> None:
        """See ``QuantizedLinear``. CUDA packs after the move: its packing runs only there."""
        if weight.is_meta:
            super().store(weight, move)
            if self.layout == "cuda":  # repacked on the card: for a moment both copies are there
                self.packed = self.packed.clone()
            return
        tensors = quantize(weight, self.format)
        codes = tensors.pop("codes")
        if self.layout == "cpu":
            packed = move(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1))
        else:
            high_first = self.layout == "cuda"  # tinygemm wants the even column in the high nibble
            packed = move(_two_per_byte(codes, high_first))
            if high_first:
                packed = torch.ops.aten._convert_weight_to_int4pack(packed, CUDA_INNER_K_TILES)
        self.register_buffer("packed", packed)
        self.register_buffer("scale_and_zero", move(tensors["scale_and_zero"]))

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """torch's int4 kernel where the layout has one, else dequantised tiles."""
        if self.layout == "nibbles":
            return self.multiply_by_tiles(rows)
        x = rows.to(torch.bfloat16)
        if self.layout == "cpu":
            kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        elif rows.is_meta:  # tinygemm's own packing is not imitated on meta; its result and temporaries (none) are
            return x.new_empty(x.shape[0], self.out_features).to(rows.dtype)
        else:
            kernel = torch.ops.aten._weight_int4pack_mm
        return kernel(x, self.packed, self.format.group_size, self.scale_and_zero).to(rows.dtype)

    def weight_tile(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """See ``QuantizedLinear``; for the ``nibbles`` layout."""
        packed = self.packed[start:stop]
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).view(stop - start, -1, self.format.group_size)
        scale, zero = self.scale_and_zero[:, start:stop].to(dtype).transpose(0, 1).unbind(-1)
        tile = codes.to(dtype).sub_(INT4_OFFSET).mul_(scale.unsqueeze(-1)).add_(zero.unsqueeze(-1))
        return tile.view(stop - start, self.in_features)


class Nf4Linear(QuantizedLinear):
    """bitsandbytes' 4-bit NormalFloat: two codes a byte, one fp32 absmax for every 64 weights."""

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """bitsandbytes' fused kernel for few tokens on CUDA, else a dequantised weight and matmul."""
        import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

        shape = [self.out_features, self.in_features]
        if self.kernels == "cuda" and rows.shape[0] <= NF4_FUSED_ROWS:
            return torch.ops.bitsandbytes.gemm_4bit.default(
                rows, self.packed, shape, self.absmax, self.format.group_size, "nf4"
            )
        weight = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.packed, self.absmax, self.format.group_size, "nf4", shape, rows.dtype
        )
        return F.linear(rows, weight)


class Int8Embedding(nn.Module):
    """An embedding table in int8, one bf16 scale a row; shares both with a tied ``Int8Linear`` head.

    Shapes: ids ``(...)`` of integers → ``(..., embedding_dim)`` in ``dtype``.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, fmt: Format, dtype: torch.dtype):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.format, self.dtype = num_embeddings, embedding_dim, fmt, dtype

    def store(self, weight: torch.Tensor, move) -> None:
        """Quantises the table ``(num_embeddings, embedding_dim)`` row by row; see ``QuantizedLinear.store``."""
        tensors = _shapes_only(weight, self.format) if weight.is_meta else quantize(weight, self.format)
        for name, tensor in tensors.items():
            self.register_buffer(name, move(tensor))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Looks up rows and scales them."""
        rows = F.embedding(ids, self.weight).to(self.dtype)
        return rows.mul_(self.scale[ids].to(self.dtype).unsqueeze(-1))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format.name}"


_LINEARS = {"int8": Int8Linear, "int4": Int4Linear, "nf4": Nf4Linear}


def import_kernels(formats: set[str]) -> None:
    """Imports what the formats' kernels need, before a meter runs that would count their tables."""
    if "nf4" in formats:
        import bitsandbytes  # noqa: F401


def quantized_linear(in_features: int, out_features: int, fmt: Format, kernels: str) -> QuantizedLinear:
    """An empty layer of a format; fill it with ``store``."""
    return _LINEARS[fmt.kind](in_features, out_features, fmt, kernels)


def _shapes_only(weight: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    """What a dry run stores: the format table's tensors, without data."""
    tensors = fmt.tensors(tuple(weight.shape), weight.dtype)
    return {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in tensors.items()}


def _two_per_byte(codes: torch.Tensor, high_first: bool) -> torch.Tensor:
    even, odd = codes[:, ::2], codes[:, 1::2]
    return (even << 4) | odd if high_first else (odd << 4) | even


def _ampere() -> bool:
    # A forecast made without a card assumes Ampere or later; a Turing card has no bf16 and takes the nibbles layout.
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
