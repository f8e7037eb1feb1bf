"""KV caches of a plan's format, as transformers ``Cache`` objects; what they allocate is charged to ``kv``.

Growing (16-bit or int8) by concatenation, as transformers' own; or static, allocated once for a known length.
"""

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from lowvram_lab.errors import BudgetError
from lowvram_lab.model.formats import SCALE_DTYPE


class Int8Layer(DynamicLayer):
    """Keys and values as int8 codes with one bf16 scale a token and head; attention sees them dequantised.

    Shapes: ``keys``, ``values`` int8 ``(batch, kv_heads, tokens, head_dim)``; ``key_scale``, ``value_scale`` the same
    with a last dimension of 1. The dequantised copy lives for one layer's attention only.
    """

    def lazy_initialization(self, key_states, value_states):
        """See ``DynamicLayer``."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = self.key_scale = self.value_scale = None
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Appends keys and values; returns all codes. Attention wants ``dequantized`` of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.key_scale = _append(self.keys, self.key_scale, key_states)
        self.values, self.value_scale = _append(self.values, self.value_scale, value_states)
        return self.keys, self.values

    def dequantized(self):
        """Keys and values in the model's dtype, for one layer's attention only."""
        return tuple(
            codes.to(self.dtype).mul_(scales.to(self.dtype))
            for codes, scales in ((self.keys, self.key_scale), (self.values, self.value_scale))
        )

    def get_seq_length(self) -> int:
        """Tokens held."""
        return 0 if not self.is_initialized or self.keys is None else self.keys.shape[-2]

    def reorder_cache(self, beam_idx):
        """Selects rows of the batch, scales too."""
        if self.get_seq_length() > 0:
            for name in ("keys", "key_scale", "values", "value_scale"):
                tensor = getattr(self, name)
                setattr(self, name, tensor.index_select(0, beam_idx.to(tensor.device)))


class FixedLayer(CacheLayerMixin):
    """What the caches have in common that allocate a layer's memory once: ``tokens`` of ``max_tokens`` are in use."""

    is_sliding = False
    is_compileable = False

    def lazy_initialization(self, key_states, value_states):
        """Nothing to do: everything is there."""

    def end_of(self, key_states) -> int:
        """How many tokens there are with these behind them; ``BudgetError`` where there is no room."""
        end = self.tokens + key_states.shape[-2]
        if end > self.max_tokens:
            raise BudgetError(f"the KV cache holds {self.max_tokens} tokens, asked for {end}; plan a longer context")
        return end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens a query attends to, and the first of them."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.tokens

    def get_max_length(self) -> int:
        """Tokens there is room for."""
        return self.max_tokens

    def reset(self) -> None:
        """Forgets everything; the memory stays."""
        self.tokens = 0


def quantize_states(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values ``(..., tokens, head_dim)`` as int8 codes, and a bf16 scale for each token and head."""
    scale = (states.abs().amax(dim=-1, keepdim=True).float() / 127).clamp_(min=torch.finfo(SCALE_DTYPE).tiny)
    scale = scale.to(SCALE_DTYPE)
    return (states / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def _append(codes, scales, states):
    new, scale = quantize_states(states)
    if codes is None:
        return new, scale
    return torch.cat((codes, new), dim=-2), torch.cat((scales, scale), dim=-2)


class PreallocatedLayer(FixedLayer):
    """Keys and values of one decoder layer, ``(batch, kv_heads, max_tokens, head_dim)`` from the start.

    Args:
        gpu: The ``Gpu`` of the model.
        place: Where the layer computes, ``"gpu"`` or ``"cpu"``.
        shape: Of keys and of values, all tokens included.
        dtype: The model's.
        kv_format: ``"int8"``, or any float format for the model's dtype.
    """

    def __init__(self, gpu, place: str, shape: tuple[int, int, int, int], dtype: torch.dtype, kv_format: str):
        super().__init__()
        self.dtype, self.tokens, self.max_tokens = dtype, 0, shape[2]
        stored = torch.int8 if kv_format == "int8" else dtype
        self.keys, self.values = (gpu.zeros(shape, stored, place) for _ in range(2))
        self.key_scale = self.value_scale = None
        if kv_format == "int8":
            scales = (*shape[:3], 1)
            self.key_scale, self.value_scale = (gpu.zeros(scales, SCALE_DTYPE, place) for _ in range(2))
        self.device, self.is_initialized = self.keys.device, True

    def update(self, key_states, value_states, *args, **kwargs):
        """Writes new keys and values behind those there are; returns all of them, in the model's dtype."""
        end = self.end_of(key_states)
        both = ((self.keys, self.key_scale, key_states), (self.values, self.value_scale, value_states))
        for held, scales, states in both:
            if scales is not None:
                states, scale = quantize_states(states)
                scales[:, :, self.tokens : end] = scale
            held[:, :, self.tokens : end] = states
        self.tokens = end
        return tuple(self._read(held, scales) for held, scales, _ in both)

    def _read(self, held: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        states = held[:, :, : self.tokens]
        return states if scales is None else states.to(self.dtype).mul_(scales[:, :, : self.tokens].to(self.dtype))

    def keep(self, tokens: int) -> None:
        """Forgets all but the first ``tokens`` tokens."""
        self.tokens = min(self.tokens, tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Selects rows of the batch, in place."""
        for held in (self.keys, self.values, self.key_scale, self.value_scale):
            if held is not None:
                rows = held[:, :, : self.tokens]
                rows.copy_(rows.index_select(0, beam_idx.to(held.device)))
