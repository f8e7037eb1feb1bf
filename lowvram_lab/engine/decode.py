"""The decode loop: prefill, one token at a time, choose the next. The engine knows nothing about tokenization or chat.

The same functions run over a real model and, on meta, in a forecast; that is why the two agree.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import Cache

from lowvram_lab.engine.caches import new_cache
from lowvram_lab.engine.sampling import Sampling, choose
from lowvram_lab.errors import BudgetError, LowvramError


def prefill(model, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Reads a prompt into the cache, at once or in pieces of the plan's ``prefill_chunk``.

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
    room = getattr(cache, "max_tokens", None)
    if room is not None and cache.get_seq_length() + ids.shape[1] > room:  # before the first piece is written
        wanted = cache.get_seq_length() + ids.shape[1]
        raise BudgetError(f"the KV cache holds {room} tokens, asked for {wanted}; plan a longer context")
    for piece in ids.split(model.plan.prefill_chunk or ids.shape[1], dim=1):
        logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    return logits


def decode_one_token(model, token: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Feeds one token back. ``token``: ``(batch, 1)``; returns logits ``(batch, vocab)``."""
    return model(token, past_key_values=cache, use_cache=True).logits[:, -1]


class ModuleDecoder:
    """Decodes with the model's own modules and a cache that grows: any architecture, any format.

    Args:
        model: From ``load``.
        why: Why it is not a ``LeanDecoder``.

    Attributes:
        cache: Prompt and answer.
    """

    def __init__(self, model, why: str = ""):
        self.model, self.why = model, why
        self.cache = new_cache(model)

    @property
    def name(self) -> str:
        """In words."""
        return "the model's modules" + (f" ({self.why})" if self.why else "")

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """See ``decode_one_token``."""
        return decode_one_token(self.model, token, self.cache)


@torch.no_grad()
def stream(
    model,
    ids: torch.Tensor,
    cache: Cache,
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    sampling: Sampling | None = None,
    seen: torch.Tensor | None = None,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[int]:
    """Generates token by token, batch 1.

    Args:
        model: From ``load``.
        ids: ``(1, tokens)``, the part of the prompt the cache has not seen; at least one token.
        cache: Holds prompt and answer afterwards (but for the last token yielded, which was never fed back).
        max_new_tokens: Stop after so many.
        stop_ids: Stop at one of these; it is not yielded.
        sampling: Greedy by default.
        seen: The whole prompt, for a repetition penalty; by default ``ids``.
        decode: Token ``(1, 1)`` → logits ``(1, vocab)``; by default by the model's own forward. A ``LeanDecoder`` has
            one for its cache.

    Yields:
        Token ids.
    """
    sampling = sampling or Sampling()
    decode = decode or partial(_decode_by_modules, model, cache)
    generator = None
    logits = prefill(model, ids, cache)
    if sampling.temperature > 0:
        generator = torch.Generator(device=logits.device).manual_seed(sampling.seed)
    remember = sampling.repetition_penalty != 1
    if remember:
        seen = model.gpu.move(ids if seen is None else seen, model.gpu.meter.place_of(logits))
    for produced in range(1, max_new_tokens + 1):
        with model.gpu.active():
            token = choose(logits, sampling, generator, seen)
            seen = torch.cat((seen, token), dim=-1) if remember else None
        value = int(token)
        if value in stop_ids:
            return
        yield value
        if produced < max_new_tokens:
            logits = decode(token)


def _decode_by_modules(model, cache: Cache, token: torch.Tensor) -> torch.Tensor:
    return decode_one_token(model, token, cache)
