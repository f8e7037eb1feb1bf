"""The planner's search held to an exhaustive one: every combination of moves in order of cost, the first that fits."""

import functools
import itertools
from dataclasses import replace

import pytest

from lowvram_lab.errors import BudgetError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner import auto
from lowvram_lab.planner.cheapest import Cheapest
from lowvram_lab.planner.constraints import Room, ram_bytes
from lowvram_lab.planner.forecast import _until_it_fails as until_it_fails
from lowvram_lab.planner.forecast import forecast, forecast_if_fits, is_whole, sketch
from lowvram_lab.planner.moves import PREFILL_CHUNKS, cost, head_modules, kv_formats
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.search import least_bytes
from lowvram_lab.planner.suited import RECIPES
from lowvram_lab.units import MiB
from tests.helpers.machines import Made, stand_in
from tests.helpers.tiny import tiny_config

LAYERS = 2
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "vocab_size": 2048}
MODELS = {
    "tied": ("llama", SIZES),
    "untied": ("qwen2", SIZES),
    "multi-head": ("qwen2", {**SIZES, "num_key_value_heads": 4, "vocab_size": 4096}),
    "heads of 48": ("llama", {**SIZES, "hidden_size": 192, "num_key_value_heads": 4}),  # no int4 KV cache
    "large head": ("qwen2", {**SIZES, "hidden_size": 128, "vocab_size": 8192}),
}
UNLIMITED = replace(GpuBudget.parse("1TiB"), kernels="cpu")  # within a budget weights are not fused


@functools.cache
def spec_of(name: str) -> ModelSpec:
    kind, sizes = MODELS[name]
    return ModelSpec.from_config(tiny_config(kind, **sizes), f"model {name}")


@functools.cache
def combinations(name: str, context: int) -> list[Plan]:
    """Every plan that the moves can make."""
    spec, found = spec_of(name), []
    for recipe in RECIPES:
        base = Plan.uniform(spec, recipe, context=context)
        ends = [(), head_modules(spec)]
        if not spec.tied:
            ends += [(spec.embedding,), (spec.embedding, spec.head)]
        for away, layers in itertools.product(ends, range(LAYERS + 1)):
            split = base.with_gpu_layers(layers)
            split = split.with_modules(*away, device="cpu") if away else split
            for kv_format, chunk in itertools.product(kv_formats(spec, base.dtype), PREFILL_CHUNKS):
                if chunk is None or chunk < context:
                    found.append(replace(split, kv_format=kv_format, prefill_chunk=chunk))
    return found


@functools.cache
def fits(plan: Plan, budget: GpuBudget) -> bool:
    """Whether every piece of the longest prompt fits; the replay ends where it does not, which is most of the time."""
    if least_bytes(plan) > budget.usable_bytes:
        return False
    return until_it_fails(plan, budget, Workload.full_context(plan.context), None) is not None


def cheapest_of_all(name: str, context: int, budget: GpuBudget, ram: int | None = None, prefer="balance", layers=None):
    """The least cost of all plans that fit, by trying them in its order; ``None`` where none does."""
    plans = combinations(name, context)
    if layers is not None:
        plans = [plan for plan in plans if plan.layer_devices().count("gpu") == layers]
    for plan in sorted(plans, key=lambda plan: cost(plan, prefer, layers)):
        if (ram is None or ram_bytes(plan) <= ram) and fits(plan, budget):
            return plan
    return None


def chosen(name, context, budget, **options):
    try:
        return auto.auto_plan(spec_of(name), budget, context, machine=Made(), **options)
    except BudgetError:
        return None


def budgets(name: str, context: int, count: int) -> list[GpuBudget]:
    """From what takes hardly anything to what holds all of it in 16 bits."""
    base = Plan.uniform(spec_of(name), "bf16", context=context)
    most = forecast(base, UNLIMITED).peak_reserved_bytes
    return [stand_in(round(MiB + (most - MiB) * (step + 1) / count)) for step in range(count)]


def check(name, context, budget, **options):
    best = cheapest_of_all(name, context, budget, options.get("ram"), options.get("prefer", "balance"),
                           options.get("gpu_layers"))  # fmt: skip
    found = chosen(name, context, budget, **options)
    assert (best is None) == (found is None), (best, found)
    if found is None:
        return None
    order = (options.get("prefer", "balance"), options.get("gpu_layers"))
    assert cost(found.plan, *order) == cost(best, *order), (found.plan.summary(), best.summary())
    assert found.forecast.fits
    assert forecast(found.plan, budget).fits
    assert 0 < len(found.why) <= 5
    return found.plan


CASES = [(name, 600, 4) for name in list(MODELS)[:4]]
MORE = [(name, context, 20) for name, _, _ in CASES for context in (300, 900, 1024)]


@pytest.mark.parametrize(
    ("name", "context", "count"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_no_combination_that_fits_is_cheaper(name, context, count):
    found = [check(name, context, budget) for budget in budgets(name, context, count)]
    costs = [cost(plan) for plan in found if plan]
    assert costs == sorted(costs, reverse=True)  # more budget is never worse
    assert len({(plan.kv_format, plan.prefill_chunk) for plan in found if plan}) > 1
    assert found[-1].layer_devices().count("gpu") == LAYERS


@pytest.mark.parametrize("options", [{"prefer": "fidelity"}, {"gpu_layers": 1}, {"ram": 4 * MiB}])
def test_nor_is_one_cheaper_within_what_is_asked_for(options):
    found = [check("untied", 600, budget, **options) for budget in budgets("untied", 600, 4)[:3]]
    assert any(found)


def test_an_embedding_stays_on_the_card_where_a_larger_head_does_not():
    spec = spec_of("large head")
    base = Plan.uniform(spec, "int8", context=600).with_modules(spec.head, format="bf16")
    plans = [
        replace(base.with_gpu_layers(layers).with_modules(*away, device="cpu"), prefill_chunk=chunk)
        for layers in range(LAYERS + 1)
        for away in ((), (spec.embedding,), (spec.head,), (spec.embedding, spec.head))
        for chunk in (None, 512, 256)
    ]
    chosen_places = []
    for size in (3 * MiB, 5 * MiB, 7 * MiB, 9 * MiB, 12 * MiB, 26 * MiB):
        budget = stand_in(size)
        best = min((plan for plan in plans if fits(plan, budget)), key=cost)
        found = Cheapest(Room(spec, budget, None, None, None)).of([base]).plan
        assert cost(found) == cost(best), (size, found.summary(), best.summary())
        chosen_places.append((found.modules[spec.embedding].device, found.modules[spec.head].device))
    assert {("cpu", "cpu"), ("gpu", "cpu"), ("gpu", "gpu")} == set(chosen_places)


@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4"])
def test_a_sketch_takes_what_the_forecast_of_all_pieces_takes(kv_format):
    plan = replace(Plan.uniform(spec_of("untied"), "int8", context=1024), kv_format=kv_format, prefill_chunk=128)
    whole = forecast(plan, UNLIMITED)
    assert not is_whole(plan, whole.workload)
    sketched = sketch(plan, UNLIMITED)
    assert sketched.peak_allocated_bytes == pytest.approx(whole.peak_allocated_bytes, rel=0.01)
    for spare in (-MiB, 0, MiB):
        budget = stand_in(whole.peak_reserved_bytes + spare)
        expected = forecast(plan, budget)
        found = forecast_if_fits(plan, budget)
        assert (found is not None) == expected.fits
        assert found is None or found.phases == expected.phases
