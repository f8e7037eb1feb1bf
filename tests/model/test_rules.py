"""What a whole number is; the rules of a plan are in test_plan.py, by the plans that break them."""

import pytest

from lowvram_lab.errors import LowvramError, PlanError
from lowvram_lab.model.rules import is_whole_number, whole_number


@pytest.mark.parametrize("value", [1, 2, 7, 2**70])
def test_whole_numbers(value):
    assert is_whole_number(value, 1)
    whole_number("tokens", value, 1)


@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, 2.5, "2", None, float("nan"), [1]])
def test_what_is_none_is_named_with_what_was_found(value):
    assert not is_whole_number(value, 1)
    with pytest.raises(PlanError) as error:
        whole_number("tokens", value, 1)
    assert str(error.value) == f"expected tokens of 1 or more, found {value!r}"


def test_bounds_are_included_and_the_error_can_be_another():
    whole_number("layers", 0, 0, 3)
    whole_number("layers", 3, 0, 3)
    with pytest.raises(LowvramError, match="^expected layers from 0 to 3, found 4$") as error:
        whole_number("layers", 4, 0, 3, LowvramError)
    assert type(error.value) is LowvramError
