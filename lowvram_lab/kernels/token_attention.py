"""Attention of one token to a decoder layer's keys and values on the CPU, as the operator ``lowvram::token_attention``.

The kernel (``token_attention.cpp``) writes the token's own key and value behind those there are, and reads them all as
they lie: int8 and 4-bit codes are never dequantised to a copy. It runs on any processor that a C++ compiler knows.
"""

import ctypes

import torch

from lowvram_lab.kernels.library import CONTIGUOUS, opened_for

CACHED = ("keys", "values", "key_scale", "value_scale", "recent")
"""What a decoder layer may keep, as its cache layer and the operator name it."""

C_DECLARATION = (
    "int32_t aoti_torch_cpu_token_attention(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, "
    "AtenTensorHandle keys, AtenTensorHandle values, AtenTensorHandle* key_scale, AtenTensorHandle* value_scale, "
    "AtenTensorHandle* recent, int64_t tokens, double scale, AtenTensorHandle* result)"
)
"""See ``product.C_DECLARATION``."""

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}
_SIZES = ctypes.c_int64 * 7


def _on_cpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others) -> torch.Tensor:
    *held, tokens, scale = others
    kernels = opened_for("token_attention")
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    result, (rows, heads, width) = torch.empty_like(q), q.shape
    keys, values, *_, recent = held
    batch = values.shape[0]
    if rows != batch and batch != 1:
        raise RuntimeError(f"expected a token of each of {batch} sequences, or several of one, found {rows}")
    if not rows // batch <= tokens <= values.shape[2]:
        raise RuntimeError(f"expected places for {rows // batch} tokens of {tokens} in a cache of {values.shape[2]}")
    kernels.lowvram_token_attention(
        *(each.data_ptr() for each in (q, k, v)),
        *(None if each is None else each.data_ptr() for each in held),
        _SIZES(batch, heads, k.shape[1], width, values.shape[2], tokens, rows // batch),
        _KINDS[keys.dtype if recent is None else recent.dtype],
        scale,
        result.data_ptr(),
    )
    return result


def _on_meta(q: torch.Tensor, *others) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_OPERATORS = torch.library.Library("lowvram", "FRAGMENT")
_OPERATORS.define(
    "token_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!)? key_scale, "
    "Tensor(d!)? value_scale, Tensor(e!)? recent, SymInt tokens, float scale) -> Tensor",
    tags=CONTIGUOUS,
)
_OPERATORS.impl("token_attention", _on_cpu, "CPU")
_OPERATORS.impl("token_attention", _on_meta, "Meta")

token_attention = torch.ops.lowvram.token_attention.default
"""Attention of one token of each sequence, or of several of one, to all before it and itself.

Args:
    q: ``(rows, heads, features)`` float32; consecutive heads share keys. As many rows as sequences in the cache; or
        where that holds one, its newest tokens, in order, each of which is treated as if it came alone.
    k: ``(rows, kv_heads, features)`` float32: the tokens' own keys, which are written as the cache holds keys.
    v: As ``k``, its value.
    keys: ``(batch, kv_heads, room, features)`` in 16 or 32 bits or int8; in 4 bits see ``engine.int4_cache``.
    values: As ``keys``.
    key_scale: Scales ``(batch, kv_heads, room, 1)`` bfloat16 of int8; scales and zeros of 4 bits; or ``None``.
    value_scale: As ``key_scale``.
    recent: Of 4 bits the newest keys; or ``None``.
    tokens: How many there are, these among them.
    scale: Of the scores.

Returns:
    ``(rows, heads, features)`` float32.
"""
