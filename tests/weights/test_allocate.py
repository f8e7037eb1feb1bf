"""Bit allocation against every combination there is, and what holds at any budget."""

import itertools
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowvram_lab.model.formats import get_format
from lowvram_lab.weights.allocate import Option, allocate, lower_hull
from lowvram_lab.weights.sensitivity import estimate_sensitivity
from tests.helpers.tiny import TINY, DictCheckpoint, random_ids, tiny_spec, tiny_state

FORMATS = ("int2", "int3", "int4", "int6", "int8", "bf16")

options = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=5).map(
    lambda pairs: [Option(f, b, float(c)) for f, (b, c) in zip(FORMATS, pairs, strict=False)]
)
modules = st.dictionaries(st.sampled_from("abcd"), options, min_size=1, max_size=4)


def total(chosen) -> tuple[int, float]:
    return sum(o.bytes for o in chosen.values()), sum(o.cost for o in chosen.values())


def combinations(given) -> list[tuple[int, float]]:
    """Bytes and cost of everything that can be chosen."""
    return [
        (sum(o.bytes for o in pick), sum(o.cost for o in pick))
        for pick in itertools.product(*map(list, given.values()))
    ]


def optimum(given, budget) -> float:
    return min((cost for taken, cost in combinations(given) if taken <= budget), default=math.inf)


