"""A streaming chat: history, the model's own template, stop ids that are right, and the KV cache kept between turns.

Derived in: notebooks/09_validated_chat.ipynb
"""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from lowvram_lab.chat.prompt import StopStrings, chat_ids, stop_ids
from lowvram_lab.engine.decode import stream
from lowvram_lab.engine.lean import decoder_for
from lowvram_lab.engine.load import replan
from lowvram_lab.engine.sampling import Sampling
from lowvram_lab.errors import BudgetError, LowvramError, SourceError
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.step_down import smaller_plans

logger = logging.getLogger(__name__)


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
                f"{model.plan.model} has no chat template, so it is a base model; name an instruction-tuned one"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.sampling = max_new_tokens, sampling or Sampling()
        self.history: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[TurnStats] = []
        self.dropped_turns = 0
        self._stop, self._stop_strings = stop_ids(model, tokenizer), StopStrings(stop)
        self._decoder, self._decoder_plan, self._cached_ids = None, None, []
        self._compiled, self._progress = compiled, progress
        self._begun()  # now: compiling and allocating are no part of the first answer

    @property
    def engine(self) -> str:
        """What decodes, in words; where it is not the fast way, why."""
        return self._begun().name

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
        gpu, started = self.model.gpu, time.perf_counter()
        cached = self._reuse_cache(prompt)
        fed, tokens, shown, first_at, ended, given_up = prompt, [], "", None, False, []
        smaller = None
        gpu.reset_peak()
        try:
            while True:
                room = min(self.max_new_tokens - len(tokens), self.model.plan.context - len(fed))
                made = len(tokens)
                try:
                    for token in self._stream(fed, room, made):
                        first_at = first_at or time.perf_counter()
                        tokens.append(token)
                        text, ended = self._stop_strings.cut(self._text(tokens))
                        if len(text) > len(shown):
                            piece, shown = text[len(shown) :], text
                            yield piece
                        if ended:
                            break
                    ended = ended or len(tokens) - made < room
                    if not ended and len(tokens) < self.max_new_tokens and self._forgets_a_turn(history, len(tokens)):
                        self._cached_ids = fed[: self._decoder.cache.get_seq_length()]
                        self._cached_ids += tokens[made : made + self._decoder.cache.get_seq_length() - len(fed)]
                        prompt, self.dropped_turns = self._fitting_prompt(history, len(tokens))
                        fed = prompt + tokens
                        continue
                    if len(held := self._text(tokens)) > len(shown) and not self._stop_strings.cut(held)[1]:
                        piece, shown = held[len(shown) :], held  # what might have become a stop string
                        yield piece
                    break
                except torch.OutOfMemoryError as error:
                    full = error.with_traceback(None)  # its frames hold the tensors of the pass that failed
                    full.__context__ = full.__cause__ = None
                smaller = smaller or smaller_plans(self.model.plan, self.model.spec)
                given_up.append(self._step_down(smaller, full))
                prompt, self.dropped_turns = self._fitting_prompt(history, len(tokens))
                fed = prompt + tokens
        except (GeneratorExit, KeyboardInterrupt):
            self._drop_broken_cache()
            raise
        except BaseException:
            self._drop_broken_cache()
            self.history = history[:-1]  # asked again, the message would fail again
            self.dropped_turns = dropped_before
            raise
        finally:
            now = time.perf_counter()
            self._cached_ids = (prompt + tokens)[: self._decoder.cache.get_seq_length()] if self._decoder else []
            if self.history is history:
                history.append({"role": "assistant", "content": shown})
            speed = (len(tokens) - 1) / (now - first_at) if len(tokens) > 1 else None
            ttft = (first_at or now) - started
            peak = gpu.peak_allocated_bytes
            self.turns.append(TurnStats(len(prompt), cached, len(tokens), ttft, speed, peak, ended, tuple(given_up)))

    def _stream(self, fed: list[int], room: int, made: int) -> Iterator[int]:
        """Goes on after ``fed``, whose last ``made`` tokens are the answer's own."""
        cached = self._reuse_cache(fed)
        sampling = replace(self.sampling, seed=(self.sampling.seed + made) % 2**63)  # not the same draws once more
        decoder, seen = self._begun(), torch.tensor([fed])
        return stream(
            self.model,
            seen[:, cached:],
            decoder.cache,
            max_new_tokens=room,
            stop_ids=self._stop,
            sampling=sampling,
            seen=seen,
            decode=decoder.decode,
        )

    def _text(self, tokens: list[int]) -> str:
        """An answer's text, whole characters only: the bytes of one may be spread over several tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")

    def _step_down(self, smaller: Iterator[tuple[str, Plan]], error: torch.OutOfMemoryError) -> str:
        """Makes the model realise the next smaller plan that can be; says what was given up. Else raises ``error``."""
        for text, plan in smaller:
            self._decoder = None  # its cache makes room
            try:
                replan(self.model, plan, progress=False)
            except (torch.OutOfMemoryError, BudgetError):  # RAM may be short too
                continue
            logger.warning("the GPU is full; going on with less: %s", text)
            return text
        raise error

    def _fitting_prompt(self, history: list[dict[str, str]], answered: int = 0) -> tuple[list[int], int]:
        """Renders a chat without its oldest turns, whole ones, so that there is room for an answer.

        Args:
            history: All of it, up to the user's last message.
            answered: Tokens of the answer that are there already.

        Returns:
            Token ids, and how many turns they leave out.
        """
        context = self.model.plan.context
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

    def _begun(self):
        """The decoder of the model as it is planned now, with whatever its cache holds."""
        stale = self._decoder is None or getattr(self._decoder, "released", False)
        if stale or self._decoder_plan != self.model.plan:  # replanned, by another session perhaps
            self._decoder, self._cached_ids = None, []
            self._decoder = decoder_for(self.model, self._compiled, self._progress)
            self._decoder_plan = self.model.plan
        return self._decoder

    def _drop_broken_cache(self) -> None:
        """Begins an empty cache if a forward that was cut off left the layers of this one with different lengths."""
        cache = self._decoder.cache if self._decoder else None
        lengths = {layer.get_seq_length() for layer in cache.layers} if cache else set()
        if cache and (len(lengths) > 1 or len(cache.layers) not in (0, self.model.spec.num_hidden_layers)):
            self._decoder = None

    def _reuse_cache(self, prompt: list[int]) -> int:
        """Keeps the part of the KV cache that the new prompt begins with; returns its length in tokens."""
        cache, common = self._begun().cache, 0
        for old, new in zip(self._cached_ids, prompt[:-1], strict=False):  # at least one token must be fed
            if old != new:
                break
            common += 1
        cache.keep(common)
        self._cached_ids = prompt[:common]
        return common
