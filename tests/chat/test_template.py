"""How a chat is given to a model's own template: roles it refuses, parts it wants, arguments, what it writes."""

import copy
import logging

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowvram_lab.chat.prompt import chat_ids, text_ids
from lowvram_lab.chat.session import ChatSession
from lowvram_lab.chat.template import ChatTemplate
from lowvram_lab.errors import LowvramError, SourceError
from tests.helpers.tiny import CHAT_TEMPLATE, letters_state, load_tiny, tiny_plan, tiny_tokenizer
from tests.helpers.tokenizers import KINDS, NAMES, tokenizer_of

THINKING = CHAT_TEMPLATE.replace(
    "assistant\n",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
)
QWEN3 = (
    "{% for m in messages %}{% set said = m.content %}"
    "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ said }}\n</tool_response><|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ said }}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}</tool_call>{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
DROPS_SYSTEM = CHAT_TEMPLATE.replace(
    "%}<|im_start|>", "%}{% if m.role == 'system' %}{% continue %}{% endif %}<|im_start|>", 1
)
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
)
PARTS = CHAT_TEMPLATE.replace("{{ m.content }}", "{% for part in m.content %}{{ part['text'] }}{% endfor %}")
ADDED = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "\n\n",
    "<b>",
    "so",
]


def tokenizer_with(template: str, added=ADDED):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens(added)
    tokenizer.chat_template = template
    return tokenizer


def user(text):
    return [{"role": "user", "content": text}]


SYSTEM = {"role": "system", "content": "Be brief."}


def shown(template, messages, **arguments):
    tokenizer = tokenizer_with(template)
    return tokenizer.decode(chat_ids(tokenizer, messages, arguments))


def stock(tokenizer, messages, **arguments):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **arguments)[
        "input_ids"
    ]


# ---- which tokens act as control tokens ----


def guarded(template, **arguments) -> set[str]:
    """Added tokens, not special, that a user cannot write."""
    tokenizer = tokenizer_with(template)

    def count(name: str, text: str) -> int:
        return chat_ids(tokenizer, user(text), arguments).count(tokenizer.convert_tokens_to_ids(name))

    return {name for name in ADDED if count(name, f"Q {name} Q") == count(name, "Q")}


@pytest.mark.parametrize(
    "template, arguments, expected",
    [
        (CHAT_TEMPLATE, {}, set()),
        (THINKING, {}, set()),
        (THINKING, {"enable_thinking": False}, {"<think>", "</think>"}),
        (QWEN3, {}, {name for name in ADDED if "think" in name or "tool" in name}),
        ("so <b>bold</b>\n\n" + CHAT_TEMPLATE, {}, set()),  # a preamble's tag is no control token
        (CHAT_TEMPLATE.replace("assistant\n", "assistant\n\n so"), {}, set()),  # nor are blank lines, and words
        (CHAT_TEMPLATE.replace("assistant\n", "assistant<b>"), {}, {"<b>"}),
        ("<b>" + CHAT_TEMPLATE, {}, {"<b>"}),  # what begins every chat
        (
            ALTERNATES + QWEN3,
            {},
            {"<think>", "</think>", "<tool_call>", "</tool_call>"},
        ),  # which takes no tool's answer
    ],
)
def test_added_tokens_act_as_control_tokens_where_the_template_writes_them_around_roles(template, arguments, expected):
    assert guarded(template, **arguments) == expected


def test_what_the_assistant_said_reaches_the_template_whole():
    tokenizer = tokenizer_with(QWEN3)
    said = "<think>\nit counts <|im_start|>\n</think>\n\nthree"
    history = [*user("one two"), {"role": "assistant", "content": said}, *user("four")]
    assert chat_ids(tokenizer, history) == stock(tokenizer, history)
    assert "counts" not in tokenizer.decode(chat_ids(tokenizer, history))
    history[-1]["content"] = "four <|im_end|>"
    assert "counts" not in tokenizer.decode(chat_ids(tokenizer, history))


@pytest.mark.parametrize("role", ["user", "system", "tool", "developer"])
def test_every_other_role_is_somebody_elses_text(role):
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    message = {"role": role, "content": "a <|im_end|> b"}
    ids = chat_ids(tokenizer, [message, *user("hi")])
    assert ids.count(1) == 2 and "a <|im_end|> b" in tokenizer.decode(ids)


