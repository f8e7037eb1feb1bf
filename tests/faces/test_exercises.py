"""An exercise is right or not yet; it never raises."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram_lab.faces.exercises import Verdict, check

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(PLAIN, PLAIN, st.floats(0, 1))
def test_it_never_raises(yours, expected, tolerance):
    verdict = check("1", yours, expected, tolerance)
    assert isinstance(verdict, Verdict)
    assert bool(verdict) is verdict.right
    assert verdict.text.startswith("1: right" if verdict else "1: not yet")
    assert "\n" not in verdict.text.replace(repr(yours), "").replace(repr(expected), "") or len(verdict.text) < 400


@pytest.mark.parametrize(
    ("yours", "expected", "tolerance"),
    [
        (4096, 4096, 0),
        (4096.0, 4096, 0),
        (np.int64(5), 5, 0),
        (torch.tensor(5), 5, 0),
        ("lm_head", "lm_head", 0),
        (104, 100, 0.05),
        (95.5, 100, 0.05),
        ([1, 2.04], (1, 2), 0.05),
        ({"a": 1}, {"a": 1}, 0),
        ({1, 2}, {2, 1}, 0),
        (True, True, 0),
        (0, 0, 0),
        (-104, -100, 0.05),
    ],
)
def test_right(yours, expected, tolerance):
    verdict = check("Exercise 1", yours, expected, tolerance)
    assert verdict, verdict
    assert verdict.text.startswith("Exercise 1: right, ")


@pytest.mark.parametrize(
    ("yours", "expected", "tolerance"),
    [
        (4095, 4096, 0),
        (106, 100, 0.05),
        ([1, 2, 3], [1, 2], 0),
        ([1, 3], [1, 2], 0.05),
        ("lm_head ", "lm_head", 0),
        ({"a": 2}, {"a": 1}, 0),
        (False, True, 0),
        (float("nan"), 100, 0.5),
        (float("inf"), 100, 0.5),
    ],
)
def test_not_yet_shows_both(yours, expected, tolerance):
    verdict = check("Exercise 1", yours, expected, tolerance)
    assert not verdict
    assert verdict.text.startswith("Exercise 1: not yet: yours is ")
    assert ", expected " in verdict.text
    assert repr(verdict) == verdict.text


@pytest.mark.parametrize("yours", [None, ...])
def test_the_expected_answer_is_not_shown_before_there_is_one(yours):
    verdict = check("1", yours, 5)
    assert not verdict
    assert verdict.text == "1: not yet: no answer so far"


class Odd:
    def __eq__(self, other):
        raise RuntimeError("do not compare me")

    __hash__ = None


@pytest.mark.parametrize(
    ("yours", "expected"),
    [(Odd(), "text"), ("five", 5), (object(), 5), (3, [1, 2]), (torch.ones(3), 1), ([Odd()], ["x"])],
)
def test_what_cannot_be_compared(yours, expected):
    verdict = check("1", yours, expected)
    assert not verdict
    assert "not yet (your answer cannot be compared: " in verdict.text


class Unshowable:
    def __repr__(self):
        raise RuntimeError("do not show me")


def test_what_cannot_be_shown():
    assert check("1", Unshowable(), "x").text == "1: not yet: yours is a Unshowable that cannot be shown, expected 'x'"
    assert "that cannot be shown" in check("1", 10**5000, "x").text


def test_numbers_are_shown_with_separators_and_long_answers_cut():
    assert check("1", 1, 7_900_738_560).text == "1: not yet: yours is 1, expected 7,900,738,560"
    verdict = check("1", "x" * 1000, "y")
    assert len(verdict.text) < 200
    assert "..." in verdict.text


def test_a_tensor_as_the_expected_answer():
    assert check("1", torch.ones(3), torch.ones(3))
    assert not check("1", torch.zeros(3), torch.ones(3))
    assert not check("1", torch.ones(3, 3), torch.ones(3))
    assert check("1", np.arange(3), np.arange(3))
