"""Which token of a chat differs, and which construct of its template did it, in templates as models have them."""

import copy
import datetime

import pytest

from lowvram_lab.chat.drift import Drift, Seen, find_drift, first_difference
from lowvram_lab.chat.prompt import chat_ids
from lowvram_lab.repository.template_text import line_with, on_another_day
from tests.chat.test_template import tokenizer_with, user
from tests.helpers.tiny import CHAT_TEMPLATE

ADDED = ["<think>", "</think>", "2024", "system", "the"]

QWEN3 = r"""
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_query_index = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set said = message.content.split('</think>')[-1].lstrip('\n') %}
        {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- if loop.index0 > ns.last_query_index and '</think>' in message.content %}
            {{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + said + '<|im_end|>\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + said + '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
"""
LLAMA3 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|im_start|>system\n\nCutting Knowledge Date: December 2023\nToday Date: " + date_string + "\n\n" }}
{{- system_message + "<|im_end|>" }}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}
"""
QWEN2 = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
) + CHAT_TEMPLATE.removeprefix("{% for m in messages %}")
SHORT_DATE = "{% set day = strftime_now('%-d %B') %}Today is {{ day }}.\n" + CHAT_TEMPLATE
LAST_ANSWER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '' if loop.last or m.role == 'user' else ' (said before)' }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set rules, others = messages[0].content, messages[1:] %}"
    "{% else %}{% set rules, others = '', messages %}{% endif %}{% for m in others %}\n"
    "{% if m.role == 'user' %}[INST] {% if loop.last and rules %}{{ rules }}\n\n{% endif %}{{ m.content }} [/INST]"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}


def clock(monkeypatch, day):
    """Has transformers and the trials believe that it is another day."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls):
            return cls.fromisoformat(day)

    for module in ("transformers.utils.chat_template_utils", "lowvram_lab.repository.template_trials"):
        monkeypatch.setattr(f"{module}.datetime", Clock)


@pytest.fixture(autouse=True)
def today(monkeypatch):
    clock(monkeypatch, "2024-07-26")


def said(text):
    return {"role": "assistant", "content": text}


def rendered(template, messages, **arguments):
    return Seen(messages, chat_ids(tokenizer_with(template, ADDED), messages, arguments))


def answered(template, messages, text, **arguments):
    """A chat and the ids that its cache holds once it has been answered, the answer's own letter by letter."""
    tokenizer = tokenizer_with(template, ADDED)
    made = [tokenizer(letter)["input_ids"] for letter in text]
    return Seen([*messages, said(text)], chat_ids(tokenizer, messages, arguments) + sum(made, []))


def drift(template, before, after, **arguments):
    tokenizer = tokenizer_with(template, ADDED)
    if not isinstance(after, Seen):
        after = rendered(template, after, **arguments)
    return find_drift(tokenizer, before, after, arguments)


def at(found, before, after):
    """Whether a drift is where these texts differ, and all of it is in one line."""
    assert "\n" not in found.text and f"token {found.position} was" in found.text and found.construct in found.text
    return (found.before, found.after) == (before, after)


def on(day, template, messages):
    """A chat as it was rendered on another day."""
    date = datetime.datetime.fromisoformat(day)
    tokenizer = tokenizer_with(template, ADDED)
    for code in ("%d %b %Y", "%-d %B", "%Y"):
        tokenizer.chat_template = tokenizer.chat_template.replace(f'strftime_now("{code}")', f"'{date.strftime(code)}'")
        tokenizer.chat_template = tokenizer.chat_template.replace(f"strftime_now('{code}')", f"'{date.strftime(code)}'")
    assert "strftime_now(" not in tokenizer.chat_template
    return Seen(messages, chat_ids(tokenizer, messages))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN2, QWEN3, LLAMA3, LAST_ANSWER])
def test_nothing_differs(template):
    one = user("one")
    assert drift(template, rendered(template, one), one) is None
    before = Seen(one, rendered(template, one).ids[:-1])
    assert drift(template, before, one) is None


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, QWEN2, QWEN3])
def test_nothing_differs_where_more_comes_behind(template):
    one = user("one")
    assert drift(template, answered(template, one, "two"), [*one, said("two"), *user("three")]) is None


def test_the_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3, 4]) is first_difference([], [1]) is None
    assert first_difference([1, 2, 3], [1, 4]) == first_difference("abc", "ad") == 1


