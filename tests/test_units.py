import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram_lab.errors import LowvramError, UnitError
from lowvram_lab.units import GiB, KiB, MiB, format_bytes, parse_bytes

FACTORS = (
    {"B": 1}
    | {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
    | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
)

sizes = st.integers(min_value=1, max_value=1 << 50)
units = st.sampled_from(sorted(FACTORS))


@given(sizes)
def test_whole_bytes_pass_unchanged(size):
    assert parse_bytes(size) == size
    assert parse_bytes(f"{size}B") == size


@given(
    whole=st.integers(0, 10**20),
    tail=st.from_regex(r"\A(\.[0-9]{1,12})?\Z"),
    unit=units,
    space=st.sampled_from(["", " ", "  "]),
)
def test_parse_is_exact_and_rounds_down(whole, tail, unit, space):
    exact = int(Fraction(f"{whole}{tail}") * FACTORS[unit])
    text = f"{whole}{tail}{space}{unit}"
    if exact == 0:
        with pytest.raises(UnitError):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == exact


@given(sizes)
def test_format_then_parse_returns_within_the_printed_digits(size):
    text = format_bytes(size)
    digits, unit = text.split()
    half_of_last_digit = {"GiB": 0.005 * GiB, "MiB": 0.05 * MiB, "KiB": 0.05 * KiB, "B": 0}[unit]
    assert abs(parse_bytes(text) - size) <= half_of_last_digit + 1, digits


@given(sizes, sizes)
def test_a_larger_size_never_reads_smaller(a, b):
    small, large = sorted((a, b))
    assert parse_bytes(format_bytes(small)) <= parse_bytes(format_bytes(large))


@given(a=st.integers(1, 10**9), b=st.integers(1, 10**9), unit=units)
def test_parse_is_monotone(a, b, unit):
    assert (parse_bytes(f"{a}{unit}") <= parse_bytes(f"{b}{unit}")) == (a <= b)


@given(sizes)
def test_a_negative_difference_is_the_same_with_a_sign(size):
    assert format_bytes(-size) == "-" + format_bytes(size)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 * GiB),
        ("4 gib", 4 * GiB),
        (" 4GIB ", 4 * GiB),
        ("4GB", 4 * 1000**3),
        ("4gb", 4 * 1000**3),
        ("192 MiB", 192 * MiB),
        ("1.5KiB", 1536),
        ("+1KiB", 1024),
        ("2TiB", 2 * 1024**4),
        ("9007199254740993B", 9007199254740993),  # 2**53 + 1: not a float
    ],
)
def test_readings(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "0.0 MiB"), (1, "1 B"), (1023, "1023 B"), (KiB, "1.0 KiB"), (MiB, "1.0 MiB"), (4 * GiB, "4.00 GiB")],
)
def test_printed(size, expected):
    assert format_bytes(size) == expected


@pytest.mark.parametrize(
    "bad", ["0", "0GiB", "0.0001B", "-1GiB", "-4", "4", "1.5", "", " ", "GiB", "nan", "inf", "nanGiB", "1e3GiB"]
)
@pytest.mark.parametrize("pad", ["", " "])
def test_refused_texts(bad, pad):
    with pytest.raises(UnitError, match="expected"):
        parse_bytes(pad + bad + pad)


@pytest.mark.parametrize(
    "bad", ["4XB", "4GiBs", "4GGB", "4 G B", "4,5GiB", "1_000MB", "٤GiB", "4G", "0x4GiB", "4ib", "4GiB 2MiB", ".5GiB"]
)
def test_refused_units_and_numbers(bad):
    with pytest.raises(UnitError, match="expected"):
        parse_bytes(bad)


@pytest.mark.parametrize("bad", [True, False, None, 4.0, b"4GiB", [4], 0, -1])
def test_refused_values(bad):
    with pytest.raises(UnitError, match="expected"):
        parse_bytes(bad)


def test_bits_are_refused_with_both_ways_out():
    with pytest.raises(UnitError) as refusal:
        parse_bytes("4Gb")
    message = str(refusal.value)
    assert "4GiB" in message and "4GB" in message
    assert "4 Gbit" in message and format_bytes(4 * 1000**3 // 8) in message  # how it was read


@pytest.mark.parametrize("bad", ["4", "4096", "4294967296"])
def test_a_bare_number_is_told_its_units(bad):
    with pytest.raises(UnitError, match=f"{bad}GiB.*{bad}B"):
        parse_bytes(bad)


@given(st.text(max_size=12) | st.from_regex(r"\A[+-]?[0-9]{1,400}(\.[0-9]{1,30})?\s*[A-Za-z]{0,4}\Z"))
def test_any_text_gives_a_size_or_one_clear_error(text):
    try:
        assert parse_bytes(text) >= 1
    except LowvramError as refusal:
        assert re.search(r"[0-9][KMGT]?i?B\b", str(refusal))  # says what to write instead
