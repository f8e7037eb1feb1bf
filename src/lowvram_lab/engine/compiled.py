"""A layer's function compiled ahead of time into a library, once for a machine; later processes open it at once.

torch.compile would do it anew in every process, and its checks before each call take as long as a small layer's own
work (37 us of 211, SmolLM2): AOTInductor's library is called directly. What it is called with is the caller's duty.
"""

import functools
import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from lowvram_lab.cache import build_directory, cache_dir
from lowvram_lab.engine.layer import LayerShape, layer

OPTIONS = {
    "size_asserts": False,
    "alignment_asserts": False,
    "scalar_asserts": False,  # the slice of a full cache is the whole of it, which the exporter takes for another case
    "cpp.dynamic_threads": True,
}
_LONGEST = 1 << 24
_LIBRARY = "layer.pt2"


class _Layer(torch.nn.Module):
    def __init__(self, shape: LayerShape):
        super().__init__()
        self.shape = shape

    def forward(self, hidden, cos, sin, positions, *tensors):
        """``layer`` for as many tokens as there are positions: a length the library reads off a shape."""
        return layer(self.shape, hidden, cos, sin, tensors, positions.shape[0])


def compiler() -> str | None:
    """The C++ compiler that would be used, or ``None``: there is none, or ``LOWVRAM_COMPILE=0`` says not to compile."""
    if os.environ.get("LOWVRAM_COMPILE") == "0":
        return None
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((name for name in names if name and shutil.which(name)), None)


def compiled_layer(shape: LayerShape, example: list[torch.Tensor], progress: bool = True) -> Callable:
    """``layer`` for a shape, any number of tokens and any room in the cache, as a library.

    Args:
        shape: What it is specialised for.
        example: Arguments as the library will get them: hidden, cos, sin, positions ``(tokens,)`` int64, and the
            tensors of a layer.
        progress: Show that it takes a while (10 to 20 s, once for a machine).

    Returns:
        A function of such a list; it returns a list with the new hidden states.

    Raises:
        RuntimeError: The compiler is missing or fails.
    """
    identity = {"layer": repr(shape), "arguments": repr(_fixed(shape, example)), "made_by": _made_by()}
    name = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:16]

    def fill(directory: Path) -> None:
        with tqdm(desc="compile a layer, once for this machine", total=1, disable=not progress, leave=False) as bar:
            _compile(shape, example, directory / _LIBRARY)
            bar.update()

    return _open(build_directory(cache_dir() / "layers" / name, identity, fill))


def _compile(shape: LayerShape, example: list[torch.Tensor], path: Path) -> None:
    tokens, room = (torch.export.Dim(name, min=2, max=_LONGEST) for name in ("tokens", "room"))
    cached = 4 if shape.int8_cache else 2
    sizes = [None, None, None, {0: tokens}, *[None] * (len(example) - 4 - cached), *[{2: room}] * cached]
    with torch.inference_mode(False), torch.no_grad():
        program = torch.export.export(
            _Layer(shape),
            tuple(example),
            dynamic_shapes=(*sizes[:4], tuple(sizes[4:])),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=OPTIONS)


@functools.cache
def _open(directory: Path) -> Callable:
    # .loader: calling the model itself would take the arguments apart and put them together, 40 us each time
    return torch._inductor.aoti_load_package(str(directory / _LIBRARY)).loader.run


def _fixed(shape: LayerShape, example: list[torch.Tensor]) -> list[tuple]:
    """What the library depends on: dtypes and shapes, without the number of tokens and the room."""
    cached = 4 if shape.int8_cache else 2
    weights = [(str(t.dtype), *t.shape) for t in example[:3] + example[4:-cached]]
    return [*weights, *((str(t.dtype), *t.shape[:2], t.shape[3]) for t in example[-cached:])]


@functools.cache
def _made_by() -> str:
    """Version of torch, the processor's vector unit, and the text of what is compiled."""
    from lowvram_lab.engine import kv_cache
    from lowvram_lab.engine import layer as layer_module

    sources = "".join(Path(module.__file__).read_text() for module in (layer_module, kv_cache))
    made = (torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.processor(), OPTIONS, compiler())
    return hashlib.sha256(repr((made, sources)).encode()).hexdigest()
