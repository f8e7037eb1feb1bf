"""What a whole number is, where planes go; the rules of a plan are in test_plan.py, by the plans that break them."""

import pytest

from lowvram_lab.errors import LowvramError, PlanError
from lowvram_lab.model.rules import DEVICES, PRECISIONS, Assignment, check_precision, is_whole_number, whole_number
from tests.helpers.tiny import tiny_spec


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


@pytest.mark.parametrize("device", DEVICES)
def test_a_low_plane_is_beside_the_high_one_unless_it_is_said(device):
    assert Assignment("INT4+4", device) == Assignment("int4+4", device, device)
    assert Assignment("int4+4", device, "disk").places == (device, "disk")
    assert Assignment("int4", device).low is None
    assert Assignment("int4", device).places == (device,)


MOVED = {  # where the planes are, where the high one goes → where the low one is then
    ("gpu", "gpu", "cpu"): "cpu",
    ("gpu", "gpu", "disk"): "disk",
    ("cpu", "cpu", "gpu"): "gpu",
    ("disk", "disk", "gpu"): "gpu",
    ("gpu", "cpu", "cpu"): "cpu",
    ("gpu", "cpu", "disk"): "disk",
    ("gpu", "disk", "cpu"): "disk",
    ("cpu", "disk", "gpu"): "disk",
    ("gpu", "cpu", "gpu"): "cpu",
}


@pytest.mark.parametrize("case", MOVED)
def test_a_low_plane_goes_along_and_never_lies_nearer(case):
    device, low, target = case
    assert Assignment("int4+4", device, low).moved(target) == Assignment("int4+4", target, MOVED[case])


@pytest.mark.parametrize("target", DEVICES)
def test_one_plane_moves_by_itself(target):
    assert Assignment("int4", "gpu").moved(target) == Assignment("int4", target)


def test_a_place_that_is_none_is_left_for_the_plan_to_refuse():
    assert Assignment("int4+4", "gpu").moved("tape").device == "tape"


def test_another_format_has_a_low_plane_or_none():
    apart = Assignment("int4+4", "gpu", "cpu")
    assert apart.stored_as("INT4+4-g128") == Assignment("int4+4-g128", "gpu", "cpu")
    assert apart.stored_as("int4") == Assignment("int4", "gpu")
    assert Assignment("int4", "cpu").stored_as("int4+4") == Assignment("int4+4", "cpu", "cpu")


@pytest.mark.parametrize("precision", [*PRECISIONS, "exact", "", "FAST", 1])
@pytest.mark.parametrize("low_planes", [set(), {"cpu"}])
def test_a_precision_needs_planes_to_choose_from(precision, low_planes):
    spec = tiny_spec("qwen2")
    if precision not in PRECISIONS:
        expected = f"expected precision fast, precise, auto, found {precision!r}"
    elif low_planes or precision == "fast":
        check_precision(spec, precision, low_planes)
        return
    else:
        expected = f"precision {precision} needs weights in two planes, found tiny-qwen2 in one; convert the 16-bit"
    with pytest.raises(PlanError) as error:
        check_precision(spec, precision, low_planes)
    assert str(error.value).startswith(expected)
