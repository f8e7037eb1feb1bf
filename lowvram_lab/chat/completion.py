"""Going on with a text: what a base model does, which has no chat template. Streamed as a chat's answers are."""

from collections.abc import Iterator

from lowvram_lab.chat.answer import Answer, Session
from lowvram_lab.chat.prompt import checked_text, text_ids
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import BudgetError

_SEEN = 8  # tokens before the answer that its first letters may depend on: a space, half a character


class CompletionSession(Session[list[int]]):
    """Raw continuations by a loaded model, each of a text of its own; with a chat template or without, none is used.

    A text that fills the plan's context is refused, a continuation that does ends there (``TurnStats.stopped`` is
    false). A text that begins like the one before it is not read again.

    Args: see ``Session``.
    """

    def send(self, text: str) -> Iterator[str]:
        """Yields what comes after a text, as it is made.

        Args:
            text: As it is: nothing is added but what the tokenizer begins a text with, and no control token is taken
                for one.

        Yields:
            Pieces of text, never half a character, without ``text`` itself.

        Raises:
            BudgetError: The text is longer than the plan's context.
            LowvramError: The text is empty, or not text in any encoding (lone surrogates).
        """
        ids = text_ids(self.tokenizer, checked_text(text, "a text to go on with"))
        return self._answer(ids, self._prompt(ids))

    def _answer(self, ids: list[int], prompt: list[int]) -> Iterator[str]:
        yield from Answer(self, ids, prompt).pieces()

    def _prompt(self, question: list[int], answered: int = 0) -> list[int]:
        """See ``Session``."""
        context = loaded(self.model).plan.context
        if len(question) + answered >= context:
            raise BudgetError(
                f"this text takes {len(question) + answered} tokens, the plan's context is {context}; "
                "shorten it or plan for more"
            )
        return question

    def _text(self, prompt: list[int], tokens: list[int]) -> str:
        """See ``Session``; with the space that a tokenizer would leave out where a text begins with it."""
        before = self.tokenizer.decode(prompt[-_SEEN:], skip_special_tokens=True)
        whole = self.tokenizer.decode(prompt[-_SEEN:] + tokens, skip_special_tokens=True)
        return whole[len(before) :].rstrip("\ufffd") if whole.startswith(before) else super()._text(prompt, tokens)
