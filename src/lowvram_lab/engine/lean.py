"""A decoder for the Llama family that does as little as possible for a token: one function for all layers.

transformers' forward of a small model spends most of its time between its matrix products: masks, caches, a Python
call for every operation. Here a layer is one plain function of tensors. Compiled (torch.compile), everything between
two matrix products becomes one loop over memory, and the function is compiled once and reused for every layer. It works
on the very weights of a loaded model, whatever their formats, and on a ``PreallocatedCache``, so a token allocates
nothing that stays.
"""

import functools
import itertools
import shutil
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from lowvram_lab.engine.decode import prefill
from lowvram_lab.engine.kv_cache import quantize_states
from lowvram_lab.engine.preallocated import PreallocatedCache
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.quantize.linear import Int4Linear, Int8Linear, QuantizedLinear
from lowvram_lab.threads import cpu_threads

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of configs whose layers are: norm, attention with rotary positions (q and k perhaps normed), norm,
gated SiLU. Smaller differences (biases, grouped heads, tied head) are read off the modules."""

OPTIONS = {"size_asserts": False, "alignment_asserts": False}
"""For the compiler: shapes never change, and checking them anew takes 13 us a layer (SmolLM2, 0.23 ms in all)."""

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LayerShape:
    """What the function of a layer is specialised for; layers of one shape share it.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Features of a head.
        scaling: Of attention scores.
        eps: Of the norms.
        kinds: Of each projection, how it is multiplied: ``("int4", group_size)``, ``("int8", 0)`` or ``("float", 0)``.
        normed_heads: Whether queries and keys are normed, head by head.
        int8_cache: Whether keys and values are int8 codes with scales.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    eps: float
    kinds: tuple[tuple[str, int], ...]
    normed_heads: bool
    int8_cache: bool