@pytest.mark.parametrize("messages", [user("one"), [SYSTEM, *user("one")]])
@pytest.mark.parametrize(
    "day, before, after", [("2019-12-31", "3", "2"), ("2024-07-27", "7", "6"), ("2023-07-26", "2", "2024")]
)
def test_the_date(messages, day, before, after):
    found = drift(LLAMA3, on(day, LLAMA3, messages), [*messages, said("two"), *user("three")])
    assert at(found, before, after)
    assert found.construct == "the date, `strftime_now` (line 4 of the template)"
    assert found.line == '{%- set date_string = strftime_now("%d %b %Y") %}'
    assert found.text.endswith(f"(line 4 of the template): {found.line}")


def test_a_day_with_a_digit_more_or_less(monkeypatch):
    """``2 July`` differs from ``26 July`` behind the date's first digit, and the other way round at the space."""
    found = drift(SHORT_DATE, on("2024-07-02", SHORT_DATE, user("one")), user("one"))
    assert at(found, " ", "6") and found.construct == "the date, `strftime_now` (line 1 of the template)"
    back = Seen(user("one"), rendered(SHORT_DATE, user("one")).ids)
    clock(monkeypatch, "2024-07-02")
    found = drift(SHORT_DATE, back, user("one"))
    assert at(found, "6", " ") and found.construct == "the date, `strftime_now` (line 1 of the template)"


@pytest.mark.parametrize("edited", [False, True])
def test_a_template_that_asks_what_year_it_is(edited):
    template = "{% if strftime_now('%Y') == '2024' %}leap {% endif %}" + CHAT_TEMPLATE
    before = rendered(template, user("one")) if edited else on("2023-07-26", template, user("one"))
    found = drift(template, before, user("on 6") if edited else user("one"))
    assert found.construct == (
        "the messages themselves differ (message 1, user)"
        if edited
        else "the date, `strftime_now` (line 1 of the template)"
    )


def test_the_date_of_a_chat_whose_answers_kept_their_whitespace():
    messages = [*user("one"), said("two"), *user("three")]
    tokenizer = tokenizer_with(LLAMA3, ADDED)
    seen = [on("2024-07-27", LLAMA3, messages), rendered(LLAMA3, messages)]
    ids = [tokenizer(tokenizer.decode(chat.ids).replace("two", "two  "))["input_ids"] for chat in seen]
    found = find_drift(tokenizer, *(Seen(messages, kept) for kept in ids))
    assert found.construct == "the date, `strftime_now` (line 4 of the template)"


def test_a_message_that_was_edited_is_not_the_date():
    one, other = [SYSTEM, *user("one")], [SYSTEM, *user("other")]
    for template in (LLAMA3, SHORT_DATE, CHAT_TEMPLATE):
        found = drift(template, rendered(template, one), other)
        assert at(found, "n", "the") and found.line is None
        assert found.construct == "the messages themselves differ (message 2, user)"


def test_reasoning_of_an_earlier_turn():
    one, thought = [SYSTEM, *user("one")], "<think>\nso\n</think>\n\ntwo"
    found = drift(QWEN3, answered(QWEN3, one, thought), [*one, said(thought), *user("three")])
    assert at(found, "<", "t") and found.position == len(rendered(QWEN3, one).ids)
    assert found.construct == "reasoning of earlier turns is left out (line 15 of the template)"
    assert found.line == "{%- if loop.index0 > ns.last_query_index and '</think>' in message.content %}"


def test_reasoning_that_the_template_itself_had_begun():
    one = user("one")
    before = answered(QWEN3, one, "two", enable_thinking=False)
    found = drift(QWEN3, before, [*one, said("two"), *user("three")], enable_thinking=False)
    assert at(found, "<think>", "t")
    assert found.construct == "reasoning of earlier turns is left out (line 15 of the template)"


def test_reasoning_that_stays_is_not_left_out():
    keeps = LAST_ANSWER.replace("{{ m.content }}", "{{ m.content.replace('<think>', '[') }}")
    thought = "<think>so</think>two"
    found = drift(keeps, answered(keeps, user("one"), thought), [*user("one"), said(thought), *user("three")])
    assert at(found, "<", "[")
    assert "an earlier answer is written differently once another message follows" in found.construct


def test_an_answer_that_is_written_differently_once_another_message_follows():
    before = answered(LAST_ANSWER, user("one"), "two")
    before.ids.append(1)  # <|im_end|>
    found = drift(LAST_ANSWER, before, [*user("one"), said("two"), *user("three")])
    assert at(found, "<|im_end|>", " ")
    assert found.construct == (
        "an earlier answer is written differently once another message follows (line 2 of the template)"
    )
    assert found.line.startswith("{{ '' if loop.last or m.role == 'user' else")


