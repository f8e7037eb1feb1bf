"""Precision formats as one frozen table: what tensors a weight becomes, hence its exact bytes, and who may hold it.

Every other module reads this table: the quantised layers allocate what it says, the forecast adds up what it says. It
knows nothing about models or kernels.

Sources: nf4, Dettmers et al. 2023, arXiv:2305.14314; group-wise integer weights, Frantar et al. 2022, arXiv:2210.17323.
"""

import difflib
import math
import re
from dataclasses import dataclass

import torch

from lowvram_lab.errors import PlanError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROUP_SIZES = (32, 64, 96, 128, 192, 256)
"""Weights that may share a scale: divisors of the widths that models have; 96 and 192 serve 288, 576 and 1536."""

KERNEL_GROUP_SIZES = (32, 64, 128, 256)
"""The group sizes torch's int4 kernels take (``aten/src/ATen/native/LinearAlgebra.cpp``)."""

SCALE_DTYPE = torch.bfloat16
"""torch's CPU int4 and int8 kernels want scales in bfloat16; the solvers round the scale *before* they choose codes."""

LOADING_SOLVERS = ("search", "rtn")
"""How weights in floats become codes without any data, see ``Plan.solver``."""


_SPELLINGS = {
    "float32": "fp32",
    "f32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "f16": "fp16",
    "half": "fp16",
}
_NEAREST = {
    "fp8": "int8",
    "mxfp8": "int8",
    "fp4": "nf4",
    "mxfp4": "nf4",
    "nvfp4": "nf4",
    "gptq": "int4-g128",
    "awq": "int4-g128",
}
"""Formats of other tools, and what is nearest to each here."""

