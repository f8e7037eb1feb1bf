"""Prompts that are read and remembered before anybody asks: system prompts, documents, questions, from a file of lines.

Derived in: notebooks/10_remember.ipynb
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from lowvram_lab.chat.prompt import checked_text
from lowvram_lab.chat.session import ChatSession, History
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import BudgetError, LowvramError, first_line
from lowvram_lab.packaged import read_text
from lowvram_lab.sampling import Sampling

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Dialogue:
    """The beginning of a chat; one of these at least is there.

    Attributes:
        system: System message.
        document: What the user's message begins with; the question stands behind it, after an empty line.
        question: The user's.
        answer: To the question.

    Raises:
        LowvramError: None is there, one is no text or empty, or an answer has no question.
    """

    system: str | None = None
    document: str | None = None
    question: str | None = None
    answer: str | None = None

    def __post_init__(self):
        there = {name: text for name, text in asdict(self).items() if text is not None}
        if not there:
            raise LowvramError(f"expected one of {', '.join(KEYS)} or more, found none")
        for name, text in there.items():
            if not isinstance(text, str) or not text.strip():
                raise LowvramError(f"expected {name} as a text that is not empty, found {text!r:.60}")
            checked_text(text, name)
        if self.answer is not None and self.question is None:
            raise LowvramError("expected a question beside the answer, found none")

    @property
    def asks(self) -> bool:
        """Whether its question has no answer yet."""
        return self.question is not None and self.answer is None

    @property
    def before(self) -> History:
        """The messages before the user's."""
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    @property
    def message(self) -> str:
        """The user's message, as far as it is known; empty where nothing is."""
        return "\n\n".join(([self.document] if self.document is not None else []) + [self.question or ""])

    @property
    def said(self) -> str | History:
        """What ``ChatSession.read`` is given, of a chat that begins with ``before``."""
        return self.message if self.asks else self.messages

    @property
    def messages(self) -> History:
        """All of it; the user goes on behind the last."""
        found = self.before
        if self.document is not None or self.question is not None:
            found = [*found, {"role": "user", "content": self.message}]
        return found if self.answer is None else [*found, {"role": "assistant", "content": self.answer}]


KEYS = tuple(field.name for field in fields(Dialogue))


def read_dialogues(path: str | Path) -> list[Dialogue]:
    """Reads a file of dialogues: in each line a JSON object with ``system``, ``document``, ``question``, ``answer``.

    Raises:
        LowvramError: It cannot be read, is empty, or a line is no dialogue; its number is named.
    """
    text = read_text(path)
    if not text.strip():
        raise LowvramError(f"{path}: expected a line of JSON or more, found an empty file")
    return [_dialogue(f"{path}, line {number}", line) for number, line in enumerate(text.rstrip().split("\n"), start=1)]


def _dialogue(place: str, line: str) -> Dialogue:
    example = 'write e.g. {"system": "...", "question": "..."}'
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LowvramError(
            f"{place}: expected a JSON object, found no JSON ({first_line(error)}); {example}"
        ) from error
    if not isinstance(values, dict):
        raise LowvramError(f"{place}: expected a JSON object, found {line.strip()!r:.60}; {example}")
    if unknown := [name for name in values if name not in KEYS]:
        raise LowvramError(f"{place}: expected keys of {', '.join(KEYS)}, found {unknown[0]!r}")
    try:
        return Dialogue(**values)
    except LowvramError as error:
        raise LowvramError(f"{place}: {error}") from error


def warm(
    session: ChatSession, dialogues: Sequence[Dialogue], pin: bool = False, progress: bool = True
) -> pandas.DataFrame:
    """Reads prompts and remembers them, so that chats that begin so need not; questions without answers are answered.

    Answers are remembered too, those that are given and those that are made: asked again, the model verifies them.

    What the session has talked about stays as it is; answers are greedy ones, and ``session.turns`` has them.

    Args:
        session: Remembers prompts.
        dialogues: What to read.
        pin: Let their blocks stay on disk, whatever else needs room.
        progress: Show a progress bar.

    Returns:
        A row for each dialogue: ``prompt`` (its number, from 1 on), ``tokens``, ``cached_tokens`` (that need not be
        read: the KV cache held them still, or they were remembered before), ``blocks_added``, ``blocks_without_room``
        (not remembered), ``bytes`` (of keys and values that were added), ``answer_tokens`` (of the answer that is
        remembered now, 0 for none) and ``seconds``. A DataFrame.

    Raises:
        BudgetError: One is longer than the plan's context; said before the first is read.
        LowvramError: The session remembers nothing; or see ``ChatSession.send``.
    """
    import pandas

    for number, dialogue in enumerate(dialogues, start=1):
        try:
            with session.beside(dialogue.before):
                session.beginning(dialogue.said)
        except BudgetError as error:
            raise BudgetError(f"prompt {number}: {error}") from error
    sampling, session.sampling = session.sampling, Sampling()
    try:
        with tqdm(dialogues, "warm", unit="prompt", disable=not progress, leave=False) as shown:
            rows = [{"prompt": number, **_warmed(session, each, pin)} for number, each in enumerate(shown, start=1)]
    finally:
        session.sampling = sampling
    return pandas.DataFrame(rows)


def _warmed(session: ChatSession, dialogue: Dialogue, pin: bool) -> dict[str, int | float]:
    """Reads one, and answers it where it asks."""
    began = time.perf_counter()
    with session.beside(dialogue.before):
        done = session.read(dialogue.said, pin)
        if dialogue.asks:
            session.ask(dialogue.message)
        elif dialogue.answer is not None:
            session.expect(dialogue.message, dialogue.answer)
        answer_tokens = 0 if dialogue.question is None else len(session._remembered_answer(dialogue.message))
    return {
        "tokens": done.tokens,
        "cached_tokens": done.cached_tokens,
        "blocks_added": done.blocks_added,
        "blocks_without_room": done.blocks_without_room,
        "bytes": done.blocks_added * loaded(session.model).plan.block_bytes,
        "answer_tokens": answer_tokens,
        "seconds": time.perf_counter() - began,
    }