def why_not(model) -> str:
    """Why a loaded model cannot be decoded here, in words, or nothing if it can."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        return f"{kind} is none of {', '.join(FAMILIES)}"
    if model.config.hidden_act != "silu":
        return f"its activation is {model.config.hidden_act}, not silu"
    if "dynamic" in model.model.rotary_emb.rope_type or model.model.rotary_emb.rope_type == "longrope":
        return f"its rotary positions ({model.model.rotary_emb.rope_type}) depend on the length"
    if "gpu" in model.plan.layer_places(model.spec) and model.gpu.kernels == "cuda":
        return "layers on a CUDA card are decoded by the modules for now"
    for layer in model.model.layers:
        for name in _PROJECTIONS:
            if _kind(_projection(layer, name)) is None:
                return f"{name} is in {_projection(layer, name).format.name}, which has no kernel"
    return ""


class LeanDecoder:
    """Decodes token by token on the weights of a loaded model.

    Args:
        model: From ``load``.
        max_tokens: Tokens of prompt and answer; by default the plan's context.
        batch_size: Sequences, all of one length.
        compiled: Whether to compile the layer's function, which takes seconds, once; by default where there is a C++
            compiler.

    Attributes:
        cache: The ``PreallocatedCache`` that prompt and answer are in.
        compiled: Whether it is compiled.

    Raises:
        LowvramError: The architecture or a format is none of those it knows; ``why_not`` says so beforehand.
        torch.OutOfMemoryError: No room for the cache.
    """

    def __init__(self, model, max_tokens: int | None = None, batch_size: int = 1, compiled: bool | None = None):
        if reason := why_not(model):
            raise LowvramError(f"{model.spec.name} cannot be decoded by LeanDecoder: {reason}; use the model itself")
        self.model, self.gpu = model, model.gpu
        self.compiled = shutil.which("g++") is not None if compiled is None else compiled
        self.cache = PreallocatedCache(model, max_tokens, batch_size)
        positions = torch.arange(self.cache.layers[0].max_tokens)[None]
        cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), positions)
        half = sin.shape[-1] // 2
        # a half turn swaps the halves of a head; the sign of the first goes into the table
        self._cos, self._sin = cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), dim=-1)
        self._layers = [
            self._bind(layer, held) for layer, held in zip(model.model.layers, self.cache.layers, strict=True)
        ]

    def _bind(self, layer, held) -> tuple:
        """A layer's function, and the tensors it works on."""
        attention, config = layer.self_attn, self.model.config
        projections = [_projection(layer, name) for name in _PROJECTIONS]
        normed = hasattr(attention, "q_norm")
        shape = LayerShape(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=self.model.spec.head_dim,
            scaling=attention.scaling,
            eps=config.rms_norm_eps,
            kinds=tuple(_kind(projection) for projection in projections),
            normed_heads=normed,
            int8_cache=held.key_scale is not None,
        )
        norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        norms += [attention.q_norm.weight, attention.k_norm.weight] if normed else []
        weights = tuple(_tensors(projection) for projection in projections)
        cached = (held.keys, held.values) + ((held.key_scale, held.value_scale) if shape.int8_cache else ())
        return _layer_function(shape, self.compiled), tuple(norms), weights, cached

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return self.cache.get_seq_length()

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Reads a prompt by the model's own forward.

        Args:
            ids: ``(batch, tokens)`` int64, those the cache has not seen.

        Returns:
            Logits of the last token, ``(batch, vocab)``.

        Raises:
            BudgetError: The cache has no room for them.
        """
        return prefill(self.model, ids, self.cache)

    @torch.inference_mode()
    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """Feeds one token of each sequence.

        Args:
            token: ``(batch, 1)`` int64.

        Returns:
            Logits, ``(batch, vocab)`` in the plan's dtype.

        Raises:
            LowvramError: There is no prompt yet.
            BudgetError: The cache is full.
        """
        position = self.tokens
        if position == 0:
            raise LowvramError("expected a prompt in the cache, found none: call prefill first")
        if position >= self.cache.layers[0].max_tokens:
            raise BudgetError(f"the KV cache of {position} tokens is full; plan a longer context")
        with self.gpu.lock, cpu_threads(self.model.plan.threads), self.gpu.unmetered():
            hidden = self.model.model.embed_tokens(token)[:, 0].float()
            cos, sin = self._cos[position], self._sin[position]
            for function, norms, weights, cached in self._layers:
                seen = [held[:, :, : position + 1] for held in cached]
                hidden = function(hidden, cos, sin, norms, weights, seen)
            normed = self.model.model.norm(hidden)
            logits = self.model.lm_head(normed.to(self.model.dtype))
        for layer in self.cache.layers:
            layer.tokens = position + 1
        return logits


_numbers = itertools.count()


@functools.cache
def _layer_function(shape: LayerShape, compiled: bool):
    def layer(hidden, cos, sin, norms, weights, seen):
        return _layer(shape, hidden, cos, sin, norms, weights, seen)

    if not compiled:
        return layer
    # code of its own name: dynamo counts compilations by the code, and every shape is worth one
    layer.__code__ = layer.__code__.replace(co_name=f"layer_{next(_numbers)}")
    fast, ready = torch.compile(layer, fullgraph=True, options=OPTIONS), False

    def function(hidden, cos, sin, norms, weights, seen):
        nonlocal ready
        if not ready:  # for any number of tokens from the start, not for this one first
            for held in seen:
                torch._dynamo.mark_dynamic(held, 2)
            ready = True
        return fast(hidden, cos, sin, norms, weights, seen)

    return function


def _layer(shape: LayerShape, hidden, cos, sin, norms, weights, seen):
    """One decoder layer for one token of each sequence.

    Args:
        shape: What is constant.
        hidden: ``(batch, hidden)`` float32.
        cos: ``(head_dim,)`` float32, for this position.
        sin: The same; its first half negative.
        norms: Weights of the layer's norms, and of queries and keys where they are normed.
        weights: Of each projection, its tensors and its bias or ``None``.
        seen: Keys and values ``(batch, kv_heads, tokens, head_dim)``, views of the cache with room for this token at
            the end; their scales behind them if they are int8.

    Returns:
        ``(batch, hidden)`` float32.
    """
    batch = hidden.shape[0]
    x = _rms_norm(hidden, norms[0], shape.eps)
    q, k, v = (_multiply(x, shape.kinds[index], weights[index]) for index in range(3))
    q = q.view(batch, shape.heads, shape.head_dim)
    k, v = (states.view(batch, shape.kv_heads, shape.head_dim) for states in (k, v))
    if shape.normed_heads:
        q, k = _rms_norm(q, norms[2], shape.eps), _rms_norm(k, norms[3], shape.eps)
    half = shape.head_dim // 2
    q, k = (states * cos + torch.roll(states, half, -1) * sin for states in (q, k))
    keys, values = (
        _append_and_read(seen[index], seen[index + 2] if shape.int8_cache else None, states)
        for index, states in enumerate((k, v))
    )
    groups = shape.heads // shape.kv_heads
    rows = (q * shape.scaling).view(batch * shape.kv_heads, groups, shape.head_dim)
    scores = torch.bmm(rows, keys.transpose(1, 2))
    # a softmax by hand: the compiler knows the other form, and puts torch's slower attention in its place
    scores = torch.exp(scores - scores.amax(-1, keepdim=True))
    mixed = torch.bmm(scores, values) / scores.sum(-1, keepdim=True)
    mixed = mixed.view(batch, shape.heads * shape.head_dim)
    hidden = hidden + _multiply(mixed, shape.kinds[3], weights[3])
    x = _rms_norm(hidden, norms[1], shape.eps)
    gate, up = (_multiply(x, shape.kinds[index], weights[index]) for index in (4, 5))
    return hidden + _multiply(F.silu(gate) * up, shape.kinds[6], weights[6])


def _append_and_read(held, scales, states):
    """Writes one token's keys or values at the end; all of them, ``(batch * kv_heads, tokens, head_dim)`` float32."""
    if scales is not None:
        states, scale = quantize_states(states)
        scales[:, :, -1:] = scale[:, :, None]
    held[:, :, -1:] = states.to(held.dtype)[:, :, None]
    read = held.float() if scales is None else held.float() * scales.float()
    return read.reshape(-1, held.shape[2], held.shape[3])


def _rms_norm(x, weight, eps: float):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


def _multiply(x, kind: tuple[str, int], tensors):
    """``(rows, in)`` float32 → ``(rows, out)`` float32, by the kernel of the weight's format."""
    *stored, bias = tensors
    if kind[0] == "int4":
        packed, scale_and_zero = stored
        result = torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), packed, kind[1], scale_and_zero).float()
    elif kind[0] == "int8":
        result = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), *stored).float()
    else:
        result = F.linear(x.to(stored[0].dtype), stored[0]).float()
    return result if bias is None else result + bias.float()


def _projection(layer, name: str):
    return getattr(layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp, name)


def _kind(projection) -> tuple[str, int] | None:
    if isinstance(projection, Int4Linear):
        return ("int4", projection.format.group_size) if projection.layout == "cpu" else None
    if isinstance(projection, Int8Linear):
        return ("int8", 0)
    return None if isinstance(projection, QuantizedLinear) else ("float", 0)


def _tensors(projection) -> tuple:
    if isinstance(projection, Int4Linear):
        return projection.packed, projection.scale_and_zero, projection.bias
    if isinstance(projection, Int8Linear):
        return projection.weight, projection.scale, projection.bias
    return projection.weight, projection.bias
