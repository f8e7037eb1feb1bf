"""The decoder behind a chat: made when it is needed, kept between turns, made smaller where the GPU is full.

Knows ids only: no template, no text.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from lowvram_lab.decoding.decision import BOTH_PLANES, HIGH_PLANE, ONE_PLANE, Decision
from lowvram_lab.decoding.decode import Decoder, generate
from lowvram_lab.decoding.escalate import escalate
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.decoding.replay import Replay
from lowvram_lab.decoding.speculate import Drafting, Pace, speculate
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.load import low_planes_alone, replan
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.engine.nested import Planes
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import BLOCK_TOKENS, DEVICES, check_precision
from lowvram_lab.planner.step_down import smaller_plans
from lowvram_lab.prefixes.prompts import Prompts, Reading
from lowvram_lab.prefixes.saved import Saved, put_cache, save_cache
from lowvram_lab.prefixes.store import Remember, Remembered
from lowvram_lab.sampling import Sampling

logger = logging.getLogger(__name__)


COMFORT = 1.25
"""Times what low planes take that must be free before they come back to a card that was full."""

JUDGED_TOKENS = 16
"""Tokens whose time says whether both planes are too slow: fewer may be one burst of right guesses, or one stall."""

_NOT_READ = -1
"""Stands for the token behind what is read: of a prompt, one at least is left to be read."""


class LiveDecoder:
    """The decoder of a model as it is planned now, and which ids its cache holds.

    Arguments as ``Session``; ``threshold`` says from which margin on ``auto`` believes the high planes.

    Attributes:
        prompts: What is remembered of prompts; ``None`` where nothing is.
        given_up: What was given up because the GPU was full, in words, since the list was last emptied.
        drafting: What drafting came to since it was last made anew, and how each token was decided in any precision.
        answers: Whether an answer is on its way; while there is none, another chat's need of room has it let go.
        least_tokens_per_s: Where both planes are slower than this, the high ones decode the rest of an answer.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        compiled: bool | None = None,
        progress: bool = True,
        precision: str | None = None,
        threshold: Callable[[], float] | None = None,
        remember: Remember | None = None,
    ):
        self.model, self.given_up, self.answers = model, [], False
        self._remember, self.prompts, self._has_begun = remember or Remember(), None, False
        self.drafting = Drafting()
        self.least_tokens_per_s: float | None = None
        self._too_slow = False
        self._threshold, self._pace = threshold, None
        self._precision = None
        self.precision = precision
        self._compiled, self._progress = compiled, progress
        self._decoder: Decoder | None = None
        self._held: list[int] = []
        self._smaller: Iterator[tuple[str, Plan]] | None = None
        self._kept: PreallocatedCache | None = None  # of a decoder whose low planes have moved since
        self._away: dict[str, str] = {}  # where low planes are to be again once there is room
        self._stepped_to: Plan | None = None
        loaded(model).chats.add(self)

    @property
    def precision(self) -> str | None:
        """How tokens are decoded, of ``rules.PRECISIONS``; ``None`` for weights of one plane. May be set any time."""
        plan = loaded(self.model).plan
        return (self._precision or plan.decodes_by) if plan.low_planes() else None

    @precision.setter
    def precision(self, precision: str | None) -> None:
        plan = loaded(self.model).plan
        if precision is not None:
            check_precision(plan.spec, precision, plan.low_planes())
        self._precision = precision

    @property
    def decisions(self) -> list[Decision]:
        """How each token was decided since ``drafting`` was last made anew."""
        return self.drafting.decisions

    def begun(self) -> Decoder:
        """The decoder, whatever its cache holds; a new one where the model was planned anew, by whomever.

        Raises:
            torch.OutOfMemoryError: No smaller plan fits either.
        """
        while self._decoder is None or self._decoder.released:
            held, kept = self._held, self._kept
            self.forget()
            plan = self._remember.wanted(loaded(self.model).plan)
            options = {"compiled": self._compiled, "progress": self._progress}
            try:
                decoder = decoder_for(self.model, **options, cache=kept, plan=plan)
                prompts = self._remembering(decoder)
                # at once: Ctrl-C leaves no decoder that remembers nothing
                self._decoder, self.prompts, self._has_begun = decoder, prompts, True
                self._held = held if kept else []
            except torch.OutOfMemoryError as error:
                self.step_down(error)
        return self._decoder

    def _remembering(self, decoder: Decoder) -> Prompts | None:
        if not decoder.plan.remembers:
            return None
        salt, folder = self._remember.salt, self._remember.folder
        try:
            return Prompts(Remembered(self.model, decoder.cache, salt, folder, self._progress, decoder.plan))
        except (LowvramError, OSError) as error:
            if not self._has_begun:
                raise
            logger.warning("prompts are no longer remembered: %s", error)  # an answer goes on without
            return None

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
        fed, left = list(ids), max_new_tokens
        if replay := self._replaying(ids, sampling, made):
            cached = self.reuse(ids)
            tokens = replay.tokens(torch.tensor([ids[cached:]]), left, stop_ids)
            for token in self._noting_what_is_read(ids, tokens):
                yield token
                fed.append(token)
            left -= len(fed) - len(ids)
            if replay.ended:
                return
            self.holds(fed)
        while True:
            precision, took = self._affordable, deque(maxlen=JUDGED_TOKENS)
            stream = self._noting_what_is_read(
                fed, self._stream(precision, fed, left, stop_ids, sampling, made + len(fed) - len(ids))
            )
            for token, seconds in _timed(stream):
                yield token
                fed.append(token)
                left -= 1
                took.extend([] if seconds is None else [seconds])
                if left and self._judged(precision, took) != precision:
                    break
            else:
                return
            stream.close()
            self.holds(fed)

    def _replaying(self, ids: list[int], sampling: Sampling, made: int) -> Replay | None:
        """What gives a remembered answer to a prompt again; ``None`` where there is none, or it could not be verified.

        It is verified by all planes there are, in one pass over several tokens.
        """
        decoder = self.begun()
        precise = self._affordable in (None, "precise")
        if made or not self.prompts or not sampling.takes_the_likeliest or not precise or decoder.most_tokens == 1:
            return None
        remembered = self.prompts.store.answer(ids)
        return Replay(decoder, remembered, self.drafting) if remembered else None

    def keep_answer(self, prompt: list[int], tokens: list[int], sampling: Sampling, seconds: float) -> None:
        """Remembers what was answered greedily to a prompt in so many seconds."""
        verified = self.begun().most_tokens > 1 and self._affordable in (None, "precise")
        if self.prompts and sampling.takes_the_likeliest and verified:
            self.prompts.store.keep_answer(prompt, tokens, seconds)

    def _noting_what_is_read(self, ids: list[int], tokens: Iterator[int]) -> Iterator[int]:
        """Tokens behind a prompt; with the first of them all of the prompt has been read."""
        cached, began, is_read = self.reuse(ids), time.perf_counter(), False
        for token in tokens:
            if not is_read:
                self._was_read(ids, cached, time.perf_counter() - began)
            is_read = True
            yield token
        if not is_read and self._decoder and self._decoder.cache.get_seq_length() >= len(ids):  # it ended at once
            self._was_read(ids, cached, time.perf_counter() - began)

    def _was_read(self, ids: list[int], cached: int, seconds: float) -> None:
        if self.prompts:
            self.prompts.was_read(len(ids), cached, seconds)

    @property
    def _affordable(self) -> str | None:
        """The precision that tokens are decoded by now."""
        return "fast" if self._too_slow else self.precision

    def _judged(self, precision: str | None, took: deque[float]) -> str | None:
        """The precision of the next token, after the latest ones by this one took so many seconds each."""
        least = self.least_tokens_per_s
        if least and precision != "fast" and len(took) == JUDGED_TOKENS and sum(took) * least > JUDGED_TOKENS:
            self._too_slow = True
            speed = JUDGED_TOKENS / sum(took)
            text = f"the high planes alone (both made {speed:.3g} tokens/s, at least {least:g} were wanted)"
            logger.warning("too slow; going on with %s", text)
            self.given_up.append(text)
        return self._affordable

    def _stream(
        self,
        precision: str | None,
        ids: list[int],
        max_new_tokens: int,
        stop_ids: frozenset[int],
        sampling: Sampling,
        made: int,
    ) -> Iterator[int]:
        """``stream`` by one precision."""
        cached, decoder, seen = self.reuse(ids), self.begun(), torch.tensor([ids])
        common = {
            "max_new_tokens": max_new_tokens,
            "stop_ids": stop_ids,
            "sampling": replace(sampling, seed=(sampling.seed + made) % 2**63),
            "seen": seen,
        }
        if precision == "auto" or (precision == "precise" and decoder.most_tokens > 1):
            self._pace = self._pace or Pace(decoder.most_tokens - 1)
            common |= {"pace": self._pace, "drafting": self.drafting}
            if precision == "auto":
                yield from escalate(decoder, seen[:, cached:], threshold=self._threshold(), **common)
            else:
                yield from speculate(decoder, seen[:, cached:], **common)
        else:
            by = BOTH_PLANES if loaded(self.model).plan.low_planes() else ONE_PLANE  # both read a prompt
            made = generate(decoder, seen[:, cached:], **common)
            for token in _each_taking(loaded(self.model).planes, precision != "fast", made):
                self.decisions.append(Decision(token, None, None, by))
                yield token
                by = HIGH_PLANE if by == BOTH_PLANES and precision == "fast" else by

    def reuse(self, ids: list[int]) -> int:
        """Keeps the part of the KV cache that these ids begin with; returns its length in tokens."""
        cache, common = self.begun().cache, 0
        self._held = self._held[: cache.get_seq_length()]  # fewer where putting back a prompt was interrupted
        for old, new in zip(self._held, ids[:-1], strict=False):  # at least one token must be fed
            if old != new:
                break
            common += 1
        if self.prompts:
            common = self.prompts.reuse(cache, self._held, ids, common)
        else:
            cache.keep(common)
        self._held = ids[:common]
        return common

    def why_missed(self, prompt: list[int]) -> str | None:
        """Why no more of a prompt was put back, in words; to be asked before it is kept."""
        missed = self.prompts and self.prompts.missed(prompt)
        return missed and missed.reason

    def keep_prompt(self) -> None:
        """Remembers what of the prompt was read, where the plan has room for it."""
        if self.prompts and self._decoder:
            self.prompts.keep(self._decoder.cache, self._held)

    def save(self, path: Path, ids: list[int], said: dict) -> int:
        """Writes what the KV cache holds of these ids, and plain data with it; see ``save_cache``.

        What else it holds, another prompt say, is forgotten: it is to be in no file of theirs.
        """
        self.reuse([*ids, _NOT_READ])
        return save_cache(path, self.model, self.begun().cache, self._held, said)

    def open(self, saved: Saved) -> None:
        """Puts a saved KV cache back; see ``put_cache``."""
        cache = self.begun().cache
        cache.keep(0)
        self._held = []
        self._held = put_cache(saved, self.model, cache)

    def remembering(self) -> Prompts:
        """What is remembered of prompts.

        Raises:
            LowvramError: Nothing is.
        """
        self.begun()
        if self.prompts is None:
            raise LowvramError("expected a session that remembers prompts, found one that does not; give it remember")
        return self.prompts

    def read(self, ids: list[int]) -> Reading:
        """Reads the whole blocks that a prompt begins with, as an answer to it would, and remembers them.

        Raises:
            LowvramError: Nothing is remembered.
            torch.OutOfMemoryError: No smaller plan fits either.
        """
        self.come_back()
        self.remembering()
        whole, began = ids[: len(ids) // BLOCK_TOKENS * BLOCK_TOKENS], time.perf_counter()
        while True:
            try:
                cached = self._read_whole(whole) if whole else 0
                break
            except torch.OutOfMemoryError as error:
                self.holds(whole)
                self.step_down(error)
            except BaseException:
                self.forget_broken()
                raise
        prompts = self.remembering()
        added, lacking = prompts.keep(self._decoder.cache, self._held) if whole else (0, 0)
        restored = prompts.restored if whole else 0
        return Reading(len(ids), cached, restored, added, lacking, time.perf_counter() - began)

    def _read_whole(self, ids: list[int]) -> int:
        """Makes the cache hold whole blocks and nothing more; how many of their tokens need not be read."""
        prompts, cache = self.remembering(), self._decoder.cache
        self._held = prompts.forget_answers(cache, self._held)
        cached, began = self.reuse([*ids, _NOT_READ]), time.perf_counter()
        if cached < len(ids):
            self.begun().prefill(torch.tensor([ids[cached:]]))
            prompts.was_read(len(ids), cached, time.perf_counter() - began)
        self.holds(ids)
        return cached

    def holds(self, ids: list[int]) -> None:
        """Says which ids were fed: the cache holds as many of them as it is long, and forgets what is behind them."""
        self._held = []
        if self._decoder:
            cache = self._decoder.cache
            cache.keep(min(len(ids), cache.get_seq_length()))
            self._held = ids[: cache.get_seq_length()]

    def forget(self) -> None:
        """Lets go of decoder and cache: their memory is free."""
        self._decoder, self._held, self._pace, self._kept, self.prompts = None, [], None, None, None

    def forget_broken(self) -> None:
        """Lets go of a cache whose layers have different lengths: a forward pass was cut off."""
        if self._decoder and not is_whole(self._decoder.cache):
            self.forget()

    def step_down(self, error: torch.OutOfMemoryError) -> None:
        """Makes room: other chats on the model let go, as long as they answer nothing; else it is planned smaller.

        The next smaller plan that can be is realised; ``given_up`` and a warning say what it costs.

        Raises:
            torch.OutOfMemoryError: ``error``, where no smaller plan fits.
        """
        if self._others_let_go():
            self.forget_broken()
            return
        full = error.with_traceback(None)  # its frames hold the tensors of the pass that failed
        full.__context__ = full.__cause__ = None
        if self._smaller is None:
            state = loaded(self.model)
            self._smaller = smaller_plans(state.plan)
        before = loaded(self.model).plan
        for text, plan in self._smaller:
            try:
                self._realise(plan)
            except (torch.OutOfMemoryError, BudgetError):  # RAM may be short too
                continue
            logger.warning("the GPU is full; going on with less: %s", text)
            for chat in loaded(self.model).chats:  # it is every chat's plan
                chat.given_up.append(text)
            if low_planes_alone(before, plan):
                moved = {name: old.low for name, old in before.modules.items() if old != plan.modules[name]}
                self._away = moved | self._away  # the first places are the ones that were planned
            self._stepped_to = plan
            return
        raise full

    def _others_let_go(self) -> bool:
        """Whether another chat held a KV cache and holds it no longer: its next message has it read again."""
        if let_idle_chats_go(self.model, but=self):
            logger.warning("the GPU has no room for the KV caches of several chats; the others are read again")
            return True
        return False

    def come_back(self) -> None:
        """Brings back low planes that had to leave: to the card where there is room again, to tokens in any case."""
        self._too_slow = False
        state, nearer = loaded(self.model), self._with_low_planes_back()
        if nearer is None:
            return
        needed, free = nearer.weight_bytes("gpu") - state.plan.weight_bytes("gpu"), state.gpu.free_bytes
        if free is not None and free < needed * COMFORT:
            return
        with contextlib.suppress(torch.OutOfMemoryError, BudgetError):
            self._realise(nearer)
            self._away, self._smaller = {}, None

    def _with_low_planes_back(self) -> Plan | None:
        """The plan with its low planes where they were, as far as their high ones still are; none if none left."""
        plan = loaded(self.model).plan
        if plan != self._stepped_to:  # planned anew, by someone else
            self._away = {}
        modules = dict(plan.modules)
        for name, place in self._away.items():
            if DEVICES.index(place) >= DEVICES.index(modules[name].device):
                modules[name] = replace(modules[name], low=place)
        nearer = replace(plan, modules=modules)
        return nearer if low_planes_alone(plan, nearer) else None

    def _realise(self, plan: Plan) -> None:
        """``replan``; the KV cache stays where low planes alone move."""
        held, cache = self._held, self._decoder.cache if self._decoder else None
        stays = cache is not None and low_planes_alone(loaded(self.model).plan, plan) and is_whole(cache)
        self.forget()
        replan(self.model, plan, progress=False)
        if stays:
            self._held, self._kept = held, cache


def _timed(tokens: Iterator[int]) -> Iterator[tuple[int, float | None]]:
    """Tokens, and seconds that each took, without the reader's time; of the first, which is the prompt's, ``None``."""
    began = None
    for token in tokens:
        yield token, None if began is None else time.perf_counter() - began
        began = time.perf_counter()


def let_idle_chats_go(model: torch.nn.Module, but: LiveDecoder | None = None) -> bool:
    """Makes room: one chat on a model that answers nothing gives its KV cache up; its next message has it read again.

    Args:
        model: From ``load``.
        but: The chat that asks.

    Returns:
        Whether there was one.
    """
    for chat in list(loaded(model).chats):
        if chat is not but and not chat.answers and chat._decoder is not None:
            chat.forget()
            return True
    return False


def is_whole(cache: PreallocatedCache) -> bool:
    """Whether all layers hold equally many tokens: no forward pass was cut off."""
    return len({layer.get_seq_length() for layer in cache.held}) == 1


def _each_taking(planes: Planes, both: bool, tokens: Iterator[int]) -> Iterator[int]:
    """Makes each token by these planes, whatever others the model's other users take in between."""
    while True:
        with planes.taking(both):
            token = next(tokens, None)
        if token is None:
            return
        yield token
