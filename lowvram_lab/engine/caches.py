"""A KV cache of exactly the size a plan gives, allocated once: decoding allocates nothing for keys and values.

It is a transformers ``Cache``: the model's own forward (prefill, ``generate``) and the lean decoder write into the same
memory. Keys and values in 16 or 32 bits, as int8 codes with one scale a token and head, or in 4 bits
(``int4_cache.py``).
"""

import torch
from transformers import Cache, StaticCache
from transformers.cache_utils import DynamicLayer

from lowvram_lab.engine.cache_layers import Int8Layer, PreallocatedLayer
from lowvram_lab.engine.int4_cache import Int4Layer
from lowvram_lab.errors import LowvramError
from lowvram_lab.model.formats import DTYPES


class MeteredCache(Cache):
    """A growing cache.

    Args:
        gpu: The ``Gpu`` its model lives on.
        kv_format: ``"int8"``, or any float format's name for the model's own dtype.
    """

    def __init__(self, gpu, kv_format: str = "bf16"):
        super().__init__(layer_class_to_replicate=Int8Layer if kv_format == "int8" else DynamicLayer)
        self.gpu = gpu

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """See ``Cache.update``. Keys and values: ``(batch, kv_heads, tokens, head_dim)``."""
        with self.gpu.meter.scope(category="kv"):
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        return layer.dequantized() if isinstance(layer, Int8Layer) else (keys, values)

    def reorder_cache(self, beam_idx):
        """Selects rows of every layer's batch, wherever the layer is."""
        with self.gpu.meter.scope(category="kv"):
            for layer in self.layers:
                layer.reorder_cache(self.gpu.move(beam_idx, self.gpu.meter.place_of(layer.keys)))

    def keep(self, tokens: int) -> None:
        """Forgets all but the first ``tokens`` tokens. Views only: the memory goes with the next token."""
        for layer in self.layers:
            for name in ("keys", "values", "key_scale", "value_scale"):
                if getattr(layer, name, None) is not None:
                    setattr(layer, name, getattr(layer, name)[..., :tokens, :])


class MeteredStaticCache(StaticCache):
    """transformers' static cache: all of it allocated at the first token, then written in place.

    Args:
        gpu: The ``Gpu`` its model lives on.
        config: The model's config.
        max_cache_len: Tokens it can hold.
    """

    def __init__(self, gpu, config, max_cache_len: int):
        super().__init__(config=config, max_cache_len=max_cache_len)
        self.gpu = gpu

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """See ``MeteredCache.update``."""
        with self.gpu.meter.scope(category="kv"):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)


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
