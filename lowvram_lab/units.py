"""Read and print byte counts and token counts. Inside the library both are ``int``; text appears only at the edges.

All sizes are powers of 1024, however they are typed: 4GiB, 4GB, 4G and 4gb are one size, that of a card or a memory
module sold as «4 GB» (JEDEC Standard 100B.01; what nvidia-smi calls 4096MiB). Output is always in MiB or GiB, so that
it says how a size was read. Contexts are in thousands of 1024 tokens too, as models' names have them: 128k is 131072.
"""

import re
from fractions import Fraction

from lowvram_lab.errors import UnitError

KiB, MiB, GiB = 1024, 1024**2, 1024**3

_POWERS = {letter: power for power, letter in enumerate("kmgt", start=1)}
_UNITS = {"b": 1} | {f"{k}{tail}": 1024**n for k, n in _POWERS.items() for tail in ("", "b", "ib")}

_NUMBER = r"([+-]?[0-9]{1,30}(?:[.,][0-9]{1,30})?)"
_SIZE = re.compile(rf"\s*{_NUMBER}\s*([A-Za-z]*)\s*")
_TOKENS = re.compile(rf"\s*{_NUMBER}\s*([kKmM]?)\s*")
_LARGEST_CARD_GIB = 512


def parse_bytes(text: str | int) -> int:
    """Reads a byte count such as ``"4GiB"``, ``"4GB"``, ``"4096 MiB"``, ``"4,5g"`` or the ``int`` 4294967296.

    Args:
        text: A number, with a point or a comma for decimals, and one of B, K, M, G or T (alone, with B or with iB), all
            in powers of 1024; or an ``int`` of bytes. Case does not matter, except that a lower-case ``b`` after an
            upper-case prefix means bits and is refused.

    Returns:
        Bytes, rounded down, at least 1.

    Raises:
        UnitError: The text is not a number with a unit, has an ambiguous number or unit, or is not positive.
    """
    if isinstance(text, bool) or not isinstance(text, int | str):
        raise UnitError(f"expected a size such as 4GiB, found {text!r} of type {type(text).__name__}")
    if isinstance(text, int):
        return _positive(text, str(text))
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UnitError(f"expected a size such as 4GiB or 192MiB, found {text!r}")
    written, unit = match.groups()
    number = _number(written)
    if number <= 0:
        return _positive(0, text)
    if not unit:
        raise UnitError(f"expected a unit after {text!r}; did you mean {written}{_likely_unit(number)}?")
    factor = _UNITS.get(unit.lower())
    if factor is None:
        raise UnitError(f"expected a unit such as MiB, GiB or GB in {text!r}, found {unit!r}; write e.g. {written}GiB")
    if unit[0].isupper() and unit[-1] == "b":
        raise UnitError(
            f"{text!r} reads as {written} {unit[0]}bit, that is {format_bytes(int(number * factor) // 8)}: "
            f"a lower-case b means bits; write {written}{unit[0]}iB or {written}{unit[0]}B for bytes"
        )
    return _positive(int(number * factor), text)


def parse_tokens(text: str) -> int:
    """Reads a number of tokens such as ``"4096"``, ``"4k"``, ``"128K"`` or ``"1M"``: k is 1024, M is 1024 x 1024.

    Returns:
        Tokens, at least 1.

    Raises:
        UnitError: Not a whole number of tokens above zero.
    """
    match = _TOKENS.fullmatch(text)
    if match is None:
        raise UnitError(f"expected a whole number of tokens above zero, such as 4096 or 4k, found {text!r}")
    written, unit = match.groups()
    tokens = _number(written) * 1024 ** _POWERS.get(unit.lower(), 0)
    if tokens.denominator != 1 or tokens < 1:
        raise UnitError(f"expected a whole number of tokens above zero, such as 4096 or 4k, found {text!r}")
    return int(tokens)


def format_bytes(count: int) -> str:
    """Formats bytes as ``"3.74 GiB"`` or ``"192.0 MiB"``; below a tenth of a MiB as KiB or B."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    if size >= GiB:
        return f"{sign}{size / GiB:.2f} GiB"
    if size >= MiB // 10 or size == 0:
        return f"{sign}{size / MiB:.1f} MiB"
    return f"{sign}{size / KiB:.1f} KiB" if size >= KiB else f"{sign}{size} B"


def _number(written: str) -> Fraction:
    """The exact number; a comma before three digits may separate thousands or decimals, and is refused."""
    if re.search(r",[0-9]{3}$", written):
        whole, point = written.replace(",", ""), written.replace(",", ".")
        raise UnitError(f"expected {whole} or {point} without a comma, found {written!r}, which may be read as either")
    return Fraction(written.replace(",", "."))


def _likely_unit(number: Fraction) -> str:
    """What a bare number was probably meant in: GiB like a card's name, MiB like nvidia-smi's table, or bytes."""
    if number <= _LARGEST_CARD_GIB:
        return "GiB"
    return "MiB" if number < MiB else "B"


def _positive(count: int, text: str) -> int:
    if count <= 0:
        raise UnitError(f"expected a size above zero, found {text!r}; write e.g. 4GiB")
    return count
