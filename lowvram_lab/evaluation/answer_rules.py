"""Rules that say of an answer's text whether it is right: each a plain function, exact, and knowing no model."""

import inspect
import json
import re
import unicodedata
from collections.abc import Callable, Sequence

from lowvram_lab.errors import LowvramError
from lowvram_lab.evaluation.fidelity import repetition

_QUOTES_AND_STOPS = " \t\n\r\"'`*.,;:!?“”‘’「」。、！？；："
_LABEL = re.compile(
    r"(?:(?:the )?(?:answer|output|result)(?: is)?|a|(?:答案|输出|结果)是?|答)\s*[:：]\s*", re.IGNORECASE
)
_FENCE = re.compile(r"\s*```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_NUMBER = re.compile(
    r"(?<![A-Za-z\d.])(?:(?<![^\s(=:])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![A-Za-z\d]|\.\d|,\d{3}(?!\d))"
)
_CLOSES = {"(": ")", "[": "]", "{": "}", "<": ">", "【": "】", "《": "》"}


def unfenced(text: str) -> str:
    """What stands in the fence (three backticks and a language, on a line of their own) that an answer begins with.

    Args:
        text: The answer; one that begins with no fence stays as it is. A fence that is not closed goes on to the end.
    """
    fence = _FENCE.match(text)
    return fence[1] if fence else text


def normalised(text: str) -> str:
    """An answer without what is no part of it.

    Full-width letters, digits and round brackets become plain ones (NFKC), white space becomes single spaces, and
    quotes, stops and a label such as ``Answer:``, ``The answer is:`` or ``答：`` go from its ends. Case stays.

    Args:
        text: The answer.
    """
    plain = " ".join(_plain(text).split()).strip(_QUOTES_AND_STOPS)
    return _LABEL.sub("", plain, count=1).strip(_QUOTES_AND_STOPS) if _LABEL.match(plain) else plain


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def equals(text: str, value: str, any_case: bool = False) -> bool:
    """Whether the answer is this, both normalised.

    Args:
        text: The answer.
        value: What it has to be.
        any_case: Upper and lower case are the same; by default they differ.
    """
    said, right = normalised(text), normalised(value)
    return said.casefold() == right.casefold() if any_case else said == right


def number(text: str, value: float) -> bool:
    """Whether the last number of the answer is this one: what comes before may be the way there.

    Numbers are in digits, with a sign, thousands commas and decimals where they have them, and no Latin letter beside
    them (``12cm``). Numbers in words (``twelve``, ``十二``) are none.

    Args:
        text: The answer.
        value: What it has to come to.
    """
    return _numbers(text)[-1:] == [value]


def numbers(text: str, values: Sequence[float]) -> bool:
    """Whether the numbers of the answer are these and no others, in this order, whatever stands between them.

    What a number is, says ``number``.

    Args:
        text: The answer.
        values: All of them.
    """
    return _numbers(text) == list(values)


def _numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in _NUMBER.findall(_plain(text))]


def regex(text: str, pattern: str) -> bool:
    """Whether a pattern matches all of the answer, normalised: a full-width comma is a plain one in it.

    Args:
        text: The answer.
        pattern: As ``re`` has it.
    """
    return re.fullmatch(pattern, normalised(text)) is not None


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


