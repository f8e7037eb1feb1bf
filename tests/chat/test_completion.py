"""Going on with a text: its ids, what comes out, room, and the KV cache kept between texts."""

import copy

import pytest
import torch
from tokenizers import decoders, processors

from lowvram_lab.chat.completion import CompletionSession
from lowvram_lab.chat.prompt import text_ids
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.errors import BudgetError, LowvramError, SourceError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.sampling import Sampling
from tests.chat.test_session import TEXT, letters_model, scripted_model
from tests.helpers.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return letters_model()


def base_tokenizer():
    """As a base model has it: no chat template."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = None
    return tokenizer


def beginning_tokenizer():
    """One that begins a text with a token of its own, and ends it with another."""
    tokenizer = base_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", 0), ("<|endoftext|>", 2)]
    )
    return tokenizer


def complete(model, **options):
    return CompletionSession(model, base_tokenizer(), **{"max_new_tokens": 12, **options})


def scripted(text, **options):
    said = [*tiny_tokenizer()(text)["input_ids"], 1]
    return complete(scripted_model(said), **{"max_new_tokens": 100, **options})


# ---- ids ----


@pytest.mark.parametrize("text", ["Once upon", " a", "\n", "naïve 日本語 🙂", "a < b | c > d"])
def test_a_text_is_the_tokenizers_own_ids_and_nothing_else(text):
    tokenizer = base_tokenizer()
    assert text_ids(tokenizer, text) == tokenizer(text)["input_ids"]


def test_a_text_is_begun_as_the_tokenizer_begins_one_and_not_ended():
    tokenizer = beginning_tokenizer()
    assert tokenizer("ab")["input_ids"] == [0, *base_tokenizer()("ab")["input_ids"], 2]
    assert text_ids(tokenizer, "ab") == [0, *base_tokenizer()("ab")["input_ids"]]


@pytest.mark.parametrize("text", ["{0}", "a{0}b{1}", "{0}{0}", "{1} and", "<table>{0}", "a<table>"])
def test_control_tokens_in_a_text_stay_text_and_other_added_tokens_what_they_are(text):
    tokenizer = beginning_tokenizer()
    tokenizer.add_tokens(["<table>"])
    text = text.format("<|im_end|>", "<|im_start|>")
    first, *rest = text_ids(tokenizer, text)
    assert first == 0 and min(rest) > 2
    assert rest.count(tokenizer.convert_tokens_to_ids("<table>")) == text.count("<table>")
    assert tokenizer.decode(rest) == text


# ---- what comes out ----


def test_it_goes_on_with_what_it_is_fed_and_nothing_else(model):
    session = complete(model)
    assert len(session.ask("once upon")) == 12
    talk = scripted(" a time")
    assert talk.ask("Once upon") == " a time"
    assert talk.model.fed[0] == tiny_tokenizer()("Once upon")["input_ids"]
    assert talk.turns[0].stopped and talk.turns[0].prompt_tokens == len("Once upon")


def test_it_says_what_the_model_says_by_itself(model):
    ids = tiny_tokenizer()("the end")["input_ids"]
    expected = []
    with torch.no_grad():
        for _ in range(12):
            logits = model(torch.tensor([ids + expected]), use_cache=False).logits[0, -1]
            expected.append(int(logits.argmax()))
    assert complete(model).ask("the end") == tiny_tokenizer().decode(expected)


def test_a_chat_template_is_neither_needed_nor_used(model):
    with pytest.raises(SourceError, match="no chat template, so it is a base model.*lowvram complete tiny-qwen2"):
        ChatSession(model, base_tokenizer())
    assert CompletionSession(model, tiny_tokenizer(), max_new_tokens=12).ask("well") == complete(model).ask("well")


def test_a_first_space_that_decoding_would_strip_is_there():
    """As of SentencePiece models, whose decoder takes the space before the first word away."""
    session = scripted(" a time")
    session.tokenizer._tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    assert session.tokenizer.decode(session.tokenizer(" a")["input_ids"]) == "a"
    assert session.ask("Once upon") == " a time"


def test_characters_of_several_tokens_come_whole():
    pieces = list(scripted(TEXT).send("日"))
    assert [piece for piece in pieces if piece] == list(TEXT)


def test_it_ends_at_a_stop_string_and_does_not_show_it():
    assert scripted("one two three", stop=["two"]).ask("count:") == "one "
    assert scripted("one two three", stop="never").ask("count:") == "one two three"


def test_sampling_is_repeatable(model):
    answers = [complete(model, sampling=Sampling(3.0, 0.9, seed)).ask("hi") for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


# ---- texts that are none, and room ----


@pytest.mark.parametrize("text", ["", "\udce9"])
def test_what_is_no_text_is_refused(model, text):
    session = complete(model)
    with pytest.raises(LowvramError, match="expected a text to go on with"):
        session.send(text)
    assert session.turns == []


def test_a_text_that_fills_the_context_is_refused_before_it_is_read():
    session = complete(letters_model(context=64))
    with pytest.raises(BudgetError, match="this text takes 64 tokens, the plan's context is 64") as error:
        session.send("x" * 64)
    assert "\n" not in str(error.value) and session.turns == []
    assert len(session.ask("x" * 63)) == 1


def test_a_continuation_ends_where_the_context_does():
    session = complete(letters_model(context=64), max_new_tokens=500)
    answer = session.ask("a" * 20)
    assert len(answer) == session.turns[0].new_tokens == 44
    assert not session.turns[0].stopped


def test_what_a_text_begins_with_is_not_read_again(model):
    session = complete(model)
    session.ask("the same beginning, one")
    answer = session.ask("the same beginning, two")
    assert session.turns[1].cached_tokens == len("the same beginning, ")
    assert complete(model).ask("the same beginning, two") == answer


def test_closing_early_keeps_the_cache_whole(model):
    session = complete(model)
    pieces = session.send("go on")
    next(pieces)
    pieces.close()
    assert not session.turns[0].stopped
    assert session.ask("go on") == complete(model).ask("go on")


def test_a_full_gpu_costs_precision_and_not_the_continuation():
    session = complete(letters_model(gpu=open_gpu("4MiB")))
    session.ask("hi")
    answer = session.ask("x" * 300)
    assert session.turns[-1].given_up and len(answer) == 12
