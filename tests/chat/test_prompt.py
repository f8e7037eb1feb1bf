"""From a chat to tokens and back to text: control tokens, templates that refuse, stop strings, which engine runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram_lab.chat.prompt import StopStrings, chat_ids
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.errors import LowvramError, SourceError
from lowvram_lab.memory.cuda import open_gpu
from tests.helpers.tiny import letters_state, load_tiny, tiny_plan, tiny_tokenizer


def session(gpu=None, plan=None, **options):
    model = load_tiny("qwen2", plan or tiny_plan("qwen2", "fp32"), gpu or open_gpu("1000MiB"), letters_state())
    return ChatSession(model, tiny_tokenizer(), **{"max_new_tokens": 12, **options})


def user(text):
    return [{"role": "user", "content": text}]


def test_what_a_user_types_never_becomes_a_control_token():
    tokenizer = tiny_tokenizer()
    control = {token: index for token, index in tokenizer.get_vocab().items() if token in tokenizer.all_special_tokens}
    assert control
    for token, index in control.items():
        plain = chat_ids(tokenizer, user("before  after"))
        found = chat_ids(tokenizer, user(f"before {token} after"))
        assert found.count(index) == plain.count(index)
        text = tokenizer.decode(found)
        assert f"before {token} after" in text
        stock = tokenizer.apply_chat_template(
            user(f"before {token} after"), add_generation_prompt=True, return_dict=True
        )
        assert stock["input_ids"].count(index) == plain.count(index) + 1  # what would have happened
        assert tokenizer.decode(stock["input_ids"]) == text


def test_a_chat_without_control_tokens_is_the_template_s_own():
    tokenizer = tiny_tokenizer()
    for text in ("hello", "a < b | c > d", "\ue0003:0\ue001", "naïve 日本語 🙂"):
        stock = tokenizer.apply_chat_template(user(text), add_generation_prompt=True, return_dict=True)["input_ids"]
        assert chat_ids(tokenizer, user(text)) == stock


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[7].content }}", "{{ 1 + messages }}", "{% if %}"],
)
def test_a_template_that_fails_is_one_line_and_costs_no_history(template, monkeypatch):
    chat = session()
    monkeypatch.setattr(chat.tokenizer, "chat_template", template)
    with pytest.raises(SourceError, match="template refuses this chat .* it was given messages of user") as error:
        chat.ask("hello")
    assert "\n" not in str(error.value)
    assert chat.history == [] and chat.turns == []
    monkeypatch.undo()
    assert chat.ask("hello")


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_message_is_refused(text):
    chat = session()
    with pytest.raises(LowvramError, match="expected a message, found an empty one"):
        chat.ask(text)
    assert chat.history == []


@pytest.mark.parametrize("strings", [[""], [3], [None], ["ok", ""]])
def test_stop_strings_that_are_none(strings):
    with pytest.raises(LowvramError, match="expected stop strings of one character or more, found"):
        StopStrings(strings)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_shown_piece_by_piece_never_holds_a_stop_string(text, strings):
    stops, shown = StopStrings(strings), ""
    for end in range(len(text) + 1):
        seen, ended = stops.cut(text[:end])
        assert seen.startswith(shown)  # nothing is taken back
        shown = seen
        if ended:
            break
    assert not any(string in shown for string in strings)
    first = min((place for string in strings if (place := text.find(string)) >= 0), default=None)
    assert ended == (first is not None)
    if ended:
        assert any(text[len(shown) :].startswith(string) for string in strings)


def test_an_answer_ends_at_a_stop_string_and_does_not_show_it():
    whole = session().ask("tell me")
    assert len(whole) > 8
    chat = session(stop=[whole[4:6]])
    assert chat.ask("tell me") == whole[: whole.index(whole[4:6])]
    assert chat.turns[-1].stopped
    assert chat.history[-1]["content"] == whole[: whole.index(whole[4:6])]
    assert session(stop="never said").ask("tell me") == whole
    almost = session(stop=[whole[-2:] + "and more"])
    assert almost.ask("tell me") == whole  # what was held back comes at the end


def test_the_session_says_what_decodes_and_why():
    assert session().engine == "the lean decoder"
    plan = tiny_plan("qwen2").with_modules("*.gate_proj", format="int3")
    assert session(plan=plan).engine == "the model's modules (gate_proj is in int3, which has no kernel)"
    small = session(gpu=open_gpu("3MiB"), plan=tiny_plan("qwen2", "fp32", context=1024))
    assert (
        small.engine == "the model's modules (its KV cache is in int4, which without compiled kernels the modules read)"
    )
    assert small.ask("hi")
    given_up = small.turns[0].given_up  # there was no room for the KV cache
    assert given_up[:2] == ("embedding to the CPU", "prompts read 256 tokens at a time")
    assert given_up[-1] == "KV cache in int4"
    assert small.model.lowvram.plan != tiny_plan("qwen2", "fp32", context=1024)
