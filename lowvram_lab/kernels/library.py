"""The kernels' library: C++ compiled once for a machine, in some seconds, and opened.

The sources are ``product.cpp``, ``attention.cpp``, ``token_attention.cpp`` and ``elementwise.cpp``.
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

_SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp") for name in ("product", "attention", "token_attention", "elementwise")
)
_HEADERS = tuple(Path(__file__).with_name(name) for name in ("pieces.h", "shim.h"))
_TORCH = Path(torch.__file__).parent / "lib"
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-w")
_WAYS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
"""What not every compiler knows; the first that works is taken."""

CONTIGUOUS = (torch.Tag.needs_contiguous_strides,)
"""Of an operator that a compiled layer calls by addresses: what it gets there must lie without gaps."""

logger = logging.getLogger(__name__)

_failed: set[tuple[str, Path]] = set()
_last: ctypes.CDLL | None = None


def there() -> bool:
    """Whether the operator will compute here: there is a compiler, and it has not failed yet. Compiles nothing."""
    command = compiler()
    return command is not None and (command, cache_dir().absolute()) not in _failed


def library() -> ctypes.CDLL | None:
    """The library, compiled first where this machine has none yet; ``None``, and a warning, where that fails."""
    global _last
    found = _library(compiler(), cache_dir().absolute()) if there() else None
    _last = found or _last
    return found


def opened() -> ctypes.CDLL | None:
    """The same without looking for the compiler again: for every call of a kernel."""
    return _last or library()


def opened_for(operator: str) -> ctypes.CDLL:
    """The same for an operator, which has nothing else to compute by.

    Raises:
        RuntimeError: It is not there.
    """
    kernels = opened()
    if kernels is None:
        raise RuntimeError(f"{operator} was called where it is not there; ask there() first")
    return kernels


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
    texts = [source.read_text(encoding="utf-8") for source in (*_SOURCES, *_HEADERS)]
    made = repr((texts, _FLAGS, _WAYS, command, instruction_set(), torch.__version__))
    identity = {"kernels": hashlib.sha256(made.encode()).hexdigest()}
    directory = folder / "compiled" / f"kernels-{identity['kernels'][:16]}"
    build_directory(directory, identity, functools.partial(_compile, command))
    return directory / "library.so"


def _compile(command: str, directory: Path) -> None:
    target, said = directory / "library.so", ""
    for way in _WAYS:
        words = [
            *shlex.split(command),
            *_FLAGS,
            *way,
            *map(str, _SOURCES),
            "-o",
            str(target),
            f"-L{_TORCH}",
            "-ltorch_cpu",
        ]
        ended = subprocess.run(words, capture_output=True, text=True, errors="replace")
        if ended.returncode == 0:
            (directory / "library.sha256").write_text(sha256_file(target))
            return
        said = said or ended.stderr
    reason = next((line.strip() for line in said.splitlines() if "error" in line), "it says nothing")
    names = " and ".join(source.name for source in _SOURCES)
    raise LowvramError(f"{command} cannot compile {names}: {reason[:300]}")


def _opened(path: Path) -> ctypes.CDLL:
    if sha256_file(path) != path.with_name("library.sha256").read_text():
        raise LowvramError(f"{path} was changed since it was made: remove its folder")
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # compiled layers look for the operator by its name
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    arguments = {
        "products": [pointer, ctypes.c_bool, *[number] * 3, *[pointer] * 4],
        "dequantise": [pointer, pointer, *[number] * 6, ctypes.c_bool, pointer],
        "attention": [*[pointer] * 5, *[number] * 6, ctypes.c_bool, ctypes.c_float, pointer],
        "token_attention": [*[pointer] * 9, number, ctypes.c_float, pointer],
        "rms_norm": [pointer, pointer, number, number, ctypes.c_float, pointer],
        "rotated": [*[pointer] * 3, *[number] * 5, pointer],
        "gated": [pointer, pointer, number, pointer],
    }
    for name, types in arguments.items():
        kernel = getattr(library, f"lowvram_{name}")
        kernel.argtypes, kernel.restype = types, None
    return library


@functools.cache
def multiplies_pairs() -> bool:
    """Whether this processor multiplies pairs in bfloat16, which int4 in blocks and attention are computed with."""
    return {"avx512_bf16", "avx512vbmi", "avx512bw", "avx512vl"} <= set(instruction_set().split())
