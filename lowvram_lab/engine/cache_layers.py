"""What a decoder layer keeps of the tokens it has seen: keys and values, in memory that is allocated once.

A KV format is a class here (this file: the model's dtype and int8) or in ``int4_cache.py``. Each is a layer of a
transformers ``Cache``, so that a model's own forward writes into it, and its tensors are open to the lean decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.cache_utils import CacheLayerMixin

from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.kernels.token_attention import CACHED
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.formats import SCALE_DTYPE
from lowvram_lab.model.geometry import KVShape


class FixedLayer(CacheLayerMixin):
    """What all KV formats have in common: ``tokens`` of ``max_tokens`` are in use.

    Args:
        shape: Room for keys and values.
        dtype: The model's.
    """

    is_sliding = False
    is_compileable = False
    can_visit = False
    """Whether keys and values can go to the GPU for a prompt whose weights travel."""

    def __init__(self, shape: KVShape, dtype: torch.dtype):
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.tokens, self.max_tokens = 0, shape.tokens

    def tensors(self) -> dict[str, torch.Tensor]:
        """What it keeps, by the names of ``CACHED``."""
        return {name: tensor for name in CACHED if (tensor := getattr(self, name, None)) is not None}

    def span(self, start: int, end: int) -> dict[str, torch.Tensor]:
        """Views of all that it keeps of the tokens from ``start`` up to ``end``, by name.

        Both are whole numbers of the tokens that share a scale (32 in int4, else 1).
        """
        return {name: tensor[:, :, start:end] for name, tensor in self.tensors().items()}

    def beginning(self, tokens: int) -> dict[str, torch.Tensor]:
        """Views of all that it keeps of the first so many tokens, of any number of them, by name."""
        return self.span(0, tokens)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: everything is there."""

    def end_of(self, key_states: torch.Tensor, value_states: torch.Tensor) -> int:
        """How many tokens there are with these behind them; an error where they do not fit, or are of another shape."""
        for room, states in ((self.shape.keys, key_states), (self.shape.values, value_states)):
            if (*room[:2], room[3]) != (*states.shape[:2], states.shape[3]):
                raise LowvramError(
                    f"expected keys and values of {room[0]} sequences, {room[1]} heads and {room[3]} features in the "
                    f"KV cache, found {states.shape[0]}, {states.shape[1]} and {states.shape[3]}"
                )
        end = self.tokens + key_states.shape[-2]
        if end > self.max_tokens:
            raise BudgetError(f"the KV cache holds {self.max_tokens} tokens, asked for {end}; plan a longer context")
        return end

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refused: transformers would select rows of keys and values, and leave their scales."""
        raise LowvramError("beam search reorders its KV cache, and a plan's cannot be; call generate without one")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens a query attends to, and the first of them."""
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.tokens

    def get_max_length(self) -> int:
        """Tokens there is room for."""
        return self.max_tokens

    @property
    def forgettable(self) -> int:
        """See ``PreallocatedCache``."""
        return self.max_tokens - self.tokens

    def reset(self) -> None:
        """Forgets everything; the memory stays."""
        self.tokens = 0


class PreallocatedLayer(FixedLayer):
    """Keys and values of one decoder layer in the model's dtype, or as int8 codes with a scale a token and head.

    Shapes: ``keys``, ``values`` as ``KVShape`` says; ``key_scale``, ``value_scale`` the same with a last dimension of
    1, or ``None``. A dequantised copy lives for one layer's attention only.

    Args:
        gpu: The ``Gpu`` of the model.
        place: Where the layer computes, ``"gpu"`` or ``"cpu"``.
        shape: See ``FixedLayer``.
        dtype: See ``FixedLayer``.
        kv_format: ``"int8"``, or any float format for the model's dtype.
    """

    can_visit = True

    def __init__(self, gpu: Gpu, place: str, shape: KVShape, dtype: torch.dtype, kv_format: str):
        super().__init__(shape, dtype)
        stored = torch.int8 if kv_format == "int8" else dtype
        self.keys, self.values = (gpu.zeros(room, stored, place) for room in (shape.keys, shape.values))
        self.key_scale = self.value_scale = None
        if kv_format == "int8":
            scales = (*shape.keys[:3], 1)
            self.key_scale, self.value_scale = (gpu.zeros(scales, SCALE_DTYPE, place) for _ in range(2))
        self.device, self.is_initialized = self.keys.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Writes new keys and values behind those there are; returns all of them, in the model's dtype."""
        end = self.end_of(key_states, value_states)
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

    @contextmanager
    def visiting(self, gpu: Gpu, new_tokens: int) -> Iterator[None]:
        """Lets a layer whose home is the CPU compute on the GPU, where so many tokens will be added.

        What it holds is copied there; only the new tokens' keys and values come home. After an error it is as before.
        """
        home = self.tensors()
        began = self.tokens
        try:
            for name, states in home.items():
                room = (*states.shape[:2], began + new_tokens, states.shape[3])
                guest = gpu.zeros(room, states.dtype, "gpu")
                if began:
                    guest[:, :, :began] = gpu.move(states[:, :, :began], "gpu")
                setattr(self, name, guest)
            yield
            for name, states in home.items():
                new = getattr(self, name)[:, :, began : self.tokens]
                states[:, :, began : self.tokens] = gpu.move(new, "cpu")
        except BaseException:
            self.tokens = began
            raise
        finally:
            for name, states in home.items():
                setattr(self, name, states)


def quantize_states(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys or values ``(..., tokens, head_dim)`` as int8 codes, and a bf16 scale for each token and head."""
    scale = (states.abs().amax(dim=-1, keepdim=True).float() / 127).clamp_(min=torch.finfo(SCALE_DTYPE).tiny)
    scale = scale.to(SCALE_DTYPE)
    return states.float().div(scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale
