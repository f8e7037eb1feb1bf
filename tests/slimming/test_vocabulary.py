"""Which tokens stay: every way to make one, the lowest ids first, padding last; texts in pieces lose none."""

from datetime import date

import pytest
from transformers import PreTrainedTokenizerFast

from lowvram_lab.errors import LowvramError
from lowvram_lab.packaged import calibration_text
from lowvram_lab.slimming import vocabulary as module
from lowvram_lab.slimming.vocabulary import chat_tokens, kept_tokens, text_tokens, with_parents
from tests.slimming.tiny import tokenizer_of


def byte_pairs(tokens: list[str], merges: list) -> dict:
    return {"model": {"vocab": {token: index for index, token in enumerate(tokens)}, "merges": merges}}


LETTERS = [chr(ord("a") + index) for index in range(26)]
SMALL = byte_pairs([*LETTERS, "ab", "bc", "abc", "de"], ["a b", "b c", ["ab", "c"], "a bc", "d e"])


def test_a_token_needs_every_way_that_it_is_made():
    assert with_parents([28], module.parents_of(SMALL)) == {28, 26, 27, 0, 1, 2}  # as ab+c and as a+bc
    assert with_parents([28], module.parents_of(SMALL), known={26}) == {28, 27, 0, 1, 2} - {26}


@pytest.fixture
def by_fours(monkeypatch):
    monkeypatch.setattr(module, "MULTIPLE", 4)


def test_the_lowest_ids_fill_it_up_that_can_be_made(by_fours):
    assert kept_tokens(SMALL, [29], 8, 40) == [0, 1, 2, 3, 4, 5, 6, 29]
    assert kept_tokens(SMALL, [29], None, 40) == [0, 3, 4, 29]  # three, rounded up


def test_rows_without_a_token_come_last(by_fours):
    assert kept_tokens(SMALL, [28], 32, 40) == [*range(30), 30, 31]
    assert kept_tokens(SMALL, [28, 39], 32, 40) == [*range(30), 30, 39]


@pytest.mark.parametrize("wanted", [1, 5])
def test_what_is_needed_beyond_a_number_is_said(by_fours, wanted):
    with pytest.raises(LowvramError, match=f"6 tokens, found {wanted}; ask for 8 or more"):
        kept_tokens(SMALL, [28], wanted, 40)


@pytest.mark.parametrize(("wanted", "said"), [(40, "found 40 wanted"), (37, "found 40 wanted"), (None, "needs 40")])
def test_nothing_to_remove_is_said(by_fours, wanted, said):
    needed = range(40) if wanted is None else [0]
    with pytest.raises(LowvramError, match=f"than the model's 40, .*{said}"):
        kept_tokens(SMALL, needed, wanted, 40)


@pytest.mark.parametrize("kind", ["Qwen's", "byte fallback"])
def test_a_text_in_pieces_has_all_tokens_of_the_whole(kind, monkeypatch):
    tokenizer, text = tokenizer_of(kind), calibration_text()[:30_000]
    whole = set(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert text_tokens(tokenizer, text) == whole
    monkeypatch.setattr(module, "_PIECE", 1000)
    monkeypatch.setattr(module, "_OVERLAP", 100)
    assert whole <= text_tokens(tokenizer, text)


def test_a_template_that_writes_the_date_keeps_every_month():
    tokenizer = tokenizer_of("GPT-2's")
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}"
    months = [date(2030, month, 1).strftime("%B") for month in range(1, 13)]
    dates = [f"01 {month} {2025 + at}" for at, month in enumerate(months)]
    assert set().union(*(tokenizer(text)["input_ids"] for text in dates)) <= chat_tokens(tokenizer)
    tokenizer.chat_template = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    assert set(tokenizer("31 Jan 2026")["input_ids"]) <= chat_tokens(tokenizer)


def test_a_template_that_refuses_a_system_message_still_shows_the_rest():
    tokenizer = tokenizer_of("Qwen's")
    strict = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=tokenizer.chat_template
    )
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    strict.chat_template = refusing + tokenizer.chat_template
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert start in chat_tokens(strict) < chat_tokens(tokenizer)
    strict.chat_template = {"default": tokenizer.chat_template, "other": "zebra"}
    assert chat_tokens(strict) == chat_tokens(tokenizer) | text_tokens(tokenizer, "zebra")
    strict.chat_template = None
    assert chat_tokens(strict) == set()
