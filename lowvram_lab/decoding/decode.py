"""What runs a loaded model: read a prompt, decode a token, keep the cache. Knows no tokenizer and no chat.

Chats, timings, comparisons and forecasts all go through ``decoder_for`` (``lean.py``), so that what is forecast is what
is run. The decoder here is the one that any architecture has: its own modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from lowvram_lab.decoding.threads import FastestThreads, thread_counts
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.machine import cpu_threads
from lowvram_lab.model.plan import Plan, compute_place
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.sampling import Sampling, choose


def prefill(model: torch.nn.Module, ids: torch.Tensor, cache: PreallocatedCache) -> torch.Tensor:
    """Reads a prompt by the model's own forward, at once or in the plan's pieces.

    Of ids ``(batch, tokens)`` behind those in the cache it returns the last one's logits, ``(batch, vocab)``.

    Raises:
        LowvramError: There is no token.
        BudgetError: The cache has no room for all of them.
    """
    for piece in _pieces(loaded(model).plan, ids, cache):
        logits = _read(model, piece, cache)
    return logits


def _pieces(plan: Plan, ids: torch.Tensor, cache: PreallocatedCache) -> tuple[torch.Tensor, ...]:
    """What is read at once of a prompt, piece by piece; refused before the first is written."""
    if not ids.shape[1]:
        raise LowvramError("expected a prompt of one token or more, found none")
    wanted = cache.get_seq_length() + ids.shape[1]
    if wanted > cache.max_tokens:
        raise BudgetError(f"the KV cache holds {cache.max_tokens} tokens, asked for {wanted}; plan a longer context")
    return ids.split(plan.pieces(cache.get_seq_length(), ids.shape[1]), dim=1)


def _read(model: torch.nn.Module, piece: torch.Tensor, cache: PreallocatedCache) -> torch.Tensor:
    return model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def module_decoder_name(why: str) -> str:
    """What a ``ModuleDecoder`` calls itself."""
    return "the model's modules" + (f" ({why})" if why else "")


class Decoder:
    """What runs a loaded model.

    Args:
        model: From ``load``.
        max_tokens: Tokens of prompt and answer; by default the plan's context.
        batch_size: Sequences, all of one length.
        why: Why it is not a faster one, in words; nothing where there is none.
        cache: One that an earlier decoder of the model has filled, of that length and batch size; by default a new one.
        plan: The model's, with what its owner wants remembered; by default as it is.

    Attributes:
        model: The model.
        plan: What it was made for.
        cache: The ``PreallocatedCache`` that prompt and answer are in.
        released: Whether the model was planned anew since; then it decodes no more.
        reads_ids_at: Where token ids are looked up, ``"gpu"`` or ``"cpu"``: a token that is there need not be moved.
        name: What it is, in words.

    Where the plan says no number of threads, tokens are decoded with the fastest (``threads.py``).
    """

    name: str

    def __init__(
        self,
        model: torch.nn.Module,
        max_tokens: int | None = None,
        batch_size: int = 1,
        why: str = "",
        cache: PreallocatedCache | None = None,
        plan: Plan | None = None,
    ):
        self.model, self.batch_size, self.why, self.released = model, batch_size, why, False
        self.cache = PreallocatedCache(model, max_tokens, batch_size) if cache is None else cache
        self._gpu, self._planes = loaded(model).gpu, loaded(model).planes
        self.plan = plan = plan or loaded(model).plan
        self.reads_ids_at = compute_place(plan.modules[plan.spec.embedding].device)
        on_cpu = "cpu" in {self._gpu.kernels_of(place) for place in plan.layer_places()} and not self._gpu.meta
        counts = thread_counts() if plan.threads is None and on_cpu else ()
        # a pass by the high planes and one by both take differently long
        self._fastest = {both: FastestThreads(counts) for both in (False, True)} if len(counts) > 1 else {}
        loaded(model).decoders.add(self)

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return self.cache.get_seq_length()

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Reads ids behind those in the cache, by both planes where weights have two.

        A few tokens behind others, as a question behind a prompt that is remembered, or the one after a switch of
        precision, are decoded: that is several times faster than a pass by the model's modules.

        Args:
            ids: ``(batch, tokens)`` int64.

        Returns:
            Logits of the last, ``(batch, vocab)`` in the plan's dtype. The next call may write over them.

        Raises:
            LowvramError: There is no token, they are of another batch size, or the model was planned anew.
            BudgetError: The cache has no room for all of them.
        """
        self._check_released()
        with self._planes.taking(both=True):
            pieces = _pieces(self.plan, ids, self.cache)
            # blocks that may be remembered are read in one way, whatever decodes; one that begins with tokens which
            # are there already may not be
            begin, end = self.tokens, self.tokens + ids.shape[1]
            first, last = -(-begin // BLOCK_TOKENS) * BLOCK_TOKENS, end // BLOCK_TOKENS * BLOCK_TOKENS
            whole = range(first, last if self.plan.remembers else first)
            for piece in pieces:
                by_modules = not self.tokens or self.tokens in whole
                logits = _read(self.model, piece, self.cache) if by_modules else self._read_behind(piece)
            return logits

    def _read_behind(self, piece: torch.Tensor) -> torch.Tensor:
        """Logits of the last of some tokens that are read at once, behind others."""
        if piece.shape[1] == 1:
            return self.decode(piece)
        if piece.shape[1] <= self.most_tokens:
            return self.decode_several(piece)[-1:]
        return _read(self.model, piece, self.cache)

    @torch.inference_mode()
    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """Feeds one token of each sequence.

        Args:
            token: ``(batch, 1)`` int64.

        Returns:
            Logits, ``(batch, vocab)`` in the plan's dtype. The next call may write over them.

        Raises:
            LowvramError: The token is of another shape, the model was planned anew, or (lean) there is no prompt yet.
            BudgetError: The cache is full.
        """
        self._check_released()
        if tuple(token.shape) != (expected := (self.batch_size, 1)):
            raise LowvramError(f"expected one token of each sequence, {expected}, found {tuple(token.shape)}")
        with self._fastest[self._planes.both].token() if self._fastest else nullcontext():
            return self._decode(token)

    @torch.inference_mode()
    def decode_several(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feeds several tokens of one sequence in one pass, by both planes where weights have two.

        Args:
            tokens: ``(1, tokens)`` int64, ``most_tokens`` at most.

        Returns:
            Logits after each, ``(tokens, vocab)``; the next call may write over them.

        Raises:
            LowvramError: See ``decode``.
            BudgetError: The cache has no room for all of them.
        """
        self._check_released()
        if tokens.shape[0] != 1 or self.batch_size != 1 or not 1 <= tokens.shape[1] <= self.most_tokens:
            found = f"{tuple(tokens.shape)} for a batch of {self.batch_size}"
            raise LowvramError(f"expected (1, up to {self.most_tokens}) tokens, found {found}")
        with self._planes.taking(both=True):
            if tokens.shape[1] == 1:
                return self.decode(tokens)
            with cpu_threads(self._fastest[True].best) if self._fastest else nullcontext():
                return self._decode_several(tokens)

    def decode_fast(self, token: torch.Tensor) -> torch.Tensor:
        """``decode`` by the high planes alone, where weights have two."""
        with self._planes.taking(both=False):
            return self.decode(token)

    @torch.inference_mode()
    def draft(self, token: torch.Tensor) -> torch.Tensor:
        """``decode_fast``, to guess what both planes will say.

        Returns:
            Logits ``(batch, vocab)``; perhaps of the first tokens of the vocabulary only, which are the commonest.
        """
        self._check_released()
        with (
            self._planes.taking(both=False),
            cpu_threads(self._fastest[False].best) if self._fastest else nullcontext(),
        ):
            return self._draft(token)

    @property
    def most_tokens(self) -> int:
        """Tokens that ``decode_several`` takes: more than one where each comes out as it would by itself."""
        return 1

    def _decode(self, token: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _draft(self, token: torch.Tensor) -> torch.Tensor:
        return self._decode(token)

    def _decode_several(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._by_modules(tokens)[0]

    def _by_modules(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits after each of some tokens, ``(batch, tokens, vocab)``, by the model's own forward."""
        return self.model(tokens, past_key_values=self.cache, use_cache=True).logits

    def choose(
        self,
        logits: torch.Tensor,
        sampling: Sampling,
        generator: torch.Generator | None = None,
        seen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The next token after logits of this decoder, see ``choose``; the next ``decode`` may write over it."""
        likeliest = self._likeliest(logits) if sampling.takes_the_likeliest else None
        return choose(logits, sampling, generator, seen) if likeliest is None else likeliest

    def _likeliest(self, logits: torch.Tensor) -> torch.Tensor | None:
        """The likeliest tokens after logits, where they are known already."""
        return None

    def release(self) -> None:
        """Lets go of the weights, which are about to be others; ``replan`` calls this."""
        self.released = True

    def _check_released(self) -> None:
        if self.released:
            raise LowvramError("the model was planned anew meanwhile; make a new decoder")


class ModuleDecoder(Decoder):
    """Decodes with the model's own modules: any architecture, any format. Its arguments are those of ``Decoder``."""

    @property
    def name(self) -> str:
        """See ``Decoder``."""
        return module_decoder_name(self.why)

    def _decode(self, token: torch.Tensor) -> torch.Tensor:
        return self._by_modules(token)[:, -1]


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
            token = decoder.choose(logits, sampling, generator, seen)
            seen = torch.cat((seen, token), dim=-1) if remember else None
        # read once: where the embedding is off the card, what was read is what it looks up
        token = token.cpu() if decoder.reads_ids_at == "cpu" else token
        value = int(token)
        if value in stop_ids:
            return
        yield value
        if produced < max_new_tokens:
            logits = decoder.decode(token)
