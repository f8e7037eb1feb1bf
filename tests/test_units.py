import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram_lab.errors import LowvramError, UnitError
from lowvram_lab.units import GiB, KiB, MiB, format_bytes, parse_bytes, parse_tokens

FACTORS = {"B": 1} | {
    spelling: 1024**power
    for power, letter in enumerate("KMGT", 1)
    for tail in ("", "B", "iB")
    for spelling in (letter + tail, letter.lower() + tail, (letter + tail).lower(), (letter + tail).upper())
    if not spelling[:1].isupper() or not spelling.endswith("b")
}

sizes = st.integers(min_value=1, max_value=1 << 50)
units = st.sampled_from(sorted(FACTORS))


@given(sizes)
def test_whole_bytes_pass_unchanged(size):
    assert parse_bytes(size) == size
    assert parse_bytes(f"{size}B") == size


@given(
    whole=st.integers(0, 10**20),
    tail=st.from_regex(r"\A([.,][0-9]{1,12})?\Z").filter(lambda tail: not re.fullmatch(",[0-9]{3}", tail)),
    unit=units,
    space=st.sampled_from(["", " ", "  "]),
)
def test_parse_is_exact_and_rounds_down(whole, tail, unit, space):
    exact = int(Fraction(f"{whole}{tail}".replace(",", ".")) * FACTORS[unit])
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
        ("4GB", 4 * GiB),  # a card sold as 4 GB
        ("4gb", 4 * GiB),
        ("4 GB", 4 * GiB),
        ("4G", 4 * GiB),
        ("4g", 4 * GiB),
        ("4096MiB", 4 * GiB),
        ("4096MB", 4 * GiB),
        ("4096M", 4 * GiB),
        ("4,5GiB", 4 * GiB + 512 * MiB),
        ("4.125GiB", 4 * GiB + 128 * MiB),
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
    "bad",
    ["4XB", "4GiBs", "4GGB", "4 G B", "1_000MB", "٤GiB", "0x4GiB", "4ib", "4GiB 2MiB", ".5GiB", "4,5,6GiB", "1.5,2GB"],
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
    assert "4 Gbit" in message and format_bytes(4 * GiB // 8) in message  # how it was read


@pytest.mark.parametrize(
    ("bad", "meant"),
    [("4", "4GiB"), ("1.5", "1.5GiB"), ("4,5", "4,5GiB"), ("4096", "4096MiB"), ("4294967296", "4294967296B")],
)
def test_a_bare_number_is_told_its_likely_unit(bad, meant):
    with pytest.raises(UnitError, match=rf"expected a unit.*did you mean {meant}\?"):
        parse_bytes(bad)
    assert parse_bytes(meant) > 0


@pytest.mark.parametrize("bad", ["4,096MiB", "1,024GB", "4,096"])
def test_a_comma_that_may_be_either_is_refused(bad):
    with pytest.raises(UnitError, match="expected .* or .* without a comma"):
        parse_bytes(bad)


@given(tokens=st.integers(1, 10**9), unit=st.sampled_from(["", "k", "K", "m", "M"]))
def test_tokens_are_exact(tokens, unit):
    assert parse_tokens(f"{tokens}{unit}") == tokens * {"": 1, "k": 1024, "m": 1024**2}[unit.lower()]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("4k", 4096), ("32k", 32768), ("128K", 131072), ("1M", 1048576), (" 4 k ", 4096), ("0.5k", 512), ("1,5k", 1536)],
)
def test_contexts_as_they_are_typed(text, tokens):
    assert parse_tokens(text) == tokens


@given(st.text(max_size=8) | st.from_regex(r"\A[+-]?[0-9]{1,40}([.,][0-9]{1,4})?\s*[A-Za-z]{0,2}\Z"))
def test_any_text_gives_a_number_of_tokens_or_one_clear_error(text):
    try:
        assert parse_tokens(text) >= 1
    except UnitError as refusal:
        assert "expected" in str(refusal) and "\n" not in str(refusal)


@pytest.mark.parametrize("bad", ["", "k", "0", "0k", "-4k", "1.5", "4kb", "4kk", "longest", "٤", "4g", "32,768"])
def test_contexts_that_are_none(bad):
    with pytest.raises(UnitError, match="expected"):
        parse_tokens(bad)


@given(st.text(max_size=12) | st.from_regex(r"\A[+-]?[0-9]{1,400}(\.[0-9]{1,30})?\s*[A-Za-z]{0,4}\Z"))
def test_any_text_gives_a_size_or_one_clear_error(text):
    try:
        assert parse_bytes(text) >= 1
    except LowvramError as refusal:
        assert re.search(r"[0-9][KMGT]?i?B\b|without a comma", str(refusal))  # says what to write instead
