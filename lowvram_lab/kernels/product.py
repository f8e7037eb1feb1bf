"""Products with a quantised weight on the CPU, as the operator ``lowvram::quantized_product``.

The kernel is C++ (``product.cpp``), compiled once for a machine, in some seconds. It reads the codes as they lie, and
multiplies with the input in bfloat16 (in float32 on processors without AVX-512), summing in float32.
"""

import ctypes
import functools
import hashlib
import logging
import shlex
import subprocess
from pathlib import Path

import torch

from lowvram_lab.errors import LowvramError
from lowvram_lab.files import build_directory, cache_dir, sha256_file
from lowvram_lab.kernels.compiler import compiler
from lowvram_lab.machine import instruction_set
from lowvram_lab.model.formats import Format

MOST_ROWS = 8
"""Rows of an input that share one pass over the codes. For more a weight is better dequantised: the kernel then reaches
half of what a matrix product in bfloat16 does. Not so int4 in blocks, which reaches as much."""

BLOCK_ROWS = 64
"""Rows of a weight that torch's int4 packing interleaves for processors with AVX-512, which the kernel reads too."""

INT4_BLOCKS = 64
"""How the kernel calls that layout; other formats see ``format_number``."""

C_DECLARATION = (
    "int32_t aoti_torch_cpu_quantized_product(AtenTensorHandle rows, AtenTensorHandle codes, AtenTensorHandle scales, "
    "int64_t features, int64_t format, AtenTensorHandle* result)"
)
"""The operator as a library made by torch's compiler calls it, which finds it among the process's symbols."""

_SOURCE = Path(__file__).with_name("product.cpp")
_TORCH = Path(torch.__file__).parent / "lib"
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w")
_WAYS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
"""What not every compiler knows; the first that works is taken."""

logger = logging.getLogger(__name__)


_failed: set[tuple[str, Path]] = set()


def there() -> bool:
    """Whether the operator will compute here: there is a compiler, and it has not failed yet. Compiles nothing."""
    command = compiler()
    return command is not None and (command, cache_dir().absolute()) not in _failed


def library() -> ctypes.CDLL | None:
    """The library, compiled first where this machine has none yet; ``None``, and a warning, where that fails."""
    return _library(compiler(), cache_dir().absolute()) if there() else None


@functools.cache
def _library(command: str, folder: Path) -> ctypes.CDLL | None:
    try:
        return _opened(_built(command, folder))
    except (LowvramError, OSError) as error:
        logger.warning("weights are dequantised, which is slower: %s", error)
        _failed.add((command, folder))
        return None


def _built(command: str, folder: Path) -> Path:
    """The library's file."""
    made = repr((_SOURCE.read_text(encoding="utf-8"), _FLAGS, _WAYS, command, instruction_set(), torch.__version__))
    identity = {"kernels": hashlib.sha256(made.encode()).hexdigest()}
    directory = folder / "compiled" / f"kernels-{identity['kernels'][:16]}"
    build_directory(directory, identity, functools.partial(_compile, command))
    return directory / "library.so"


def _compile(command: str, directory: Path) -> None:
    target, said = directory / "library.so", ""
    for way in _WAYS:
        words = [*shlex.split(command), *_FLAGS, *way, str(_SOURCE), "-o", str(target), f"-L{_TORCH}", "-ltorch_cpu"]
        ended = subprocess.run(words, capture_output=True, text=True, errors="replace")
        if ended.returncode == 0:
            (directory / "library.sha256").write_text(sha256_file(target))
            return
        said = said or ended.stderr
    reason = next((line.strip() for line in said.splitlines() if "error" in line), "it says nothing")
    raise LowvramError(f"{command} cannot compile {_SOURCE.name}: {reason[:300]}")


def _opened(path: Path) -> ctypes.CDLL:
    if sha256_file(path) != path.with_name("library.sha256").read_text():
        raise LowvramError(f"{path} was changed since it was made: remove its folder")
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # compiled layers look for the operator by its name
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.lowvram_product.argtypes = [pointer, number, pointer, pointer, *[number] * 6, pointer]
    library.lowvram_product.restype = None
    library.lowvram_dequantise.argtypes = [pointer, pointer, *[number] * 6, ctypes.c_bool, pointer]
    library.lowvram_dequantise.restype = None
    return library


