"""A model's chat template as it is found by trying it: what it takes, what it leaves out, what it writes by itself."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lowvram_lab.chat.control import ControlTokens, Mask
from lowvram_lab.errors import LowvramError, SourceError, first_line
from lowvram_lab.repository.chat_template import check_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

_USER = {"role": "user", "content": "quillwort"}
_SYSTEM = {"role": "system", "content": "bergamot"}
_ASSISTANT = {"role": "assistant", "content": "saffron", "reasoning_content": "juniper"}
_CALL = {"type": "function", "function": {"name": "tarragon", "arguments": {}}}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_TOOL = {"role": "tool", "content": "marjoram"}
_STEPS = (  # a chat, and the same with one message more
    ([_USER], [_SYSTEM, _USER]),
    ([_USER], [_USER, _ASSISTANT]),
    ([_USER, _ASSISTANT], [_USER, _ASSISTANT, _USER]),
    ([_USER], [_USER, _CALLING]),
    ([_USER, _CALLING], [_USER, _CALLING, _TOOL]),
)


class ChatTemplate:
    """How a tokenizer's chat template is given a chat, so that the model sees all of it.

    Args:
        tokenizer: With a chat template.
        arguments: What the template takes beside messages (``enable_thinking``, say).

    Attributes:
        folds_system: Whether a system message goes before the first user message, since the template refuses its role
            or leaves it out.
        takes_parts: Whether a message's content goes in as a list of parts, since the template leaves out mere text.

    Raises:
        LowvramError: Arguments that ``apply_chat_template`` itself takes, or that the template does not know.
        SourceError: The template fails on a user's message, or leaves it out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, object] | None = None):
        self.tokenizer, self.arguments = tokenizer, dict(arguments or {})
        check_arguments(self._text(), self.arguments)
        self.takes_parts = self._takes_parts()
        self.folds_system = not self._writes([_SYSTEM, _USER], _SYSTEM)

    @functools.cached_property
    def control(self) -> ControlTokens:
        """The tokens that nobody but the template may write."""
        return ControlTokens(self.tokenizer, self._written_tokens())

    def ids(self, messages: Messages) -> list[int]:
        """Token ids of a chat, ready for the assistant's answer.

        Where nobody typed a control token they are ``apply_chat_template``'s. What the assistant said is not looked at:
        it reaches the template whole (which may leave out its reasoning), and its tokens were the model's own.

        Raises:
            SourceError: The template refuses these messages, or fails; or a typed control token cannot be read as text.
        """
        messages = self._folded(messages)
        others = [message["content"] if message["role"] != "assistant" else "" for message in messages]
        typed = [self.control.typed(text) for text in others]
        wary = [places | self.control.completable(text) for places, text in zip(typed, others, strict=True)]
        if not any(wary):
            return self._apply(messages, tokenize=True)["input_ids"]
        mask = Mask([message["content"] for message in messages])
        masked, guarded = (self._masked(messages, mask, places) for places in (typed, wary))
        if mask.off(guarded) == mask.off(masked):  # else the template asks what was said, and is to see it
            masked = guarded
        return self.control.written_ids(masked, mask)

    def _masked(self, messages: Messages, mask: Mask, places: list[set[int]]) -> str:
        """A chat as it is rendered, with what lies at some places of each message masked."""
        given = zip(messages, places, strict=True)
        return self._apply([{**message, "content": mask.on(message["content"], found)} for message, found in given])

    def _folded(self, messages: Messages) -> Messages:
        """With the system message before the first user message, where the template takes it nowhere else."""
        system, *others = messages
        first = next((place for place, message in enumerate(others) if message["role"] == "user"), None)
        if not self.folds_system or system["role"] != "system" or first is None:
            return messages
        texts = [text for text in (system["content"], others[first]["content"]) if text]
        others[first] = {**others[first], "content": "\n\n".join(texts)}
        return others

    def _apply(self, messages: list[dict], tokenize: bool = False, generation_prompt: bool = True):
        """A chat as the template renders it; with ``tokenize``, a ``BatchEncoding``."""
        given = messages
        if self.takes_parts:
            given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                given,
                add_generation_prompt=generation_prompt,
                tokenize=tokenize,
                return_dict=tokenize,
                **self.arguments,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:  # what Python raises inside a template, too
            raise _refusal(error, f"; it was given messages of {', '.join(m['role'] for m in messages)}") from error

    def _text(self) -> str:
        try:
            return self.tokenizer.get_chat_template()
        except ValueError as error:  # several, and none of them called "default"
            raise _refusal(error) from error

    def _takes_parts(self) -> bool:
        """Whether content goes in as parts; mere text is tried first, which most templates take."""
        for self.takes_parts in (False, True):
            if self._writes([_USER], _USER):
                return self.takes_parts
        self.takes_parts = False
        self._apply([_USER])  # where it refuses, it says why
        raise SourceError(
            "the model's chat template leaves out what the user says (tried as text and as a list of parts); "
            "it needs something that a chat does not give it"
        )

    def _writes(self, messages: list[dict], message: dict) -> bool:
        """Whether the template takes these messages and writes that one."""
        try:
            return message["content"] in self._apply(messages).lower()
        except SourceError:
            return False

    def _written_tokens(self) -> frozenset[str]:
        """Added tokens, special or not, that the template writes around roles by itself.

        They are those that one message more, or the beginning of an answer, makes more frequent: ``<think>`` where the
        template writes it into an answer, ``<tool_call>`` where it writes calls. A tag in a fixed preamble is text, and
        so are blank lines and words: a template writes them too, and they steer nothing that their letters would not.
        """
        written = set((self._added_tokens([_USER]) or [])[:1])  # what begins a chat
        steps = [(self._added_tokens(less), self._added_tokens(more)) for less, more in _STEPS]
        steps.append((self._added_tokens([_USER]), self._added_tokens([_USER], True)))
        for less, more in steps:
            if less is not None and more is not None:
                written |= {token for token in more if more.count(token) > less.count(token)}
        return frozenset(token for token in written if not token.isalnum())

    def _added_tokens(self, messages: list[dict], generation_prompt: bool = False) -> list[str] | None:
        """The added tokens of a chat as it is rendered; ``None`` where the template does not take it."""
        try:
            text = self._apply(messages, generation_prompt=generation_prompt)
        except SourceError:
            return None
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        added = self.tokenizer.added_tokens_decoder
        return [added[index].content for index in ids if index in added]


def chat_template(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, object] | None = None) -> ChatTemplate:
    """The chat template of a tokenizer as it is now; tried once, since a large vocabulary takes a tenth of a second.

    Raises:
        LowvramError: Arguments that are no plain data, or what ``ChatTemplate`` raises.
    """
    try:
        values = json.dumps(dict(arguments or {}))
    except (TypeError, ValueError) as error:
        raise LowvramError(
            f"expected template arguments of plain data (numbers, texts, lists), found {arguments!r:.120}"
        ) from error
    template = tokenizer.chat_template
    return _tried(tokenizer, template if isinstance(template, str) else json.dumps(template), len(tokenizer), values)


@functools.lru_cache(maxsize=4)
def _tried(tokenizer: PreTrainedTokenizerBase, template: str, tokens: int, arguments: str) -> ChatTemplate:
    """Keyed by all that may be changed of a tokenizer, too."""
    return ChatTemplate(tokenizer, json.loads(arguments))


def _refusal(error: Exception, given: str = "") -> SourceError:
    return SourceError(f"the model's chat template refuses this chat ({first_line(error)}){given}")
