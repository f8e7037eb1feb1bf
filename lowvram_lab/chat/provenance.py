"""An answer in colours: each token by who decided it, of weights in two planes. HTML, no widgets.

Derived in: notebooks/08_precision_on_demand.ipynb
"""

import html
from collections import Counter
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from lowvram_lab.chat.answer import Session
from lowvram_lab.decoding.decision import (
    BOTH_PLANES,
    GUESS_BY_N_GRAMS,
    GUESS_OF_HIGH_PLANE,
    GUESS_OF_MEMORY,
    HIGH_PLANE,
    ONE_PLANE,
    Decision,
)
from lowvram_lab.decoding.speculate import Drafting

LOOKS = {  # background and line: tints of Okabe and Ito's colours, told apart by the line alone too
    HIGH_PLANE: ("#d6ebf8", "2px solid #0072b2", "the high plane alone"),
    BOTH_PLANES: ("#fbdcc8", "4px double #d55e00", "both planes"),
    GUESS_OF_HIGH_PLANE: ("#cdeee1", "2px dashed #009e73", "guessed by the high plane, found right by both"),
    GUESS_BY_N_GRAMS: ("#fbf3b8", "3px dotted #7a6a00", "guessed by n-grams, found right by both"),
    GUESS_OF_MEMORY: ("#ead6ea", "2px groove #cc79a7", "remembered, found right"),
    ONE_PLANE: ("#eeeeee", "1px solid #9e9e9e", "the only plane"),
}
"""Who decided a token: how it is shown, and how the legend calls it."""


class Html(str):
    """Text that a notebook shows as the HTML it is."""

    def _repr_html_(self) -> str:
        return str(self)


class TokenTexts:
    """The text of each token, of an answer on its way; one after the other they are its text.

    A character's bytes may be spread over several tokens: the last of them has it, the others have nothing.

    Args:
        tokenizer: What decodes.

    Attributes:
        texts: Of the tokens read so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer, self.texts = tokenizer, []
        self._tokens, self._first, self._told = [], 0, 0

    def read(self, tokens: Iterable[int]) -> list[str]:
        """Goes on with some tokens; returns ``texts``. A token is decoded with those before it, for the spaces."""
        for token in tokens:
            self._tokens.append(token)
            before, now = (self._decode(self._tokens[self._first : end]) for end in (self._told, None))
            whole = not now.endswith("\ufffd")
            self.texts.append(now[len(before) :] if whole else "")
            if whole:
                self._first, self._told = self._told, len(self._tokens)
        return self.texts

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def token_html(session: Session) -> Html:
    """The latest answer of a session, each token coloured and underlined by who decided it, with a legend.

    A token's margin and entropy, where the high planes were asked, show under the mouse.

    Args:
        session: A ``ChatSession`` or ``CompletionSession``.

    Returns:
        HTML, a string; as the last line of a cell it is shown.
    """
    tokens = [decision.token for decision in session.decisions]
    return tokens_html(TokenTexts(session.tokenizer).read(tokens), session.decisions)


def tokens_html(texts: Sequence[str], decisions: Sequence[Decision]) -> Html:
    """Tokens in colours, and the legend.

    Args:
        texts: Of each token, any text.
        decisions: Of each token.
    """
    spans = [
        _span(html.escape(text), decision.by, _detail(decision))
        for text, decision in zip(texts, decisions, strict=True)
        if text
    ]
    counts = Counter(decision.by for decision in decisions)
    legend = [
        f"{_span('&nbsp;abc&nbsp;', by)} {html.escape(name)}: {counts[by]} ({counts[by] / len(decisions):.0%})"
        for by, (_, _, name) in LOOKS.items()
        if counts[by]
    ]
    answer = f'<div style="white-space: pre-wrap; line-height: 1.9">{"".join(spans)}</div>'
    return Html(f'{answer}<div style="margin-top: 0.6em; line-height: 2">{" &ensp; ".join(legend)}</div>')


def progress_line(decisions: Sequence[Decision], seconds: float | None, drafting: Drafting) -> str:
    """How an answer goes, in a line: tokens, tokens a second, and how often guesses were right.

    Args:
        decisions: Of each token so far.
        seconds: Since the first of them; ``None`` before it.
        drafting: What was guessed.
    """
    words = [f"{len(decisions)} tokens"]
    if seconds and len(decisions) > 1:
        words.append(f"{(len(decisions) - 1) / seconds:.1f} tokens/s")
    if drafting.acceptance is not None:
        accepted, drafted = sum(drafting.accepted.values()), sum(drafting.drafted.values())
        words.append(f"{accepted} of {drafted} guesses right ({drafting.acceptance:.0%})")
    if decisions:
        words.append(f"{sum(decision.both for decision in decisions) / len(decisions):.0%} computed by both planes")
    return ", ".join(words)


def _span(text: str, by: str, detail: str = "") -> str:
    colour, line, _ = LOOKS[by]
    style = f"background: {colour}; color: #111; border-bottom: {line}"
    title = f' title="{html.escape(detail)}"' if detail else ""
    return f'<span style="{style}"{title}>{text}</span>'


def _detail(decision: Decision) -> str:
    name = LOOKS[decision.by][2]
    if decision.margin is None:
        return name
    return f"{name}; the high plane's margin {decision.margin:.2f} nats, entropy {decision.entropy:.2f}"
