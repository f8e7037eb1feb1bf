"""A streaming chat: history, the model's own template, stop ids that are right, and the KV cache kept between turns.

Derived in: notebooks/09_validated_chat.ipynb
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from lowvram_lab.engine.decode import Sampling, stream
from lowvram_lab.engine.kv_cache import MeteredCache
from lowvram_lab.errors import BudgetError, LowvramError, SourceError

END_OF_TURN_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>")
"""Checkpoints disagree on ``eos_token_id`` (Qwen1.5's chat and base models do): stop at any of these."""


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
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    ttft_s: float
    tokens_per_s: float | None
    peak_bytes: int
    stopped: bool

    def to_dict(self) -> dict:
        """Plain data."""
        return asdict(self)


def stop_ids(model, tokenizer) -> frozenset[int]:
    """Every id that ends a turn: from generation config, config, tokenizer, and well-known names it has."""
    found = set()
    for holder in (model.generation_config, model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    vocabulary = tokenizer.get_vocab()
    found.update(vocabulary[token] for token in END_OF_TURN_TOKENS if token in vocabulary)
    return frozenset(found)


class ChatSession:
    """A conversation with a loaded model.

    Args:
        model: From ``load``.
        tokenizer: Its tokenizer, with a chat template.
        system: System message, or ``None`` for the template's own.
        max_new_tokens: Longest answer.
        sampling: Greedy by default.

    Attributes:
        history: Messages so far, each with ``role`` and ``content``.
        turns: What each answer took.
        dropped_turns: How many of the oldest turns had to be forgotten for want of context.
    """

    def __init__(
        self, model, tokenizer, *, system: str | None = None, max_new_tokens=256, sampling: Sampling | None = None
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
        self._stop = stop_ids(model, tokenizer)
        self._cache, self._cached_ids = MeteredCache(model.gpu, model.plan.kv_format), []

    def ask(self, text: str) -> str:
        """Sends a message and returns the whole answer."""
        return "".join(self.send(text))

    def send(self, text: str) -> Iterator[str]:
        """Sends a message, yields the answer as it is made. History keeps what was yielded, also if cut off.

        Args:
            text: The user's message.

        Yields:
            Pieces of text, never half a character.

        Raises:
            BudgetError: The message alone is longer than the plan's context.
            LowvramError: The message is not text in any encoding (lone surrogates).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise LowvramError(
                "expected a message in UTF-8, found bytes that are not; check the terminal's encoding"
            ) from error
        history = [*self.history, {"role": "user", "content": text}]
        prompt, dropped = self._fitting_prompt(history)
        return self._answer(history, prompt, dropped)

    def _answer(self, history: list[dict[str, str]], prompt: list[int], dropped: int) -> Iterator[str]:
        self.history, self.dropped_turns = history, self.dropped_turns + dropped
        gpu, started = self.model.gpu, time.perf_counter()
        cached = self._reuse_cache(prompt)
        room = min(self.max_new_tokens, self.model.plan.context - len(prompt))
        ids = torch.tensor([prompt[cached:]])
        tokens, shown, first_at, ended = [], "", None, False
        gpu.reset_peak()
        try:
            for token in stream(
                self.model, ids, self._cache, max_new_tokens=room, stop_ids=self._stop, sampling=self.sampling
            ):
                first_at = first_at or time.perf_counter()
                tokens.append(token)
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # the bytes of a character may be spread over several tokens
                    piece, shown = text[len(shown) :], text
                    yield piece
            ended = len(tokens) < room
        except (GeneratorExit, KeyboardInterrupt):
            self._cache = self._usable_cache()
            raise
        except BaseException:
            self._cache, self.history = self._usable_cache(), history[:-1]  # asked again, the message would fail again
            raise
        finally:
            now = time.perf_counter()
            self._cached_ids = (prompt + tokens)[: self._cache.get_seq_length()]
            if self.history is history:
                history.append({"role": "assistant", "content": shown})
            speed = (len(tokens) - 1) / (now - first_at) if len(tokens) > 1 else None
            ttft = (first_at or now) - started
            peak = gpu.peak_allocated_bytes
            self.turns.append(TurnStats(len(prompt), cached, len(tokens), ttft, speed, peak, ended))

    def _fitting_prompt(self, history: list[dict[str, str]]) -> tuple[list[int], int]:
        """Renders a chat; drops its oldest turns, whole ones, until there is room for an answer.

        Returns:
            Token ids, and how many turns were dropped from ``history``.
        """
        context, dropped = self.model.plan.context, 0
        first = 1 if history[0]["role"] == "system" else 0
        while True:
            rendered = self.tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=True)
            prompt = rendered["input_ids"]
            if len(prompt) + min(self.max_new_tokens, context // 4) <= context:
                return prompt, dropped
            if len(history) - first > 2:
                del history[first : first + 2]
                dropped += 1
            elif len(prompt) < context:
                return prompt, dropped
            else:
                raise BudgetError(
                    f"this message takes {len(prompt)} tokens, the plan's context is {context}; "
                    "shorten it or plan for more"
                )

    def _usable_cache(self) -> MeteredCache:
        """The cache, or an empty one if a forward that was cut off left its layers with different lengths."""
        lengths = {layer.get_seq_length() for layer in self._cache.layers}
        complete = len(lengths) <= 1 and len(self._cache.layers) in (0, self.model.spec.num_hidden_layers)
        return self._cache if complete else MeteredCache(self.model.gpu, self.model.plan.kv_format)

    def _reuse_cache(self, prompt: list[int]) -> int:
        """Keeps the part of the KV cache that the new prompt begins with; returns its length in tokens."""
        common = 0
        for old, new in zip(self._cached_ids, prompt[:-1], strict=False):  # at least one token must be fed
            if old != new:
                break
            common += 1
        self._cache.keep(common)
        return common
