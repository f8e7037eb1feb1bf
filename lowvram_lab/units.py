"""Parse and format byte counts. Inside the library a size is an ``int`` of bytes; text appears only at the edges.

KiB, MiB, GiB are powers of 1024; KB, MB, GB are powers of 1000 (IEC 80000-13). Output is always in MiB or GiB.
"""

import re
from fractions import Fraction

from lowvram_lab.errors import UnitError

KiB, MiB, GiB = 1024, 1024**2, 1024**3

_FACTORS = {"b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _FACTORS[f"{_letter}ib"] = 1024**_power
    _FACTORS[f"{_letter}b"] = 1000**_power

_PATTERN = re.compile(r"\s*([+-]?[0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Reads a byte count such as ``"4GiB"``, ``"192 MiB"``, ``"4GB"`` or the ``int`` 4294967296.

    Args:
        text: A number with one of B, KiB, MiB, GiB, TiB (1024-based) or KB, MB, GB, TB (1000-based), or an ``int``
            of bytes. Case does not matter, except that a lower-case ``b`` after an upper-case prefix means bits
            and is refused.

    Returns:
        Bytes, rounded down, at least 1.

    Raises:
        UnitError: The text is not a number with a unit, has an ambiguous unit, or is not positive.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise UnitError(f"expected a size such as 4GiB, found {text!r} of type {type(text).__name__}")
    if isinstance(text, int):
        return _positive(text, str(text))
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise UnitError(f"expected a size such as 4GiB or 192MiB, found {text!r}")
    number, unit = match.groups()
    if unit and unit[0].isupper() and unit[-1] == "b":
        bits = Fraction(number) * _FACTORS.get(unit.lower(), 0)
        if bits > 0:
            raise UnitError(
                f"{text!r} reads as {number} {unit[0]}bit, that is {format_bytes(int(bits) // 8)}: "
                f"a lower-case b means bits; write {number}{unit[0]}iB (1024-based) or {number}{unit[0]}B (1000-based)"
            )
    if not unit and Fraction(number) > 0:
        raise UnitError(f"expected a unit after {text!r}; write {number}GiB, {number}MiB, or {number}B for bytes")
    factor = _FACTORS.get(unit.lower() or "b")
    if factor is None:
        hint = f"{number}{unit.upper()}iB" if unit.lower() in set("kmgt") else "4GiB"
        raise UnitError(f"expected a unit such as MiB, GiB, MB or GB in {text!r}, found {unit!r}; write e.g. {hint}")
    return _positive(int(Fraction(number) * factor), text)


def format_bytes(count: int) -> str:
    """Formats bytes as ``"3.74 GiB"`` or ``"192.0 MiB"``; below a tenth of a MiB as KiB or B."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    if size >= GiB:
        return f"{sign}{size / GiB:.2f} GiB"
    if size >= MiB // 10 or size == 0:
        return f"{sign}{size / MiB:.1f} MiB"
    return f"{sign}{size / KiB:.1f} KiB" if size >= KiB else f"{sign}{size} B"


def _positive(count: int, text: str) -> int:
    if count <= 0:
        raise UnitError(f"expected a size above zero, found {text!r}; write e.g. 4GiB")
    return count