def test_an_end_of_turn_in_the_vocabulary_that_nobody_added_is_not_typed():
    pieces = ["<unk>", "</s>", "<|im_end|>", *"abcdeimnrstu<>/|_▁\n", "</", "s>", "/s"]
    scores = [(piece, -1.0 - len(piece) / 10) for piece in pieces]
    unigram = Tokenizer(models.Unigram([*scores[:1], ("</s>", 0.0), ("<|im_end|>", 0.0), *scores[3:]], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>")
    assert tokenizer("a</s>b")["input_ids"].count(1) == 1  # Unigram reads any piece from any text
    assert 1 not in text_ids(tokenizer, "a</s>b") and 2 not in text_ids(tokenizer, "a<|im_end|>b")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    assert chat_ids(tokenizer, user("a b")) == stock(tokenizer, user("a b"))
    assert chat_ids(tokenizer, user("a</s>b")).count(1) == 1


def test_an_end_of_turn_that_merges_make_is_not_typed_either():
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "</s>", *"ab<>/s", "</", "s>"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("<", "/"), ("s", ">"), ("</", "s>")], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a</s>b")["input_ids"]) == ["a", "</s>", "b"]
    assert tokenizer.convert_ids_to_tokens(text_ids(tokenizer, "a</s>b")) == ["a", "</", "s>", "b"]


def test_a_special_token_of_one_letter_is_that_letter():
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    tokenizer.add_special_tokens({"pad_token": "!"})
    for text in ("no!", "no! <|im_end|>"):
        assert chat_ids(tokenizer, user(text)).count(tokenizer.pad_token_id) == 1


def test_an_unknown_letter_is_no_control_token_and_the_unknown_token_is_one():
    tokenizer = tokenizer_of("WordPiece as BERT has it")
    unknown = tokenizer.unk_token_id
    assert chat_ids(tokenizer, user("🙂 </s> 🙂")).count(unknown) == 2
    assert chat_ids(tokenizer, user("🙂 <unk>")).count(unknown) == 1
    assert text_ids(tokenizer, "🙂") == tokenizer("🙂")["input_ids"]


def test_pieces_that_make_a_control_token_with_the_templates_own_letters():
    tokenizer = tokenizer_with("{% for m in messages %}<|im_{{ m.content }}|>{% endfor %}")
    ids = chat_ids(tokenizer, user("end"))
    assert 1 in stock(tokenizer, user("end")) and 1 not in ids and tokenizer.decode(ids) == "<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}d|>{% endfor %}"
    assert 1 not in chat_ids(tokenizer, user("<|im_en"))


@pytest.mark.parametrize("said", ["/think", "think", "be brief /think", "<", "/think <|im_end|>"])
def test_a_template_that_asks_what_was_said_sees_it(said):
    asks = "{% if '/think' in messages[0].content %}<think>{% endif %}"
    tokenizer = tokenizer_with(QWEN3 + asks)
    ids = chat_ids(tokenizer, user(said))
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == ("/think" in said)
    if "<|im_end|>" not in said:
        assert ids == stock(tokenizer, user(said))


def test_a_tokenizer_that_is_not_fast_refuses_what_it_cannot_spell(monkeypatch):
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert chat_ids(tokenizer, user("a < b <")) == stock(tokenizer, user("a < b <"))
    for ask in (lambda text: chat_ids(tokenizer, user(text)), lambda text: text_ids(tokenizer, text)):
        with pytest.raises(SourceError, match="spells a control token"):
            ask("a <|im_end|>")


def test_a_tokenizer_with_parts_in_python_refuses_it_too():
    class Nothing:
        def pre_tokenize(self, text):
            text.split(lambda _, letters: [letters])

    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.PreTokenizer.custom(Nothing()), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert chat_ids(tokenizer, user("a < b")) == stock(tokenizer, user("a < b"))
    with pytest.raises(SourceError, match="spells a control token of the model .one of <.endoftext.>, <.im_end.>"):
        chat_ids(tokenizer, user("a <|im_end|>"))


# ---- roles and parts ----


@pytest.mark.parametrize("template", [NO_SYSTEM + CHAT_TEMPLATE, DROPS_SYSTEM, ALTERNATES + CHAT_TEMPLATE])
def test_a_system_message_that_the_template_does_not_take_goes_before_the_first_user_message(template):
    messages = [SYSTEM, *user("one"), {"role": "assistant", "content": "two"}, *user("three")]
    folded = [*user("Be brief.\n\none"), *messages[2:]]
    assert ChatTemplate(tokenizer_with(template)).folds_system
    tokenizer = tokenizer_with(template)
    assert chat_ids(tokenizer, messages) == stock(tokenizer, folded)
    assert messages[0] is SYSTEM and messages[1]["content"] == "one"
    assert chat_ids(tokenizer, messages[1:]) == stock(tokenizer, messages[1:])
    assert chat_ids(tokenizer, [{**SYSTEM, "content": ""}, *messages[1:]]) == stock(tokenizer, messages[1:])


def test_it_goes_to_the_user_also_where_the_assistant_speaks_first():
    tokenizer = tokenizer_with(NO_SYSTEM + CHAT_TEMPLATE)
    hello = {"role": "assistant", "content": "hello"}
    folded = stock(tokenizer, [hello, *user("Be brief.\n\none")])
    assert chat_ids(tokenizer, [SYSTEM, hello, *user("one")]) == folded


@pytest.mark.parametrize("template", ["hello", "{% if %}", {"rag": CHAT_TEMPLATE}])
def test_a_text_to_go_on_with_needs_no_template_that_works(template):
    tokenizer = tokenizer_with(template)
    assert text_ids(tokenizer, "a <b>") == tokenizer("a <b>")["input_ids"]
    assert 1 not in text_ids(tokenizer, "a <|im_end|>")


def test_one_that_it_takes_is_left_alone():
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    assert chat_ids(tokenizer, [SYSTEM, *user("one")]) == stock(tokenizer, [SYSTEM, *user("one")])


def test_a_template_that_wants_parts_gets_parts():
    tokenizer = tokenizer_with(PARTS)
    assert "one" not in tokenizer.decode(stock(tokenizer, user("one")))  # what would have happened
    assert chat_ids(tokenizer, user("one")) == stock(tokenizer_with(CHAT_TEMPLATE), user("one"))
    assert shown(PARTS, [SYSTEM, *user("a <|im_end|>")]).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na <|im_end|><|im_end|>"
    )


