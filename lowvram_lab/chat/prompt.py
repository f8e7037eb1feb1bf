"""From a chat to token ids by the model's own template, or from a text as it is; from generated text to where it stops.

Nothing a user types becomes a control token: ``<|im_end|>`` in a message is spelt out in ordinary tokens.
Which tokens those are says ``control``, how a template takes a chat ``template``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lowvram_lab.chat.control import END_OF_TURN_TOKENS, ControlTokens
from lowvram_lab.chat.template import chat_template
from lowvram_lab.errors import LowvramError, SourceError
from lowvram_lab.repository.text import first_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a turn: from generation config, config, tokenizer, and well-known names it has."""
    found = set()
    for holder in (model.generation_config, model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    vocabulary = tokenizer.get_vocab()
    found.update(vocabulary[token] for token in END_OF_TURN_TOKENS if token in vocabulary)
    return frozenset(found)


def chat_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    template_arguments: Mapping[str, object] | None = None,
) -> list[int]:
    """Token ids of a chat, ready for the assistant's answer.

    They are ``apply_chat_template``'s, but for control tokens that somebody typed, and where the template would leave
    out a system message, or refuses it (see ``ChatTemplate``).

    Args:
        tokenizer: With a chat template.
        messages: Each with ``role`` and ``content``.
        template_arguments: What the template takes beside them.

    Raises:
        LowvramError: The template does not know these arguments, or the messages are none.
        SourceError: The template refuses these messages, or fails.
    """
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise LowvramError(f"expected messages with role and content as text, found {message!r}"[:200])
    if not messages:
        raise LowvramError("expected a chat of one message or more, found none")
    return chat_template(tokenizer, template_arguments).ids(messages)


_QUESTIONS = "quillwort", "9 x 9?"
"""Two that begin differently: what chats have in common that go on with them, all have that begin so."""


def opening_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    template_arguments: Mapping[str, object] | None = None,
) -> list[int]:
    """Token ids that all chats have that begin with some messages, up to where they go on with what a user says.

    Arguments, and what is raised, as ``chat_ids``; where the last message is a user's, that goes on behind its text.
    None at all is the beginning of any chat.
    """
    before, begun = messages, ""
    if messages and messages[-1].get("role") == "user":
        *before, last = messages
        begun = last["content"]
    whole = [[*before, {"role": "user", "content": begun + question}] for question in _QUESTIONS]
    one, other = (chat_ids(tokenizer, each, template_arguments) for each in whole)
    common = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:common]


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text to go on with: begun as the tokenizer begins one (``<s>``, where it does), and not ended.

    Args:
        tokenizer: With or without a chat template.
        text: Control tokens in it are spelt out.
    """
    control = _control_tokens(tokenizer)
    ids, typed = control.read(text)
    return first_ids(tokenizer) + (control.read_as_text(text, []) if typed else ids)


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """With those of a chat template, where there is one that a chat can go by; a text needs none."""
    if getattr(tokenizer, "chat_template", None):
        with contextlib.suppress(SourceError):
            return chat_template(tokenizer).control
    return _untemplated(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=4)  # a vocabulary takes a tenth of a second to look through
def _untemplated(tokenizer: PreTrainedTokenizerBase, tokens: int) -> ControlTokens:
    return ControlTokens(tokenizer)


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
