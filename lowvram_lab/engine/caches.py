"""A KV cache of exactly the size a plan gives, allocated once: decoding allocates nothing for keys and values.

It is a transformers ``Cache``: the model's own forward (prefill, ``generate``) and the lean decoder write into the same
memory. Keys and values in 16 or 32 bits, as int8 codes with one scale a token and head, or in 4 bits
(``int4_cache.py``).
"""

import torch
from transformers import Cache

from lowvram_lab.engine.cache_layers import FixedLayer, MeteredCache, quantize_states
from lowvram_lab.engine.int4_cache import Int4Layer
from lowvram_lab.errors import LowvramError
from lowvram_lab.model.formats import DTYPES, SCALE_DTYPE


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


class PreallocatedCache(Cache):
    """The KV cache of a loaded model, all of it allocated now.

    Args:
        model: From ``load``; its plan says format and length.
        max_tokens: Tokens it can hold; by default the plan's context.
        batch_size: Sequences.

    Raises:
        LowvramError: A size that is none.
        torch.OutOfMemoryError: No room for it on the GPU.
    """

    def __init__(self, model, max_tokens: int | None = None, batch_size: int = 1):
        plan, spec, self.gpu, self._plan = model.plan, model.spec, model.gpu, model.plan
        self.max_tokens = plan.context if max_tokens is None else max_tokens
        for name, value in (("max_tokens", self.max_tokens), ("batch_size", batch_size)):
            if type(value) is not int or value < 1:
                raise LowvramError(f"expected {name} of 1 or more, found {value!r}")
        shape = (batch_size, spec.num_key_value_heads, self.max_tokens, spec.head_dim)
        with self.gpu.active(), self.gpu.meter.scope(owner="kv cache", category="kv"):
            layers = [self._layer(place, shape) for place in plan.layer_places(spec)]
        super().__init__(layers=layers)

    def _layer(self, place: str, shape: tuple[int, int, int, int]):
        dtype = DTYPES[self._plan.dtype]
        if self._plan.kv_format == "int4":
            return Int4Layer(self.gpu, place, shape, dtype)
        return PreallocatedLayer(self.gpu, place, shape, dtype, self._plan.kv_format)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """See ``Cache.update``."""
        held, found = self.layers[layer_idx].keys.shape[0], key_states.shape[0]
        if held != found:  # one would be written into all rows
            raise LowvramError(f"the KV cache is for {held} sequences, found {found}; say batch_size={found}")
        return self.layers[layer_idx].update(key_states, value_states)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Selects rows of every layer's batch, wherever the layer is."""
        with self.gpu.active(), self.gpu.meter.scope(category="kv"):
            for layer in self.layers:
                layer.reorder_cache(self.gpu.move(beam_idx, self.gpu.meter.place_of(layer.keys)))

    def keep(self, tokens: int) -> None:
        """Forgets all but the first ``tokens`` tokens."""
        for layer in self.layers:
            layer.keep(tokens)


def new_cache(model, max_tokens: int | None = None, batch_size: int = 1) -> Cache:
    """The cache a plan's KV format is run with: one that grows, or for int4, which is packed in blocks, all at once.

    Args:
        model: From ``load``, real or on meta.
        max_tokens: Tokens it must hold; by default the plan's context.
        batch_size: Sequences.
    """
    if model.plan.kv_format == "int4":
        return PreallocatedCache(model, max_tokens, batch_size)
    return MeteredCache(model.gpu, model.plan.kv_format)
