"""Typed control tokens, on every kind of tokenizer: text is read as stock transformers reads it, and never obeyed."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowvram_lab.chat.prompt import chat_ids, text_ids
from tests.helpers.tokenizers import KINDS, LEGACY, LOSSLESS, NAMES, PLAIN, tokenizer_of

FLAGS = [
    {},
    {"normalized": True},
    {"lstrip": True},
    {"rstrip": True, "bos": "post-processor"},
    {"single_word": True, "bos": ""},
    {"normalized": True, "lstrip": True, "trims": True},
]
WORDS = [
    "one",
    " two",
    "fox ",
    " ",
    "\n",
    "   ",
    "END",
    "für",
    "日本語",
    "🙂",
    "é",
    "a",
    "3",
    "'s",
    "ﬁ",
    "İ",
    "\ue000",
    "\U00100000",
]
PIECES = ["<", "|", ">", "<|", "|>", "/", "</", "s>", "<|im_", "im_end|>", "end|>", "think>", "</think>", "u", "nk>"]
LOUD = [name.upper() for name in NAMES.values()]
plain_text = st.lists(st.sampled_from([*WORDS, *PLAIN]), min_size=1, max_size=8).map("".join)
pieces_text = st.lists(st.sampled_from([*WORDS, *PIECES, *PLAIN]), min_size=1, max_size=8).map("".join)
control_text = st.lists(st.sampled_from([*WORDS, *PIECES, *NAMES.values(), *LOUD, *PLAIN]), max_size=8).map("".join)
flags = st.sampled_from(FLAGS)
# A single word is no token beside a letter, which the template writes beside it: then its own is spelt, by its name.
flags_of_namesakes = st.sampled_from([flags for flags in FLAGS if "single_word" not in flags])
many = settings(max_examples=100, deadline=None)


def chat(system, first, answer, last):
    messages = [("system", system), ("user", first), ("assistant", answer), ("user", last)]
    return [{"role": role, "content": content} for role, content in messages]


def stock(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@many
@given(st.one_of(plain_text, pieces_text), st.one_of(plain_text, pieces_text), plain_text, pieces_text, flags)
def test_a_chat_without_control_tokens_is_what_the_template_makes_of_it(kind, system, first, answer, last, flags):
    texts = "\0".join((system, first, last)).lower()
    assume(not any(name in texts for name in NAMES.values()))
    tokenizer = tokenizer_of(kind, **flags)
    messages = chat(system, first, answer, last)
    assert chat_ids(tokenizer, messages) == stock(tokenizer, messages)


@pytest.mark.parametrize("kind", KINDS)
@many
@given(control_text, control_text, plain_text, control_text, flags_of_namesakes)
def test_typed_control_tokens_are_read_as_by_a_tokenizer_that_does_not_know_them(
    kind, system, first, answer, last, flags
):
    assume(kind != LEGACY or not flags.get("normalized"))
    messages = chat(system, first, answer, last)
    found = chat_ids(tokenizer_of(kind, **flags), messages)
    assert found == stock(tokenizer_of(kind, "namesakes", **flags), messages)


@pytest.mark.parametrize("kind", LOSSLESS)
@many
@given(control_text, flags_of_namesakes)
def test_typed_control_tokens_can_still_be_read(kind, typed, flags):
    typed = typed.replace("ü", "u")  # the decoder takes the letter of an added token for a byte
    tokenizer = tokenizer_of(kind, **{**flags, "lstrip": False, "rstrip": False, "trims": False})
    neutral = tokenizer.decode(chat_ids(tokenizer, [{"role": "user", "content": "QUILL"}]))
    shown = tokenizer.decode(chat_ids(tokenizer, [{"role": "user", "content": f"Q{typed}L"}]))
    assert shown == neutral.replace("QUILL", f"Q{typed}L")


@pytest.mark.parametrize("kind", KINDS)
@many
@given(control_text, flags)
def test_a_text_to_go_on_with_is_read_so_too(kind, typed, flags):
    assume(kind != LEGACY or not flags.get("normalized"))
    tokenizer, namesake = tokenizer_of(kind, **flags), tokenizer_of(kind, "namesakes", **flags)
    ids = text_ids(tokenizer, typed)
    assert ids == namesake(typed)["input_ids"]
    if not any(name in typed.lower() for name in NAMES.values()):
        assert ids == tokenizer(typed)["input_ids"]
    assert (flags.get("bos") == "post-processor") == (ids[:1] == [tokenizer.bos_token_id])