@functools.cache
def multiplies_blocks() -> bool:
    """Whether this processor has the instructions that the kernel reads int4 in blocks with."""
    return {"avx512_bf16", "avx512vbmi", "avx512vl"} <= set(instruction_set().split())


def format_number(fmt: Format) -> int:
    """How the kernel calls a format: the bits of its codes, 0 for nf4."""
    return 0 if fmt.kind == "nf4" else fmt.bits


def features_of(codes: torch.Tensor, columns: int, format: int) -> int:
    """Rows of a weight, by the bytes of its codes."""
    return 8 * codes.nbytes // (columns * _BITS.get(format, format))


_BITS = {0: 4, INT4_BLOCKS: 4}
_BFLOAT16, _FLOAT32, _WITH_ZEROS = range(3)


def _on_cpu(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, features: int, format: int) -> torch.Tensor:
    opened = library()
    if opened is None:
        raise RuntimeError("quantized_product was called where it is not there; ask library() first")
    rows, codes, columns = rows.contiguous(), codes.contiguous(), rows.shape[1]
    result = rows.new_empty(rows.shape[0], features)
    kind, groups, step = _lie(scales, features)
    addresses = rows.data_ptr(), rows.shape[0], codes.data_ptr(), scales.data_ptr()
    opened.lowvram_product(*addresses, kind, features, columns, format, columns // groups, step, result.data_ptr())
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
    library().lowvram_dequantise(codes.data_ptr(), scales.data_ptr(), *sizes, wide, result.data_ptr())
    return result


def _dequantised_on_meta(
    codes: torch.Tensor, scales: torch.Tensor, features: int, format: int, dtype: torch.dtype
) -> torch.Tensor:
    return codes.new_empty(features, 8 * codes.nbytes // (features * _BITS.get(format, format)), dtype=dtype)


def _on_meta(rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, features: int, format: int) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], features)


_OPERATORS = torch.library.Library("lowvram", "DEF")
_OPERATORS.define("quantized_product(Tensor rows, Tensor codes, Tensor scales, int features, int format) -> Tensor")
_OPERATORS.impl("quantized_product", _on_cpu, "CPU")
_OPERATORS.impl("quantized_product", _on_meta, "Meta")
_OPERATORS.define("dequantized(Tensor codes, Tensor scales, int features, int format, ScalarType dtype) -> Tensor")
_OPERATORS.impl("dequantized", _dequantised_on_cpu, "CPU")
_OPERATORS.impl("dequantized", _dequantised_on_meta, "Meta")

quantized_product = torch.ops.lowvram.quantized_product.default
"""Rows times a quantised weight.

Args:
    rows: ``(rows, columns)`` float32 on the CPU.
    codes: Those of the weight, row by row, as ``weights.codes.pack`` lays them; of int4 two a byte, the even one low,
        or in blocks as torch packs them; of nf4 as bitsandbytes lays them.
    scales: bfloat16 or float32: ``(features,)`` or, of nf4, ``(features * groups,)``; ``(features, groups)``;
        ``(groups, features, 2)`` of scales and zeros, in bfloat16.
    features: Rows of the weight; of blocks a multiple of ``BLOCK_ROWS``.
    format: See ``format_number`` and ``INT4_BLOCKS``.

Returns:
    ``(rows, features)`` float32. A row's result does not depend on the other rows.
"""

dequantized = torch.ops.lowvram.dequantized.default
"""A weight of integers, or some rows of it.

Args:
    codes: As of ``quantized_product``, not in blocks, nor of nf4 (whose values the kernel rounds twice).
    scales: As of ``quantized_product``.
    features: Rows of the weight.
    format: See ``format_number``.
    dtype: ``torch.bfloat16`` or ``torch.float32``.

Returns:
    ``(features, columns)`` in dtype, each value rounded once.
"""

DEQUANTIZED_IN = (torch.bfloat16, torch.float32)
