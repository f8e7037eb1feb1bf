"""Rules that say of an answer's text whether it is right: each a plain function, exact, and knowing no model."""

import inspect
import json
import re
import unicodedata
from collections.abc import Callable, Sequence

from lowvram_lab.errors import LowvramError
from lowvram_lab.evaluation.fidelity import repetition

_QUOTES_AND_STOPS = " \t\n\r\"'`*.,;:!?“”‘’「」。、！？；："
_LABEL = re.compile(r"(?:answer|output|result|a|答案|答|输出|结果)\s*[:：]\s*", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?<![A-Za-z\d.])(?:(?<![^\s(=:])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![A-Za-z\d]|\.\d|,\d{3}(?!\d))"
)
_CLOSES = {")": "(", "]": "[", "}": "{", ">": "<", "）": "（", "】": "【", "》": "《", "」": "「", "』": "『"}


def normalised(text: str) -> str:
    """An answer without what is no part of it.

    Full-width letters and digits become plain ones (NFKC), white space becomes single spaces, and quotes, stops and a
    label such as ``Answer:`` or ``答：`` go from its ends. Case stays.

    Args:
        text: The answer.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).split()).strip(_QUOTES_AND_STOPS)
    return _LABEL.sub("", plain, count=1).strip(_QUOTES_AND_STOPS) if _LABEL.match(plain) else plain


def equals(text: str, value: str) -> bool:
    """Whether the answer is this, both normalised; upper and lower case differ.

    Args:
        text: The answer.
        value: What it has to be.
    """
    return normalised(text) == normalised(value)


def number(text: str, value: float) -> bool:
    """Whether the last number of the answer is this one: what comes before may be the way there.

    Numbers are in digits, with a sign, thousands commas and decimals where they have them, and no Latin letter beside
    them (``12cm``). Numbers in words (``twelve``, ``十二``) are none.

    Args:
        text: The answer.
        value: What it has to come to.
    """
    found = _NUMBER.findall(unicodedata.normalize("NFKC", text))
    return bool(found) and float(found[-1].replace(",", "")) == value


def regex(text: str, pattern: str) -> bool:
    """Whether a pattern matches all of the answer, but for white space at its ends.

    Args:
        text: The answer.
        pattern: As ``re`` has it.
    """
    return re.fullmatch(pattern, text.strip()) is not None


def json_keys(text: str, keys: Sequence[str], values: dict | None = None) -> bool:
    """Whether the answer's first ``{`` begins a valid JSON object of exactly these keys, each once.

    A fence or words around the object do no harm.

    Args:
        text: The answer.
        keys: All of them, in any order.
        values: Key → the value it has to have, of those that matter.
    """
    place = text.find("{")
    if place < 0:
        return False
    try:
        pairs, _ = json.JSONDecoder(object_pairs_hook=_Pairs).raw_decode(text, place)
    except (ValueError, RecursionError):
        return False
    found = dict(pairs)
    right = all(type(found.get(key)) is type(value) and found[key] == value for key, value in (values or {}).items())
    return sorted(key for key, _ in pairs) == sorted(keys) and right


class _Pairs(tuple):
    """A JSON object's keys and values as they stand, one that is there twice too."""


