"""Every token of an answer says who decided it, in every precision; in colours, with its text escaped."""

import re

import pytest

from lowvram_lab.chat.provenance import LOOKS, Html, TokenTexts, progress_line, token_html, tokens_html
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.decoding import decision as decisions_module
from lowvram_lab.decoding.decision import (
    BOTH_PLANES,
    GUESS_BY_N_GRAMS,
    GUESS_OF_HIGH_PLANE,
    HIGH_PLANE,
    ONE_PLANE,
    Decision,
)
from lowvram_lab.decoding.speculate import Drafting
from tests.helpers.tiny import letters_state, load_tiny, tiny_plan, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return load_tiny("qwen2", tiny_plan("qwen2", "int4+4"), state=letters_state())


def chat(model, **options):
    return ChatSession(model, tiny_tokenizer(), **{"max_new_tokens": 60, "compiled": False, **options})


def ids(text):
    return tiny_tokenizer()(text)["input_ids"]


ALLOWED = {
    "fast": {HIGH_PLANE, BOTH_PLANES},
    "precise": {BOTH_PLANES, GUESS_OF_HIGH_PLANE, GUESS_BY_N_GRAMS},
    "auto": {HIGH_PLANE, BOTH_PLANES},
}


@pytest.mark.parametrize("precision", ALLOWED)
def test_each_token_has_a_decision(model, precision, monkeypatch):
    session = chat(model, precision="fast")
    monkeypatch.setattr(session._live, "_threshold", lambda: 0.3)
    session.precision = precision
    answer = session.ask("abcabc")
    assert [decision.token for decision in session.decisions] == ids(answer)
    by = [decision.by for decision in session.decisions]
    assert set(by) <= ALLOWED[precision] and by[0] == BOTH_PLANES  # which read the prompt
    (turn,) = session.turns
    assert turn.precise_tokens == len(by) - by.count(HIGH_PLANE)
    guessed = by.count(GUESS_OF_HIGH_PLANE) + by.count(GUESS_BY_N_GRAMS)
    assert turn.accepted - 8 < guessed <= turn.accepted  # of the last guess perhaps more than was wanted
    assert session.drafting.decisions is session.decisions
    for decision in session.decisions[1:]:
        assert decision.both == (decision.by != HIGH_PLANE)
        assert (decision.margin is not None) == (decision.entropy is not None) == (precision == "auto")
        if precision == "auto":
            assert decision.both == (decision.margin < 0.3)


def test_a_precision_changed_meanwhile_is_seen_in_the_tokens(model):
    session = chat(model, precision="precise")
    pieces = session.send("abc")
    text = next(pieces) + next(pieces)
    session.precision = "fast"
    text += "".join(pieces)
    assert [decision.token for decision in session.decisions] == ids(text)
    by = [decision.by for decision in session.decisions]
    assert HIGH_PLANE not in by[:2] and set(by[4:]) == {HIGH_PLANE}
    session.ask("d")
    assert len(session.decisions) == session.turns[-1].new_tokens  # of the latest answer alone


def test_weights_in_one_plane_are_said_to_be_that():
    session = chat(load_tiny("qwen2", tiny_plan("qwen2", "int4"), state=letters_state()))
    session.ask("abc")
    assert {decision.by for decision in session.decisions} == {ONE_PLANE}
    assert session.turns[-1].precise_tokens is None
    assert LOOKS[ONE_PLANE][2] in token_html(session)


def test_a_stop_id_is_no_decision(model, monkeypatch):
    session = chat(model, precision="precise")
    answer = session.ask("abcabc")
    stops = frozenset(ids(answer[20]))
    monkeypatch.setattr(session, "_stop_ids", stops)
    session.history.clear()
    shorter = session.ask("abcabc")
    assert shorter == answer[: answer.index(answer[20])]
    assert [decision.token for decision in session.decisions] == ids(shorter)


def test_texts_of_tokens_are_the_text_though_characters_are_spread():
    text = "naïve 日本語 🙂<b>\n end"
    texts = TokenTexts(tiny_tokenizer())
    tokens = ids(text)
    texts.read(tokens[:9])
    assert "".join(texts.read(tokens[9:])) == text
    assert len(texts.texts) == len(tokens)
    assert texts.texts[tokens.index(ids("日")[0])] == ""
    broken = TokenTexts(tiny_tokenizer()).read([*ids("a"), ids("日")[0], *ids("b")])
    assert len(broken) == 3 and "".join(broken).replace("\ufffd", "") == "ab"


def test_html_escapes_and_has_a_legend_and_differs_by_line_too():
    decisions = [Decision(index, None, None, by) for index, by in enumerate(LOOKS)]
    decisions.append(Decision(9, 0.25, 1.5, HIGH_PLANE))
    page = tokens_html(["<script>", "&", '"', "", "ü", "o", "e"], decisions)
    assert "<script>" not in page and "&lt;script&gt;</span>" in page and "&amp;</span>" in page
    assert "margin 0.25 nats, entropy 1.50" in page
    assert "the high plane alone: 2 (29%)" in page
    assert all(name in page for _, _, name in LOOKS.values())
    assert (
        len({line for _, line, _ in LOOKS.values()}) == len({colour for colour, _, _ in LOOKS.values()}) == len(LOOKS)
    )
    assert page.count("<span") == page.count("</span>") == 6 + 6  # no text, no span; and the legend's
    assert isinstance(page, Html) and page._repr_html_() == page
    assert re.sub(r"<[^>]*>", "", tokens_html([], [])) == ""


def test_the_static_page_is_of_the_latest_answer(model):
    session = chat(model, precision="fast")
    assert re.sub(r"<[^>]*>", "", token_html(session)) == ""
    answer = session.ask("abc")
    page = token_html(session)
    assert re.sub(r"<[^>]*>", "", page).startswith(answer)


def test_progress_in_a_line():
    assert progress_line([], None, Drafting()) == "0 tokens"
    drafting = Drafting()
    drafting.drafted["x"], drafting.accepted["x"] = 4, 3
    decisions = [Decision(0, None, None, BOTH_PLANES), Decision(1, None, None, HIGH_PLANE)]
    line = progress_line(decisions, 0.5, drafting)
    assert line == "2 tokens, 2.0 tokens/s, 3 of 4 guesses right (75%), 50% computed by both planes"


def test_whoever_decides_a_token_has_a_look():
    named = {name: value for name, value in vars(decisions_module).items() if name.isupper() and isinstance(value, str)}
    assert set(LOOKS) == set(named.values())
