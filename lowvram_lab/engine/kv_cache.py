"""The KV cache of a loaded model: exactly the bytes that its plan gives, allocated once.

It is a transformers ``Cache``: the model's own forward (prefill, ``generate``) and the lean decoder write into the same
memory. Keys and values in 16 or 32 bits, as int8 codes, or in 4 bits.

Derived in: notebooks/06_the_engine.ipynb
"""

from __future__ import annotations

from functools import partial

import torch
from transformers import Cache
from transformers.cache_utils import DummyLayer

from lowvram_lab.engine.cache_layers import FixedLayer, PreallocatedLayer
from lowvram_lab.engine.int4_cache import Int4Layer
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError
from lowvram_lab.model.formats import DTYPES
from lowvram_lab.model.rules import whole_number


class PreallocatedCache(Cache):
    """Keys and values of every decoder layer, each where the layer computes.

    Args:
        model: From ``load``; its plan says format, places and length.
        max_tokens: Tokens it can hold; by default the plan's context.
        batch_size: Sequences.

    Raises:
        LowvramError: A size that is none.
        torch.OutOfMemoryError: No room for it on the GPU.
    """

    def __init__(self, model: torch.nn.Module, max_tokens: int | None = None, batch_size: int = 1):
        state = loaded(model)
        plan, spec, self.gpu = state.plan, state.plan.spec, state.gpu
        self.max_tokens = plan.context if max_tokens is None else max_tokens
        for name, value in (("max_tokens", self.max_tokens), ("batch_size", batch_size)):
            whole_number(name, value, 1, error=LowvramError)
        held_as = Int4Layer if plan.kv_format == "int4" else partial(PreallocatedLayer, kv_format=plan.kv_format)
        layers = []
        with self.gpu.noting_oom(state), self.gpu.active(), self.gpu.meter.scope(owner="kv cache", category="kv"):
            for kv, place in zip(spec.kv_layers, plan.layer_places(), strict=True):
                room = kv and kv.room(batch_size, self.max_tokens)  # or it reads another layer's
                layers.append(held_as(self.gpu, place, room, DTYPES[plan.dtype]) if room else DummyLayer())
        super().__init__(layers=layers)
        self.held = [layer for layer in layers if isinstance(layer, FixedLayer)]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """See ``Cache.update``. Keys and values: ``(batch, kv_heads, tokens, head_dim)``."""
        held, found = self.layers[layer_idx].shape.batch, key_states.shape[0]
        if held != found:  # one would be written into all rows
            raise LowvramError(f"the KV cache is for {held} sequences, found {found}; say batch_size={found}")
        return self.layers[layer_idx].update(key_states, value_states)

    def keep(self, tokens: int) -> None:
        """Forgets all but the first ``tokens`` tokens."""
        for layer in self.held:
            layer.keep(tokens)

    def holds(self, tokens: int) -> None:
        """Says that keys and values of so many tokens have been put there, or are taken for there."""
        for layer in self.held:
            layer.tokens = tokens

    @property
    def forgettable(self) -> int:
        """How many tokens may be added and then forgotten without a trace."""
        return min(layer.forgettable for layer in self.held)