def lines_begin_with(text: str, prefix: str, count: int) -> bool:
    """Whether the answer is so many lines that each begin so and go on; no two the same, no other line beside them.

    Args:
        text: The answer; its empty lines do not count.
        prefix: What every line begins with, behind white space.
        count: Lines.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    begin = all(line.startswith(prefix) and line[len(prefix) :].strip() for line in lines)
    return begin and len(lines) == count == len(set(lines))


def items_in_list(text: str, count: int, among: Sequence[str] | None = None) -> bool:
    """Whether the answer is one line of so many different items with commas (``,``, ``，`` or ``、``) between them.

    Args:
        text: The answer; a label before it, and quotes and stops around items, do not count.
        count: Items.
        among: What each has to be one of, whatever its case; by default anything.
    """
    items = [item.strip(_QUOTES_AND_STOPS).casefold() for item in re.split("[,、]", normalised(text))]
    known = among is None or set(items) <= {normalised(each).casefold() for each in among}
    return "\n" not in text.strip() and all(items) and len(items) == count == len(set(items)) and known


def balanced(text: str, opened: str = "") -> bool:
    """Whether the answer closes all that is open, in the right order, and opens nothing that it does not close.

    Args:
        text: The answer, which may repeat ``opened`` before it goes on; it has one bracket at least. What is no bracket
            is passed over.
        opened: What was open before it.
    """
    brackets = _brackets(text)
    before = _brackets(opened)
    left = list(before) if not before or not brackets.startswith(before) else []
    for bracket in brackets:
        if bracket not in _CLOSES:
            left.append(bracket)
        elif not left or left.pop() != _CLOSES[bracket]:
            return False
    return bool(brackets) and not left


def _brackets(text: str) -> str:
    return "".join(letter for letter in text if letter in _CLOSES or letter in _CLOSES.values())


def no_repetition(text: str, mentions: Sequence[str], most: float = 0.2, least: int = 20) -> bool:
    """Whether a free answer goes on, keeps to what was asked, and is not caught in a loop.

    Args:
        text: The answer.
        mentions: Words of which one at least must be in it, whatever its case: no loop is not yet an answer.
        most: Largest share of its 4-grams that were in it before (``repetition``: of words, or of characters where
            there are no spaces).
        least: Characters it must have, white space left out.
    """
    said = text.casefold()
    about = any(word.casefold() in said for word in mentions)
    return about and len("".join(text.split())) >= least and repetition(text) <= most


def one_of(text: str, values: Sequence[str], but_not: Sequence[str] = ()) -> bool:
    """Whether one of these is in the answer, and none of what would be wrong.

    Latin words must stand there whole (``cat`` is not in ``catalogue``); case does not matter.

    Args:
        text: The answer.
        values: Right ones, which mean the same.
        but_not: Wrong ones: who lists everything has not answered.
    """
    said = unicodedata.normalize("NFKC", text).casefold()
    return any(_stands_in(value, said) for value in values) and not any(_stands_in(value, said) for value in but_not)


def _stands_in(value: str, said: str) -> bool:
    word = re.escape(unicodedata.normalize("NFKC", value).casefold())
    return re.search(rf"(?<![a-z\d]){word}(?![a-z\d])", said) is not None


RULES: dict[str, Callable[..., bool]] = {
    rule.__name__: rule
    for rule in (equals, number, regex, json_keys, lines_begin_with, items_in_list, balanced, no_repetition, one_of)
}
"""Name → the function of an answer's text and of its own parameters."""


def check_rule(where: str, rule: object) -> None:
    """Refuses what is no rule, or has other parameters than its function.

    Args:
        where: Whose rule it is, for the message.
        rule: ``{"name": one of RULES, …}`` with that function's parameters by name.

    Raises:
        LowvramError: Says what it expected.
    """
    if not isinstance(rule, dict) or rule.get("name") not in RULES:
        raise LowvramError(f"{where}: expected a rule with a name among {', '.join(RULES)}, found {rule!r}")
    parameters = {key: value for key, value in rule.items() if key != "name"}
    function = RULES[rule["name"]]
    try:
        inspect.signature(function).bind("", **parameters)
    except TypeError as error:
        takes = ", ".join(list(inspect.signature(function).parameters)[1:])
        raise LowvramError(f"{where}: expected {rule['name']} with {takes}, found {', '.join(parameters)}") from error


def passes(rule: dict, text: str) -> bool:
    """Whether an answer passes a rule, see ``check_rule``."""
    return RULES[rule["name"]](text, **{key: value for key, value in rule.items() if key != "name"})