_USUAL = ("int8", "int4", "nf4")
_LLAMA_CPP = re.compile(r"(?:iq|q|tq)([1-8])_[a-z0-9_]+")
_BITS = re.compile(r"(?:q|int-)([2-8])|([2-8])-?bits?")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data, without any allocator's rounding."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Format:
    """One way to store a weight.

    Attributes:
        name: As written in a plan, e.g. ``"int4-g128"``.
        kind: ``"float"``, ``"int8"`` (a scale per output channel or per group), ``"int4"`` (scale and zero per group
            of ``group_size`` inputs, as torch's kernels want them), ``"packed"`` (2 to 6 bits packed tight, a scale per
            group, in some a zero; on the CPU a kernel of ours) or ``"nf4"`` (bitsandbytes, one fp32 absmax per
            ``group_size`` values).
        bits: Bits of one code, without scales.
        group_size: Weights that share a scale, or ``None`` for a whole row.
        modules: Kinds of module that may hold it.
        has_zeros: Whether each group has a zero beside its scale: a weight is ``code * scale + zero``. A file's zero
            points or least values say what it is; of weights in floats the solver chooses it with the codes.
        planes: 2 where a second weight, the low plane, holds what the first, the high one, is off by: the high plane is
            a weight by itself, both together are as good as int8 (``int4+4``). The other attributes are the high one's.
    """

    name: str
    kind: str
    bits: int
    group_size: int | None = None
    modules: tuple[str, ...] = ("linear",)
    has_zeros: bool = False
    planes: int = 1

    @property
    def storable(self) -> bool:
        """Whether a converted directory may hold it: codes and scales, as stock transformers reads them."""
        return self.kind in ("int8", "int4") or (self.kind == "packed" and not self.has_zeros)

    @property
    def plane(self) -> "Format":
        """The high plane's format, by itself."""
        return self if self.planes == 1 else FORMATS[self.name.replace("int4+4", "int4")]

    @property
    def low_plane(self) -> "Format":
        """The low plane's, of two.

        In groups of 32, with zeros: what GPTQ leaves has tails of several steps, on which a scale alone spends its
        range. Error of both planes, beside int8's: 1.3 times; in groups of 64 2.2 times, without zeros 3.7 times
        (four matrices of SmolLM2-135M).
        """
        return FORMATS["int4-g32"]

    def tensors(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, TensorSpec]:
        """The tensors that hold a weight of ``shape``.

        Args:
            shape: ``(out_features, in_features)`` of a linear layer, ``(num_embeddings, embedding_dim)`` of an
                embedding, or any shape for a float format.
            dtype: The plan's activation dtype; a float format's own dtype wins.

        Returns:
            Buffer name → shape and dtype. A float weight has the one entry ``"weight"``; of two planes it is the high
            one's.
        """
        if self.kind == "float":
            return {"weight": TensorSpec(tuple(shape), DTYPES.get(self.name, dtype))}
        rows, columns = shape
        if self.kind == "int8":
            scales = (rows, columns // self.group_size) if self.group_size else (rows,)
            return {"weight": TensorSpec((rows, columns), torch.int8), "scale": TensorSpec(scales, SCALE_DTYPE)}
        if self.kind == "int4":
            groups = columns // self.group_size
            return {
                "packed": TensorSpec((rows, columns // 2), torch.uint8),
                "scale_and_zero": TensorSpec((groups, rows, 2), SCALE_DTYPE),
            }
        if self.kind == "packed":  # 32 codes fill exactly ``bits`` words; see layouts/packing.py
            groups = columns // self.group_size
            scales = {"scale_and_zero": (groups, rows, 2)} if self.has_zeros else {"scale": (rows, groups)}
            return {
                "packed": TensorSpec((rows, columns * self.bits // 32), torch.int32),
                **{name: TensorSpec(sizes, SCALE_DTYPE) for name, sizes in scales.items()},
            }
        return {
            "packed": TensorSpec((rows * columns // 2, 1), torch.uint8),
            "absmax": TensorSpec((rows * columns // self.group_size,), torch.float32),
        }

    def weight_bytes(self, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> int:
        """Exact bytes of a weight of ``shape``: codes, scales and zero points, of all planes."""
        return sum(self.bytes_by_plane(shape, dtype))

    def bytes_by_plane(self, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[int]:
        """``weight_bytes`` of the high plane, and of the low one where there is one."""
        high = sum(spec.nbytes for spec in self.tensors(shape, dtype).values())
        return [high] if self.planes == 1 else [high, self.low_plane.weight_bytes(shape)]

    def refuse(self, module_kind: str, shape: tuple[int, ...]) -> str | None:
        """Why a module of this kind and shape cannot hold the format, or ``None`` where it can."""
        if self.kind == "float":
            return None
        if module_kind not in self.modules:
            return f"{self.name} is for {' and '.join(self.modules)} modules, found a module of kind {module_kind}"
        rows, columns = shape
        unit = 32 if self.kind == "packed" or self.group_size else 1  # codes that kernels read together
        together = max(self.group_size or 1, unit)
        if self.kind in ("int8", "int4", "packed") and columns % together:
            return f"{self.name} needs in_features divisible by {together}, found {columns}"
        if self.kind == "nf4" and rows * columns % self.group_size:
            return f"{self.name} needs a multiple of {self.group_size} weights, found {rows} x {columns}"
        return None


def _table() -> dict[str, Format]:
    everything = ("linear", "embedding", "other")
    tables = ("linear", "embedding")
    sizes = (64, *(size for size in KERNEL_GROUP_SIZES if size != 64))

    def grouped(bits: int, size: int, zeros: bool = False) -> Format:
        kind = "int4" if bits == 4 and size in KERNEL_GROUP_SIZES else "packed"
        name = f"int{bits}{'' if size == 64 else f'-g{size}'}{'-asym' if zeros else ''}"
        return Format(name, kind, bits, size, tables, zeros or kind == "int4")

    formats = [
        Format("fp32", "float", 32, modules=everything),
        Format("bf16", "float", 16, modules=everything),
        Format("fp16", "float", 16, modules=everything),
        Format("int8", "int8", 8, modules=tables),
        Format("int8-g32", "int8", 8, 32, tables),  # what llama.cpp's Q8_0 holds
        *(grouped(bits, size) for bits in (6, 5, 4, 3, 2) for size in (64, *(s for s in GROUP_SIZES if s != 64))),
        Format("int8-g16", "int8", 8, 16, tables),  # this and the next are for what files hold
        *(grouped(bits, 16) for bits in (6, 5, 3)),
        grouped(5, 32, zeros=True),
        *(grouped(3, size, zeros=True) for size in KERNEL_GROUP_SIZES),
        *(grouped(2, size, zeros=True) for size in (16, *KERNEL_GROUP_SIZES)),
        Format("nf4", "nf4", 4, group_size=64),
        *(
            Format(f"int4+4{'' if size == 64 else f'-g{size}'}", "int4", 4, size, has_zeros=True, planes=2)
            for size in sizes
        ),
    ]
    return {entry.name: entry for entry in formats}


FORMATS = _table()


def check_solver(name: str) -> None:
    """Refuses what is none of ``LOADING_SOLVERS``.

    Raises:
        PlanError: Says which there are.
    """
    if name not in LOADING_SOLVERS:
        raise PlanError(f"expected solver {' or '.join(LOADING_SOLVERS)}, found {name!r}")


def get_format(name: str) -> Format:
    """Looks a format up by name, in any case and in the spellings that :func:`canonical_name` reads.

    Raises:
        PlanError: There is no such format; the message names the three nearest, or the one nearest to what another tool
            calls by that name.
    """
    found = FORMATS.get(canonical_name(name)) if isinstance(name, str) else None
    if found is None:
        raise PlanError(f"unknown format {name!r}; {_nearest(name)}")
    return found


def canonical_name(text: str) -> str:
    """A format's name in the one spelling that plans hold, for example of ``"INT8"``, ``"8bit"`` or ``"q8"``.

    Returns:
        The name; what is no format comes back as it is.
    """
    if not isinstance(text, str) or text in FORMATS:
        return text
    name = text.strip().lower().replace("_", "-")
    if bits := _BITS.fullmatch(name):
        name = f"int{bits[1] or bits[2]}"
    name = re.sub("-g64(?=-asym$|$)", "", _SPELLINGS.get(name, name))  # 64 is the size that a name leaves out
    return name if name in FORMATS else text


def _nearest(name: object) -> str:
    """What to write instead of an unknown name."""
    text = name.strip().lower() if isinstance(name, str) else ""
    if theirs := _LLAMA_CPP.fullmatch(text):
        bits = theirs[1] if theirs[1] in "234568" else "2" if theirs[1] == "1" else "8"
        near = "int8" if bits == "8" else f"int{bits}-g32"
        return f"that is llama.cpp's name for about {theirs[1]} bits a weight in small blocks; the nearest is {near}"
    if text in _NEAREST:
        return f"the nearest to it is {_NEAREST[text]}"
    if group := re.fullmatch(r"(int[2-6]|int4\+4)-g([0-9]{1,9})", text):
        plain = [fmt for fmt in FORMATS.values() if fmt.group_size and not fmt.name.endswith("-asym")]
        same_bits = [fmt for fmt in plain if fmt.name.partition("-")[0] == group[1]]
        near = [fmt.name for fmt in sorted(same_bits, key=lambda fmt: abs(fmt.group_size - int(group[2])))]
    else:
        near = difflib.get_close_matches(text, FORMATS, n=3, cutoff=0.5)
        near += [usual for usual in _USUAL if usual not in near]
    return f"the nearest are {', '.join(near[:3])} (bf16, fp16, int8 and groups of 2 to 6 bits such as int4-g128)"