def lines_begin_with(text: str, prefix: str, count: int, among: Sequence[str] | None = None) -> bool:
    """Whether the answer is so many lines that each begin so and go on; no two the same, no other line beside them.

    Args:
        text: The answer; its empty lines do not count.
        prefix: What every line begins with, behind white space.
        count: Lines.
        among: What each has to be one of behind its prefix, whatever its case and its stop; by default anything.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    items = [_item(line[len(prefix) :]) for line in lines]
    begin = all(line.startswith(prefix) for line in lines)
    return begin and _different(items, count) and _known(items, among)


def items_in_list(text: str, count: int, among: Sequence[str] | None = None, in_order: bool = False) -> bool:
    """Whether the answer is one line of so many different items with commas (``,``, ``，`` or ``、``) between them.

    Args:
        text: The answer; a label before it, quotes and stops around items, and an ``and`` behind a comma do not count.
        count: Items.
        among: What each has to be one of, whatever its case; by default anything.
        in_order: The items have to be the first ``count`` of ``among`` as they stand there.
    """
    items = [_item(item).removeprefix("and ") for item in re.split("[,、]", normalised(text))]
    if "\n" in text.strip() or not _different(items, count) or not _known(items, among):
        return False
    return not in_order or items == [_item(each) for each in (among or [])[:count]]


def _item(text: str) -> str:
    return _plain(text).strip(_QUOTES_AND_STOPS).casefold()


def _different(items: list[str], count: int) -> bool:
    """So many items, none of them empty and no two the same."""
    return all(items) and len(items) == count == len(set(items))


def _known(items: list[str], among: Sequence[str] | None) -> bool:
    return among is None or set(items) <= {_item(each) for each in among}


def closes(text: str, opened: str) -> bool:
    """Whether the answer closes all brackets of a text that are open, in the right order, and says nothing else.

    It is the text with what closes them behind it, or that alone; normalised, and white space does not count. Brackets
    are round, square, curly, angle ones, ``【】`` and ``《》``.

    Args:
        text: The answer.
        opened: The text, such as ``"[1, (2"``: ``"[1, (2)]"`` and ``")]"`` close it.
    """
    before = "".join(_plain(opened).split())
    said = "".join(normalised(text).split())
    left: list[str] = []
    for letter in before:
        if letter in _CLOSES:
            left.append(_CLOSES[letter])
        elif left and letter == left[-1]:
            left.pop()
    missing = "".join(reversed(left))
    return bool(missing) and said in (missing, before + missing)


def no_repetition(
    text: str, mentions: Sequence[str], most: float = 0.2, least: int = 20, but_not: Sequence[str] = ()
) -> bool:
    """Whether a free answer goes on, keeps to what was asked, copies nothing, and is not caught in a loop.

    Args:
        text: The answer.
        mentions: Words of which one at least must be in it, whatever its case: no loop is not yet an answer.
        most: Largest share of its 4-grams that were in it before (``repetition``: of words, or of characters where
            there are no spaces).
        least: Characters it must have, white space left out.
        but_not: What must not be in it, whatever its case: an example's answer that it could repeat.
    """
    said = text.casefold()
    about = any(word.casefold() in said for word in mentions)
    copied = any(words.casefold() in said for words in but_not)
    return about and not copied and len("".join(text.split())) >= least and repetition(text) <= most


def short_answer(text: str, values: Sequence[str], beside: Sequence[str] = ()) -> bool:
    """Whether one of these is in the answer, and beside it only words that change nothing: ``not Paris`` is wrong.

    Latin words must stand there whole (``cat`` is not in ``catalogue``); case, quotes, stops and round brackets do not
    matter.

    Args:
        text: The answer.
        values: Right ones, which mean the same.
        beside: Words that may be there too, such as the question's own: ``The capital of France is`` Paris.
    """
    said = normalised(text).casefold().replace("’", "'")
    rest = _without(said, values)
    return rest != said and not _without(rest, beside).strip(_QUOTES_AND_STOPS + "()")


def _without(said: str, words: Sequence[str]) -> str:
    """A text without some words, the longest first: one may be a part of another."""
    for word in sorted((_plain(word).casefold() for word in words), key=len, reverse=True):
        said = re.sub(rf"(?<![a-z\d]){re.escape(word)}(?![a-z\d])", " ", said)
    return said


RULES: dict[str, Callable[..., bool]] = {
    rule.__name__: rule
    for rule in (
        equals,
        number,
        numbers,
        regex,
        json_keys,
        lines_begin_with,
        items_in_list,
        closes,
        no_repetition,
        short_answer,
    )
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