def test_a_users_message_that_is_written_differently_once_another_follows():
    one = [SYSTEM, *user("one")]
    found = drift(MISTRAL, answered(MISTRAL, one, "two"), [*one, said("two"), *user("three")])
    assert at(found, "B", "o")
    assert found.construct == (
        "message 2 (user) is written differently once another message follows (line 2 of the template)"
    )
    assert found.line == "{% if loop.last and rules %}{{ rules }}"


def test_the_templates_own_system_message():
    found = drift(QWEN2, rendered(QWEN2, user("one")), [SYSTEM, *user("one")])
    assert at(found, "Y", "B")
    assert "the template's own system message is written only where the chat has none (line 1" in found.construct
    assert found.line.startswith("{% if loop.first and messages[0]['role'] != 'system' %}")
    back = drift(QWEN2, rendered(QWEN2, [SYSTEM, *user("one")]), user("one"))
    assert (back.construct, back.line) == (found.construct, found.line) and at(back, "B", "Y")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA3])
def test_a_system_message_where_the_template_has_none_of_its_own(template):
    found = drift(template, rendered(template, user("one")), [SYSTEM, *user("one")])
    assert found.construct == "the messages themselves differ (message 1, system)" and found.line is None


def test_an_answer_in_other_tokens_and_one_that_was_edited():
    found = drift(CHAT_TEMPLATE, answered(CHAT_TEMPLATE, user("1"), "the"), [*user("1"), said("the"), *user("2")])
    assert at(found, "t", "the") and found.construct == "the same text in other tokens" and found.line is None
    found = drift(CHAT_TEMPLATE, answered(CHAT_TEMPLATE, user("1"), "two"), [*user("1"), said("no"), *user("2")])
    assert at(found, "t", "n") and found.construct == "the messages themselves differ (message 2, assistant)"


def test_whitespace_that_an_answer_kept_does_not_hide_what_came_later():
    trims = CHAT_TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
    early, tokenizer = [*user("1"), said("two  ")], tokenizer_with(trims, ADDED)
    kept = [tokenizer.decode(chat_ids(tokenizer, [*early, *user(text)])) for text in ("3", "4")]
    ids = [tokenizer(text.replace("two", "two  "))["input_ids"] for text in kept]
    found = find_drift(tokenizer, Seen([*early, *user("3")], ids[0]), Seen([*early, *user("4")], ids[1]))
    assert at(found, "3", "4") and found.construct == "the messages themselves differ (message 3, user)"


@pytest.mark.parametrize("back", [False, True])
def test_other_arguments_are_neither_date_nor_messages(back):
    template = "{{ 'loud ' if aloud else 'low ' }}" + CHAT_TEMPLATE
    seen = [rendered(template, user("one"), aloud=True), rendered(template, user("one"))]
    found = drift(template, *(seen[::-1] if back else seen))
    assert found.construct == "neither date nor messages: the template or its arguments were others"


def test_nothing_of_the_tokenizer_is_changed():
    tokenizer = tokenizer_with(LLAMA3, ADDED)
    before, clock = copy.deepcopy(tokenizer.__dict__), chat_ids(tokenizer, user("one"))
    find_drift(tokenizer, on("2019-12-31", LLAMA3, user("one")), Seen(user("one"), clock))
    assert tokenizer.chat_template == before["chat_template"] == LLAMA3
    assert chat_ids(tokenizer, user("one")) == clock


def test_in_one_line_for_people():
    assert Drift(7, "\n", "a", "the date (line 2 of the template)", "{{ x }}").text == (
        "token 7 was '\\n' and is 'a'; the date (line 2 of the template): {{ x }}"
    )


def test_another_day_is_as_long_and_another_in_every_letter_and_digit():
    text = on_another_day(
        "\n {% if x %}{{ strftime_now(format='%H:%M, %-d %b') }}{% endif %}%", datetime.datetime.now()
    )
    macro, _, template = text.partition("\n")
    assert template == "\n {% if x %}{{ strftime_now(format='%H:%M, %-d %b') }}{% endif %}%"
    assert macro.startswith("{% macro strftime_now(format) %}") and macro.count("replace(") == 4


@pytest.mark.parametrize(
    "patterns, expected", [(("c", "b"), (2, "b {{ d }}")), (("d",), (2, "d }}")), (("x",), None), ((), None)]
)
def test_a_line_of_a_template(patterns, expected):
    assert line_with("a\n b {{ d }}  \nb", *patterns) == expected


def test_a_long_line_is_shortened():
    number, line = line_with("a" + "b" * 100, "b")
    assert (number, len(line), line[-2:]) == (1, 80, "b…")
