"""A streaming chat: history, the model's own template, stop ids that are right, and the KV cache kept between turns.

Derived in: notebooks/09_validated_chat.ipynb
"""

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowvram_lab.chat.answer import Answer, Session
from lowvram_lab.chat.drift import Seen, find_drift
from lowvram_lab.chat.kept_ids import Turn, kept_ids
from lowvram_lab.chat.prompt import chat_ids, checked_text, opening_ids
from lowvram_lab.chat.template import chat_template
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import BudgetError, LowvramError
from lowvram_lab.prefixes.explanation import Explanation
from lowvram_lab.prefixes.prompts import Reading
from lowvram_lab.prefixes.saved import check_saved, opened
from lowvram_lab.repository.chat_template import base_model

logger = logging.getLogger(__name__)

History = list[dict[str, str]]


class ChatSession(Session[History]):
    """A conversation with a loaded model.

    A chat that outgrows the plan's context goes on without its oldest turns, whole ones, also in the middle of an
    answer; an answer that fills the context all by itself ends there (``TurnStats.stopped`` is false).

    Earlier answers are read in the ids they were generated in, as long as the template writes them as they were said.

    Where the GPU is full in spite of the plan (another process took memory, say), the session goes on with a smaller
    plan: prompts in pieces, KV cache in int8 or int4, layers on the CPU, a shorter context. ``TurnStats.given_up`` and
    a warning say so.

    Args:
        model: From ``load``.
        tokenizer: Its tokenizer, with a chat template.
        system: System message, or ``None`` for the template's own. Where the template refuses the role, or leaves such
            a message out, it goes before the first user message, and a warning says so.
        template_arguments: What the chat template takes beside messages, such as ``{"enable_thinking": False}``.
        **options: See ``Session``: ``max_new_tokens``, ``sampling``, ``stop``, ``compiled``, ``progress``,
            ``precision``, ``remember``.

    Attributes:
        history: Messages so far, each with ``role`` and ``content``.
        template_arguments: As given; what is changed holds from the next turn on.
        turns: What each answer took.
        dropped_turns: How many of the oldest turns the model no longer sees, for want of context; ``history`` has them.

    Raises:
        LowvramError: The template does not know these arguments.
        SourceError: The tokenizer has no chat template, or one that no chat can go by
            (``Source.require_chat_template`` says so before the model is loaded, as far as small files tell).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        template_arguments: Mapping[str, object] | None = None,
        **options,
    ):
        if not getattr(tokenizer, "chat_template", None):
            raise base_model(loaded(model).plan.model)
        self.template_arguments = dict(template_arguments or {})
        if chat_template(tokenizer, template_arguments).folds_system and system:
            logger.warning("the chat template takes no system message; it goes before the first user message")
        self.history: History = [] if system is None else [{"role": "system", "content": system}]
        self.dropped_turns = 0
        self._asked = self._said = Turn()  # of the answer on its way, and of the latest one that is in the history
        self._said_in: History = []  # the messages as they were then
        super().__init__(model, tokenizer, **options)

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
        history = self._with_message(text)
        return self._answer(history, *self._fitting_prompt(history))

    def beginning(self, said: str | History) -> list[int]:
        """Token ids of the prompt that a message would be sent with, or of what all chats have that begin alike.

        Args:
            said: The user's message, or the messages that chats begin with: up to where they go on with what the user
                says, which is behind the last of them where that is a user's too.

        Raises:
            BudgetError: They are longer than the plan's context.
            LowvramError, SourceError: See ``send``.
        """
        if isinstance(said, str):
            return self._fitting_prompt(self._with_message(said))[0].prompt
        ids, context = opening_ids(self.tokenizer, said, self.template_arguments), loaded(self.model).plan.context
        if len(ids) >= context:
            raise BudgetError(
                f"these messages take {len(ids)} tokens, the plan's context is {context}; shorten them or plan for more"
            )
        return ids

    def read(self, said: str | History, pin: bool = False) -> Reading:
        """Reads whole blocks of a prompt and remembers them, so that whoever asks need not wait for it.

        What the KV cache held of the chat is given up: the next message has it read again.

        Args:
            said: See ``beginning``.
            pin: Let its blocks stay on disk, whatever else needs room.

        Raises:
            BudgetError: It is longer than the plan's context.
            LowvramError: The session remembers nothing; or see ``send``.
        """
        ids = self.beginning(said)
        done = self._live.read(ids)
        if pin:
            self._live.remembering().pin(ids)
        return done

    def explain(self, text: str) -> Explanation:
        """Says how much of the prompt that a message would be sent with is remembered, and why no more; sends nothing.

        Where the chat so far would be read as other tokens than it was, it says which, and what of the template did it.

        Raises:
            LowvramError: The session remembers nothing; or see ``send``.
        """
        store, ids = self._live.remembering().store, self.beginning(text)
        found = store.find(ids)
        place = found.missed and found.missed.differs_at
        return Explanation(
            tokens=found.tokens,
            hit_tokens=found.hit_tokens,
            places=found.places,
            reason=found.missed and found.missed.reason,
            differs_at=place,
            differs_text=None if place is None else self.tokenizer.decode([ids[place]]),
            drift=self._drift(self._with_message(text), ids),
            answer_tokens=len(store.answer(ids)),
        )

    def _remembered_answer(self, text: str) -> list[int]:
        """The tokens that are remembered as the answer to a message."""
        return self._live.remembering().store.answer(self.beginning(text))

    def _drift(self, history: History, ids: list[int]) -> str | None:
        """Why a prompt does not begin with the turn before it, in words."""
        if not self._said.prompt:
            return None
        before = Seen(self._said_in, self._said.prompt + self._said.answer)
        drift = find_drift(self.tokenizer, before, Seen(history, ids), self.template_arguments)
        return drift and drift.text

    def expect(self, text: str, answer: str) -> None:
        """Remembers what the answer to a message will be, as far as that is known: asked, the model verifies it.

        A wrong one costs a pass, and changes nothing.

        Args:
            text: The user's message, in this chat as it is now.
            answer: Its answer.

        Raises:
            LowvramError: The session remembers nothing on disk; or see ``send``.
        """
        if self._live.remembering().store.folder is None:
            raise LowvramError("answers are remembered on disk, found prompts that are in RAM alone; give disk")
        tokens = self.tokenizer(checked_text(answer, "an answer"), add_special_tokens=False)["input_ids"]
        self._live.remembering().store.keep_answer(self.beginning(text), tokens, 0.0)

    @contextmanager
    def beside(self, history: History) -> Iterator[None]:
        """Holds another chat for a while, which begins with some messages; then this one is again where it was.

        Its KV cache is not: the next message has it read again.
        """
        before = self.history, self.dropped_turns, self._asked, self._said, self._said_in
        self.history, self.dropped_turns, self._asked, self._said, self._said_in = history, 0, Turn(), Turn(), []
        try:
            yield
        finally:
            self.history, self.dropped_turns, self._asked, self._said, self._said_in = before

    def _with_message(self, text: str) -> History:
        """The chat with a user's message more."""
        text = checked_text(text if text.strip() else "", "a message")
        return [*self.history, {"role": "user", "content": text}]

    def save(self, path: str | Path) -> int:
        """Writes the conversation: history, ids and KV cache, in one file that nobody else may read.

        Args:
            path: A file; one that is there is replaced. It can be turned back into the text of the conversation.

        Returns:
            Its bytes.

        Raises:
            LowvramError: Nothing has been answered yet, or it cannot be written.
        """
        if not self._said.prompt:
            raise LowvramError("expected a conversation of one answer or more to save, found none; ask something first")
        said = {
            "history": checked_history(self.history, "save"),
            "dropped_turns": self.dropped_turns,
            "template_arguments": self.template_arguments,
            "turn": asdict(self._said),
        }
        return self._live.save(Path(path), self._said.prompt + self._said.answer, said)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        read_again: bool = False,
        **options,
    ) -> "ChatSession":
        """Opens a saved conversation: it goes on as if it had never been closed, and nothing of it is read again.

        Args:
            path: From ``save``.
            model: The model that it was held with, loaded from a plan of the same formats and places.
            tokenizer: Its tokenizer.
            read_again: Take the history alone, which the next message then has any model read.
            **options: As for a new session; not ``system``, which the history has.

        Raises:
            LowvramError: The file is no conversation, is damaged, or belongs to another model, plan or version, which
                is named.
        """
        saved = opened(Path(path))
        said = _checked_said(saved.said, str(path))
        if not read_again:
            check_saved(saved, model)  # before a KV cache is taken for it
        session = cls(model, tokenizer, **{"template_arguments": said["template_arguments"], **options})
        if not read_again:
            session._live.open(saved)
            session._said = Turn(**said["turn"])
            session.dropped_turns = said["dropped_turns"]
            session._said_in = [dict(message) for message in said["history"]]
        session.history = said["history"]
        return session

    def _answer(self, history: History, asked: Turn, dropped: int) -> Iterator[str]:
        answer = Answer(self, history, asked.prompt)
        dropped_before = self.dropped_turns
        self.history, self.dropped_turns, self._asked = history, dropped, asked
        try:
            yield from answer.pieces()
        except (GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException:
            self.history = history[:-1]  # asked again, the message would fail again
            self.dropped_turns = dropped_before
            raise
        finally:
            if self.history is history:
                history.append({"role": "assistant", "content": answer.shown})
                self._said = replace(self._asked, answer=answer.tokens)
                self._said_in = [dict(message) for message in history]

    def _prompt(self, question: History, answered: int = 0) -> list[int]:
        """See ``Session``; from then on the turns that it leaves out are no longer seen."""
        self._asked, self.dropped_turns = self._fitting_prompt(question, answered)
        return self._asked.prompt

    def _can_shorten(self, question: History, answered: int) -> bool:
        """Whether an answer that has filled the context can go on without the oldest turn that is still seen."""
        try:
            return self._fitting_prompt(question, answered)[1] > self.dropped_turns
        except BudgetError:
            return False

    def _fitting_prompt(self, history: History, answered: int = 0) -> tuple[Turn, int]:
        """A chat's prompt without its oldest turns, whole ones, so that there is room for an answer.

        Args:
            history: All of it, up to the user's last message.
            answered: Tokens of the answer that are there already.

        Returns:
            The prompt, without an answer, and how many turns it leaves out.
        """
        context = loaded(self.model).plan.context
        first = 1 if history[0]["role"] == "system" else 0
        dropped = min(self.dropped_turns, (len(history) - first - 1) // 2)  # history may have been cut by its owner
        wanted = max(1, min(self.max_new_tokens, answered + context // 4))
        decode = functools.partial(self.tokenizer.decode, clean_up_tokenization_spaces=False)
        while True:
            seen = history[:first] + history[first + 2 * dropped :]
            rendered = chat_ids(self.tokenizer, seen, self.template_arguments)
            kept = kept_ids(rendered, self._said, decode)
            prompt = kept if len(kept) + wanted <= context else rendered  # a tokenizer's ids may be fewer
            if len(prompt) + wanted <= context:
                return Turn(rendered, prompt), dropped
            if len(seen) - first > 2:
                dropped += 1
            elif len(prompt) + answered < context:
                return Turn(rendered, prompt), dropped
            else:
                raise BudgetError(
                    f"this message takes {len(prompt) + answered} tokens, the plan's context is {context}; "
                    "shorten it or plan for more"
                )


def checked_history(found: object, where: str) -> History:
    """Messages as a file has them.

    Raises:
        LowvramError: They are none.
    """
    plain = isinstance(found, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) and isinstance(each.get("content"), str)
        for each in found
    )
    if not plain or not found:
        raise LowvramError(f"{where}: expected a conversation's messages, found none that can be read")
    return found


def _checked_said(said: dict, where: str) -> dict:
    """What ``ChatSession.save`` said of a conversation.

    Raises:
        LowvramError: Another version said it, or it is damaged.
    """
    checked_history(said.get("history"), where)
    turn, dropped = said.get("turn"), said.get("dropped_turns")
    is_turn = isinstance(turn, dict) and turn.keys() == {field.name for field in fields(Turn)}
    is_turn = is_turn and all(isinstance(ids, list) and all(type(i) is int for i in ids) for ids in turn.values())
    is_count = type(dropped) is int and dropped >= 0
    if not (is_turn and is_count and isinstance(said.get("template_arguments"), dict)):
        raise LowvramError(f"{where}: expected a conversation as this version saves it, found another")
    return said
