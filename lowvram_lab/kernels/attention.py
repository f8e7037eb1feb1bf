"""Attention of many queries on the CPU, as the operator ``lowvram::attention``.

The kernel is C++ (``attention.cpp``): three to five times as fast as torch's own (64 to 1024 tokens, one thread, Zen
5), because scores and sums are products of bfloat16 pairs there.
"""

import ctypes

import torch

from lowvram_lab.kernels.library import opened_for

FEWEST_QUERIES = 8
"""For fewer the kernel lays keys side by side for nothing."""

_HEAD_MULTIPLE = 16
_STEPS = ctypes.c_int64 * 11


def attends(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether the kernel, where it is there, computes such an attention; for the arguments see ``attention``."""
    narrow = q.dtype == k.dtype == v.dtype == torch.bfloat16
    shaped = q.dim() == 4 and q.shape[-1] == v.shape[-1] and q.shape[-1] % _HEAD_MULTIPLE == 0
    wide = shaped and q.shape[2] >= FEWEST_QUERIES and q.shape[2] <= k.shape[2]
    side_by_side = all(each.stride(-1) == 1 for each in (q, k, v))
    shown = mask is None or (
        mask.dtype == torch.bool
        and mask.dim() == 4
        and mask.shape[1:] == (1, q.shape[2], k.shape[2])
        and mask.shape[0] in (1, q.shape[0])
        and mask.stride(-1) == 1
    )
    return narrow and wide and side_by_side and shown


def _on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    kernels = opened_for("attention")
    result = _on_meta(q, k, v, mask, causal, scale)
    (batch, heads, queries, width), masked = q.shape, mask is not None
    by_sequence = mask.stride(0) if masked and mask.shape[0] > 1 else 0
    steps = [step for each in (q, k, v) for step in each.stride()[:3]]
    kernels.lowvram_attention(
        *(each.data_ptr() for each in (q, k, v)),
        mask.data_ptr() if masked else None,
        _STEPS(*steps, by_sequence, mask.stride(2) if masked else 0),
        *(batch, heads, k.shape[1], queries, k.shape[2], width),
        causal,
        scale,
        result.data_ptr(),
    )
    return result


def _on_meta(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    batch, heads, queries, width = q.shape
    return q.new_empty(batch, queries, heads, width)


_OPERATORS = torch.library.Library("lowvram", "FRAGMENT")
_OPERATORS.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> Tensor")
_OPERATORS.impl("attention", _on_cpu, "CPU")
_OPERATORS.impl("attention", _on_meta, "Meta")

attention = torch.ops.lowvram.attention.default
"""Attention of queries to keys, in bfloat16, without a matrix of all scores.

Args:
    q: ``(batch, heads, queries, features)``.
    k: ``(batch, kv_heads, keys, features)``; consecutive heads share keys.
    v: As ``k``.
    mask: ``(batch or 1, 1, queries, keys)`` of booleans, True where a query may look; or ``None``.
    causal: Whether the last query sees all keys, and each before it one fewer.
    scale: Of the scores.

Returns:
    ``(batch, queries, heads, features)``: tokens first, as the product behind it wants them. A query that may look
    nowhere gets zeros.
"""
