"""A chat template's text: what it would write on a given day, and which of its lines tests something."""

import re
import string
from collections.abc import Callable
from datetime import date, datetime

_TAG = r"\{[%{][^%}]*"
DATE = (rf"{_TAG}strftime_now\s*\(", "strftime_now")
"""Patterns, the likeliest first, of where a template writes the date."""

OWN_SYSTEM_MESSAGE = (rf"{_TAG}['\"]system['\"]",)
"""Of where it asks for a system message."""

FOLLOWED = (
    *(rf"{_TAG}\bif\b[^%}}]*{name}" for name in ("last_query_index", r"loop\.last", "</think>", r"\|\s*length")),
    "</think>",
    "reasoning",
)
"""Of where it asks which messages are the last ones, or takes reasoning off."""

_OTHER = str.maketrans(
    string.digits + string.ascii_letters,
    string.digits[1:] + string.digits[:1] + string.ascii_letters[1:] + string.ascii_letters[:1],
)
_QUOTED = 80  # letters of a line


def on_another_day(template: str, now: datetime) -> str:
    """The same template with a clock that is wrong in every letter and digit, and writes as many as the right one.

    Args:
        template: A chat template.
        now: What the right clock says.
    """
    return _with_clock(template, lambda code: now.strftime(code).translate(_OTHER))


def on_day(template: str, day: date) -> str:
    """The same template with a clock that stands still on a day.

    Args:
        template: A chat template.
        day: Which.
    """
    return _with_clock(template, day.strftime)


def _with_clock(template: str, write: Callable[[str], str]) -> str:
    """The same template with a clock that writes each code, such as ``%d``, so.

    transformers gives templates ``strftime_now``; a macro of that name takes its place in this one text, and no other
    template sees it.
    """
    codes = sorted(set(re.findall("%-?[A-Za-z]", template)))
    filters = [f" | replace({code!r}, {write(code)!r})" for code in codes]
    macro = "{% macro strftime_now(format) %}{{ format" + "".join(filters) + " }}{% endmacro %}"
    return f"{macro}\n{template}"  # Jinja drops that line's end, so the text begins as it did


def line_with(template: str, *patterns: str) -> tuple[int, str] | None:
    """The first place of a template that one of some patterns matches, the first pattern first.

    Returns:
        The line's number, from 1, and the line from there on, shortened; ``None`` where none matches.
    """
    for pattern in patterns:
        if found := re.search(pattern, template):
            line = template[found.start() :].partition("\n")[0].rstrip()
            shortened = line if len(line) <= _QUOTED else line[: _QUOTED - 1] + "…"
            return template.count("\n", 0, found.start()) + 1, shortened
    return None
