"""Layers that hold quantised weights and run them over kernels.

CPU: a kernel of ours (``kernels/product.py``) where there is a C++ compiler; without one torch's, which want bfloat16
activations (others are 20 times slower). CUDA: ``_weight_int4pack_mm`` on Ampere or later, bitsandbytes for nf4. Where
none serves, and for many tokens, a tile of the weight is dequantised at a time, a small temporary (nf4: all of it).

A layer on meta imitates the kernels it is told to (``kernels=``): that is how a forecast knows their temporaries.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lowvram_lab.kernels import product
from lowvram_lab.kernels.int4_layout import cpu_block_rows, pack_for_cpu, two_per_byte, unpack_from_cpu
from lowvram_lab.kernels.library import library, multiplies_pairs, opened, there
from lowvram_lab.layouts.packing import unpack
from lowvram_lab.memory.card import Card, this_card
from lowvram_lab.model.formats import Format, get_format
from lowvram_lab.units import MiB
from lowvram_lab.weights.codes import INT4_OFFSET
from lowvram_lab.weights.solvers import quantize

TILE_BYTES = 16 * MiB
"""Largest dequantised temporary: small beside any budget, large enough to keep a matrix product efficient."""

DEQUANTIZE_ROWS = 64
"""From this many tokens on, torch's CPU int8 kernel is slower than dequantise + matmul (measured, 2560 to 6912)."""

INT8_COLUMNS = 16
"""torch's CPU int8 kernel reads so many columns at once, also beyond the end of a row: NaN, or a crash."""

INT8_ALIGNMENT = 16
"""torch's CPU int8 kernel ends the process on a weight that begins elsewhere, as one mapped from safetensors may."""

NF4_FUSED_ROWS = 4
"""Up to this many tokens bitsandbytes always runs its fused kernel on CUDA (``_GEMM_4BIT_CUSTOM_FLOOR_M``); beyond it
the card decides, so there the weight is dequantised in the open, where it is counted."""

Move = Callable[[torch.Tensor], torch.Tensor]
"""A tensor → the same at its final place."""

CUDA_INNER_K_TILES = 8
_CUDA_INT4_K = CUDA_INNER_K_TILES * 16


