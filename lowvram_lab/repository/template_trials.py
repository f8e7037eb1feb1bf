"""What of a chat template made a text another than it was: found by rendering the chat in other ways.

Knows texts only: how messages are rendered is given, and so is what was read before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

from lowvram_lab.repository.template_text import DATE, FOLLOWED, OWN_SYSTEM_MESSAGE, line_with, on_another_day

Messages = list[dict[str, str]]
Render = Callable[[Messages, str], str]
"""Text of a chat that is ready for an answer, as a template writes it."""

_USER = {"role": "user", "content": "quillwort"}
_SYSTEM = {"role": "system", "content": "bergamot"}


@dataclass(frozen=True)
class Written:
    """A chat and the text that was made of it: ready for an answer, or with the answer that is its last message."""

    messages: Messages
    text: str


def first_difference(before: Sequence, after: Sequence) -> int | None:
    """The first place at which two sequences differ; ``None`` where one begins with the other."""
    pairs = enumerate(zip(before, after, strict=False))
    return next((place for place, (old, new) in pairs if old != new), None)


class TemplateTrials:
    """Trials of a template on a chat whose text is another than it was.

    Args:
        template: The chat template.
        render: Renders messages by it, or by a text that takes its place.
        before: The chat as it was.
        after: The chat as it is, of one message or more.
    """

    def __init__(self, template: str, render: Render, before: Written, after: Written):
        self._template, self._render, self._before, self._after = template, render, before, after
        self._place = first_difference(before.text, after.text)  # of a letter
        answered = before.messages[-1]["role"] == "assistant"
        self._question = before.messages[:-1] if answered else before.messages

    def construct(self) -> tuple[str, str | None]:
        """What did it, in words, and what the template says there; messages and lines are counted from 1."""
        what, patterns = self._found()
        line = line_with(self._template, *patterns)
        return (what, None) if line is None else (f"{what} (line {line[0]} of the template)", line[1])

    def _found(self) -> tuple[str, Sequence[str]]:
        """What did it, and what to look for in the template."""
        before, after = self._before, self._after
        if self._place is None:
            return "the same text in other tokens", ()
        if self._is_date():
            return "the date, `strftime_now`", DATE
        if not (self._is_written(self._question, before.text) and self._is_written(after.messages, after.text)):
            return "neither date nor messages: the template or its arguments were others", ()
        edited = first_difference(before.messages, after.messages)
        if edited is None:
            return self._followed(), FOLLOWED
        roles = [chat.messages[edited]["role"] for chat in (before, after)]
        if edited == 0 and roles.count("system") == 1 and self._has_own_system_message():
            return "the template's own system message is written only where the chat has none", OWN_SYSTEM_MESSAGE
        return f"the messages themselves differ (message {edited + 1}, {roles[1]})", ()

    def _is_date(self) -> bool:
        """Whether another clock writes something else at the place, or right before it (``1 July``, ``11 July``)."""
        now = self._written(self._after.messages)
        other = self._render(self._after.messages, on_another_day(self._template, datetime.now()))
        if len(other) != len(now):  # the template counts with the date, or asks what it is
            return first_difference(other, now) == self._place
        around = slice(max(self._place - 1, 0), self._place + 1)
        return other[around] != now[around]

    def _is_written(self, messages: Messages, text: str) -> bool:
        """Whether a text is what messages come to now, up to the place; whitespace of an answer may be trimmed."""
        letters = ("".join(found.split()) for found in (self._written(messages), text[: self._place + 1]))
        return first_difference(*letters) is None

    def _followed(self) -> str:
        """What became of messages that are as they were, and have others behind them."""
        said = self._question[-1]["content"].strip()
        if self._place < self._written(self._question).rfind(said) + len(said):
            changed = f"message {len(self._question)} ({self._question[-1]['role']})"
        elif self._leaves_out_reasoning():
            return "reasoning of earlier turns is left out"
        else:
            changed = "an earlier answer"
        return f"{changed} is written differently once another message follows"

    def _leaves_out_reasoning(self) -> bool:
        """Whether there was reasoning from the place on, and now nothing is lost without that of any answer."""
        bare = [
            {**message, "content": message["content"].rpartition("</think>")[2]}
            if message["role"] == "assistant"
            else message
            for message in self._after.messages
        ]
        return "think>" in self._before.text[self._place :] and self._written(bare) == self._written(
            self._after.messages
        )

    def _has_own_system_message(self) -> bool:
        """Whether a chat without a system message has one all the same, in the same place."""
        head, _, tail = self._written([_SYSTEM, _USER]).partition(_SYSTEM["content"])
        alone = self._written([_USER])
        return alone.startswith(head) and alone.endswith(tail) and len(alone) > len(head + tail)

    def _written(self, messages: Messages) -> str:
        return self._render(messages, self._template)
