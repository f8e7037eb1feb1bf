"""One answer on its way, and what every kind of session shares: where it stops, how it is shown, what it took.

Knows no template and no history: a session says what the prompt of its question is.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Generic, TypeVar

import pandas
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowvram_lab.chat.live import LiveDecoder
from lowvram_lab.chat.margins import margins_of, tokens_for
from lowvram_lab.chat.prompt import StopStrings, stop_ids
from lowvram_lab.decoding.decision import Decision
from lowvram_lab.decoding.escalate import Margins, check_flip_rate
from lowvram_lab.decoding.speculate import Drafting
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import LowvramError
from lowvram_lab.prefixes.store import Remember
from lowvram_lab.sampling import Sampling

Question = TypeVar("Question")
"""What a session is asked: a chat's messages, or a text's ids."""


FLIP_RATE = 0.01
"""Of ``"auto"``, where none is asked for."""


@dataclass(frozen=True)
class TurnStats:
    """What one answer took.

    Attributes:
        prompt_tokens: Length of the whole prompt; of a chat, with earlier answers as they were generated.
        cached_tokens: How many of them were still in the KV cache, or were put back there.
        new_tokens: Tokens generated, without the stop token.
        ttft_s: Seconds to the first token.
        tokens_per_s: Decoding speed after the first token, or ``None`` for a shorter answer.
        peak_bytes: Highest allocated GPU memory during the turn, without the CUDA context.
        stopped: Whether the model ended its turn itself, rather than running out of room.
        given_up: What was given up on the way because the GPU was full, or both planes too slow, in words.
        drafted: Tokens that were guessed and verified, where precision is not ``"fast"``.
        accepted: How many of them were right.
        precise_tokens: Of weights in two planes, tokens that both computed; else ``None``.
        remembered_tokens: How many of the prompt's tokens were put back from what is remembered.
        missed: Why no more of them were, in words; ``None`` where all were that could be, or the KV cache held them.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    ttft_s: float
    tokens_per_s: float | None
    peak_bytes: int
    stopped: bool
    given_up: tuple[str, ...] = ()
    drafted: int = 0
    accepted: int = 0
    precise_tokens: int | None = None
    remembered_tokens: int = 0
    missed: str | None = None

    def to_dict(self) -> dict:
        """Plain data."""
        return asdict(self)


