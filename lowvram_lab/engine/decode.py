"""One protocol for what runs a model: read a prompt, decode a token, keep the cache. Knows no tokenizer and no chat.

Chats, timings, comparisons and forecasts all go through ``decoder_for`` (``lean.py``), so that what is forecast is what
is run. Here are the protocol, the decoder that any architecture has (its own modules), and the loop over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.engine.sampling import Sampling, choose
from lowvram_lab.errors import BudgetError, LowvramError


class Decoder(Protocol):
    """What runs a loaded model.

    Attributes:
        model: The model, from ``load``.
        cache: Prompt and answer so far.
        released: Whether the model was planned anew since; then it decodes no more.
    """

    model: torch.nn.Module
    cache: PreallocatedCache
    released: bool

    @property
    def name(self) -> str:
        """What it is, in words."""

    @property
    def why(self) -> str:
        """Why it is not a faster one, in words; nothing where there is none."""

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Reads ``(batch, tokens)`` ids behind those in the cache; returns logits of the last, ``(batch, vocab)``."""

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """Feeds one token of each sequence, ``(batch, 1)``; returns logits ``(batch, vocab)``."""

    def release(self) -> None:
        """Lets go of the weights, which are about to be others; ``replan`` calls this."""


def prefill(model: torch.nn.Module, ids: torch.Tensor, cache: PreallocatedCache) -> torch.Tensor:
    """Reads a prompt by the model's own forward, at once or in pieces of the plan's ``prefill_chunk``.

    Args:
        model: From ``load``.
        ids: ``(batch, tokens)`` int64, those the cache has not seen.
        cache: Grows by ``tokens``.

    Returns:
        Logits of the last token, ``(batch, vocab)``.

    Raises:
        LowvramError: There is no token.
        BudgetError: The cache has no room for all of them.
    """
    if not ids.shape[1]:
        raise LowvramError("expected a prompt of one token or more, found none")
    wanted = cache.get_seq_length() + ids.shape[1]
    if wanted > cache.max_tokens:  # before the first piece is written
        raise BudgetError(f"the KV cache holds {cache.max_tokens} tokens, asked for {wanted}; plan a longer context")
    for piece in ids.split(loaded(model).plan.prefill_chunk or ids.shape[1], dim=1):
        logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    return logits


def module_decoder_name(why: str) -> str:
    """What a ``ModuleDecoder`` calls itself."""
    return "the model's modules" + (f" ({why})" if why else "")


class ModuleDecoder:
    """Decodes with the model's own modules: any architecture, any format.

    Args:
        model: From ``load``.
        max_tokens: Tokens of prompt and answer; by default the plan's context.
        batch_size: Sequences, all of one length.
        why: Why it is not a ``LeanDecoder``.

    Attributes:
        model: The model.
        cache: Prompt and answer.
        released: Whether the model was planned anew since.
    """

    def __init__(self, model: torch.nn.Module, max_tokens: int | None = None, batch_size: int = 1, why: str = ""):
        self.model, self.why, self.released = model, why, False
        self.cache = PreallocatedCache(model, max_tokens, batch_size)
        loaded(model).decoders.add(self)

    @property
    def name(self) -> str:
        """See ``Decoder``."""
        return module_decoder_name(self.why)

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """See ``prefill``."""
        self._check_released()
        return prefill(self.model, ids, self.cache)

    @torch.inference_mode()
    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """See ``Decoder``."""
        self._check_released()
        return self.model(token, past_key_values=self.cache, use_cache=True).logits[:, -1]

    def release(self) -> None:
        """See ``Decoder``."""
        self.released = True

    def _check_released(self) -> None:
        if self.released:
            raise LowvramError("the model was planned anew meanwhile; make a new decoder")


@torch.no_grad()
def generate(
    decoder: Decoder,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
    seen: torch.Tensor | None = None,
) -> Iterator[int]:
    """Generates token by token, batch 1.

    Args:
        decoder: Its cache holds prompt and answer afterwards (but for the last token, which was never fed back).
        ids: ``(1, tokens)``, the part of the prompt the cache has not seen; at least one token.
        max_new_tokens: Stop after so many.
        stop_ids: Stop at one of these; it is not yielded.
        sampling: Greedy by default.
        seen: The whole prompt, for a repetition penalty; by default ``ids``.

    Yields:
        Token ids.
    """
    sampling = sampling or Sampling()
    gpu = loaded(decoder.model).gpu
    generator = None
    logits = decoder.prefill(ids)
    if sampling.temperature > 0:
        generator = torch.Generator(device=logits.device).manual_seed(sampling.seed)
    remember = sampling.repetition_penalty != 1
    if remember:
        seen = gpu.move(ids if seen is None else seen, gpu.meter.place_of(logits))
    for produced in range(1, max_new_tokens + 1):
        with gpu.active():
            token = choose(logits, sampling, generator, seen)
            seen = torch.cat((seen, token), dim=-1) if remember else None
        value = int(token)
        if value in stop_ids:
            return
        yield value
        if produced < max_new_tokens:
            logits = decoder.decode(token)
