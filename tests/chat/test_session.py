"""A chat with a tiny model and a tokenizer of bytes: history, stop tokens, KV cache, room, streaming."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lowvram_lab.chat.live import LiveDecoder
from lowvram_lab.chat.prompt import stop_ids
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.errors import BudgetError, SourceError
from lowvram_lab.sampling import Sampling
from tests.helpers.tiny import letters_state, load_tiny, tiny_plan, tiny_tokenizer

TEXT = "naïve 日本語 🙂🙃 end"


def scripted_model(tokens, context=1024):
    """A loaded model that says the tokens it is told to, whatever it is asked; ``fed`` keeps the ids it was given."""
    model, tokens, fed = load_tiny("qwen2", tiny_plan("qwen2", context=context)), list(tokens), []

    def forward(ids, **kwargs):
        fed.append(ids.tolist()[0])
        logits = torch.zeros(1, ids.shape[1], 400)
        logits[:, -1, tokens.pop(0)] = 1
        return SimpleNamespace(logits=logits)

    model.forward, model.fed = forward, fed
    state = model.lowvram  # no decoder knows its type: its own forward is called
    spec = replace(state.plan.spec, config={**state.plan.spec.config, "model_type": "scripted"})
    state.plan = replace(state.plan, spec=spec)
    return model


def letters_model(context=512, gpu=None):
    return load_tiny("qwen2", tiny_plan("qwen2", "fp32", context=context), gpu, letters_state())


@pytest.fixture(scope="module")
def model():
    return letters_model()


def chat(model, history=(), **options):
    session = ChatSession(model, tiny_tokenizer(), **{"max_new_tokens": 12, **options})
    session.history.extend(dict(message) for message in history)
    return session


def scripted(text, ending=(1,), **options):
    return chat(scripted_model([*tiny_tokenizer()(text)["input_ids"], *ending]), **{"max_new_tokens": 100, **options})


def roles(session):
    return [message["role"] for message in session.history]


def test_every_stop_token_that_anyone_names():
    holder = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=[300, 301]), config=SimpleNamespace(eos_token_id=302)
    )
    assert stop_ids(holder, tiny_tokenizer()) == {300, 301, 302, 1, 2}  # 1: the tokenizer's; 2: <|endoftext|> by name
    nobody = SimpleNamespace(generation_config=SimpleNamespace(), config=SimpleNamespace(eos_token_id=None))
    assert stop_ids(nobody, tiny_tokenizer()) == {1, 2}


@pytest.mark.parametrize("stop", [1, 2])
def test_the_answer_ends_at_a_stop_token(stop):
    session = scripted("yes", ending=[stop, 50, 50])
    assert session.ask("well?") == "yes"
    assert session.turns[0].stopped
    assert session.turns[0].new_tokens == 3


def test_the_history_and_the_prompt_are_the_templates(model):
    session = chat(model, system="be brief")
    answer = session.ask("one")
    assert session.history == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": answer},
    ]
    talk = scripted("x", system="be brief")
    talk.ask("one")
    rendered = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer().decode(talk.model.fed[0]) == rendered
    assert len(answer) == 12
    assert not session.turns[0].stopped  # it ran out of room


def test_a_kept_cache_changes_nothing_but_the_work(model):
    session = chat(model)
    for number, text in enumerate(["first question", "and then?", "so"]):
        before = list(session.history)
        answer = session.ask(text)
        fresh = chat(model, before)
        assert fresh.ask(text) == answer
        assert fresh.turns[0].cached_tokens == 0
        if number:  # all of the last turn is there but its last token, which was never fed
            last = session.turns[number - 1]
            assert session.turns[number].cached_tokens == last.prompt_tokens + last.new_tokens - 1
        assert session.turns[number].prompt_tokens == fresh.turns[0].prompt_tokens
    assert session.turns[0].to_dict()["cached_tokens"] == 0


def test_an_edited_history_is_answered_as_if_new(model):
    session = chat(model)
    session.ask("my name is Anna")
    session.history[0]["content"] = "my name is Otto"
    answer = session.ask("what is it?")
    assert chat(model, session.history[:2]).ask("what is it?") == answer
    assert 0 < session.turns[1].cached_tokens < session.turns[0].prompt_tokens


def test_asking_again_from_the_start(model):
    session = chat(model)
    answer = session.ask("hi")
    session.history.clear()
    assert session.ask("hi") == answer
    assert session.turns[1].cached_tokens == session.turns[1].prompt_tokens - 1  # one token has to be fed


@pytest.mark.parametrize("system", [None, "be brief"])
def test_the_oldest_turns_are_dropped_when_the_context_is_full(system):
    model = letters_model(context=128)
    session = chat(model, system=system)
    for number in range(6):
        session.ask(f"question {number}")
        assert len(session.history) == 2 * number + 2 + (system is not None)  # all of it stays
        assert roles(session)[-2:] == ["user", "assistant"]
        assert session.history[-2]["content"] == f"question {number}"
        assert session.turns[-1].prompt_tokens + session.turns[-1].new_tokens <= 128
    assert 0 < session.dropped_turns < 5
    assert (session.history[0]["content"] == system) == (system is not None)
    first = 1 if system else 0
    seen = session.history[:first] + session.history[first + 2 * session.dropped_turns : -2]
    assert chat(model, seen).ask("question 5") == session.history[-1]["content"]
    session.ask("question 6")
    assert session.turns[-1].prompt_tokens <= 128


@pytest.mark.parametrize("earlier", [0, 2])
def test_a_message_longer_than_the_context_changes_nothing(earlier):
    session = chat(letters_model(context=128), system="s")
    for number in range(earlier):
        session.ask(f"q{number}")
    before, dropped = [dict(message) for message in session.history], session.dropped_turns
    with pytest.raises(BudgetError, match="tokens, the plan's context is 128") as error:
        session.ask("x" * 200)
    assert "\n" not in str(error.value)
    assert session.history == before
    assert session.dropped_turns == dropped
    assert len(session.ask("ok")) == 12


def test_the_answer_never_runs_past_the_context():
    session = chat(letters_model(context=64), max_new_tokens=500)
    answer = session.ask("a" * 20)
    assert session.turns[0].prompt_tokens + len(answer) == 64


def test_closing_early_keeps_what_was_said(model):
    session = chat(model)
    pieces = session.send("go on")
    said = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert session.history[-1] == {"role": "assistant", "content": said}
    assert not session.turns[0].stopped
    before = list(session.history)
    assert session.ask("and?") == chat(model, before).ask("and?")
    assert roles(session) == ["user", "assistant"] * 2


def test_closing_before_the_first_piece_leaves_turns_in_pairs(model):
    session = chat(model)
    session.send("never mind").close()
    session.ask("hello")
    assert roles(session) in (["user", "assistant"], ["user", "assistant"] * 2)


def test_characters_of_several_tokens_come_whole():
    session = scripted(TEXT)
    pieces = list(session.send("?"))
    assert "".join(pieces) == TEXT == session.history[-1]["content"]
    assert [piece for piece in pieces if piece] == list(TEXT)
    assert session.turns[0].new_tokens == len(TEXT.encode())


@pytest.mark.parametrize("tokens", range(1, 5))
def test_half_a_character_is_not_shown(tokens):
    session = scripted("🙂", max_new_tokens=tokens)
    answer = session.ask("?")
    assert answer == session.history[-1]["content"] == ("🙂" if tokens == 4 else "")


def test_sampling_is_repeatable_in_a_chat(model):
    answers = [chat(model, sampling=Sampling(3.0, 0.9, seed)).ask("hi") for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_what_a_turn_took(model):
    session = chat(model)
    session.ask("hi")
    turn = session.turns[0]
    assert turn.ttft_s > 0
    assert turn.tokens_per_s > 0
    assert turn.peak_bytes > model.lowvram.plan.weight_bytes("gpu")
    assert scripted("x").ask("hi") == "x"
    short = scripted("x")
    short.ask("hi")
    assert short.turns[0].tokens_per_s is None  # one token has no speed


def test_a_base_model_is_refused(model):
    with pytest.raises(SourceError, match="tiny-qwen2 has no chat template"):
        ChatSession(model, SimpleNamespace(chat_template=None))


@pytest.mark.parametrize("stopped_in", [1, 2])
def test_after_an_interrupt_the_chat_goes_on(model, stopped_in):
    session, layer = chat(letters_model()), stopped_in
    session.ask("hi")

    def interrupt(*args):
        hook.remove()
        raise KeyboardInterrupt

    hook = session.model.model.layers[layer].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.ask("x" * 100)
    del session.history[2:]
    before = list(session.history)
    assert session.ask("x" * 40) == chat(model, before).ask("x" * 40)


def test_an_answer_that_fills_the_context_goes_on_without_the_oldest_turn():
    model = letters_model(context=128)
    session = chat(model, max_new_tokens=40)
    for text in ("first", "second", "third"):
        session.ask(text)
    before = session.dropped_turns
    session.max_new_tokens = 90
    answer = session.ask("go on")
    assert session.turns[-1].new_tokens == len(answer) == 90  # more than was left of the context
    assert session.dropped_turns > before
    assert [message["content"] for message in session.history][::2] == ["first", "second", "third", "go on"]


def test_the_cache_is_compared_with_what_it_holds_now_not_with_the_turn_before():
    live, ids = LiveDecoder(letters_model()), tiny_tokenizer()("hello")["input_ids"]
    answer = list(live.stream(ids, 4, frozenset(), Sampling()))
    live.holds(ids + answer)
    assert live.reuse([*ids, *answer, 9]) == live.begun().cache.get_seq_length() == len(ids) + 3
    assert live.reuse([*ids[:2], 200, 201, 202]) == 2  # and then the pass that was to follow failed
    assert live.reuse([*ids, *answer, 9]) == live.begun().cache.get_seq_length() == 2


def test_an_answer_that_fills_the_context_alone_ends_there_and_says_so():
    session = chat(letters_model(context=64), max_new_tokens=200)
    answer = session.ask("go on")
    turn = session.turns[-1]
    assert len(answer) == turn.new_tokens == 64 - turn.prompt_tokens
    assert not turn.stopped
    assert session.ask("and now?")  # the next turn forgets that one
