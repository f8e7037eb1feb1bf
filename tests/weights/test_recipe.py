"""Recipes within bytes: never over, little left, what stock transformers opens, what is refused."""

import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_lab.errors import BudgetError, LowvramError, PlanError
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.units import parse_bytes
from lowvram_lab.weights.recipe import WeightBudget, recipe
from lowvram_lab.weights.sensitivity import Sensitivity, candidate_formats, estimate_sensitivity
from tests.helpers.tiny import TINY, DictCheckpoint, random_ids, tiny_spec, tiny_state

stand_in_only = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's own counters differ by what kernels hide")
EMBED, HEAD = "model.embed_tokens", "lm_head"


@functools.cache
def estimated(kind) -> Sensitivity:
    checkpoint = DictCheckpoint(tiny_state(kind))
    return estimate_sensitivity(tiny_spec(kind), checkpoint, random_ids(64, batch=4), progress=False)


def least_bytes(kind, stock=True) -> int:
    """By hand: each module in the smallest format it may have, norms and biases in 16 bits."""
    total = 0
    for module in tiny_spec(kind).modules:
        for key, shape in module.parameters.items():
            if key == "weight" and module.kind != "other":
                names = ["int8"] if stock and module.name == EMBED else candidate_formats(module)
                total += min(get_format(n).weight_bytes(shape) for n in names) if not module.tied_to else 0
            else:
                total += 2 * shape[0]
    return total


def chosen(found) -> dict[str, str]:
    return {name: a.format for name, a in found.plan.modules.items()}


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("kind", TINY)
def test_weights_take_no_more_than_their_bytes_and_hardly_less(kind, stock):
    spec, least = tiny_spec(kind), least_bytes(kind, stock)
    whole = Plan.uniform(spec, "bf16", context=64).weight_bytes()
    assert whole == 2 * spec.num_parameters
    for budget in [least, least + 1, *range(least + 5000, whole, 40_000), whole, whole + 10**6]:
        found = recipe(spec, estimated(kind), weight_bytes=budget, context=64, stock=stock)
        assert found.weight_bytes == found.plan.weight_bytes() <= budget
        assert found.source_weight_bytes == whole
        assert found.reduction == pytest.approx(1 - found.weight_bytes / whole)
        left = budget - found.weight_bytes
        for module in spec.modules:  # no module could still have a format that costs less
            if module.kind == "other" or module.tied_to:
                continue
            costs, now = {"bf16": 0.0} | estimated(kind).costs[module.name], chosen(found)[module.name]
            for name in costs:
                more = get_format(name).weight_bytes(module.weight_shape) - get_format(now).weight_bytes(
                    module.weight_shape
                )
                allowed = not stock or module.name != EMBED or name in ("int8", "bf16")
                assert not (allowed and costs[name] < costs[now] and more <= left), (module.name, now, name)
    assert set(chosen(found).values()) == {"bf16"}
    assert found.estimated_kl == 0


@pytest.mark.parametrize("kind", TINY)
def test_the_estimate_is_the_sum_of_its_modules(kind):
    spec, costs = tiny_spec(kind), estimated(kind).costs
    found = recipe(spec, estimated(kind), weight_bytes="300KiB", context=64)
    formats = chosen(found)
    assert len(set(formats.values())) > 4
    expected = sum(({"bf16": 0.0} | costs[name])[formats[name]] for name in costs)
    assert found.estimated_kl == pytest.approx(expected)
    more = recipe(spec, estimated(kind), weight_bytes="400KiB", context=64)
    assert more.estimated_kl < found.estimated_kl
    assert f"{found.reduction:.1%}" in found.summary()


def test_a_mixture_is_better_than_one_format_of_the_same_bytes():
    for kind in TINY:
        spec = tiny_spec(kind)
        for fmt in ("int4", "int3"):
            uniform = Plan.uniform(spec, fmt, context=64)  # both ends in int8
            found = recipe(spec, estimated(kind), weight_bytes=uniform.weight_bytes(), context=64)
            costs = estimated(kind).costs
            cost = sum(costs[n][a.format] for n, a in uniform.modules.items() if n in costs)
            assert found.estimated_kl < 0.8 * cost