class Session(Generic[Question]):
    """Answers, one after the other, of a loaded model whose KV cache is kept in between.

    Args:
        model: From ``load``.
        tokenizer: Its tokenizer.
        max_new_tokens: Longest answer.
        sampling: Greedy by default.
        stop: Texts that end an answer, and are not shown.
        compiled: Whether the decoder may compile a layer (``LeanDecoder``); by default where there is a compiler.
        progress: Show that it compiles.
        precision: Of weights in two planes: ``"fast"`` decodes by the high ones, ``"precise"`` by both (and lets the
            high ones guess ahead), ``"auto"`` by both where the high ones are unsure; by default what the plan says.
        remember: What to remember of prompts, so that what begins alike need not be read again: bytes on disk, as
            ``"2GiB"``, or a ``Remember``; by default what the plan says.

    Attributes:
        turns: What each answer took.
        flip_rate: Of ``"auto"``: the share of tokens that may differ from what both planes would have said; 0.01 until
            it is set.
        decisions: How each token of the latest answer was decided, and by which planes.
        margins: Of ``"auto"``: where the high planes are unsure; the library's text's until others are set.
        least_tokens_per_s: Of weights in two planes: where both are slower than this, the high ones decode the rest of
            an answer; the next one is begun by both again. ``None`` until it is set.
    """

    def __init__(  # noqa: PLR0913  (each a setting of its own)
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Iterable[str] = (),
        compiled: bool | None = None,
        progress: bool = True,
        precision: str | None = None,
        remember: Remember | str | int | None = None,
    ):
        self.model, self.tokenizer, self._flip_rate = model, tokenizer, FLIP_RATE
        self.decisions: list[Decision] = []
        self._progress, self._margins, self._margins_of_tokens = progress, None, 0
        self.max_new_tokens, self.sampling = max_new_tokens, sampling or Sampling()
        self.turns: list[TurnStats] = []
        self._stop_ids, self._stop_strings = stop_ids(model, tokenizer), StopStrings(stop)
        self._live = LiveDecoder(model, compiled, progress, precision, self._threshold, Remember.of(remember))
        self._live.begun()  # now: compiling and allocating are no part of the first answer

    @property
    def precision(self) -> str | None:
        """How tokens are decoded; ``None`` for weights of one plane. May be set at any time, within an answer too."""
        return self._live.precision

    @precision.setter
    def precision(self, precision: str | None) -> None:
        self._live.precision = precision

    @property
    def flip_rate(self) -> float:
        """See the class."""
        return self._flip_rate

    @flip_rate.setter
    def flip_rate(self, rate: float) -> None:
        check_flip_rate(rate)
        self._flip_rate = rate

    @property
    def margins(self) -> Margins | None:
        """Where the high planes are unsure, as ``"auto"`` takes it; read off the library's text when it is needed.

        Set, it is what was set: ``margins_of`` of a text like what is asked.
        """
        return self._margins

    @margins.setter
    def margins(self, margins: Margins) -> None:
        self._margins, self._margins_of_tokens = margins, math.inf

    @property
    def least_tokens_per_s(self) -> float | None:
        """See the class."""
        return self._live.least_tokens_per_s

    @least_tokens_per_s.setter
    def least_tokens_per_s(self, least: float | None) -> None:
        check_least(least, self.precision is not None)
        self._live.least_tokens_per_s = least

    @property
    def drafting(self) -> Drafting:
        """What drafting came to in the latest answer, or comes to in the one that is being made."""
        return self._live.drafting

    def _threshold(self) -> float:
        """From which margin on the high planes are believed."""
        wanted = tokens_for(self._flip_rate)
        if self._margins is None or wanted > self._margins_of_tokens:
            self._margins = margins_of(self.model, self.tokenizer, tokens=wanted, progress=self._progress)
            self._margins_of_tokens = wanted
        return self._margins.threshold(self._flip_rate)

    def unsure(self, top: int = 10) -> pandas.DataFrame:
        """The tokens of the latest answer, decided by ``"auto"``, at which the high planes were least sure.

        Returns:
            ``token`` (its text), ``margin`` and ``entropy`` of the high planes (nats), ``both`` (whether both planes
            computed it), by falling entropy. A DataFrame.
        """
        asked = [decision for decision in self.decisions if decision.entropy is not None]
        asked = sorted(asked, key=lambda decision: -decision.entropy)[:top]
        rows = [(self.tokenizer.decode([d.token]), d.margin, d.entropy, d.both) for d in asked]
        return pandas.DataFrame(rows, columns=["token", "margin", "entropy", "both"])

    @property
    def engine(self) -> str:
        """What decodes, in words; where it is not the fast way, why."""
        return self._live.begun().name

    def ask(self, text: str) -> str:
        """Sends a text and returns the whole answer."""
        return "".join(self.send(text))

    def send(self, text: str) -> Iterator[str]:
        """Sends a text, yields the answer as it is made, in pieces that are never half a character."""
        raise NotImplementedError

    def _prompt(self, question: Question, answered: int = 0) -> list[int]:
        """Ids of a question, so that there is room for more of an answer than ``answered`` tokens.

        Raises:
            BudgetError: There is not, whatever is left out.
        """
        raise NotImplementedError

    def _can_shorten(self, question: Question, answered: int) -> bool:
        """Whether ``_prompt`` would now leave out more of the question than it did."""
        return False

    def _text(self, prompt: list[int], tokens: list[int]) -> str:
        """An answer's text, whole characters only: the bytes of one may be spread over several tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


def check_least(least: float | None, low_planes: bool) -> None:
    """Refuses, by a ``LowvramError``, what is no least number of tokens a second, or has no low planes to leave out."""
    if least is None:
        return
    if isinstance(least, bool) or not isinstance(least, int | float) or not 0 < least < math.inf:
        raise LowvramError(f"expected a least number of tokens a second above 0, such as 5, found {least!r}")
    if not low_planes:
        raise LowvramError("a least number of tokens a second needs weights in two planes (int4+4), found one")


class Answer(Generic[Question]):
    """One answer on its way.

    Attributes:
        session: Whose.
        question: What it answers.
        prompt: Ids of the question, as much of it as is seen.
        tokens: Ids of the answer so far.
        shown: Its text so far, as it was yielded.
    """

    def __init__(self, session: Session[Question], question: Question, prompt: list[int]):
        self.session = session
        self.question = question
        self.prompt = self._asked = prompt
        self.tokens: list[int] = []
        self.shown = ""
        self._live = session._live
        self._gpu = loaded(session.model).gpu
        self._ended, self._is_fed, self._first_at = False, False, None
        self._started = time.perf_counter()
        self._live.come_back()
        self._cached = self._live.reuse(prompt)
        self._remembered = self._live.prompts.restored if self._live.prompts else 0
        self._gpu.reset_peak()
        self._live.drafting = Drafting()
        session.decisions = self._live.decisions

    def pieces(self) -> Iterator[str]:
        """Yields the text. However that ends, the KV cache is whole then and ``session.turns`` has a turn more."""
        self._live.answers = True
        try:
            yield from self._until_it_ends()
        except BaseException:
            self._live.forget_broken()
            raise
        finally:
            self._live.answers = False
            # the last token is fed by what follows it: where nothing did, it is the next turn's to feed, also where one
            # pass has verified several
            self._live.holds(self.prompt + (self.tokens if self._is_fed else self.tokens[:-1]))
            self.session.turns.append(self._stats())
            self._live.keep_prompt()
        if self.prompt == self._asked and not self.session.turns[-1].given_up:  # all of it to one prompt, by one plan
            self._live.keep_answer(self.prompt, self.tokens, self.session.sampling, time.perf_counter() - self._started)

    def _until_it_ends(self) -> Iterator[str]:
        """Where there is no room left it goes on with less of the question, or with a smaller plan."""
        while True:
            fed, made = self.prompt + self.tokens, len(self.tokens)
            try:
                self._read_margins()
                yield from self._until_full(fed, made)
            except torch.OutOfMemoryError as error:
                self._live.holds(self.prompt + self.tokens)  # where low planes alone leave, the cache stays
                self._live.step_down(error)
                self.prompt = self.session._prompt(self.question, len(self.tokens))
                continue
            unfinished = not self._ended and made < len(self.tokens) < self.session.max_new_tokens
            if not unfinished or not self.session._can_shorten(self.question, len(self.tokens)):
                break
            self._live.holds(fed + self.tokens[made:])
            self.prompt = self.session._prompt(self.question, len(self.tokens))
        yield from self._held_back()

    def _read_margins(self) -> None:
        """Reads them where they are wanted and not known, once for all answers, and so no part of this one's time."""
        if self.session.precision == "auto":
            began = time.perf_counter()
            self.session._threshold()
            self._started += time.perf_counter() - began

    def _until_full(self, fed: list[int], made: int) -> Iterator[str]:
        """Goes on after ``fed`` until the answer ends, or the context or the longest answer is reached."""
        session = self.session
        room = min(session.max_new_tokens - made, loaded(session.model).plan.context - len(fed))
        for token in self._live.stream(fed, room, session._stop_ids, session.sampling, made):
            self._first_at = self._first_at or time.perf_counter()
            self.tokens.append(token)
            text, self._ended = session._stop_strings.cut(session._text(self.prompt, self.tokens))
            if len(text) > len(self.shown):
                piece, self.shown = text[len(self.shown) :], text
                yield piece
            if self._ended:
                return
        self._ended = self._is_fed = len(self.tokens) - made < room

    def _held_back(self) -> Iterator[str]:
        """What might have become a stop string, and did not."""
        text = self.session._text(self.prompt, self.tokens)
        if len(text) > len(self.shown) and not self.session._stop_strings.cut(text)[1]:
            piece, self.shown = text[len(self.shown) :], text
            yield piece

    def _stats(self) -> TurnStats:
        now = time.perf_counter()
        decoded = len(self.tokens) - 1
        given_up = tuple(self._live.given_up)
        self._live.given_up.clear()
        return TurnStats(
            prompt_tokens=len(self.prompt),
            cached_tokens=self._cached,
            new_tokens=len(self.tokens),
            ttft_s=(self._first_at or now) - self._started,
            tokens_per_s=decoded / (now - self._first_at) if decoded > 0 else None,
            peak_bytes=self._gpu.peak_allocated_bytes,
            stopped=self._ended,
            given_up=given_up,
            drafted=sum(self._live.drafting.drafted.values()),
            accepted=sum(self._live.drafting.accepted.values()),
            precise_tokens=self._precise_tokens(),
            remembered_tokens=self._remembered,
            missed=self._live.why_missed(self.prompt),
        )

    def _precise_tokens(self) -> int | None:
        """How many tokens both planes computed."""
        return None if self._live.precision is None else sum(decision.both for decision in self._live.decisions)
