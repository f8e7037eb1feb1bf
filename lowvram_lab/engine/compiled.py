"""A layer's and the head's function compiled ahead of time, once for a machine; later processes open them at once.

torch.compile would do it anew in every process, and its checks before each call take as long as a small layer's own
work (37 us of 211, SmolLM2): AOTInductor's library is called directly. What it is called with is the caller's duty.
"""

import functools
import hashlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from lowvram_lab.engine.llama_layer import LayerShape, Product, head, llama_layer
from lowvram_lab.files import build_directory, cache_dir, sha256_file
from lowvram_lab.machine import instruction_set

OPTIONS = {
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,  # the slice of a full cache is the whole of it, which the exporter takes for another case
    "cpp.dynamic_threads": True,
}
LEAST_ROOM = 3
"""Places a cache must have for a compiled layer; the exporter takes fewer for another case."""

_LONGEST = 1 << 24
_LIBRARY = "library.pt2"
_DIGEST = "library.sha256"

logger = logging.getLogger(__name__)


class _Layer(torch.nn.Module):
    def __init__(self, shape: LayerShape):
        super().__init__()
        self.shape = shape

    def forward(self, hidden, cos, sin, positions, *tensors):
        """``llama_layer`` for as many tokens as there are positions: a length the library reads off a shape."""
        loops = []
        return llama_layer(self.shape, hidden, cos, sin, tensors, positions.shape[0], loops=loops), *loops


class _Head(torch.nn.Module):
    def __init__(self, product: Product, eps: float):
        super().__init__()
        self.product, self.eps = product, eps

    def forward(self, hidden, *tensors):
        """See ``head``."""
        loops = []
        return head(self.product, self.eps, hidden, tensors, loops), *loops


def compiler() -> str | None:
    """The C++ compiler that would be used, or ``None``: there is none, or ``LOWVRAM_COMPILE=0`` says not to compile."""
    if os.environ.get("LOWVRAM_COMPILE") == "0":
        return None
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks for it
    return name if shutil.which(name.split()[0]) else None


def compiled_layer(shape: LayerShape, example: list[torch.Tensor], progress: bool = True) -> Callable:
    """``layer`` for a shape, any number of tokens and any room in the cache, as a library.

    Args:
        shape: What it is specialised for.
        example: Arguments as the library will get them: hidden, cos, sin, positions ``(tokens,)`` int64, and the
            tensors of a layer.
        progress: Show that it takes a while (10 to 20 s, once for a machine).

    Returns:
        A function of such a list; it returns a list whose first is the new hidden states.

    Raises:
        RuntimeError: The compiler is missing or fails.
    """
    tokens = torch.export.Dim("tokens", min=2, max=_LONGEST - 1)
    room = torch.export.Dim("room", min=LEAST_ROOM, max=_LONGEST)
    cached = 4 if shape.int8_cache else 2
    sizes = [{}, {}, {}, {0: tokens}, *[{}] * (len(example) - 4 - cached), *[{2: room}] * cached]
    return _library(_Layer(shape), repr(shape), example, sizes, 4, progress)


def compiled_head(product: Product, eps: float, example: list[torch.Tensor], progress: bool = True) -> Callable:
    """``head`` as a library.

    Args:
        product: See ``head``.
        eps: See ``head``.
        example: Arguments as the library will get them: hidden, and the tensors.
        progress: See ``compiled_layer``.

    Returns:
        A function of such a list; it returns a list whose first is the logits.

    Raises:
        RuntimeError: See ``compiled_layer``.
    """
    return _library(_Head(product, eps), f"head {product} {eps}", example, [{} for _ in example], 1, progress)


def _library(module, what: str, example: list[torch.Tensor], sizes: list[dict], named: int, progress: bool) -> Callable:
    """Opens what was compiled before, or compiles; ``sizes`` names the dimensions of each argument that may vary."""
    fixed = [
        (str(tensor.dtype), *(size for dim, size in enumerate(tensor.shape) if dim not in free))
        for tensor, free in zip(example, sizes, strict=True)
    ]
    identity = {"function": what, "arguments": repr(fixed), "made_by": _made_by()}
    name = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:16]

    def fill(directory: Path) -> None:
        shown = None if progress else True  # None: on a terminal and in a notebook, not in a pipe
        with tqdm(desc="compile, once for this machine", total=1, disable=shown, leave=False) as bar:
            _compile(module, example, (*sizes[:named], tuple(sizes[named:])), directory / _LIBRARY)
            (directory / _DIGEST).write_text(sha256_file(directory / _LIBRARY))
            bar.update()

    target = build_directory(cache_dir() / "compiled" / name, identity, fill)
    try:
        return _open(target)
    except (RuntimeError, OSError) as error:  # damaged since it was made, or no library any more
        logger.warning("%s cannot be opened (%s): compiling again", target, (str(error).splitlines() or ["?"])[0])
        shutil.rmtree(target, ignore_errors=True)
    return _open(build_directory(target, identity, fill))


def _compile(module, example: list[torch.Tensor], sizes: tuple, path: Path) -> None:
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its own
        program = torch.export.export(
            module,
            tuple(example),
            dynamic_shapes=sizes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=OPTIONS)


@functools.cache
def _open(directory: Path) -> Callable:
    if sha256_file(directory / _LIBRARY) != (directory / _DIGEST).read_text():
        raise RuntimeError("its checksum is another")
    # .loader: calling the model itself would take the arguments apart and put them together, 40 us each time
    return torch._inductor.aoti_load_package(str(directory / _LIBRARY)).loader.run


@functools.cache
def _made_by() -> str:
    """Version of torch, the processor's vector unit, and the text of what is compiled."""
    from lowvram_lab.engine import cache_layers as kv_cache
    from lowvram_lab.engine import llama_layer as layer_module

    sources = "".join(Path(module.__file__).read_text() for module in (layer_module, kv_cache))
    made = (torch.__version__, torch.backends.cpu.get_cpu_capability(), instruction_set(), OPTIONS, compiler())
    return hashlib.sha256(repr((made, sources)).encode()).hexdigest()
