"""Recipes for a card: they fit it and really run, little of it is left, what is refused."""

import functools
import re
from dataclasses import replace

import pytest
import torch

from lowvram_lab.engine.load import load
from lowvram_lab.errors import BudgetError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.card_recipe import CardBudget, recipe_for_card
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from lowvram_lab.units import MiB
from lowvram_lab.weights.sensitivity import Sensitivity, candidate_formats
from tests.helpers.machines import stand_in
from tests.helpers.tiny import TINY, DictCheckpoint, random_state, tiny_config

stand_in_only = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's own counters differ by what kernels hide")
EMBED = "model.embed_tokens"

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
    """The recipe for a stand-in of so many MiB and its forecast, each made once."""
    spec, costs = wider(kind)
    return recipe_for_card(spec, costs, open_gpu(f"{size}MiB"), context=256)


@stand_in_only
@pytest.mark.parametrize(("kind", "size"), [("llama", 10), ("llama", 16), ("qwen2", 12)])
def test_beside_the_cache_it_fits_and_really_runs(kind, size):
    (spec, _), gpu = wider(kind), open_gpu(f"{size}MiB")
    found, foretold = beside_the_cache(kind, size)
    assert foretold.fits
    assert foretold.peak_reserved_bytes <= gpu.budget.usable_bytes
    again = forecast(found.plan, gpu)
    assert again.phases == foretold.phases
    model = load(found.plan, gpu, checkpoint=DictCheckpoint(random_state(spec)), progress=False)
    measured = run_workload(model, Workload.full_context(256))
    assert (foretold.compare(measured)["difference"] == 0).all()
    assert measured.fits
    devices = {name: a.device for name, a in found.plan.modules.items()}
    assert {d for n, d in devices.items() if n != EMBED} == {"gpu"}
    assert devices[EMBED] == ("gpu" if kind == "llama" else "cpu")
    # a plan that costs less in 16 bits everywhere does not fit, so the search had something to do
    assert not forecast(Plan.uniform(spec, "bf16", context=256), gpu).fits


@stand_in_only
@pytest.mark.parametrize("kind", TINY)
def test_a_larger_card_gives_a_better_recipe(kind):
    found = [beside_the_cache(kind, size)[0] for size in (12, 16)]
    assert [f.estimated_kl for f in found] == sorted((f.estimated_kl for f in found), reverse=True)
    assert found[0].estimated_kl > 2 * found[1].estimated_kl


@stand_in_only
def test_what_is_left_of_the_card_is_less_than_a_segment():
    """The allocator takes 2 MiB at a time (20 for large tensors, of which these models have none)."""
    for size in (10, 12):
        _, foretold = beside_the_cache("llama", size)
        assert size * MiB - foretold.peak_reserved_bytes < 2 * MiB


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
def test_a_card_for_which_nothing_is_small_enough(kernels):
    spec, costs = wider("llama")
    with pytest.raises(BudgetError) as error:
        recipe_for_card(spec, costs, replace(GpuBudget.parse("3MiB"), kernels=kernels), context=256)
    assert "wider-llama" in str(error.value)
    assert "\n" not in str(error.value)
    assert "-" not in re.sub("wider-llama", "", str(error.value)), "a negative number of bytes"


def test_a_card_too_small_is_named_as_it_was_given():
    spec, costs = wider("llama")
    with pytest.raises(BudgetError, match="5.0 MiB"):
        recipe_for_card(spec, costs, stand_in("5MiB"), context=256)


@pytest.mark.parametrize(
    ("kind", "size", "context"),
    [("llama", "10MiB", 256), ("llama", "26MiB", 512), pytest.param("qwen2", "10MiB", 256, marks=pytest.mark.slow)],
)
def test_where_one_format_for_all_fits_a_recipe_does(kind, size, context):
    spec, costs = wider(kind)
    assert forecast(Plan.uniform(spec, "int4", context=context), stand_in(size)).fits
    _, foretold = recipe_for_card(spec, costs, stand_in(size), context=context)
    assert foretold.fits


def test_an_int8_cache_leaves_more_to_the_weights():
    spec, costs = wider("llama")
    found = []
    for kv_format in (None, "int8"):
        made, _ = recipe_for_card(spec, costs, stand_in("18MiB"), context=512, kv_format=kv_format)
        found.append(made)
    assert [f.plan.kv_format for f in found] == ["bf16", "int8"]
    assert found[1].weight_bytes > found[0].weight_bytes
    assert found[1].estimated_kl < found[0].estimated_kl


def test_a_budget_makes_what_the_function_does_and_its_repr_says_of_what():
    spec, costs = wider("qwen2")
    budget = CardBudget(stand_in("12MiB"), context=256, formats=("int8", "int4"))
    expected, _ = recipe_for_card(spec, costs, stand_in("12MiB"), context=256, formats=("int8", "int4"))
    assert budget.recipe(spec, costs) == expected
    assert repr(CardBudget("1GiB")) == repr(CardBudget(2**30)) != repr(CardBudget("1GiB", context=64))
    assert repr(CardBudget(StandInGpu(GpuBudget.parse("12MiB")))) == repr(CardBudget(stand_in("12MiB")))
