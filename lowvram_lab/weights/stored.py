"""The tensors of a quantised module in a safetensors file; ``compressed.py`` says which modules have them."""

from collections.abc import Callable
from dataclasses import replace

import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.layouts.packing import pack, unpack
from lowvram_lab.layouts.weights import QuantizedWeights
from lowvram_lab.model.checkpoint import Checkpoint, misfit
from lowvram_lab.model.formats import SCALE_DTYPE, Format
from lowvram_lab.model.spec import ModuleSpec
from lowvram_lab.repository.gguf_weights import GgufWeights
from lowvram_lab.weights.codes import IntegerWeight
from lowvram_lab.weights.solvers import by_rows


def tensor_names(name: str, fmt: Format) -> dict[str, str]:
    """Names in the file of a module's codes, scales and shape."""
    codes = "weight" if fmt.kind == "int8" else "weight_packed"
    return {"codes": f"{name}.{codes}", "scale": f"{name}.weight_scale", "shape": f"{name}.weight_shape"}


def to_stored(name: str, weight: IntegerWeight, fmt: Format) -> dict[str, torch.Tensor]:
    """The tensors of a quantised module by their names in the file. The solution must be symmetric."""
    names = tensor_names(name, fmt)
    if fmt.kind == "int8":
        return {names["codes"]: weight.codes, names["scale"]: weight.scale}
    return {
        names["codes"]: pack(weight.codes, fmt.bits),
        names["scale"]: weight.scale,
        names["shape"]: torch.tensor(weight.codes.shape),
    }


def to_stored_low(name: str, weight: IntegerWeight, fmt: Format) -> dict[str, torch.Tensor]:
    """The tensors of a module's low plane by their names in its file: codes, scales and zeros."""
    stored = to_stored(name, weight, fmt.low_plane)
    return {key: tensor for key, tensor in stored.items() if not key.endswith("_shape")} | {_zero(name): weight.zero}


def _zero(name: str) -> str:
    return f"{name}.weight_zero"


def check_low_plane(module: ModuleSpec, fmt: Format, checkpoint: Checkpoint) -> None:
    """``check_stored`` of a module's low plane.

    Raises:
        CheckpointError: The file is missing, damaged, from another conversion, or holds none of the module's.
    """
    low = checkpoint.low_plane
    check_stored(module, fmt.low_plane, low)
    scales = low.shape(f"{module.name}.weight_scale")
    if _zero(module.name) not in low or low.shape(_zero(module.name)) != scales:
        raise CheckpointError(f"{low.files[0]}: expected zeros {scales} of {module.name}, found none; convert again")


def stored_low_plane(name: str, fmt: Format, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """``stored_tensors`` of a module's low plane."""
    names = tensor_names(name, fmt.low_plane)
    read = checkpoint.low_plane.read_together([names["codes"], names["scale"], _zero(name)]).__getitem__
    symmetric = read_stored(name, fmt.low_plane, read)
    return replace(symmetric, zero=_scale(_zero(name), read)).tensors(fmt.low_plane)


def check_stored(module: ModuleSpec, fmt: Format, checkpoint: Checkpoint) -> None:
    """Checks names, shapes and dtypes of a module's stored tensors, from headers alone.

    Raises:
        CheckpointError: Missing, or not what the config says.
    """
    rows, columns = module.weight_shape
    names = tensor_names(module.name, fmt)
    columns_stored = columns if fmt.kind == "int8" else columns * fmt.bits // 32
    expected = {
        names["codes"]: ((rows, columns_stored), torch.int8 if fmt.kind == "int8" else torch.int32),
        names["scale"]: ((rows, columns // (fmt.group_size or columns)), None),
    }
    for name, (shape, dtype) in expected.items():
        if name not in checkpoint:
            raise CheckpointError(f"expected a tensor {name} for {module.name} in {fmt.name}, found none")
        found = tuple(checkpoint.shape(name)), checkpoint.dtype(name)
        if found != (shape, dtype or found[1]):
            of = f" of {dtype}" if dtype else ""
            raise misfit(name, checkpoint, f"shape {shape}{of}, found {found[0]} of {found[1]}")


def kept_tensors(name: str, fmt: Format, weights: object) -> dict[str, torch.Tensor] | None:
    """What a layer of a format is filled with, where the files hold the very codes; else ``None``.

    Scales and zeros are rounded to the layer's, which is all that is lost.
    """
    weight = f"{name}.weight"
    if not isinstance(weights, GgufWeights | QuantizedWeights) or weights.held_format(weight) != fmt.name:
        return None
    if fmt.kind == "nf4":
        return weights.blocks(weight)

    def keep(rows: slice) -> dict[str, torch.Tensor]:
        codes, scale, zero = weights.integers(weight, rows)
        scale, zero = (None if each is None else _finite(weight, each).to(SCALE_DTYPE) for each in (scale, zero))
        return IntegerWeight(codes, scale, zero).tensors(fmt)

    return by_rows(weights.shape(weight), keep)


def read_stored(name: str, fmt: Format, read: Callable[[str], torch.Tensor]) -> IntegerWeight:
    """A module's stored codes and scales; ``read`` gives a tensor for its name.

    Raises:
        CheckpointError: The scales are not finite.
    """
    names = tensor_names(name, fmt)
    codes = read(names["codes"])
    return IntegerWeight(codes if fmt.kind == "int8" else unpack(codes, fmt.bits), _scale(names["scale"], read))


def stored_tensors(name: str, fmt: Format, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What a layer is filled with, see ``QuantizedLinear.fill``: packed codes stay as they lie in the file."""
    if fmt.kind != "packed":
        return read_stored(name, fmt, checkpoint.read).tensors(fmt)
    names = tensor_names(name, fmt)
    return {"packed": checkpoint.read(names["codes"]), "scale": _scale(names["scale"], checkpoint.read)}


def _scale(name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    return _finite(name, read(name)).to(SCALE_DTYPE)


def _finite(name: str, scale: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(scale).all()):
        raise CheckpointError(f"{name}: expected finite scales, found NaN or infinite values; fetch it anew")
    return scale