def test_a_template_that_leaves_out_what_the_user_says_is_refused():
    with pytest.raises(SourceError, match="leaves out what the user says"):
        ChatTemplate(tokenizer_with("<|im_start|>user\n<|im_end|>"))


# ---- arguments ----


def test_arguments_reach_the_template():
    assert shown(THINKING, user("hi"), enable_thinking=False).endswith("assistant\n<think>\n\n</think>\n\n")
    assert shown(THINKING, user("hi"), enable_thinking=True) == shown(THINKING, user("hi"))
    assert "</think>" in shown(THINKING, user("a <|im_end|> b"), enable_thinking=False)


@pytest.mark.parametrize(
    "name", ["tokenize", "add_generation_prompt", "chat_template", "tools", "messages", "conversation", "bos_token"]
)
def test_arguments_that_are_not_the_templates_are_refused_by_name(name):
    with pytest.raises(LowvramError, match=f"'{name}' is transformers' own argument"):
        chat_ids(tokenizer_with(THINKING), user("hi"), {name: 1})


def test_an_argument_that_the_template_never_mentions_is_refused_with_those_it_knows():
    with pytest.raises(LowvramError, match="does not know the argument 'thinking'; it knows enable_thinking$"):
        chat_ids(tokenizer_with(THINKING), user("hi"), {"thinking": False})
    globals_are_none = "{{ strftime_now('%Y') }}{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    with pytest.raises(LowvramError, match="it knows none$"):
        chat_ids(tokenizer_with(globals_are_none), user("hi"), {"strftime_now": 1})
    with pytest.raises(LowvramError, match="expected template arguments of plain data"):
        chat_ids(tokenizer_with(THINKING), user("hi"), {"enable_thinking": object()})


# ---- sessions ----


@pytest.fixture(scope="module")
def model():
    return load_tiny("qwen2", tiny_plan("qwen2", "fp32"), state=letters_state())


def test_a_session_gives_its_arguments_to_every_turn(model):
    tokenizer = tokenizer_with(THINKING)
    session = ChatSession(model, tokenizer, max_new_tokens=4, template_arguments={"enable_thinking": False})
    session.ask("hello")
    session.ask("there")
    messages = session.history[:3]
    assert session.turns[1].prompt_tokens == len(stock(tokenizer, messages, enable_thinking=False))
    assert session.turns[1].prompt_tokens > len(stock(tokenizer, messages))
    with pytest.raises(LowvramError, match="it knows enable_thinking"):
        ChatSession(model, tokenizer, template_arguments={"enable_thoughts": True})


def test_a_session_says_once_where_its_system_message_goes(model, caplog):
    tokenizer = tokenizer_with(NO_SYSTEM + CHAT_TEMPLATE)
    with caplog.at_level(logging.WARNING):
        session = ChatSession(model, tokenizer, max_new_tokens=4, system="Be brief.")
        session.ask("hello")
        session.ask("there")
    assert [record.getMessage() for record in caplog.records] == [
        "the chat template takes no system message; it goes before the first user message"
    ]
    assert session.history[0] == SYSTEM and session.history[1] == user("hello")[0]
    assert session.turns[0].prompt_tokens == len(stock(tokenizer, user("Be brief.\n\nhello")))
    caplog.clear()
    ChatSession(model, tokenizer, max_new_tokens=4)
    ChatSession(model, tokenizer_with(CHAT_TEMPLATE), max_new_tokens=4, system="Be brief.")
    assert not caplog.records


def test_a_session_cannot_go_by_a_template_that_no_chat_can_go_by(model):
    several = tokenizer_with({"rag": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE})
    with pytest.raises(SourceError, match="multiple chat templates"):
        ChatSession(model, several)
    assert ChatSession(model, tokenizer_with({"default": CHAT_TEMPLATE, "rag": "x"}), max_new_tokens=2).ask("hi")


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_are_found_on_every_kind_of_tokenizer(kind):
    assert set(ChatTemplate(tokenizer_of(kind)).control.ids) == set(NAMES.values())
