"""What lies between a prompt's matrix products on the CPU, in bfloat16: one operator where torch takes two to eight.

The kernels are C++ (``elementwise.cpp``). They round where torch's operators do.
"""

import torch

from lowvram_lab.kernels.library import opened_for


def _rms_norm_on_cpu(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    _check(rows, weight, weight.shape == rows.shape[-1:])
    rows, weight = rows.contiguous(), weight.contiguous()
    result, columns = torch.empty_like(rows), rows.shape[-1]
    sizes = rows.numel() // columns, columns, eps
    opened_for("rms_norm").lowvram_rms_norm(rows.data_ptr(), weight.data_ptr(), *sizes, result.data_ptr())
    return result


def _rotated_on_cpu(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    fitting = cos.shape in [(batch, states.shape[1], states.shape[3]) for batch in (1, states.shape[0])]
    _check(states, cos, fitting and cos.shape == sin.shape and cos.dtype == sin.dtype)
    states, cos, sin = states.contiguous(), cos.contiguous(), sin.contiguous()
    result, (batch, tokens, heads, width) = torch.empty_like(states), states.shape
    sizes = batch, cos.stride(0) if cos.shape[0] > 1 else 0, tokens, heads, width
    opened_for("rotated").lowvram_rotated(states.data_ptr(), cos.data_ptr(), sin.data_ptr(), *sizes, result.data_ptr())
    return result


def _gated_on_cpu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    _check(gate, up, gate.shape == up.shape)
    gate, up = gate.contiguous(), up.contiguous()
    result = torch.empty_like(gate)
    opened_for("gated").lowvram_gated(gate.data_ptr(), up.data_ptr(), gate.numel(), result.data_ptr())
    return result


def _check(first: torch.Tensor, second: torch.Tensor, fitting: bool) -> None:
    """The kernels go by addresses: what is not as they expect would be read as something else."""
    if not fitting or first.dtype != torch.bfloat16 or second.dtype != torch.bfloat16:
        found = " and ".join(f"{tuple(each.shape)} {each.dtype}" for each in (first, second))
        raise RuntimeError(f"expected tensors in bfloat16 whose shapes fit, found {found}")


def _like_the_first(first: torch.Tensor, *others) -> torch.Tensor:
    return first.new_empty(first.shape)


_OPERATORS = torch.library.Library("lowvram", "FRAGMENT")
for _name, _arguments, _on_cpu in (
    ("rms_norm", "Tensor rows, Tensor weight, float eps", _rms_norm_on_cpu),
    ("rotated", "Tensor states, Tensor cos, Tensor sin", _rotated_on_cpu),
    ("gated", "Tensor gate, Tensor up", _gated_on_cpu),
):
    _OPERATORS.define(f"{_name}({_arguments}) -> Tensor")
    _OPERATORS.impl(_name, _on_cpu, "CPU")
    _OPERATORS.impl(_name, _like_the_first, "Meta")

rms_norm = torch.ops.lowvram.rms_norm.default
"""``rows * rsqrt(mean(rows ** 2) + eps) * weight``, rounded before the last product too.

Args:
    rows: ``(..., columns)`` bfloat16.
    weight: ``(columns,)`` bfloat16.
    eps: Added to the mean square.

Returns:
    As rows.
"""

rotated = torch.ops.lowvram.rotated.default
"""Rotary positions: ``states * cos + rotate_half(states) * sin``, each product rounded.

Args:
    states: ``(batch, tokens, heads, width)`` bfloat16.
    cos: ``(batch or 1, tokens, width)`` bfloat16.
    sin: As ``cos``.

Returns:
    As states.
"""

gated = torch.ops.lowvram.gated.default
"""``silu(gate) * up``, both ``(..., features)`` bfloat16, rounded before the product too."""
