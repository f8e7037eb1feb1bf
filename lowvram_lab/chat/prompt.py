"""From a chat to token ids by the model's own template, or from a text as it is; from generated text to where it stops.

Nothing a user types becomes a control token: ``<|im_end|>`` in a message is spelt out in ordinary tokens.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lowvram_lab.errors import LowvramError, SourceError
from lowvram_lab.model.text import first_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END_OF_TURN_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>")
"""Checkpoints disagree on ``eos_token_id`` (Qwen1.5's chat and base models do): stop at any of these."""


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a turn: from generation config, config, tokenizer, and well-known names it has."""
    found = set()
    for holder in (model.generation_config, model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    vocabulary = tokenizer.get_vocab()
    found.update(vocabulary[token] for token in END_OF_TURN_TOKENS if token in vocabulary)
    return frozenset(found)


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a chat, messages with ``role`` and ``content``, ready for the assistant's answer.

    Raises:
        SourceError: The template refuses these messages, or fails.
    """
    control = _control_tokens(tokenizer)
    if not control or not any(control.search(message["content"]) for message in messages):
        return _render(tokenizer, messages, tokenize=True)["input_ids"]
    mark, spelt = secrets.token_hex(8), []

    def hide(match: re.Match) -> str:
        spelt.append(match.group())
        return f"\ue000{mark}:{len(spelt) - 1}\ue001"

    hidden = [{**message, "content": control.sub(hide, message["content"])} for message in messages]
    ids: list[int] = []
    for piece in re.split(f"(\ue000{mark}:\\d+\ue001)", _render(tokenizer, hidden, tokenize=False)):
        if piece.startswith(f"\ue000{mark}:"):
            ids += _spelt_out(tokenizer, spelt[int(piece[len(mark) + 2 : -1])])
        else:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
    return ids


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text to go on with: begun as the tokenizer begins one (``<s>``, where it does), and not ended.

    Args:
        tokenizer: With or without a chat template.
        text: Control tokens in it are spelt out.
    """
    first = first_ids(tokenizer)
    control = _control_tokens(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if control is None or not any(map(control.fullmatch, tokenizer.convert_ids_to_tokens(ids))):
        return first + ids
    ids = []  # of control tokens that are not special
    for place, piece in enumerate(re.split(f"({control.pattern})", text)):
        if place % 2:
            ids += _spelt_out(tokenizer, piece)
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return first + ids


def checked_text(text: str, what: str) -> str:
    """What a user typed, if it is text.

    Raises:
        LowvramError: It is empty, or not text in any encoding (lone surrogates).
    """
    if not text:
        raise LowvramError(f"expected {what}, found an empty one; write something")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LowvramError(
            f"expected {what} in UTF-8, found bytes that are not; check the terminal's encoding"
        ) from error
    return text


def _spelt_out(tokenizer: PreTrainedTokenizerBase, control: str) -> list[int]:
    """A control token as the ordinary tokens of its letters; one that is not special is split only by hand."""
    ids: list[int] = []
    for part in filter(None, (control[:1], control[1:])):
        ids += tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


@functools.lru_cache(maxsize=4)  # a vocabulary takes a tenth of a second to look through
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    vocabulary = tokenizer.get_vocab()
    names = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    names |= {token for token in END_OF_TURN_TOKENS if token in vocabulary}
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))) if names else None


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], tokenize: bool):
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=tokenize, return_dict=tokenize
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:  # what Python raises inside a template, too
        reason = str(error).strip().splitlines() or [type(error).__name__]
        roles = ", ".join(message["role"] for message in messages)
        raise SourceError(
            f"the model's chat template refuses this chat ({reason[0]}); it was given messages of {roles}"
        ) from error


class StopStrings:
    """Texts at which an answer ends.

    Args:
        strings: None of them is shown.

    Raises:
        LowvramError: One is empty, or no text.
    """

    def __init__(self, strings: Iterable[str] = ()):
        if isinstance(strings, str):
            strings = (strings,)
        self.strings = tuple(strings)
        for string in self.strings:
            if not isinstance(string, str) or not string:
                raise LowvramError(f"expected stop strings of one character or more, found {string!r}")

    def cut(self, text: str) -> tuple[str, bool]:
        """What of an unfinished answer can be shown, and whether it has ended.

        Returns:
            The text before the first stop string and ``True``; or the text without what may be the beginning of one,
            and ``False``.
        """
        found = [place for string in self.strings if (place := text.find(string)) >= 0]
        if found:
            return text[: min(found)], True
        longest = max((len(string) for string in self.strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self.strings):
                return text[:-length], False
        return text, False