class Quantized(nn.Module):
    """A module whose weight is stored in a quantised format, as buffers."""

    format: Format

    def store(self, weight: torch.Tensor, move: Move, solver: str = "rtn") -> None:
        """Quantises a weight and keeps the result where ``move`` puts it.

        Args:
            weight: ``(rows, columns)`` float, on the CPU or on meta.
            move: Puts a tensor at its final place.
            solver: See ``quantize``.

        Raises:
            CheckpointError: The weight is not finite.
        """
        if weight.is_meta:  # a dry run: the format table's tensors, without data
            tensors = self.format.tensors(tuple(weight.shape), weight.dtype)
            empty = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in tensors.items()}
            self.fill(empty, move)
        else:
            self.fill(quantize(weight, self.format, solver=solver), move)

    def fill(self, tensors: dict[str, torch.Tensor], move: Move) -> None:
        """Keeps a weight quantised before, where ``move`` puts it.

        Args:
            tensors: As ``quantize`` returns them, or of those shapes on meta.
            move: See ``store``.
        """
        for name, tensor in tensors.items():
            self.register_buffer(name, move(tensor))

    def weight_rows(self, select: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Some rows of the dequantised weight, ``(rows, columns)``; ``select`` is a slice or ``(rows,)`` ids."""
        raise NotImplementedError

    def dequantises(self, select: slice | torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether our kernel makes these rows, in one pass."""
        return False


class QuantizedLinear(Quantized):
    """``y = x W^T + b`` with W stored in a quantised format.

    Args:
        in_features: Columns of W.
        out_features: Rows of W.
        fmt: The format.
        kernels: ``"cpu"`` or ``"cuda"``: whose kernels the layer runs, or imitates on meta.
        shared: Whether an embedding reads rows of the same buffers.
        card: Which of CUDA's there are; by default those of this machine's card.

    Shapes: x ``(..., in_features)``, result ``(..., out_features)`` in x's dtype.
    """

    held: tuple[str, str]
    """Names of the tensors that a kernel reads: codes and scales."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fmt: Format,
        kernels: str,
        shared: bool = False,
        card: Card | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.format, self.kernels = in_features, out_features, fmt, kernels
        self.bias = None
        self.tile_rows = 1  # rows of the weight that can be dequantised only together
        self._lay_out(shared, card)
        self.readable = self._readable() and there()  # by our kernel; asked once: to look for a compiler takes time

    def _lay_out(self, shared: bool, card: Card | None) -> None:
        """Chooses how the codes lie, in formats where there is a choice."""

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.in_features}, {self.out_features}, {self.format.name}, bias={self.bias is not None}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies and adds the bias."""
        # the last tokens of a batch lie apart; kernels want no gaps
        result = self.multiply(x.reshape(-1, self.in_features).contiguous())
        if self.bias is not None:
            result = result + self.bias
        return result.view(*x.shape[:-1], self.out_features)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """``(tokens, in_features)`` → ``(tokens, out_features)``: our kernel, or dequantise + matmul, tile by tile."""
        if (found := self.by_our_kernel(rows)) is not None:
            return found
        step = max(1, TILE_BYTES // (rows.element_size() * self.in_features))
        step = max(step - step % self.tile_rows, self.tile_rows)
        if step >= self.out_features:
            return F.linear(rows, self.weight_rows(slice(None), rows.dtype))
        result = rows.new_empty(rows.shape[0], self.out_features)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            result[:, start:stop] = F.linear(rows, self.weight_rows(slice(start, stop), rows.dtype))
        return result

    def _readable(self) -> bool:
        """Whether our kernel could read the weight as it lies."""
        return self.in_features % (self.format.group_size or 1) == 0  # of nf4, groups may go on in the next row

    def has_our_kernel(self) -> bool:
        """Whether our kernel multiplies by the weight as it lies."""
        return self.readable and self.kernels == "cpu"

    def dequantises(self, select: slice | torch.Tensor, dtype: torch.dtype) -> bool:
        """See ``Quantized``."""
        return isinstance(select, slice) and dtype in product.DTYPES and self.has_our_kernel()

    @property
    def kernel_format(self) -> int:
        """How our kernel calls the way in which the weight lies."""
        return product.format_number(self.format)

    def by_our_kernel(self, rows: torch.Tensor) -> torch.Tensor | None:
        """``multiply`` by our kernel, on the CPU with a compiler (many tokens not on every processor), or ``None``."""
        many = rows.shape[0] > product.MOST_ROWS
        if (many and not multiplies_pairs()) or not self.has_our_kernel() or not (rows.is_meta or opened()):
            return None
        held = (getattr(self, name) for name in self.held)
        known = rows if rows.dtype in product.DTYPES else rows.float()
        return product.quantized_product(known, *held, self.out_features, self.kernel_format).to(rows.dtype)


class _Int8Rows:
    """One int8 code a weight, one bf16 scale an output feature or, of formats with groups, a group of inputs."""

    def weight_rows(self, select: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See ``Quantized``."""
        codes, scale = self.weight[select], self.scale[select]
        if self.dequantises(select, dtype):
            return product.dequantized(codes, scale, codes.shape[0], 8, dtype)
        groups = codes.to(dtype).view(codes.shape[0], -1, self.format.group_size or codes.shape[1])
        return groups.mul_(scale.to(dtype).view(*groups.shape[:2], 1)).view(codes.shape)


class _Int4Rows:
    """Two codes a byte, the even column low; a bf16 scale and zero for every ``group_size`` inputs."""

    def weight_rows(self, select: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See ``Quantized``."""
        packed = self.packed[select]
        if self.dequantises(select, dtype):
            return product.dequantized(packed, self.scale_and_zero[:, select], packed.shape[0], 4, dtype)
        codes = self.codes(packed)
        scale, zero = self.scale_and_zero[:, select].to(dtype).transpose(0, 1).unbind(-1)
        groups = codes.view(*scale.shape, self.format.group_size).to(dtype)
        groups = groups.sub_(INT4_OFFSET).mul_(scale.unsqueeze(-1)).add_(zero.unsqueeze(-1))
        return groups.view(packed.shape[0], 2 * packed.shape[1])

    def codes(self, packed: torch.Tensor) -> torch.Tensor:
        """``(rows, in / 2)`` bytes → codes, ``in`` of them a row, in the order of the columns."""
        return torch.stack((packed & 15, packed >> 4), dim=-1)


class _PackedRows:
    """Codes packed tight into words; a bf16 scale, in some formats also a zero, for every ``group_size`` inputs."""

    def weight_rows(self, select: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See ``Quantized``."""
        packed, zero = self.packed[select], None
        scales = self.scale_and_zero[:, select] if self.format.has_zeros else self.scale[select]
        if self.dequantises(select, dtype):
            return product.dequantized(packed, scales, packed.shape[0], self.format.bits, dtype)
        scale = scales.to(dtype)
        if self.format.has_zeros:
            scale, zero = scale.transpose(0, 1).unbind(-1)
        codes = unpack(packed, self.format.bits)
        groups = codes.to(dtype).view(*scale.shape, self.format.group_size).mul_(scale.unsqueeze(-1))
        return (groups if zero is None else groups.add_(zero.unsqueeze(-1))).view(codes.shape)


class Int8Linear(_Int8Rows, QuantizedLinear):
    """Our kernel on the CPU; without a compiler torch's, for widths that it reads and scales of whole rows."""

    held = ("weight", "scale")

    def fill(self, tensors: dict[str, torch.Tensor], move: Move) -> None:
        """See ``Quantized``; a weight that begins where torch's kernel cannot read it is copied."""
        super().fill(tensors, move)
        if self.by_torch() and not self.weight.is_meta and self.weight.data_ptr() % INT8_ALIGNMENT:
            self.weight = self.weight.clone()

    def by_torch(self) -> bool:
        """Whether torch's kernel multiplies few tokens."""
        known = self.format.group_size is None and self.in_features % INT8_COLUMNS == 0
        return known and self.kernels == "cpu" and not self.has_our_kernel()

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """A CPU kernel for few tokens, dequantised tiles for many and on CUDA."""
        if rows.shape[0] < DEQUANTIZE_ROWS and self.by_torch():
            return torch.ops.aten._weight_int8pack_mm(rows.to(torch.bfloat16), self.weight, self.scale).to(rows.dtype)
        return super().multiply(rows)


class Int4Linear(_Int4Rows, QuantizedLinear):
    """torch's int4 kernels.

    ``layout`` says how the codes lie: ``"cpu"`` and ``"cuda"`` are what torch's own packing makes (they differ by
    machine, so a checkpoint never holds them), ``"nibbles"`` is two codes a byte, the even column low: the only one
    whose rows an embedding can read.
    """

    held = ("packed", "scale_and_zero")

    def _lay_out(self, shared: bool, card: Card | None) -> None:
        in_features, out_features, kernels = self.in_features, self.out_features, self.kernels
        in_tiles = in_features % _CUDA_INT4_K == 0 and out_features % 8 == 0
        if not shared and kernels == "cpu" and out_features % 16 == 0:
            self.layout, self.tile_rows = "cpu", cpu_block_rows() or 1
        elif not shared and kernels == "cuda" and in_tiles and (card or this_card()).multiplies_int4:
            self.layout = "cuda"
        else:
            self.layout = "nibbles"

    def fill(self, tensors: dict[str, torch.Tensor], move: Move) -> None:
        """See ``Quantized``. CUDA packs after the move, where its packing runs: for a moment both are there."""
        codes = tensors.get("codes")
        if codes is None:  # a dry run's
            packed = move(tensors["packed"])
            packed = packed.clone() if self.layout == "cuda" else packed
        elif self.layout == "cuda":  # tinygemm wants the even column in the high nibble
            packed = move(two_per_byte(codes, high_first=True))
            packed = torch.ops.aten._convert_weight_to_int4pack(packed, CUDA_INNER_K_TILES)
        else:
            packed = move(pack_for_cpu(codes) if self.layout == "cpu" else two_per_byte(codes, high_first=False))
        self.register_buffer("packed", packed)
        self.register_buffer("scale_and_zero", move(tensors["scale_and_zero"]))

    def codes(self, packed: torch.Tensor) -> torch.Tensor:
        """See ``_Int4Rows``; of whole blocks in the CPU's layout."""
        return unpack_from_cpu(packed) if self.layout == "cpu" else super().codes(packed)

    def _readable(self) -> bool:
        """See ``QuantizedLinear``; of torch's layouts it reads one."""
        if self.layout == "nibbles":
            return super()._readable()
        return self.tile_rows == product.BLOCK_ROWS and self.out_features % self.tile_rows == 0 and multiplies_pairs()

    def dequantises(self, select: slice | torch.Tensor, dtype: torch.dtype) -> bool:
        """See ``Quantized``."""
        return self.layout == "nibbles" and super().dequantises(select, dtype)

    @property
    def kernel_format(self) -> int:
        """See ``QuantizedLinear``."""
        return product.INT4_BLOCKS if self.layout == "cpu" else super().kernel_format

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Our kernel or torch's where the layout has one for the device, else dequantised tiles."""
        if (found := self.by_our_kernel(rows)) is not None:
            return found
        if self.layout != self.kernels:  # nibbles; or packed for the CPU, and for now on the GPU: see travel.py
            return super().multiply(rows)
        x = rows.to(torch.bfloat16)
        if self.layout == "cpu":
            kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        elif rows.is_meta:  # tinygemm's own packing is not imitated on meta; its result and temporaries (none) are
            return x.new_empty(x.shape[0], self.out_features).to(rows.dtype)
        else:
            kernel = torch.ops.aten._weight_int4pack_mm
        # fused with others (fuse.py) the scales are a view with gaps, which the kernel would read as if without
        return kernel(x, self.packed, self.format.group_size, self.scale_and_zero.contiguous()).to(rows.dtype)


class PackedLinear(_PackedRows, QuantizedLinear):
    """Bits and groups that no other kernel has: ours on the CPU."""

    @property
    def held(self) -> tuple[str, str]:
        """See ``QuantizedLinear``."""
        return "packed", "scale_and_zero" if self.format.has_zeros else "scale"


class Nf4Linear(QuantizedLinear):
    """bitsandbytes' 4-bit NormalFloat: two codes a byte, one fp32 absmax for every 64 weights."""

    held = ("packed", "absmax")

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """For few tokens bitsandbytes' fused kernel on CUDA, ours on the CPU; else a dequantised weight and matmul."""
        import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

        if (found := self.by_our_kernel(rows)) is not None:
            return found
        kernels, group_size = torch.ops.bitsandbytes, self.format.group_size
        shape = [self.out_features, self.in_features]
        if self.kernels == "cuda" and rows.shape[0] <= NF4_FUSED_ROWS:
            return kernels.gemm_4bit.default(rows, self.packed, shape, self.absmax, group_size, "nf4")
        weight = kernels.dequantize_4bit.default(self.packed, self.absmax, group_size, "nf4", shape, rows.dtype)
        return F.linear(rows, weight)


class QuantizedEmbedding(Quantized):
    """An embedding table in a quantised format, whose buffers a tied head can share.

    Args:
        num_embeddings: Rows.
        embedding_dim: Columns.
        fmt: The format.
        dtype: Of the result.
        scale: What rows are multiplied by.

    Shapes: ids ``(...)`` of integers → ``(..., embedding_dim)``.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, fmt: Format, dtype: torch.dtype, scale: float = 1.0):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.format, self.dtype = num_embeddings, embedding_dim, fmt, dtype
        self.scale_of_rows = float(torch.tensor(scale, dtype=dtype))  # rounded as the class's own is

    def fill(self, tensors: dict[str, torch.Tensor], move: Move) -> None:
        """See ``Quantized``."""
        if "codes" in tensors:
            packed = two_per_byte(tensors["codes"], high_first=False)
            tensors = {"scale_and_zero": tensors["scale_and_zero"], "packed": packed}
        super().fill(tensors, move)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Looks up rows and scales them."""
        rows = self.weight_rows(ids.reshape(-1), self.dtype).view(*ids.shape, self.embedding_dim)
        return rows if self.scale_of_rows == 1 else rows.mul_(self.scale_of_rows)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format.name}"


class Int8Embedding(_Int8Rows, QuantizedEmbedding):
    """A table in int8."""


class Int4Embedding(_Int4Rows, QuantizedEmbedding):
    """A table in int4."""


class PackedEmbedding(_PackedRows, QuantizedEmbedding):
    """A table in a packed format."""


_LINEARS = {"int8": Int8Linear, "int4": Int4Linear, "packed": PackedLinear, "nf4": Nf4Linear}
_EMBEDDINGS = {"int8": Int8Embedding, "int4": Int4Embedding, "packed": PackedEmbedding}


def import_kernels(formats: set[str], dry: bool) -> None:
    """Imports or learns what the formats' kernels need, before a meter runs that would count their tables.

    Of a dry run nothing is multiplied: our kernels need not be compiled for it.
    """
    if "nf4" in formats:
        import bitsandbytes  # noqa: F401
    kinds = {get_format(name).kind for name in formats}
    if "int4" in kinds:
        cpu_block_rows()
    if not dry:
        library()


def quantized_linear(
    in_features: int,
    out_features: int,
    fmt: Format,
    kernels: str,
    *,
    shared: bool = False,
    card: Card | None = None,
) -> QuantizedLinear:
    """An empty layer of a format, to be given its weight by ``store`` or ``fill``; see ``QuantizedLinear``."""
    return _LINEARS[fmt.kind](in_features, out_features, fmt, kernels, shared, card)


def quantized_embedding(
    num_embeddings: int, embedding_dim: int, fmt: Format, dtype: torch.dtype, scale: float = 1.0
) -> QuantizedEmbedding:
    """An empty table of a format; see ``quantized_linear``."""
    return _EMBEDDINGS[fmt.kind](num_embeddings, embedding_dim, fmt, dtype, scale)
