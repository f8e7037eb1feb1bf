"""GPTQ against a plain implementation of its rule, against rounding without it, and where moments say too little."""

import pytest
import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.model.formats import FORMATS, get_format
from lowvram_lab.weights import gptq as module
from lowvram_lab.weights.gptq import DAMPINGS, error_spread, gptq, output_error
from lowvram_lab.weights.solvers import round_to_nearest, search_clip
from tests.helpers.tiny import seeded

INTEGERS = [name for name, fmt in FORMATS.items() if fmt.kind in ("int8", "int4", "packed")]
COLUMNS = 768  # a multiple of every group size


def moments_of(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def correlated(columns: int, tokens: int = 2000, seed: int = 1) -> torch.Tensor:
    """Moments of inputs that lie near a space of a few dimensions, as those of real layers do."""
    shared = seeded(tokens, 16, seed=seed) @ seeded(16, columns, seed=seed + 1) / 4
    return moments_of(shared + 0.3 * seeded(tokens, columns, seed=seed + 2))


def total_error(found, weight, moments) -> float:
    return float(output_error(found.dequantize() - weight, moments).sum())


def one_column_at_a_time(weight, fmt, moments, scale, act_order: bool) -> torch.Tensor:
    """Optimal brain quantisation in a fixed order, in float64: round a column, spread its error, drop it for good."""
    weight, hessian = weight.double(), moments.double()
    hessian = hessian + DAMPINGS[0] * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.linalg.inv(hessian)
    low, high = -(1 << (fmt.bits - 1)) + (fmt.kind == "int8"), (1 << (fmt.bits - 1)) - 1
    codes, left = torch.zeros_like(weight), list(range(weight.shape[1]))
    while left:
        column = max(left, key=lambda c: moments[c, c]) if act_order else left[0]
        step = scale[:, column // (fmt.group_size or weight.shape[1])].double()
        codes[:, column] = (weight[:, column] / step).round().clamp(low, high)
        error = (weight[:, column] - codes[:, column] * step) / inverse[column, column]
        weight = weight - error[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
        left.remove(column)
    return codes.to(torch.int8)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("columns", [32, 160])  # 160: five groups, and more than one block of columns
@pytest.mark.parametrize("name", ["int2-g32", "int3-g32", "int4-g32", "int6-g32", "int8"])
def test_codes_are_those_of_the_plain_rule(name, columns, act_order):
    weight, fmt, moments = seeded(64, columns), get_format(name), correlated(columns)
    found = gptq(weight, fmt, moments, act_order=act_order)
    expected = one_column_at_a_time(weight, fmt, moments, found.scale, act_order)
    # float32 against float64 may round a tie the other way, and then the rest of that row
    assert (found.codes == expected).float().mean() >= 0.99
    assert (found.codes != search_clip(weight, fmt, moments.diagonal()).codes).float().mean() > 0.05


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", INTEGERS)
def test_outputs_change_less_than_by_rounding_alone(name, act_order):
    weight, fmt, moments = seeded(48, COLUMNS), get_format(name), correlated(COLUMNS)
    found, start = gptq(weight, fmt, moments, act_order=act_order), search_clip(weight, fmt, moments.diagonal())
    assert torch.equal(found.scale, start.scale)
    assert found.zero is None
    assert total_error(found, weight, moments) < 0.2 * total_error(start, weight, moments)
    if fmt.kind == "int8":
        assert found.codes.min() >= -127


def test_columns_by_falling_moment_do_better():
    weight, fmt = seeded(48, COLUMNS), get_format("int3")
    sizes = torch.linspace(0.1, 3, COLUMNS)  # rising: from left to right is the worst order
    moments = correlated(COLUMNS) * sizes * sizes[:, None]
    by_moment, by_place = (total_error(gptq(weight, fmt, moments, act_order=a), weight, moments) for a in (True, False))
    assert by_moment < 0.9 * by_place


@pytest.mark.parametrize("name", INTEGERS)
def test_inputs_without_correlation_leave_the_nearest_codes(name):
    weight, fmt = seeded(16, COLUMNS), get_format(name)
    moments = 3.7 * torch.eye(COLUMNS)
    found, nearest = gptq(weight, fmt, moments), search_clip(weight, fmt, moments.diagonal())
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.scale, nearest.scale)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", ["int2", "int3-g32", "int4", "int5", "int6", "int8"])
def test_three_tokens_and_an_unused_channel_do_no_harm(name, act_order):
    for seed in range(3):
        weight, fmt, inputs = seeded(32, 64, seed=seed), get_format(name), seeded(3, 64, seed=50 + seed)
        inputs[:, 7] = 0
        moments = moments_of(inputs)
        found, nearest = gptq(weight, fmt, moments, act_order=act_order), round_to_nearest(weight, fmt)
        assert total_error(found, weight, moments) <= 1.05 * total_error(nearest, weight, moments)
        assert found.dequantize().isfinite().all()
        # the unused channel neither gives nor takes an error
        assert torch.equal(found.codes[:, 7], search_clip(weight, fmt, moments.diagonal()).codes[:, 7])


@pytest.mark.parametrize("moments", [torch.zeros(64, 64), 5 - 4 * torch.eye(64)], ids=["none", "not positive definite"])
def test_moments_that_say_nothing_leave_the_nearest_codes(moments):
    weight, fmt = seeded(16, 64), get_format("int3")
    assert torch.equal(gptq(weight, fmt, moments).codes, search_clip(weight, fmt, moments.diagonal()).codes)


def test_a_channel_that_always_says_the_same_as_another_takes_its_error():
    inputs = seeded(500, 64, seed=1)
    inputs[:, 1] = inputs[:, 0]
    moments, weight, fmt = moments_of(inputs), seeded(256, 64), get_format("int4")
    found = gptq(weight, fmt, moments)
    errors = found.dequantize() - weight
    # what two of them leave together has the variance of one rounding, not of two
    assert errors[:, :2].sum(dim=1).var() < 0.7 * errors[:, 2:4].sum(dim=1).var()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(bad):
    moments = torch.eye(64)
    moments[3, 3] = bad
    with pytest.raises(CheckpointError, match="finite calibration moments"):
        gptq(seeded(4, 64), get_format("int3"), moments)


@pytest.mark.parametrize("name", ["int3", "int4", "int8"])
def test_rows_are_solved_for_themselves(name, monkeypatch):
    weight, fmt, moments = seeded(130, 256), get_format(name), correlated(256)
    whole = gptq(weight, fmt, moments)
    # another number of rows is another order of summation in a product of matrices, hence a rare tie
    for row in (0, 5, 129):
        assert (gptq(weight[row : row + 1], fmt, moments).codes == whole.codes[row]).float().mean() > 0.99
    monkeypatch.setattr(module, "ROW_BYTES", 1)  # 64 rows at a time
    pieces = gptq(weight, fmt, moments)
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.scale, whole.scale)


def test_weight_and_moments_are_left_alone_and_any_float_will_do():
    weight, fmt, moments = seeded(16, 64, dtype=torch.bfloat16), get_format("int3"), correlated(64)
    moments[7], moments[:, 7] = 0, 0
    before = weight.float(), moments.clone()
    found, again = gptq(weight, fmt, moments), gptq(before[0], fmt, moments)
    assert torch.equal(found.codes, again.codes)
    assert torch.equal(before[0], weight.float())
    assert torch.equal(before[1], moments)


def test_the_spread_is_the_cholesky_factor_of_the_inverse():
    moments, order = correlated(64), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    factor = error_spread(moments, order)
    damped = (moments + DAMPINGS[0] * moments.diagonal().mean() * torch.eye(64))[order][:, order].double()
    assert torch.equal(factor, factor.triu())
    # float32 on both sides of an inverse whose condition is some thousand
    assert (factor.double().T @ factor.double() @ damped - torch.eye(64)).abs().max() < 1e-2


def test_output_error_is_the_mean_square_of_the_outputs_change():
    inputs, change = seeded(500, 64), seeded(8, 64, seed=1)
    expected = (inputs @ change.T).square().mean(dim=0)
    assert output_error(change, moments_of(inputs)) == pytest.approx(expected.numpy(), rel=1e-4)
