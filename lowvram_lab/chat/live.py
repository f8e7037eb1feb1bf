"""The decoder behind a chat: made when it is needed, kept between turns, made smaller where the GPU is full.

Knows ids only: no template, no text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace

import torch

from lowvram_lab.decoding.decode import Decoder, generate
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import replan
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import BudgetError
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.step_down import smaller_plans
from lowvram_lab.sampling import Sampling

logger = logging.getLogger(__name__)


class LiveDecoder:
    """The decoder of a model as it is planned now, and which ids its cache holds.

    Arguments as ``Session``.

    Attributes:
        given_up: What was given up because the GPU was full, in words, since the list was last emptied.
    """

    def __init__(self, model: torch.nn.Module, compiled: bool | None = None, progress: bool = True):
        self.model, self.given_up = model, []
        self._compiled, self._progress = compiled, progress
        self._decoder: Decoder | None = None
        self._held: list[int] = []
        self._smaller: Iterator[tuple[str, Plan]] | None = None

    def begun(self) -> Decoder:
        """The decoder, whatever its cache holds; a new one where the model was planned anew, by whomever.

        Raises:
            torch.OutOfMemoryError: No smaller plan fits either.
        """
        while self._decoder is None or self._decoder.released:
            self.forget()
            try:
                self._decoder = decoder_for(self.model, compiled=self._compiled, progress=self._progress)
            except torch.OutOfMemoryError as error:
                self.step_down(error)
        return self._decoder

    def stream(
        self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling, made: int = 0
    ) -> Iterator[int]:
        """Goes on after some ids; those at the beginning that the cache holds are not read again.

        Args:
            ids: Prompt, and what has been answered so far.
            max_new_tokens: Stop after so many.
            stop_ids: Stop at one of these.
            sampling: How to choose.
            made: How many of ``ids`` were answered: sampling goes on with other draws.
        """
        cached = self.reuse(ids)
        seen = torch.tensor([ids])
        yield from generate(
            self.begun(),
            seen[:, cached:],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=replace(sampling, seed=(sampling.seed + made) % 2**63),
            seen=seen,
        )

    def reuse(self, ids: list[int]) -> int:
        """Keeps the part of the KV cache that these ids begin with; returns its length in tokens."""
        cache, common = self.begun().cache, 0
        for old, new in zip(self._held, ids[:-1], strict=False):  # at least one token must be fed
            if old != new:
                break
            common += 1
        cache.keep(common)
        self._held = ids[:common]
        return common

    def holds(self, ids: list[int]) -> None:
        """Says which ids were fed: the cache holds as many of them as it is long."""
        self._held = ids[: self._decoder.cache.get_seq_length()] if self._decoder else []

    def forget(self) -> None:
        """Lets go of decoder and cache: their memory is free."""
        self._decoder, self._held = None, []

    def forget_broken(self) -> None:
        """Lets go of a cache whose layers have different lengths: a forward pass was cut off."""
        lengths = {layer.get_seq_length() for layer in self._decoder.cache.layers} if self._decoder else set()
        if len(lengths) > 1:
            self.forget()

    def step_down(self, error: torch.OutOfMemoryError) -> None:
        """Makes the model realise the next smaller plan that can be; ``given_up`` and a warning say what it costs.

        Raises:
            torch.OutOfMemoryError: ``error``, where no smaller plan fits.
        """
        full = error.with_traceback(None)  # its frames hold the tensors of the pass that failed
        full.__context__ = full.__cause__ = None
        if self._smaller is None:
            state = loaded(self.model)
            self._smaller = smaller_plans(state.plan)
        for text, plan in self._smaller:
            self.forget()
            try:
                replan(self.model, plan, progress=False)
            except (torch.OutOfMemoryError, BudgetError):  # RAM may be short too
                continue
            logger.warning("the GPU is full; going on with less: %s", text)
            self.given_up.append(text)
            return
        raise full
