"""Several sequences side by side in llama.cpp: a context of its own over the model that llama-cpp-python has open.

Its high-level ``Llama`` knows one sequence. A batch of llama.cpp is a list of tokens, each with its sequence and its
position in that; logits are asked for where a sequence ends.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llama_cpp import Llama


class LlamaBatch:
    """A KV cache for several sequences of one length, and greedy decoding of them.

    Args:
        model: Whose weights and settings it shares.
        size: Sequences.
        tokens: Most tokens of each.

    Attributes:
        size: Sequences.
    """

    def __init__(self, model: Llama, size: int, tokens: int):
        from llama_cpp import _internals

        self.size, self._held, self._vocab = size, 0, model.n_vocab()
        params = type(model.context_params).from_buffer_copy(model.context_params)
        params.n_seq_max = size
        params.n_ctx = size * -(-tokens // 256) * 256  # of each sequence, in llama.cpp's own blocks of cells
        params.kv_unified = False
        self._at_once = model.n_batch
        self._context = _internals.LlamaContext(model=model._model, params=params, verbose=False)
        self._batch = _internals.LlamaBatch(n_tokens=self._at_once, embd=0, n_seq_max=size, verbose=False)

    def close(self) -> None:
        """Frees the cache."""
        self._context.close()
        self._batch.close()

    def forget(self) -> None:
        """Empties the cache."""
        self._context.kv_cache_clear()
        self._held = 0

    def answer(self, ids: list[list[int]], count: int) -> tuple[list[list[int]], list[float]]:
        """See ``Engine.answer``."""
        step, found, times = [each[self._held :] for each in ids], [], []
        while len(found) < count:
            found.append(self.read(step))
            times.append(time.perf_counter())
            step = [[token] for token in found[-1]]
        return [list(each) for each in zip(*found, strict=True)], times

    def read(self, ids: list[list[int]]) -> list[int]:
        """Reads ids of each sequence behind those in the cache; the likeliest token after each."""
        length, likeliest = len(ids[0]), []
        entries = [(token, place, each) for each, tokens in enumerate(ids) for place, token in enumerate(tokens)]
        for start in range(0, len(entries), self._at_once):
            some = entries[start : start + self._at_once]
            ends = [index for index, (_, place, _) in enumerate(some) if place == length - 1]
            self._fill(some, ends)
            self._context.decode(self._batch)
            likeliest += [self._likeliest(index) for index in ends]
        self._held += length
        return likeliest

    def _fill(self, entries: list[tuple[int, int, int]], ends: list[int]) -> None:
        batch = self._batch.batch
        batch.n_tokens = len(entries)
        for index, (token, place, sequence) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = self._held + place
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = False
        for index in ends:
            batch.logits[index] = True

    def _likeliest(self, index: int) -> int:
        logits = np.ctypeslib.as_array(self._context.get_logits_ith(index), shape=(self._vocab,))
        return int(logits.argmax())
