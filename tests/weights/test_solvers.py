"""Each solver has the least error by its own measure, and what it stores is exactly what it computed with."""

import pytest
import torch

from lowvram_lab.errors import CheckpointError, PlanError
from lowvram_lab.model.formats import FORMATS, LOADING_SOLVERS, SCALE_DTYPE, get_format
from lowvram_lab.weights import solvers
from lowvram_lab.weights.codes import IntegerWeight
from lowvram_lab.weights.solvers import by_rows, dequantize, half_quadratic, quantize, round_to_nearest, search_clip
from tests.helpers.tiny import relative_error, seeded

QUANTISED = [name for name, fmt in FORMATS.items() if fmt.kind != "float" and fmt.planes == 1]
INTEGERS = [name for name in QUANTISED if name != "nf4"]
GROUPED = [name for name in INTEGERS if FORMATS[name].kind != "int8"]
COLUMNS = 768  # a multiple of every group size
SOLVERS = {
    "nearest, symmetric": round_to_nearest,
    "nearest, asymmetric": lambda weight, fmt: round_to_nearest(weight, fmt, symmetric=False),
    "clip search": search_clip,
    "half-quadratic": half_quadratic,
}


def heavy_tailed(*shape: int, degrees: int = 3) -> torch.Tensor:
    """Student's t: normal noise over the root of a chi-squared one."""
    return seeded(*shape) / seeded(degrees, *shape, seed=1).square().mean(dim=0).sqrt()


