"""A streaming chat: history, the model's own template, stop ids that are right, and the KV cache kept between turns.

Derived in: notebooks/09_validated_chat.ipynb
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch

from lowvram_lab.chat.live import LiveDecoder
from lowvram_lab.chat.prompt import StopStrings, chat_ids, stop_ids
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.engine.sampling import Sampling
from lowvram_lab.errors import BudgetError, LowvramError, SourceError


@dataclass(frozen=True)
class TurnStats:
    """What one answer took.

    Attributes:
        prompt_tokens: Length of the whole rendered chat.
        cached_tokens: How many of them were still in the KV cache.
        new_tokens: Tokens generated, without the stop token.
        ttft_s: Seconds to the first token.
        tokens_per_s: Decoding speed after the first token, or ``None`` for a shorter answer.
        peak_bytes: Highest allocated GPU memory during the turn, without the CUDA context.
        stopped: Whether the model ended its turn itself, rather than running out of room.
        given_up: What was given up on the way because the GPU was full, in words.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    ttft_s: float
    tokens_per_s: float | None
    peak_bytes: int
    stopped: bool
    given_up: tuple[str, ...] = ()

    def to_dict(self) -> dict:
        """Plain data."""
        return asdict(self)


class ChatSession:
    """A conversation with a loaded model.

    A chat that outgrows the plan's context goes on without its oldest turns, whole ones, also in the middle of an
    answer; an answer that fills the context all by itself ends there (``TurnStats.stopped`` is false).

    Where the GPU is full in spite of the plan (another process took memory, say), the session goes on with a smaller
    plan: KV cache in int8, then layers on the CPU, then a shorter context. ``TurnStats.given_up`` and a warning say so.

    Args:
        model: From ``load``.
        tokenizer: Its tokenizer, with a chat template.
        system: System message, or ``None`` for the template's own.
        max_new_tokens: Longest answer.
        sampling: Greedy by default.
        stop: Texts that end an answer, and are not shown.
        compiled: Whether the decoder may compile a layer (``LeanDecoder``); by default where there is a compiler.
        progress: Show that it compiles.

    Attributes:
        history: Messages so far, each with ``role`` and ``content``.
        turns: What each answer took.
        dropped_turns: How many of the oldest turns the model no longer sees, for want of context; ``history`` has them.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        system: str | None = None,
        max_new_tokens=256,
        sampling: Sampling | None = None,
        stop: Iterable[str] = (),
        compiled: bool | None = None,
        progress: bool = True,
    ):
        if not getattr(tokenizer, "chat_template", None):
            raise SourceError(
                f"{model.lowvram.plan.model} has no chat template, so it is a base model; name an instruction-tuned one"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.sampling = max_new_tokens, sampling or Sampling()
        self.history: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[TurnStats] = []
        self.dropped_turns = 0
        self._stop, self._stop_strings = stop_ids(model, tokenizer), StopStrings(stop)
        self._live = LiveDecoder(model, compiled, progress)
        self._live.begun()  # now: compiling and allocating are no part of the first answer

    @property
    def engine(self) -> str:
        """What decodes, in words; where it is not the fast way, why."""
        return self._live.begun().name

    def ask(self, text: str) -> str:
        """Sends a message and returns the whole answer."""
        return "".join(self.send(text))

    def send(self, text: str) -> Iterator[str]:
        """Sends a message, yields the answer as it is made.

        History keeps what was yielded where the answer is cut off by its reader or by Ctrl-C; after an error it is as
        if nothing had been asked.

        Args:
            text: The user's message.

        Yields:
            Pieces of text, never half a character.

        Raises:
            BudgetError: The message alone is longer than the plan's context.
            LowvramError: The message is empty, or not text in any encoding (lone surrogates).
            SourceError: The model's chat template refuses the chat.
        """
        if not text.strip():
            raise LowvramError("expected a message, found an empty one; write something")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise LowvramError(
                "expected a message in UTF-8, found bytes that are not; check the terminal's encoding"
            ) from error
        history = [*self.history, {"role": "user", "content": text}]
        return self._answer(history, *self._fitting_prompt(history))

    def _answer(self, history: list[dict[str, str]], prompt: list[int], dropped: int) -> Iterator[str]:
        dropped_before = self.dropped_turns
        self.history, self.dropped_turns = history, dropped
        answer = _Answer(self, prompt)
        try:
            yield from answer.pieces(history)
        except (GeneratorExit, KeyboardInterrupt):
            self._live.forget_broken()
            raise
        except BaseException:
            self._live.forget_broken()
            self.history = history[:-1]  # asked again, the message would fail again
            self.dropped_turns = dropped_before
            raise
        finally:
            self._live.holds(answer.prompt + answer.tokens)
            if self.history is history:
                history.append({"role": "assistant", "content": answer.shown})
            self.turns.append(answer.stats())

    def _text(self, tokens: list[int]) -> str:
        """An answer's text, whole characters only: the bytes of one may be spread over several tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")

    def _fitting_prompt(self, history: list[dict[str, str]], answered: int = 0) -> tuple[list[int], int]:
        """Renders a chat without its oldest turns, whole ones, so that there is room for an answer.

        Args:
            history: All of it, up to the user's last message.
            answered: Tokens of the answer that are there already.

        Returns:
            Token ids, and how many turns they leave out.
        """
        context = self.model.lowvram.plan.context
        first = 1 if history[0]["role"] == "system" else 0
        dropped = min(self.dropped_turns, (len(history) - first - 1) // 2)  # history may have been cut by its owner
        while True:
            seen = history[:first] + history[first + 2 * dropped :]
            prompt = chat_ids(self.tokenizer, seen)
            wanted = max(1, min(self.max_new_tokens, answered + context // 4))
            if len(prompt) + wanted <= context:
                return prompt, dropped
            if len(seen) - first > 2:
                dropped += 1
            elif len(prompt) + answered < context:
                return prompt, dropped
            else:
                raise BudgetError(
                    f"this message takes {len(prompt) + answered} tokens, the plan's context is {context}; "
                    "shorten it or plan for more"
                )

    def _forgets_a_turn(self, history: list[dict[str, str]], answered: int) -> bool:
        """Whether an answer that has filled the context can go on without the oldest turn that is still seen."""
        try:
            return self._fitting_prompt(history, answered)[1] > self.dropped_turns
        except BudgetError:
            return False


class _Answer:
    """One answer on its way.

    Attributes:
        prompt: Ids of the rendered chat, without the turns that were dropped.
        tokens: Ids of the answer so far.
        shown: Its text so far, as it was yielded.
    """

    def __init__(self, session: ChatSession, prompt: list[int]):
        self.session, self.prompt = session, prompt
        self.tokens: list[int] = []
        self.shown = ""
        self._live = session._live
        self._gpu = loaded(session.model).gpu
        self._ended, self._first_at = False, None
        self._started = time.perf_counter()
        self._cached = self._live.reuse(prompt)
        self._gpu.reset_peak()

    def pieces(self, history: list[dict[str, str]]) -> Iterator[str]:
        """Yields the answer; where there is no room left, without the oldest turns, or with a smaller plan."""
        while True:
            fed, made = self.prompt + self.tokens, len(self.tokens)
            try:
                yield from self._until_full(fed, made)
            except torch.OutOfMemoryError as error:
                self._live.step_down(error)
                self._render(history)
                continue
            unfinished = not self._ended and made < len(self.tokens) < self.session.max_new_tokens
            if not unfinished or not self.session._forgets_a_turn(history, len(self.tokens)):
                break
            self._live.holds(fed + self.tokens[made:])
            self._render(history)
        yield from self._held_back()

    def _until_full(self, fed: list[int], made: int) -> Iterator[str]:
        """Goes on after ``fed`` until the answer ends, or the context or the longest answer is reached."""
        session = self.session
        room = min(session.max_new_tokens - made, loaded(session.model).plan.context - len(fed))
        for token in self._live.stream(fed, room, session._stop, session.sampling, made):
            self._first_at = self._first_at or time.perf_counter()
            self.tokens.append(token)
            text, self._ended = session._stop_strings.cut(session._text(self.tokens))
            if len(text) > len(self.shown):
                piece, self.shown = text[len(self.shown) :], text
                yield piece
            if self._ended:
                return
        self._ended = len(self.tokens) - made < room

    def _held_back(self) -> Iterator[str]:
        """What might have become a stop string, and did not."""
        text = self.session._text(self.tokens)
        if len(text) > len(self.shown) and not self.session._stop_strings.cut(text)[1]:
            piece, self.shown = text[len(self.shown) :], text
            yield piece

    def _render(self, history: list[dict[str, str]]) -> None:
        self.prompt, self.session.dropped_turns = self.session._fitting_prompt(history, len(self.tokens))

    def stats(self) -> TurnStats:
        """What it took until now."""
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
        )
