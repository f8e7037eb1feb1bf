"""Which token of a chat is another than it was, and what of its template did it."""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lowvram_lab.chat.prompt import chat_ids
from lowvram_lab.repository.template_trials import Messages, TemplateTrials, Written, first_difference


@dataclass(frozen=True)
class Seen:
    """A chat and the ids that were made of it: ready for an answer, or with the answer that is its last message."""

    messages: Messages
    ids: list[int]


@dataclass(frozen=True)
class Drift:
    """The first token that differs.

    Attributes:
        position: Its place, from 0.
        before: Its text as it was.
        after: Its text as it is.
        construct: What did it, in words; messages and lines are counted from 1.
        line: What the template says there, shortened; ``None`` where it is not the template's doing.
    """

    position: int
    before: str
    after: str
    construct: str
    line: str | None

    @property
    def text(self) -> str:
        """All of it in one line."""
        said = f": {self.line}" if self.line else ""
        return f"token {self.position} was {self.before!r} and is {self.after!r}; {self.construct}{said}"


def find_drift(
    tokenizer: PreTrainedTokenizerBase,
    before: Seen,
    after: Seen,
    template_arguments: Mapping[str, object] | None = None,
) -> Drift | None:
    """Why the KV cache of a chat is of no use from some token on; ``None`` where one's ids begin with the other's.

    Args:
        tokenizer: With a chat template.
        before: The chat as it was read.
        after: The same later: with more messages, on another day, edited.
        template_arguments: Of both.

    Raises: what ``chat_ids`` raises.
    """
    position = first_difference(before.ids, after.ids)
    if position is None:
        return None
    own = tokenizer.get_chat_template()
    decoded = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)

    def render(messages: Messages, template: str) -> str:
        by = tokenizer
        if template != own:
            by = copy.copy(tokenizer)  # another one's template is not to be changed, not for a moment
            by.chat_template = template
        return decoded(chat_ids(by, messages, template_arguments))

    was, now = (Written(seen.messages, decoded(seen.ids)) for seen in (before, after))
    construct, line = TemplateTrials(own, render, was, now).construct()
    return Drift(position, decoded([before.ids[position]]), decoded([after.ids[position]]), construct, line)
