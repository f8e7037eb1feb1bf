"""The planner: the most precise recipe that fits, and suggestions that are true. Budgets come from forecasts."""

import functools
from dataclasses import replace

import pytest

from lowvram_lab.errors import BudgetError, PlanError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner import auto
from lowvram_lab.planner import forecast as dry_run
from lowvram_lab.planner.auto import RECIPES
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.search import largest_fitting, least_bytes
from lowvram_lab.planner.suggest import suggest
from lowvram_lab.units import GiB, MiB
from tests.helpers.machines import Flat, stand_in
from tests.helpers.tiny import TINY, packaged_spec, tiny_config

CONTEXT, LAYERS = 512, 4
SEGMENT = (
    2 * MiB
)  # what a model this small grows by, on the stand-in: CUDA's workspace would hide it in a large segment


def forecast(plan, gpu=None, **options):
    return dry_run.forecast(plan, stand_in(gpu), **options)


def auto_plan(spec, gpu, *arguments, **options):
    return auto.auto_plan(spec, stand_in(gpu), *arguments, **options)


@functools.cache
def small_spec(kind: str) -> ModelSpec:
    """Large enough, 10 MiB in bf16, that a recipe shows through the allocator's segments of 2 MiB."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": LAYERS, "vocab_size": 2048}
    return ModelSpec.from_config(tiny_config(kind, **sizes), f"small-{kind}")


@functools.cache
def needed(kind: str, recipe: str, gpu_layers: int = LAYERS, kernels: str = "cpu") -> int:
    plan = Plan.uniform(small_spec(kind), recipe, context=CONTEXT).with_gpu_layers(gpu_layers)
    budget = replace(GpuBudget.parse("1TiB"), kernels=kernels)  # within a budget weights are not fused
    return dry_run.forecast(plan, budget).peak_reserved_bytes


def body_formats(plan: Plan) -> set[str]:
    return {a.format for name, a in plan.modules.items() if name.endswith("_proj")}


def test_the_recipes_need_less_and_less():
    for kind in TINY:
        assert needed(kind, "bf16") > needed(kind, "int8") > needed(kind, "int4") > needed(kind, "int4", 2)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", TINY)
def test_exactly_what_a_recipe_needs_gets_that_recipe(kind, recipe):
    """Or a more precise one, where the cheap moves let it in: what int4 needs is enough for int8 with an int8 cache."""
    choice = auto_plan(small_spec(kind), needed(kind, recipe), CONTEXT)
    assert set(choice.plan.layer_devices()) == {"gpu"}
    assert choice.forecast.fits
    (found,) = body_formats(choice.plan)
    if found != recipe:
        assert (found, recipe, choice.plan.kv_format) == ("int8", "int4", "int8")
        recipe = found
    assert choice.recipe == recipe
    assert choice.why[-1].startswith(f"{recipe} ")
    assert "KV cache in int8 fits" in choice.why[-1] or choice.plan.kv_format == "bf16"
    for refused, line in zip(RECIPES, choice.why[: RECIPES.index(recipe)], strict=False):
        assert refused in line or kind == "qwen2"
    if recipe != "bf16":
        assert choice.why[0].startswith("bf16 does not fit: ")
    assert choice.plan.context == CONTEXT
    assert "fits" in choice._repr_html_()


@pytest.mark.parametrize("kind", TINY)
def test_less_than_int4_needs_is_split(kind):
    budget = needed(kind, "int4") - SEGMENT
    choice = auto_plan(small_spec(kind), budget, CONTEXT)
    on_gpu = choice.plan.layer_devices().count("gpu")
    assert 0 < on_gpu < LAYERS
    assert body_formats(choice.plan) == {"int4"}
    one_more = choice.plan.with_gpu_layers(on_gpu + 1)
    assert not forecast(one_more, budget).fits  # as many layers as there is room for
    assert f"{on_gpu} of {LAYERS} layers" in choice.why[-1]


def test_an_untied_embedding_goes_to_the_cpu_before_a_lower_recipe():
    spec = small_spec("qwen2")
    for context in range(256, 1024, 64):  # until the embedding's 1 MiB makes a segment of difference
        plan = Plan.uniform(spec, "bf16", context=context)
        spared = forecast(plan.with_modules(spec.embedding, device="cpu")).peak_reserved_bytes
        if spared < forecast(plan).peak_reserved_bytes:
            break
    choice = auto_plan(spec, spared, context)
    assert body_formats(choice.plan) == {"bf16"}
    assert choice.plan.modules[spec.embedding].device == "cpu"
    assert choice.why[-1].startswith("bf16 with the embedding on the CPU fits")


@pytest.mark.parametrize(("kind", "kernels"), [("llama", "cpu"), ("qwen2", "cuda")])
def test_more_budget_never_lowers_the_recipe(kind, kernels):
    spec, ranks = small_spec(kind), []
    for budget in range(needed(kind, "int4", 1, kernels), needed(kind, "bf16", LAYERS, kernels) + 1, SEGMENT):
        card = replace(GpuBudget.parse(budget), kernels=kernels)
        choice = auto.auto_plan(spec, card, CONTEXT)
        again = dry_run.forecast(choice.plan, card)
        assert again.fits
        assert again.phases == choice.forecast.phases
        assert again.peak_reserved_bytes <= budget
        recipe = RECIPES.index(body_formats(choice.plan).pop())
        ranks.append((-recipe, choice.plan.layer_devices().count("gpu")))
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1] == (0, LAYERS)


@pytest.mark.parametrize("kind", TINY)
def test_recipes_can_be_named(kind):
    assert body_formats(auto_plan(small_spec(kind), "1GiB", CONTEXT, recipes=("nf4",)).plan) == {"nf4"}
    with pytest.raises(PlanError, match="unknown format 'int9'"):
        auto_plan(small_spec(kind), "1GiB", CONTEXT, recipes=("int9",))


def test_an_opened_gpu_brings_budget_and_kernels():
    spec, gpu = small_spec("llama"), open_gpu(needed("llama", "int8", kernels="cpu"))
    choice = auto_plan(spec, gpu, CONTEXT)
    assert choice.forecast.budget == gpu.budget
    assert choice.forecast.phases == forecast(choice.plan, gpu).phases
    with pytest.raises(BudgetError, match="without a limit"):
        auto_plan(spec, open_gpu(), CONTEXT)


@pytest.mark.parametrize("context", [0, 1025])
def test_a_context_the_model_does_not_have(context):
    with pytest.raises(PlanError, match=str(context)):
        auto_plan(small_spec("llama"), "1GiB", context)


@pytest.mark.parametrize("short_by", [1, MiB // 2])
@pytest.mark.parametrize("recipes", [RECIPES, ("nf4",)])
@pytest.mark.parametrize("kind", TINY)
def test_a_refusal_says_what_is_short_and_what_helps(kind, recipes, short_by):
    spec = small_spec(kind)
    least = Plan.uniform(spec, recipes[-1], context=CONTEXT).with_gpu_layers(0)
    if not spec.tied:
        least = least.with_modules(spec.embedding, device="cpu")
    least = replace(least, kv_format="int8")
    budget = forecast(least).peak_reserved_bytes - short_by
    with pytest.raises(BudgetError) as error:
        auto_plan(spec, budget, CONTEXT, recipes=recipes)
    message = str(error.value)
    assert "\n" not in message
    assert all(words in message for words in (spec.name, str(CONTEXT), "needs more than"))
    found = suggest(least, stand_in(budget))
    if found:  # and each of them is true: see the next test
        assert message.endswith(f"what would help: {found[0].text}")
    else:
        assert "not even a context of 256 helps" in message
        with pytest.raises(BudgetError):
            auto_plan(spec, budget, 256, recipes=recipes)


@pytest.mark.parametrize("kind", TINY)
def test_fidelity_keeps_the_recipe_and_moves_layers(kind):
    spec, ranks = small_spec(kind), []
    for budget in range(needed(kind, "bf16", 0), needed(kind, "bf16") + 1, SEGMENT):
        choice = auto_plan(spec, budget, CONTEXT, prefer="fidelity")
        assert body_formats(choice.plan) == {"bf16"}
        assert forecast(choice.plan, budget).fits
        ranks.append(choice.plan.layer_devices().count("gpu"))
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1] == LAYERS


@pytest.mark.parametrize("prefer", auto.PREFERENCES)
def test_too_little_ram_is_a_bound_too(prefer):
    spec, machine = small_spec("qwen2"), Flat({"bf16": 3.0, "int8": 2.0, "int4": 1.0})
    budget = needed("qwen2", "int4", 0)
    free = auto_plan(spec, budget, CONTEXT, prefer=prefer, machine=machine)
    taken = auto.ram_bytes(free.plan)
    assert auto_plan(spec, budget, CONTEXT, prefer=prefer, ram=taken, machine=machine).plan == free.plan
    try:
        less = auto_plan(spec, {0: budget, "cpu": taken - 1}, CONTEXT, prefer=prefer, machine=machine)
    except BudgetError as error:
        assert "of RAM: the CPU's part alone takes" in str(error)  # noqa: PT017
        assert prefer != "fidelity"
    else:
        assert auto.ram_bytes(less.plan) < taken


def test_speed_weighs_what_each_recipe_leaves_on_the_gpu():
    spec = small_spec("llama")
    budget = needed("llama", "int8", 2)
    quick_int4 = auto_plan(spec, budget, CONTEXT, prefer="speed", machine=Flat({"bf16": 4.0, "int8": 2.0, "int4": 1.0}))
    assert body_formats(quick_int4.plan) == {"int4"}
    slow_int4 = auto_plan(spec, budget, CONTEXT, prefer="speed", machine=Flat({"bf16": 4.0, "int8": 2.0, "int4": 90.0}))
    assert body_formats(slow_int4.plan) == {"int8"}
    assert slow_int4.speed.origin == "forecast"
    assert len(slow_int4.why) <= 5
    assert any("forecast tokens/s: bf16" in line for line in slow_int4.why)
    even = auto_plan(spec, budget, CONTEXT, prefer="speed", machine=Flat({"bf16": 0.0, "int8": 0.0, "int4": 0.0}))
    assert body_formats(even.plan) == {"bf16"}  # as fast, and more precise


def test_more_budget_is_never_slower():
    spec, machine = small_spec("qwen2"), Flat({"bf16": 4.0, "int8": 2.0, "int4": 1.0})
    speeds = [
        auto_plan(spec, budget, CONTEXT, prefer="speed", machine=machine).speed.decode_tokens_per_s
        for budget in range(needed("qwen2", "int4", 0), needed("qwen2", "bf16") + 1, SEGMENT)
    ]
    assert speeds == sorted(speeds)
    assert speeds[0] < speeds[-1]


@pytest.mark.parametrize("kind", TINY)
def test_what_is_given_is_kept(kind):
    spec = small_spec(kind)
    for budget in range(needed(kind, "int4", 0), needed(kind, "bf16") + 1, 2 * SEGMENT):
        assert auto_plan(spec, budget, CONTEXT, kv_format="bf16").plan.kv_format == "bf16"
        assert auto_plan(spec, budget, CONTEXT, kv_format="int8").plan.kv_format == "int8"
    plan = auto_plan(spec, needed(kind, "int8"), CONTEXT, gpu_layers=1, threads=3).plan
    assert (plan.layer_devices().count("gpu"), plan.threads) == (1, 3)


def test_what_auto_plan_does_not_understand():
    spec = small_spec("llama")
    with pytest.raises(PlanError, match="expected prefer balance, fidelity, speed, found 'cheap'"):
        auto_plan(spec, "1GiB", CONTEXT, prefer="cheap")
    with pytest.raises(PlanError, match="expected max_memory with one GPU"):
        auto_plan(spec, {0: "1GiB", 1: "1GiB", "cpu": "1GiB"}, CONTEXT)
    with pytest.raises(PlanError, match="RAM in max_memory or in ram, found both"):
        auto_plan(spec, {0: "1GiB", "cpu": "1GiB"}, CONTEXT, ram="1GiB")
    with pytest.raises(PlanError, match="chooses the split, found gpu_layers=2 as well"):
        auto_plan(spec, "1GiB", CONTEXT, prefer="speed", gpu_layers=2)
    with pytest.raises(PlanError, match="expected one recipe or more"):
        auto_plan(spec, "1GiB", CONTEXT, recipes=())


@pytest.mark.parametrize("short_by", [0, 2])
@pytest.mark.parametrize("recipe", ["bf16", "int8", "int4", "nf4"])
@pytest.mark.parametrize("kind", TINY)
def test_every_suggestion_is_true(kind, recipe, short_by):
    spec = small_spec(kind)
    plan = Plan.uniform(spec, recipe, context=CONTEXT)
    budget = GpuBudget(needed(kind, recipe) - 1 - short_by * SEGMENT)
    assert not forecast(plan, budget).fits
    found = suggest(plan, stand_in(budget))
    assert found
    for suggestion in found:
        again = forecast(suggestion.plan, budget)
        assert again.fits
        assert suggestion.to_dict()["peak_allocated_bytes"] == again.peak_allocated_bytes
        assert str(suggestion).endswith("fits")
        on_cpu = suggestion.plan.layer_devices().count("cpu")
        assert (f"{on_cpu} of {LAYERS} layers to the CPU" in suggestion.text) == (on_cpu > 0)
        assert (f"context {suggestion.plan.context}" in suggestion.text) == (suggestion.plan.context < CONTEXT)
        moved = suggestion.plan.modules[spec.embedding].device == "cpu"
        assert ("embedding to the CPU" in suggestion.text) == moved
        if body_formats(suggestion.plan) != body_formats(plan):
            assert body_formats(suggestion.plan).pop() in suggestion.text
    assert len({suggestion.text for suggestion in found}) == len(found)


@pytest.mark.parametrize("budget", [4, 6, 8, 10, 24])
@pytest.mark.parametrize("what", ["layers", "context"])
def test_largest_fitting_is_the_largest(what, budget):
    base = Plan.uniform(small_spec("qwen2"), "int8", context=CONTEXT)

    def at(number):
        plan = base.with_gpu_layers(number) if what == "layers" else replace(base, context=number)
        return plan, Workload.full_context(plan.context)

    def fits(number):
        return forecast(at(number)[0], budget * MiB).fits

    low, high = (0, LAYERS) if what == "layers" else (2, 1024)
    found = largest_fitting(at, low, high, stand_in(budget * MiB))
    if found is None:
        assert not fits(low)
    else:
        assert found.plan == at(found.number)[0]
        assert found.forecast.fits
        assert fits(found.number)
        assert found.number == high or not fits(found.number + 1)


@pytest.mark.parametrize("gpu_layers", [0, 3, LAYERS])
@pytest.mark.parametrize("recipe", ["bf16", "int8", "int4", "nf4"])
def test_the_bound_is_a_bound(recipe, gpu_layers):
    spec = small_spec("llama")
    plan = Plan.uniform(spec, recipe, context=CONTEXT).with_gpu_layers(gpu_layers)
    assert 0 < least_bytes(plan) <= forecast(plan).peak_allocated_bytes


def test_default_4_bit_of_qwen_4b_does_not_fit_4_gib():
    spec, budget = packaged_spec("qwen1.5-4b"), GpuBudget.parse("4GiB")
    plan = Plan.uniform(spec, "nf4", context=4096)
    assert least_bytes(plan) > budget.usable_bytes
    assert least_bytes(plan) / GiB == pytest.approx(4.67, abs=0.01)  # 3.11 of weights, 1.56 of KV cache
    first, *_ = suggest(plan, budget)
    assert "embedding to the CPU" in first.text
    assert first.plan.modules["model.embed_tokens"].device == "cpu"
    assert first.forecast.peak_reserved_bytes <= budget.usable_bytes
