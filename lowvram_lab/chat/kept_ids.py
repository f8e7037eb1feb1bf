"""A chat's next prompt, in which earlier answers keep the ids that were generated.

A template renders an answer's text, and a tokenizer may cut that into other tokens than the model made it of. The model
would then read what it never said, and the KV cache would be lost from there. Knows ids only: no template, no model.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

Decode = Callable[[list[int]], str]
"""Text of some ids, control tokens included, nothing tidied up."""


@dataclass(frozen=True)
class Turn:
    """A prompt and the answer to it.

    Attributes:
        rendered: The prompt's ids as they are rendered from the history: earlier answers as their text is tokenised.
        prompt: The ids that the model read instead: earlier answers as they were generated.
        answer: The ids generated, without the token that ended them.
    """

    rendered: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)


def kept_ids(rendered: list[int], last: Turn, decode: Decode) -> list[int]:
    """The ids of a prompt that reads as ``rendered`` does and begins with those of the turn before.

    Only what is rendered decides: a history that was edited, turns that were dropped, a template that writes earlier
    turns in another way are followed, from where they differ on. The texts are the same but for whitespace at the ends
    of an answer, which templates trim.

    Args:
        rendered: The next prompt, rendered from the history.
        last: The turn before.
        decode: Text of ids.

    Returns:
        ``last.prompt``, the answer's own ids if its text comes next, and what is rendered behind that; ``rendered``
        itself where it does not begin as the last prompt was rendered.
    """
    begun = len(last.rendered)
    if rendered[:begun] != last.rendered:
        return rendered
    behind = rendered[begun:]
    text = decode(last.answer)
    end = _end_of_answer(text, behind, decode) if text else None  # no text could be anywhere
    return last.prompt + (behind if end is None else last.answer + behind[end:])


def _end_of_answer(text: str, ids: list[int], decode: Decode) -> int | None:
    """How many of the ids spell an answer's text; ``None`` where no whole number of them does."""
    end = _fewest(ids, len(text), decode)
    if decode(ids[:end]) == text:
        return end
    said = text.strip()
    end = _fewest(ids, len(said), lambda start: decode(start).strip())
    if decode(ids[:end]).strip() != said:
        return None
    may_be_its_own = text[-1:].isspace() and decode(ids[end : end + 1])[:1].isspace()
    return None if may_be_its_own else end  # the answer's space would come twice, were it not the template's


def _fewest(ids: list[int], letters: int, read: Decode) -> int:
    """How many of the ids it takes to read so many letters, whole ones: the beginning of one reads as up to three."""
    return bisect_left(range(len(ids)), letters, key=lambda count: len(read(ids[:count]).rstrip("\ufffd")))