@given(st.integers(100_000, 800_000), st.sampled_from(TINY), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_tied_pair_has_one_format_and_every_plan_is_valid(budget, kind, stock):
    spec = tiny_spec(kind)
    try:
        found = recipe(spec, estimated(kind), weight_bytes=budget, context=64, stock=stock)
    except BudgetError:
        assert budget < least_bytes(kind, stock)
        return
    formats = chosen(found)
    assert kind != "llama" or formats[EMBED] == formats[HEAD]
    if stock:
        assert formats[EMBED] in ("bf16", "int8")
    assert {formats[m.name] for m in spec.modules if m.kind == "other"} == {"bf16"}


@pytest.mark.parametrize("kind", TINY)
def test_stock_keeps_the_embedding_at_8_bits_or_more_and_own_formats_need_not(kind):
    budget = least_bytes(kind) + 1000
    assert chosen(recipe(tiny_spec(kind), estimated(kind), weight_bytes=budget, context=64))[EMBED] == "int8"
    own = recipe(tiny_spec(kind), estimated(kind), weight_bytes=budget, context=64, stock=False)
    assert get_format(chosen(own)[EMBED]).bits < 8
    assert own.estimated_kl < recipe(tiny_spec(kind), estimated(kind), weight_bytes=budget, context=64).estimated_kl


def test_only_the_given_formats_are_used():
    spec = tiny_spec("qwen2")
    found = recipe(spec, estimated("qwen2"), weight_bytes="300KiB", context=64, formats=("int4", "int3"))
    formats = chosen(found)
    assert {formats[m.name] for m in spec.modules if m.layer is not None and m.kind == "linear"} <= {"int4", "int3"}
    assert formats[EMBED] == "int8"  # none of the two can be opened by stock transformers there
    found = recipe(spec, estimated("qwen2"), weight_bytes="1GiB", context=64, formats=("int4", "int3"))
    assert "bf16" not in {chosen(found)[m.name] for m in spec.modules if m.kind == "linear"}
    found = recipe(spec, estimated("qwen2"), weight_bytes="600KiB", context=64, formats=("int4", "bf16"))
    assert {"int4", "bf16"} <= set(chosen(found).values()) <= {"int4", "bf16", "int8"}


def test_a_shape_that_no_given_format_holds_is_in_int8():
    spec = tiny_spec("llama")
    checkpoint = DictCheckpoint(tiny_state("llama"))
    found = estimate_sensitivity(spec, checkpoint, random_ids(64), formats=("int4-g128",), progress=False)
    formats = chosen(recipe(spec, found, weight_bytes="1GiB", context=64, formats=("int4-g128",)))
    assert {f for n, f in formats.items() if n.endswith("down_proj")} == {"int8"}  # 192 columns
    assert {f for n, f in formats.items() if n.endswith("up_proj")} == {"int4-g128"}


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("stock", [True, False])
def test_too_few_bytes_name_the_least(kind, stock):
    least = least_bytes(kind, stock)
    recipe(tiny_spec(kind), estimated(kind), weight_bytes=least, context=64, stock=stock)
    with pytest.raises(BudgetError, match=r"take (.*) at the least in these formats, found a budget of") as error:
        recipe(tiny_spec(kind), estimated(kind), weight_bytes=least - 1, context=64, stock=stock)
    named = parse_bytes(re.search(r"take (.*) at the least", str(error.value)).group(1))
    assert named == pytest.approx(least, rel=0.5)  # "0.1 MiB": a digit is all there is of so small a model
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_bytes": "1MiB", "formats": ("int9",)}, "unknown format 'int9'"),
        ({"weight_bytes": "1MiB", "formats": ("int4", "int4+4")}, "int4\\+4 is for whole models"),
        ({"weight_bytes": "1MiB", "context": 4096}, "beyond the 1024 positions"),
        ({"weight_bytes": "1MiB", "kv_format": "int3"}, "expected kv_format"),
    ],
)
def test_contradictions_are_named(options, words):
    with pytest.raises(PlanError, match=words):
        recipe(tiny_spec("llama"), estimated("llama"), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "expected weight_bytes or reduction, one of the two"),
        ({"weight_bytes": "1MiB", "reduction": 0.5}, "expected weight_bytes or reduction, one of the two"),
        ({"reduction": 1.0}, "between 0 and 1"),
        ({"reduction": -0.5}, "between 0 and 1"),
        ({"reduction": 70}, "between 0 and 1"),
        ({"reduction": float("nan")}, "between 0 and 1"),
        ({"weight_bytes": "1.9"}, "GiB"),
    ],
)
def test_a_budget_that_says_no_size_is_refused_when_made(options, words):
    with pytest.raises(LowvramError, match=words) as error:
        WeightBudget(**options)
    assert "\n" not in str(error.value)


def test_a_maker_makes_what_the_function_does_and_its_repr_says_of_what():
    spec, costs = tiny_spec("llama"), estimated("llama")
    whole = 2 * spec.num_parameters
    share, size = WeightBudget(reduction=0.6, stock=False), int(whole * 0.4)
    assert share.recipe(spec, costs) == recipe(spec, costs, weight_bytes=size, stock=False)
    assert WeightBudget("300KiB").recipe(spec, costs) == recipe(spec, costs, weight_bytes="300KiB")
    assert repr(WeightBudget("1GiB")) == repr(WeightBudget(2**30)) != repr(WeightBudget("1GiB", stock=False))


def test_the_sensitivity_of_another_model_is_refused():
    with pytest.raises(PlanError, match="expected the sensitivity of tiny-qwen2, found one that lacks lm_head"):
        recipe(tiny_spec("qwen2"), estimated("llama"), weight_bytes="1MiB")


def test_the_context_is_2048_or_what_the_model_has():
    assert recipe(tiny_spec("llama"), estimated("llama"), weight_bytes="1MiB").plan.context == 1024
    assert recipe(tiny_spec("llama"), estimated("llama"), weight_bytes="1MiB", context=77).plan.context == 77