def group_errors(found: IntegerWeight, weight: torch.Tensor, importance: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Weighted squared error of every group ``(out, groups)``, in float64."""
    squares = (found.dequantize() - weight).double().square() * importance
    return squares.view(*found.scale.shape, -1).sum(dim=-1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", INTEGERS)
def test_the_search_is_never_worse_than_the_nearest_codes(name, weighted):
    weight, fmt = heavy_tailed(24, COLUMNS), get_format(name)
    importance = seeded(COLUMNS, seed=2).square() if weighted else None
    measure = importance if weighted else 1.0
    best = group_errors(search_clip(weight, fmt, importance), weight, measure)
    nearest = group_errors(round_to_nearest(weight, fmt), weight, measure)
    assert (best <= nearest * (1 + 1e-4)).all()  # float32's sums of errors that are themselves differences
    # few bits gain most from clipping, of groups with room for outliers
    assert best.sum() < nearest.sum() * (0.9 if fmt.bits <= 3 and fmt.group_size > 16 else 1)


def test_importance_says_whose_error_counts():
    weight, fmt = heavy_tailed(24, COLUMNS), get_format("int3")
    importance = torch.where(torch.arange(COLUMNS) % 8 == 0, 100.0, 1.0)
    with_it, without = search_clip(weight, fmt, importance), search_clip(weight, fmt)
    assert group_errors(with_it, weight, importance).sum() < 0.9 * group_errors(without, weight, importance).sum()
    assert group_errors(with_it, weight).sum() > group_errors(without, weight).sum()


@pytest.mark.parametrize("solve", [round_to_nearest, search_clip])
@pytest.mark.parametrize("name", INTEGERS)
def test_a_weight_that_codes_can_say_comes_back_to_the_bit(name, solve):
    """Scales of both signs, where the format has them; each group has a lowest code, which fixes its scale."""
    fmt, generator = get_format(name), torch.Generator().manual_seed(0)
    size, half = fmt.group_size or COLUMNS, 1 << (fmt.bits - 1)
    codes = torch.randint(1 - half, half, (16, COLUMNS // size, size), generator=generator, dtype=torch.int8)
    codes[..., 5] = half - 1 if fmt.kind == "int8" else -half
    scale = seeded(16, COLUMNS // size).to(SCALE_DTYPE)
    scale = scale.abs() if fmt.kind == "int8" else scale
    made = IntegerWeight(codes.view(16, -1), scale)
    weight = made.dequantize()
    found = solve(weight, fmt)
    assert (found.codes.dtype, found.scale.dtype, found.zero) == (torch.int8, SCALE_DTYPE, None)
    assert torch.equal(found.codes, made.codes)
    assert torch.equal(found.scale, scale)
    assert fmt.kind == "int8" or {-1, 1} == set(scale.sign().flatten().tolist())
    assert torch.equal(dequantize(found.tensors(fmt), fmt), weight)


@pytest.mark.parametrize("name", GROUPED)
def test_the_largest_weight_of_a_group_sets_the_sign(name):
    weight, fmt = seeded(16, COLUMNS), get_format(name)
    groups = weight.view(16, -1, fmt.group_size)
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    found = round_to_nearest(weight, fmt)
    assert torch.equal(found.scale.sign().float(), -largest.sign())
    codes = found.codes.view_as(groups)
    assert (codes.min(dim=-1).values == -(1 << (fmt.bits - 1))).all()  # the one that reaches furthest is used


@pytest.mark.parametrize("size", [1.0, 0.02])
@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int2-g32", "int3-g256", "int4-g96"])
def test_half_quadratic_has_the_least_error_by_a_norm_that_forgives_outliers(name, size):
    weight, fmt = heavy_tailed(64, COLUMNS) * size, get_format(name)
    found, nearest = half_quadratic(weight, fmt), round_to_nearest(weight, fmt, symmetric=False)
    assert torch.equal(found.scale, nearest.scale)  # only zero points move
    forgiving = [(solved.dequantize() - weight).abs().pow(0.7).mean() for solved in (found, nearest)]
    assert forgiving[0] < 0.99 * forgiving[1]


@pytest.mark.parametrize("name", GROUPED)
def test_half_quadratic_starts_from_the_nearest_asymmetric_codes(name):
    weight, fmt = seeded(16, COLUMNS), get_format(name)
    found, nearest = half_quadratic(weight, fmt, iterations=0), round_to_nearest(weight, fmt, symmetric=False)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.zero, nearest.zero)


@pytest.mark.parametrize("name", GROUPED)
def test_a_zero_point_serves_a_weight_that_lies_on_one_side(name):
    weight, fmt = 5 + seeded(16, COLUMNS).sigmoid(), get_format(name)
    found, symmetric = round_to_nearest(weight, fmt, symmetric=False), round_to_nearest(weight, fmt)
    # codes over 5 … 6 instead of -6 … 6: twelve times finer, but for the zero point's own rounding
    assert group_errors(found, weight).sum() < group_errors(symmetric, weight).sum() / 20


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e-30, 1e38])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_constant_comes_back(solver, value):
    weight = torch.full((4, COLUMNS), value)
    for name in INTEGERS:
        found = SOLVERS[solver](weight, get_format(name))
        assert (found.scale != 0).all(), name  # nothing is ever divided by zero
        # bf16's rounding of the scale and of the zero; the smallest scale there is stands in for zero
        assert ((found.dequantize() - weight).abs() <= 2.0**-7 * abs(value) + 1e-36).all(), name


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_huge_weight_comes_back_and_troubles_its_own_group_only(solver, name):
    weight, fmt = seeded(4, COLUMNS), get_format(name)
    spoilt = weight.clone()
    spoilt[1, 5] = 1000.0
    calm, found = SOLVERS[solver](weight, fmt), SOLVERS[solver](spoilt, fmt)
    assert found.dequantize()[1, 5] == pytest.approx(1000, rel=2.0**-7)
    others = torch.ones_like(found.scale, dtype=torch.bool)
    others[1, 0] = False
    assert torch.equal(found.scale[others], calm.scale[others])
    assert torch.equal(found.codes.view(*others.shape, -1)[others], calm.codes.view(*others.shape, -1)[others])


@pytest.mark.parametrize("name", INTEGERS)
def test_channels_that_calibration_never_used_count_for_nothing(name):
    weight, fmt = seeded(16, COLUMNS), get_format(name)
    weight[:, 5] = 4.0  # an outlier in the first group, which stretches its scale
    importance = torch.ones(COLUMNS)
    importance[5] = 0
    clipped, plain = search_clip(weight, fmt, importance), search_clip(weight, fmt)
    first = [group_errors(found, weight, importance)[:, 0].sum() for found in (clipped, plain)]
    assert first[0] < first[1]
    importance[:] = 0  # no scale is better than another: the first one, which clips nothing
    nothing, nearest = search_clip(weight, fmt, importance), round_to_nearest(weight, fmt)
    assert torch.equal(nothing.codes, nearest.codes)
    assert torch.equal(nothing.scale, nearest.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", INTEGERS)
def test_stored_tensors_say_what_the_solution_says(name, dtype):
    weight, fmt = seeded(16, COLUMNS), get_format(name)
    solve = half_quadratic if fmt.has_zeros else search_clip
    solution = solve(weight, fmt)
    tensors = solution.tensors(fmt)
    assert torch.equal(dequantize(tensors, fmt, dtype), solution.dequantize(dtype))
    shapes = fmt.tensors((16, COLUMNS), torch.bfloat16)
    assert set(tensors) - {"codes"} == set(shapes) - ({"packed"} if "codes" in tensors else set())
    kept = round_to_nearest(weight, fmt, symmetric=not fmt.has_zeros).tensors(fmt)
    assert all(torch.equal(value, kept[key]) for key, value in quantize(weight, fmt).items())


@pytest.mark.parametrize("name", GROUPED)
def test_what_is_loaded_is_searched_and_loses_less_than_the_nearest_codes(name):
    weight, fmt = heavy_tailed(24, COLUMNS), get_format(name)
    power = 0.7 if fmt.has_zeros else 2  # the norm that each search is for
    errors = {
        solver: (dequantize(quantize(weight, fmt, solver=solver), fmt) - weight).abs().pow(power).sum()
        for solver in LOADING_SOLVERS
    }
    assert errors["search"] < errors["rtn"]


@pytest.mark.parametrize("name", INTEGERS)
def test_what_codes_can_say_is_loaded_as_it_is_whatever_the_solver(name):
    fmt = get_format(name)
    once = dequantize(quantize(heavy_tailed(24, COLUMNS), fmt), fmt)
    for solver in LOADING_SOLVERS:
        assert relative_error(dequantize(quantize(once, fmt, solver=solver), fmt), once) < 2.0**-8, solver


def test_another_solver_is_refused():
    with pytest.raises(PlanError, match="expected solver search or rtn, found 'gptq'$"):
        quantize(seeded(4, COLUMNS), get_format("int4"), solver="gptq")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", QUANTISED)
def test_what_is_not_finite_is_refused(name, bad):
    weight = seeded(4, COLUMNS)
    weight[3, -1] = bad
    with pytest.raises(CheckpointError, match=f"cannot quantise to {name}: .*NaN or infinite"):
        quantize(weight, get_format(name))


@pytest.mark.parametrize("name", QUANTISED)
def test_chunks_of_rows_change_nothing(name, monkeypatch):
    weight, fmt = seeded(200, COLUMNS), get_format(name)
    whole = quantize(weight, fmt)
    monkeypatch.setattr(solvers, "CHUNK_BYTES", 1)
    chunked = quantize(weight, fmt)
    assert list(chunked) == list(whole)
    assert all(torch.equal(chunked[key], value) for key, value in whole.items())


def test_chunks_have_a_multiple_of_64_rows(monkeypatch):
    def lengths(chunk_bytes):
        monkeypatch.setattr(solvers, "CHUNK_BYTES", chunk_bytes)
        seen = []
        weight = seeded(300, 32)
        by_rows(weight.shape, lambda rows: seen.append(len(weight[rows])) or {"rows": weight[rows]})
        return seen

    assert lengths(1) == [64, 64, 64, 64, 44]
    assert lengths(200 * 4 * 32) == [192, 108]
    assert lengths(10**6) == [300]
