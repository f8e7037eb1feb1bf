"""Recipes within bytes and within a card: never over, little left, what stock transformers opens, what is refused."""

import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, DictCheckpoint, random_ids, random_state, tiny_config, tiny_spec, tiny_state

from lowvram_lab.engine.load import load
from lowvram_lab.errors import BudgetError, PlanError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.card_recipe import recipe
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from lowvram_lab.units import MiB, parse_bytes
from lowvram_lab.weights.sensitivity import Sensitivity, candidate_formats, estimate_sensitivity

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
    whole = Plan.uniform(spec, "bf16", context=64).weight_bytes(spec)
    assert whole == 2 * spec.num_parameters
    for budget in [least, least + 1, *range(least + 5000, whole, 40_000), whole, whole + 10**6]:
        found = recipe(spec, estimated(kind), weight_bytes=budget, context=64, stock=stock)
        assert found.weight_bytes == found.plan.weight_bytes(spec) <= budget
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
            found = recipe(spec, estimated(kind), weight_bytes=uniform.weight_bytes(spec), context=64)
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
    found.plan.validate(spec)
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
        ({}, "expected weight_bytes or gpu, one of the two"),
        ({"weight_bytes": "1MiB", "gpu": "1GiB"}, "expected weight_bytes or gpu, one of the two"),
        ({"weight_bytes": "1MiB", "formats": ("int9",)}, "unknown format 'int9'"),
        ({"weight_bytes": "1MiB", "context": 4096}, "beyond the 1024 positions"),
        ({"weight_bytes": "1MiB", "kv_format": "int3"}, "expected kv_format"),
    ],
)
def test_contradictions_are_named(options, words):
    with pytest.raises(PlanError, match=words):
        recipe(tiny_spec("llama"), estimated("llama"), **options)


def test_the_sensitivity_of_another_model_is_refused():
    with pytest.raises(PlanError, match="expected the sensitivity of tiny-qwen2, found one that lacks lm_head"):
        recipe(tiny_spec("qwen2"), estimated("llama"), weight_bytes="1MiB")


def test_the_context_is_2048_or_what_the_model_has():
    assert recipe(tiny_spec("llama"), estimated("llama"), weight_bytes="1MiB").plan.context == 1024
    assert recipe(tiny_spec("llama"), estimated("llama"), weight_bytes="1MiB", context=77).plan.context == 77


# Large enough that weights, not the allocator's segments of 2 and 20 MiB, decide what fits.
WIDER = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 2048, "num_attention_heads": 8}


@functools.cache
def wider(kind) -> tuple[ModelSpec, Sensitivity]:
    """A spec, and costs made up: a quarter for each bit more, the modules differing by what they weigh."""
    spec = ModelSpec.from_config(tiny_config(kind, **WIDER), f"wider-{kind}")
    costs = {
        m.name: {f: (1 + i % 5) * 4.0 ** -get_format(f).bits for f in candidate_formats(m)}
        for i, m in enumerate(spec.modules)
        if m.kind != "other" and not m.tied_to
    }
    return spec, Sensitivity(costs, costs, 1000)


@functools.cache
def beside_the_cache(kind, size):
    """The recipe for a stand-in of so many MiB, each made once."""
    spec, costs = wider(kind)
    return recipe(spec, costs, gpu=open_gpu(f"{size}MiB"), context=256)


@stand_in_only
@pytest.mark.parametrize(("kind", "size"), [("llama", 10), ("llama", 16), ("qwen2", 12)])
def test_beside_the_cache_it_fits_and_really_runs(kind, size):
    (spec, _), gpu = wider(kind), open_gpu(f"{size}MiB")
    found = beside_the_cache(kind, size)
    assert found.forecast.fits
    assert found.forecast.peak_reserved_bytes <= gpu.budget.usable_bytes
    again = forecast(found.plan, spec, gpu)
    assert again.phases == found.forecast.phases
    model = load(found.plan, gpu, checkpoint=DictCheckpoint(random_state(spec)), spec=spec, progress=False)
    measured = run_workload(model, Workload.full_context(256))
    assert (found.forecast.compare(measured)["difference"] == 0).all()
    assert measured.fits
    devices = {name: a.device for name, a in found.plan.modules.items()}
    assert {d for n, d in devices.items() if n != EMBED} == {"gpu"}
    assert devices[EMBED] == ("gpu" if kind == "llama" else "cpu")
    # a plan that costs less in 16 bits everywhere does not fit, so the search had something to do
    assert not forecast(Plan.uniform(spec, "bf16", context=256), spec, gpu).fits


@stand_in_only
@pytest.mark.parametrize("kind", TINY)
def test_a_larger_card_gives_a_better_recipe(kind):
    found = [beside_the_cache(kind, size) for size in (12, 16)]
    assert [f.estimated_kl for f in found] == sorted((f.estimated_kl for f in found), reverse=True)
    assert found[0].estimated_kl > 2 * found[1].estimated_kl


@stand_in_only
def test_what_is_left_of_the_card_is_less_than_a_segment():
    """The allocator takes 2 MiB at a time (20 for large tensors, of which these models have none)."""
    for size in (10, 12):
        assert size * MiB - beside_the_cache("llama", size).forecast.peak_reserved_bytes < 2 * MiB


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
def test_a_card_for_which_nothing_is_small_enough(kernels):
    spec, costs = wider("llama")
    with pytest.raises(BudgetError) as error:
        recipe(spec, costs, gpu="3MiB", context=256, kernels=kernels)
    assert "wider-llama" in str(error.value)
    assert "\n" not in str(error.value)
    assert "-" not in re.sub("wider-llama", "", str(error.value)), "a negative number of bytes"


def test_a_card_too_small_is_named_as_it_was_given():
    spec, costs = wider("llama")
    with pytest.raises(BudgetError, match="5.0 MiB"):
        recipe(spec, costs, gpu="5MiB", context=256, kernels="cpu")


@pytest.mark.parametrize(
    ("kind", "size", "context"),
    [("llama", "10MiB", 256), ("llama", "26MiB", 512), pytest.param("qwen2", "10MiB", 256, marks=pytest.mark.slow)],
)
def test_where_one_format_for_all_fits_a_recipe_does(kind, size, context):
    spec, costs = wider(kind)
    assert forecast(Plan.uniform(spec, "int4", context=context), spec, size, kernels="cpu").fits
    assert recipe(spec, costs, gpu=size, context=context, kernels="cpu").forecast.fits


def test_an_int8_cache_leaves_more_to_the_weights():
    spec, costs = wider("llama")
    found = [recipe(spec, costs, gpu="18MiB", context=512, kv_format=kv, kernels="cpu") for kv in (None, "int8")]
    assert [f.plan.kv_format for f in found] == ["bf16", "int8"]
    assert found[1].weight_bytes > found[0].weight_bytes
    assert found[1].estimated_kl < found[0].estimated_kl
