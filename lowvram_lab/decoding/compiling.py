"""The process that compiles: what a library is made from, and the export and compiler run that make it.

It runs in an interpreter of its own (``compiled.py`` starts it): what the caller's process has imported cannot stand in
the compiler's way (the standard library's distutils did), nor the compiler's settings and memory in the caller's.
"""

import contextlib
import itertools
import os
import pickle
import shutil
import signal
import sys
import threading
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_lab.decoding.llama_layer import HeadShape, LayerShape, head, llama_layer
from lowvram_lab.files import build_directory, sha256_file
from lowvram_lab.kernels import product
from lowvram_lab.kernels import token_attention as attention
from lowvram_lab.kernels.product import quantized_products
from lowvram_lab.kernels.token_attention import token_attention

OPTIONS = {
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,  # the slice of a full cache is the whole of it, which the exporter takes for another case
    "cpp.dynamic_threads": True,
    "aot_inductor.custom_ops_to_c_shims": {
        quantized_products: [product.C_DECLARATION],
        token_attention: [attention.C_DECLARATION],
    },
}
LEAST_ROOM = 3
"""Places a cache must have for a compiled layer; the exporter takes fewer for another case."""
EXAMPLE_ROWS = 3
"""Tokens of one sequence in the arguments that a library for several is made from; it runs from 2 of them on."""
LIBRARY = "library.so"
DIGEST = "library.sha256"

_LONGEST = 1 << 24
_SIZES = {
    "tokens": (2, _LONGEST - 1),
    "room": (LEAST_ROOM, _LONGEST),
    "blocks": (LEAST_ROOM, _LONGEST),
    "rows": (2, product.MOST_ROWS),
}
_FORMATS = (2, product.LONGEST_FORMAT)
_POSITIONS = 3
"""Which argument of a layer has the positions."""


class Argument(NamedTuple):
    """A tensor as a library will get it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def like(cls, tensor: Tensor) -> "Argument":
        """That of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride())

    @property
    def unusual_stride(self) -> tuple[int, ...]:
        """The stride where elements do not lie one after the other; a library computes its addresses by it."""
        usual = torch.empty(self.shape, device="meta").stride()
        same = all(size == 1 or a == b for size, a, b in zip(self.shape, self.stride, usual, strict=True))
        return () if same else self.stride


_CODES, _SCALES = Argument(torch.uint8, (1,), (1,)), Argument(torch.bfloat16, (1,), (1,))


def _weights_of_ours(function: LayerShape | HeadShape) -> list[int]:
    """Where among a library's arguments the weights are that our kernel multiplies: their codes, scales and format."""
    layer = isinstance(function, LayerShape)
    products = itertools.chain(*function.products) if layer else [function.product]
    at = _POSITIONS + 1 + (4 if function.normed_heads else 2) if layer else 2
    found = []
    for each in products:
        if each.kernel == "ours":
            found += [at + plane * each.of_a_plane for plane in range(each.planes)]
        at += each.tensors
    return found


@dataclass(frozen=True)
class Library:
    """All that a library is compiled from; another process needs no more.

    Attributes:
        function: The layer or head it is specialised for.
        arguments: What it will be called with. Sizes that ``free_sizes`` names may be others then.
        several: Whether its rows are tokens of one sequence, as many as there happen to be.
    """

    function: LayerShape | HeadShape
    arguments: tuple[Argument, ...]
    several: bool = False

    @classmethod
    def called_with(cls, function: LayerShape | HeadShape, example: list[Tensor], several: bool = False) -> "Library":
        """That of a function for arguments like these."""
        arguments = [*map(Argument.like, example)]
        for at in _weights_of_ours(function):  # only our kernel looks at them, which finds out what they are
            arguments[at : at + 2] = _CODES, _SCALES
        return cls(function, tuple(arguments), several)

    def free_sizes(self) -> list[dict[int, str]]:
        """For each argument: dimension → name, for those that may vary from call to call."""
        free = [{} for _ in self.arguments]
        for at in _weights_of_ours(self.function):
            free[at + 2] = {0: f"format{at}"}
        if isinstance(self.function, LayerShape):
            free[_POSITIONS] = {0: "tokens"}
            for index, name in enumerate(self.function.cache, len(free) - len(self.function.cache)):
                size = "blocks" if self._in_blocks(name) else "room"
                if name != "recent" and self.arguments[index].shape[2] >= LEAST_ROOM:
                    free[index] = {2: size}
        if self.several:
            for index in range(_POSITIONS if isinstance(self.function, LayerShape) else 1):
                free[index] = {0: "rows"}
        return free

    def _in_blocks(self, name: str) -> bool:
        """Whether a tensor of the cache has its tokens in blocks, as keys of 4 bits have."""
        return "recent" in self.function.cache and name in ("keys", "key_scale")


class _Exported(torch.nn.Module):
    """A layer or a head as the exporter takes it: the result, and the inputs of its loops."""

    def __init__(self, function: LayerShape | HeadShape):
        super().__init__()
        self.function = function

    def forward(self, hidden: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """A layer is for as many tokens as there are positions: a length the library reads off a shape."""
        loops = []
        if isinstance(self.function, HeadShape):
            return head(self.function, hidden, others, loops), *loops
        cos, sin, positions, *tensors = others
        return llama_layer(self.function, hidden, cos, sin, tensors, positions.shape[0], loops=loops), *loops


def main() -> None:
    """Reads ``[(library, directory, identity), ...]`` from stdin, pickled, and builds each; ends where stdin does."""
    jobs = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    for library, directory, identity in jobs:
        build_directory(directory, identity, lambda partial, library=library: _fill(partial, library))


def _end_with_the_caller() -> None:
    """Whoever started this holds the other end of stdin: it closes when that process is gone, killed even."""
    os.read(sys.stdin.fileno(), 1)  # not stdin.read(), whose lock would be held when this process ends by itself
    scratch = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(OSError):  # another of the caller's compilers still uses it, and takes it along
        scratch.parent.rmdir()
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)  # the C++ compiler too
    os._exit(1)


def _fill(directory: Path, library: Library) -> None:
    package = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "library.pt2"
    _compile(library, package)
    with zipfile.ZipFile(package) as members:
        (name,) = (name for name in members.namelist() if name.endswith(".so"))
        (directory / LIBRARY).write_bytes(members.read(name))
    (directory / DIGEST).write_text(sha256_file(directory / LIBRARY))


def _compile(library: Library, path: Path) -> None:
    example = [torch.empty_strided(shape, stride, dtype=dtype) for dtype, shape, stride in library.arguments]
    sizes = _SIZES | dict.fromkeys((f"format{at}" for at in _weights_of_ours(library.function)), _FORMATS)
    dims = {name: torch.export.Dim(name, min=least, max=most) for name, (least, most) in sizes.items()}
    sizes = [{dim: dims[name] for dim, name in free.items()} for free in library.free_sizes()]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own
        program = torch.export.export(
            _Exported(library.function),
            tuple(example),
            dynamic_shapes=(sizes[0], tuple(sizes[1:])),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        options = dict(OPTIONS)
        if (headers := "aot_inductor.precompile_headers") in torch._inductor.config.get_config_copy():
            options[headers] = False  # for two libraries they cost more seconds than they save
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