def below_every_line(given) -> list[tuple[int, float]]:
    """The corners of the lower convex hull of all combinations, found by asking every pair of them."""
    points = sorted({(b, min(c for b2, c in combinations(given) if b2 <= b)) for b, _ in combinations(given)})
    points = [p for i, p in enumerate(points) if i == 0 or p[1] < points[i - 1][1]]

    def is_corner(p):
        for left in (q for q in points if q[0] < p[0]):
            for right in (q for q in points if q[0] > p[0]):
                if (p[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (p[0] - left[0]):
                    return False
        return True

    return [p for p in points if is_corner(p)]


def bound(given, budget) -> float:
    """No choice within the budget costs less: the hull's straight line between its corners."""
    corners = below_every_line(given)
    if budget < corners[0][0]:
        return math.inf
    for left, right in itertools.pairwise(corners):
        if budget < right[0]:
            return left[1] + (right[1] - left[1]) * (budget - left[0]) / (right[0] - left[0])
    return corners[-1][1]


@given(modules, st.integers(0, 250))
@settings(max_examples=200, deadline=None)
def test_never_over_budget_and_none_only_below_the_least(given, budget):
    least = sum(min(o.bytes for o in choices) for choices in given.values())
    chosen = allocate(given, budget)
    assert (chosen is None) == (budget < least)
    if chosen is not None:
        assert total(chosen)[0] <= budget
        assert chosen.keys() == given.keys()
        assert all(option in given[name] for name, option in chosen.items())


@given(modules, st.integers(0, 250))
@settings(max_examples=200, deadline=None)
def test_no_module_gets_a_format_that_another_of_its_formats_dominates(given, budget):
    """What is no larger and no dearer, and better in one, would be so at any speed that is not lower."""
    for name, chosen in (allocate(given, budget) or {}).items():
        for other in given[name]:
            assert (other.bytes, other.cost) == (chosen.bytes, chosen.cost) or not (
                other.bytes <= chosen.bytes and other.cost <= chosen.cost
            )


@given(modules)
@settings(max_examples=150, deadline=None)
def test_best_of_all_combinations_where_an_edge_of_the_hull_ends(given):
    for budget, cost in below_every_line(given):
        assert total(allocate(given, budget))[1] == cost == optimum(given, budget)


@given(modules, st.integers(0, 250))
@settings(max_examples=200, deadline=None)
def test_between_two_corners_at_most_one_edge_short(given, budget):
    chosen = allocate(given, budget)
    if chosen is not None:
        cost = total(chosen)[1]
        edges = [a.cost - b.cost for choices in given.values() for a, b in itertools.pairwise(lower_hull(choices))]
        assert optimum(given, budget) <= cost < bound(given, budget) + max(edges, default=0) + 1e-9


@given(modules)
@settings(max_examples=100, deadline=None)
def test_a_larger_budget_costs_no_more_at_the_corners_and_least_of_all_when_it_is_ample(given):
    """Between corners it may: bytes left over by one edge may have bought something better than the next edge does."""
    costs = [total(allocate(given, budget))[1] for budget, _ in below_every_line(given)]
    assert costs == sorted(costs, reverse=True)
    cheapest = sum(min(o.cost for o in choices) for choices in given.values())
    assert total(allocate(given, sum(o.bytes for choices in given.values() for o in choices)))[1] == cheapest


@given(modules, st.integers(0, 250))
@settings(max_examples=100, deadline=None)
def test_nothing_better_is_left_that_still_fits(given, budget):
    chosen = allocate(given, budget)
    if chosen is not None:
        left = budget - total(chosen)[0]
        for name, choices in given.items():
            assert not any(o.cost < chosen[name].cost and o.bytes - chosen[name].bytes <= left for o in choices)


@given(modules, st.integers(0, 250), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_order_of_formats_does_not_matter(given, budget, random):
    shuffled = {name: random.sample(choices, len(choices)) for name, choices in given.items()}
    chosen, other = allocate(given, budget), allocate(shuffled, budget)
    assert chosen is None or total(chosen) == total(other)


@pytest.mark.parametrize("kind", TINY)
def test_of_a_real_model_never_worse_than_one_format_for_all(kind):
    """Not so for any numbers: see the next test. For those of a model, at the very bytes a uniform choice takes."""
    spec = tiny_spec(kind)
    found = estimate_sensitivity(spec, DictCheckpoint(tiny_state(kind)), random_ids(64, batch=4), progress=False)
    given = {
        name: [Option(f, get_format(f).weight_bytes(spec.module(name).weight_shape), c) for f, c in costs.items()]
        for name, costs in found.costs.items()
    }
    for fmt in sorted(set.intersection(*(set(costs) for costs in found.costs.values()))):
        uniform = {name: next(o for o in choices if o.format == fmt) for name, choices in given.items()}
        budget, cost = total(uniform)
        chosen = total(allocate(given, budget))
        assert chosen[0] <= budget
        assert chosen[1] <= cost
        assert chosen[1] < 0.9 * cost or fmt in ("int6-g32", "int8")  # and mostly a good deal better


def test_between_corners_one_format_for_all_may_be_better():
    """What the docstring grants: an edge that does not fit is left out, here the one that mattered."""
    small = [Option("int2", 1, 10.0), Option("int8", 2, 0.0)]
    middle = [Option("int2", 10, 90.0), Option("int4", 20, 0.0)]
    tables = {name: [Option("int4", 100, 5.0)] for name in ("embedding", "head")}
    given = {"small": small, "middle": middle, **tables}
    assert total(allocate(given, 221)) == (212, 100.0)  # 10 a byte first; then 9 a byte is one byte short
    assert optimum(given, 221) == 20.0
    assert total(allocate(given, 222)) == (222, 10.0)


def test_the_largest_modules_are_tried_in_every_option():
    """Most of a small model's bytes are its table: one edge of its hull is not little there."""
    table = [Option("int3", 300, 70.0), Option("int4", 400, 30.0), Option("int5", 500, 20.0)]
    layers = {
        f"layer {n}": [Option("int3", 30, 20.0), Option("int4", 40, 9.5), Option("int5", 50, 2.0)] for n in range(5)
    }
    for budget in range(450, 760, 10):
        assert total(allocate({"table": table, **layers}, budget))[1] == optimum({"table": table, **layers}, budget)


@given(options)
@example([Option("int2", 5, 3.0), Option("int3", 5, 2.0), Option("int4", 7, 2.0)])
@settings(max_examples=200, deadline=None)
def test_the_hull_falls_ever_more_gently(choices):
    hull = lower_hull(choices)
    assert hull[0].bytes == min(o.bytes for o in choices)
    assert hull[-1].cost == min(o.cost for o in choices)
    steps = list(itertools.pairwise(hull))
    assert all(a.bytes < b.bytes and a.cost > b.cost for a, b in steps)
    gains = [(a.cost - b.cost) / (b.bytes - a.bytes) for a, b in steps]
    assert gains == sorted(set(gains), reverse=True)
    for o in choices:  # nothing lies below it
        for a, b in steps:
            if a.bytes <= o.bytes <= b.bytes:
                line = a.cost + (b.cost - a.cost) * (o.bytes - a.bytes) / (b.bytes - a.bytes)
                assert o.cost >= line - 1e-9
