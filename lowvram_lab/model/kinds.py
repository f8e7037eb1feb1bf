"""What a module computes, found by letting it compute: a linear layer, a lookup, or something of its own.

Names and exact types say too little: Falcon's linear layers are a subclass, GPT-2's keep their weight transposed and
are none, Gemma's embedding scales its rows, OPT's positions are an embedding that looks up other rows than it is asked.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

_ROWS, _COLUMNS = 5, 3
"""Of the weight that a module is tried with: small, and not to be mistaken for each other."""


@dataclass(frozen=True)
class Kind:
    """What a module is.

    Attributes:
        name: ``"linear"``, ``"embedding"`` or ``"other"``.
        transposed: A linear weight is stored ``(in_features, out_features)``.
        scale: What an embedding multiplies its rows by.
    """

    name: str
    transposed: bool = False
    scale: float = 1.0


LINEAR, EMBEDDING, OTHER = Kind("linear"), Kind("embedding"), Kind("other")


def kind_of(module: nn.Module) -> Kind:
    """What a module computes from its own parameters, ``weight`` and perhaps ``bias``.

    Args:
        module: Its parameters may be on meta, its buffers must not.
    """
    if type(module) is nn.Linear:
        return LINEAR
    if type(module) is nn.Embedding:
        return EMBEDDING
    names = {name for name, _ in module.named_parameters(recurse=False)}
    weight = getattr(module, "weight", None)
    plain = isinstance(weight, torch.Tensor) and weight.dim() == 2 and not any(True for _ in module.children())
    if not plain or not names <= {"weight", "bias"}:
        return OTHER
    tried = [_as_embedding] if isinstance(module, nn.Embedding) else [_as_linear, _as_transposed]
    for attempt in tried:
        try:
            with torch.no_grad():
                kind = attempt(module)
        except Exception:  # a module of its own kind, with a forward of its own: whatever it lacks here, it is no match
            kind = None
        if kind:
            return kind
    return OTHER


def _small(module: nn.Module, rows: int, columns: int, features: int) -> nn.Module:
    """A copy of a module with a small random weight, and a bias of ``features`` numbers where it has one."""
    generator = torch.Generator().manual_seed(0)
    small = copy.copy(module)
    small._parameters = {"weight": nn.Parameter(torch.randn(rows, columns, generator=generator))}
    if "bias" in module._parameters:
        bias = module._parameters["bias"]
        held = None if bias is None else nn.Parameter(torch.randn(features, generator=generator))
        small._parameters["bias"] = held
    return small


def _as_linear(module: nn.Module) -> Kind | None:
    small = _small(module, _ROWS, _COLUMNS, _ROWS)
    return LINEAR if _multiplies(small, small.weight) else None


def _as_transposed(module: nn.Module) -> Kind | None:
    small = _small(module, _COLUMNS, _ROWS, _ROWS)
    small.nf = _ROWS  # transformers' Conv1D views its result by a number of its own
    return Kind("linear", transposed=True) if _multiplies(small, small.weight.T) else None


def _multiplies(small: nn.Module, weight: torch.Tensor) -> bool:
    x = torch.randn(2, 4, _COLUMNS, generator=torch.Generator().manual_seed(1))
    found = small(x)
    expected = F.linear(x, weight, small._parameters.get("bias"))
    return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


def _as_embedding(module: nn.Module) -> Kind | None:
    small = _small(module, _ROWS, _COLUMNS, 0)
    small.padding_idx = None
    # in no order, lest a table of positions that passes them over be taken for one
    ids = torch.tensor([[3, 0, 4, 4, 1]])
    found, rows = small(ids), small.weight[ids]
    small._parameters["weight"] = nn.Parameter(torch.ones(_ROWS, _COLUMNS))
    scale = float(small(ids).flatten()[0])
    same = found.shape == rows.shape and torch.allclose(found, rows * scale, rtol=1e-5)
    return Kind("embedding", scale=scale) if same and math.isfinite(scale) else None
