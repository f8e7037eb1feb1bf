"""Earlier answers keep the ids that were generated, where the template writes them as they were said."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_lab.chat.kept_ids import Turn, kept_ids
from lowvram_lab.chat.prompt import chat_ids
from lowvram_lab.chat.session import ChatSession
from tests.chat.test_session import scripted_model
from tests.chat.test_template import QWEN3, tokenizer_with, user
from tests.helpers.tiny import CHAT_TEMPLATE, tiny_tokenizer
from tests.helpers.tokenizers import KINDS, tokenizer_of

END = 1  # <|im_end|>
WORDS = ["the", "so", "there", "\n"]
TRIMS = CHAT_TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
THINKS = [*WORDS, "<think>", "</think>"]


def letters(text, *ending):
    """A text in tokens of one byte each: not what a tokenizer with words makes of it."""
    return [*tiny_tokenizer()(text)["input_ids"], *ending]


def ended(text):
    return letters(text, END)


def talk(*answers, template=CHAT_TEMPLATE, words=WORDS, context=1024, **options):
    """A chat whose model says these ids, one answer after the other; its KV cache is a real one."""
    model = scripted_model([token for answer in answers for token in answer], context)
    says, reads = model.forward, type(model).forward

    def forward(ids, **kwargs):
        reads(model, ids, **kwargs)
        return says(ids, **kwargs)

    model.forward = forward
    return ChatSession(model, tokenizer_with(template, words), **{"max_new_tokens": 100, **options})


def rendered(session, history=None):
    return chat_ids(session.tokenizer, session.history if history is None else history, session.template_arguments)


def asked_again(session, text="and?"):
    """The next turn: its prompt, as it was read, and as it is rendered anew."""
    anew = rendered(session, [*session.history, *user(text)])
    list(session.send(text))
    return session._asked.prompt, anew


def decode(session, ids):
    return session.tokenizer.decode(ids)


def test_the_next_prompt_begins_with_what_was_asked_and_what_was_generated():
    session = talk(ended("so there"), ended("ok"))
    assert session.ask("the day") == "so there"
    asked = rendered(session, session.history[:1])
    prompt, anew = asked_again(session)
    assert prompt[: len(asked) + 8] == asked + letters("so there")
    assert len(anew) < len(prompt) and anew[: len(asked) + 1] == [*asked, session.tokenizer("so")["input_ids"][0]]
    assert decode(session, prompt) == decode(session, anew)
    assert session.turns[1].prompt_tokens == len(prompt)
    assert session.turns[1].cached_tokens == len(asked) + len("so there")  # its end was said, and never read
    assert session.model.fed[-3] == prompt[session.turns[1].cached_tokens :]


def test_it_does_so_turn_after_turn():
    answers = [letters("the so"), letters("so so"), letters("there"), letters("ok")]
    session = talk(*([*answer, END] for answer in answers))
    list(session.send("one"))
    before = session._asked.prompt
    for answer in answers[:-1]:
        prompt, anew = asked_again(session)
        assert prompt[: len(before) + len(answer)] == before + answer
        assert decode(session, prompt) == decode(session, anew)
        assert session.turns[-1].cached_tokens == len(before) + len(answer)
        before = prompt


def test_the_token_that_ended_an_answer_is_the_templates_affair():
    session = talk(letters("so there", 2), ended("ok"))  # <|endoftext|>, where the template writes <|im_end|>
    list(session.send("one"))
    said = session._asked.prompt + letters("so there")
    prompt, anew = asked_again(session)
    assert prompt[: len(said) + 1] == [*said, END] and decode(session, prompt) == decode(session, anew)


def test_a_template_that_leaves_out_reasoning_is_followed():
    said = ended("<think>so</think>\n\nthe")
    session = talk(said, ended("ok"), template=QWEN3, words=THINKS)
    assert session.ask("one") == "<think>so</think>\n\nthe"
    prompt, anew = asked_again(session)
    assert prompt == anew and "<think>" not in decode(session, prompt)


def test_an_answer_that_is_followed_leaves_those_before_it_as_they_were_said():
    """One answer is cut by a stop string: it is rendered, and the one before stays."""
    session = talk(ended("so there"), letters("the STOP"), ended("ok"), stop=["STOP"])
    list(session.send("one"))
    first = session._asked.prompt + letters("so there")
    assert session.ask("two") == "the "
    second = session._asked.prompt
    prompt, anew = asked_again(session)
    assert prompt[: len(first)] == first and prompt[: len(second)] == second
    assert prompt[len(second) :] == anew[len(anew) - len(prompt) + len(second) :] != []
    assert prompt[len(second)] == session.tokenizer("the")["input_ids"][0]
    assert decode(session, prompt) == decode(session, anew)


@pytest.mark.parametrize("place", [0, 1])
def test_an_edited_history_is_rendered(place):
    session = talk(ended("so there"), ended("ok"))
    list(session.send("one"))
    asked = session._asked.prompt
    session.history[place]["content"] = "there so"
    prompt, anew = asked_again(session)
    assert prompt == anew
    assert (prompt[: len(asked)] == asked) == (place == 1)


def test_turns_taken_back_and_other_arguments_are_rendered():
    template = "{% if aloud %}!{% endif %}" + CHAT_TEMPLATE
    session = talk(ended("so there"), ended("the"), ended("so"), template=template)
    list(session.send("one"))
    del session.history[:]
    prompt, anew = asked_again(session)
    assert prompt == anew
    session.template_arguments["aloud"] = True
    prompt, anew = asked_again(session)
    assert prompt == anew and decode(session, prompt).startswith("!")


def test_what_was_said_before_ctrl_c_is_kept():
    session = talk(letters("so"), ended("ok"))
    pieces = session.send("one")
    said = next(pieces) + next(pieces)
    with pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    assert session.history[-1]["content"] == said == "so"
    asked = session._asked.prompt
    prompt, anew = asked_again(session)
    assert prompt[: len(asked) + 2] == asked + letters("so")
    assert decode(session, prompt) == decode(session, anew)


def test_an_answer_cut_within_a_character_is_rendered():
    session = talk(letters("so🙂")[:-1], ended("ok"), max_new_tokens=5)
    assert session.ask("one") == "so"
    prompt, anew = asked_again(session)
    assert prompt == anew


def test_generated_ids_that_leave_no_room_are_rendered():
    session = talk(ended("there" * 8), ended("ok"), context=100)
    list(session.send("one"))
    prompt, anew = asked_again(session)
    assert prompt == anew and session.dropped_turns == 0
    assert len(anew) + 25 <= 100 < len(anew) + 32 + 25  # eight words of five letters


def test_the_oldest_turn_is_left_out_as_before():
    session = talk(*[ended("there " * 4)] * 4, context=160, max_new_tokens=40)
    for number in range(4):
        prompt, _ = asked_again(session, f"question {number}")
        assert len(prompt) + 24 <= 160
    assert session.dropped_turns > 0 and "question 0" not in decode(session, prompt)


def test_what_a_user_types_stays_text():
    session = talk(ended("so there"), ended("ok"))
    list(session.send("a <|im_end|> b"))
    prompt, _ = asked_again(session, "so <|im_end|>")
    assert prompt.count(END) == 3 and decode(session, prompt).count("<|im_end|>") == 5


@pytest.mark.parametrize(
    "said, template, kept",
    [
        ("so \n", TRIMS, True),
        (" \nso", TRIMS, True),
        (" \nso", CHAT_TEMPLATE, False),  # "assistant\n" and what comes then is one token now
        ("so ", CHAT_TEMPLATE, True),
        ("so \n", CHAT_TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }} "), False),  # whose is the space?
        (" ", TRIMS, True),
        ("", CHAT_TEMPLATE, True),
        ("so🙂", CHAT_TEMPLATE, True),  # its first byte reads as a letter, too
    ],
)
def test_the_ends_of_an_answer(said, template, kept):
    session = talk(ended(said), ended("ok"), template=template, words=["so", "\n \n"])
    list(session.send("one"))
    asked = session._asked.prompt
    prompt, anew = asked_again(session)
    assert (prompt[: len(asked + letters(said))] == asked + letters(said)) == kept
    assert kept or prompt == anew
    assert "".join(decode(session, prompt).split()) == "".join(decode(session, anew).split())


def test_ids_that_run_across_the_end_of_the_answer_are_rendered():
    texts = {1: "a", 2: "b", 3: "ab", 4: "bc", 5: "c"}

    def decode(ids):
        return "".join(texts[index] for index in ids)

    last = Turn([5], [5], [1, 2])
    assert kept_ids([5, 3, 5], last, decode) == [5, 1, 2, 5]
    assert kept_ids([5, 1, 4], last, decode) == [5, 1, 4]
    assert kept_ids([1, 3, 5], last, decode) == [1, 3, 5]
    assert kept_ids([5], last, decode) == [5]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text("the on 日<\n", max_size=4), min_size=1, max_size=5),
    st.text("the on 日<\n", min_size=1, max_size=8),
)
def test_the_prompt_reads_as_it_is_rendered(kind, pieces, follow_up):
    tokenizer = tokenizer_of(kind)

    def decode(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    asked = chat_ids(tokenizer, user("one"))
    answer = [index for piece in pieces for index in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    said = {"role": "assistant", "content": decode(answer)}
    anew = chat_ids(tokenizer, [*user("one"), said, *user(f"{follow_up}?")])
    kept = kept_ids(anew, Turn(asked, asked, answer), decode)
    assert re.sub(r"\s", "", decode(kept)) == re.sub(r"\s", "", decode(anew))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("theso 日", max_size=4), min_size=1, max_size=5))
def test_an_answer_in_whatever_tokens_is_kept_to_the_letter(pieces):
    tokenizer = tokenizer_with(CHAT_TEMPLATE, WORDS)
    answer = [index for piece in pieces for index in tokenizer(piece)["input_ids"]]
    asked = chat_ids(tokenizer, user("one"))
    anew = chat_ids(tokenizer, [*user("one"), {"role": "assistant", "content": "".join(pieces)}, *user("two")])
    kept = kept_ids(anew, Turn(asked, asked, answer), tokenizer.decode)
    assert kept[: len(asked + answer)] == asked + answer
    assert tokenizer.decode(kept) == tokenizer.decode(anew)
