"""Weights that multiply the same input, laid side by side in memory: one matrix product instead of two or three.

The modules stay as they are: their tensors become views of the common one, so nothing is held twice, and a weight can
be put back by itself (``separate``).
"""

from collections.abc import Sequence

import torch
from torch import nn

from lowvram_lab.engine.layers import Int4Linear, Int8Linear, Nf4Linear, PackedLinear, QuantizedLinear
from lowvram_lab.kernels.int4_layout import cpu_block_rows

GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
"""Attribute of a decoder layer, and its modules with a common input."""

_ROWS_AT = {"weight": 0, "packed": 0, "scale": 0, "absmax": 0, "bias": 0, "scale_and_zero": 1}
"""Tensors of a linear layer → the dimension that counts output features."""


def fuse(projections: Sequence[nn.Module]) -> dict[str, torch.Tensor] | None:
    """Lays weights side by side, output features one behind the other.

    Args:
        projections: Linear layers with one input; their tensors become views. Fused before, they are found so.

    Returns:
        Name of each tensor → the common one (``bias`` may be ``None``), or ``None`` where they cannot be fused: another
        format each, biases in some only, or a layout that does not divide there.
    """
    first = projections[0]
    if len(projections) == 1 or not all(_alike(first, other) for other in projections):
        return None
    if isinstance(first, Int4Linear) and any(p.out_features % cpu_block_rows() for p in projections):
        return None
    lie_so = all(getattr(projection, "fused", False) for projection in projections)
    common = {"bias": None}
    for name, dim in _ROWS_AT.items():
        if getattr(first, name, None) is not None:
            common[name] = (_seen_as_one if lie_so else _side_by_side)(projections, name, dim)
    for projection in projections:
        projection.fused = True
    return common


def separate(model: nn.Module, names: set[str]) -> None:
    """Gives fused weights a memory of their own again, where the named ones among them are about to go."""
    for index, block in enumerate(getattr(getattr(model, "model", None), "layers", ())):
        for part, members in GROUPS:
            stay = [name for name in members if f"model.layers.{index}.{part}.{name}" not in names]
            if len(stay) == len(members):
                continue
            for module in (getattr(getattr(block, part, None), name, None) for name in stay):
                for plane in (module, getattr(module, "low", None)):
                    if getattr(plane, "fused", False):
                        _separate(plane)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    if type(one) is not type(other) or (one.bias is None) != (other.bias is None):
        return False
    if isinstance(one, Int4Linear):
        return one.format == other.format and one.layout == other.layout == "cpu"
    if isinstance(one, PackedLinear | Nf4Linear):
        return one.format == other.format
    plain = isinstance(one, Int8Linear) or not isinstance(one, QuantizedLinear)
    return plain and one.weight.dtype == other.weight.dtype


def _side_by_side(projections: Sequence[nn.Module], name: str, dim: int) -> torch.Tensor:
    tensors = [getattr(projection, name) for projection in projections]
    sizes = [tensor.shape[dim] for tensor in tensors]
    common = tensors[0].new_empty([*tensors[0].shape[:dim], sum(sizes), *tensors[0].shape[dim + 1 :]])
    for projection, tensor, part in zip(projections, tensors, common.split(sizes, dim), strict=True):
        part.copy_(tensor)
        _put(projection, name, part)
    return common


def _seen_as_one(projections: Sequence[nn.Module], name: str, dim: int) -> torch.Tensor:
    first, rows = getattr(projections[0], name), sum(getattr(p, name).shape[dim] for p in projections)
    shape = [*first.shape[:dim], rows, *first.shape[dim + 1 :]]
    return first.as_strided(shape, first.stride(), first.storage_offset())


def _separate(module: nn.Module) -> None:
    for name in _ROWS_AT:
        if (tensor := getattr(module, name, None)) is not None:
            _put(module, name, tensor.clone(memory_format=torch.contiguous_format))
    module.fused = False


def _put(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    if name in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, name, tensor)
