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
from lowvram_lab.planner import suggest as levers
from lowvram_lab.planner.moves import cost, forecast_loss, off_card_seconds
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.search import largest_fitting, least_bytes
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.planner.suggest import suggest
from lowvram_lab.planner.suited import QUICK, RECIPES, quick_recipes
from lowvram_lab.units import GiB, MiB, format_bytes
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
def test_exactly_what_a_recipe_needs_gets_that_recipe_or_what_loses_less(kind, recipe):
    """A more precise one, where moves that cost less let it in: int8 with an int4 cache in what int4 needs."""
    choice = auto_plan(small_spec(kind), needed(kind, recipe), CONTEXT)
    plan = choice.plan
    assert cost(plan) <= cost(Plan.uniform(small_spec(kind), recipe, context=CONTEXT))
    assert choice.forecast.fits
    assert (choice.recipe,) == tuple(body_formats(plan))
    assert choice.why[-1].startswith(f"{choice.recipe} ")
    assert (f"the KV cache in {plan.kv_format}" in choice.why[-1]) == (plan.kv_format != "bf16")
    assert (f"prompts read {plan.prefill_chunk} tokens at a time" in choice.why[-1]) == (plan.prefill_chunk is not None)
    assert (f"prompts read {plan.prefill_chunk} tokens" in plan.summary()) == (plan.prefill_chunk is not None)
    if choice.recipe == "int4":
        assert choice.why[0].startswith("bf16 does not fit: ")
    assert plan.context == CONTEXT
    assert "fits" in choice._repr_html_()


def least_on_gpu(kind: str, recipe: str = "int4") -> Plan:
    """All layers and the head on the GPU, with every move that leaves them there."""
    spec = small_spec(kind)
    plan = replace(Plan.uniform(spec, recipe, context=CONTEXT), kv_format="int4", prefill_chunk=256)
    return plan if spec.tied else plan.with_modules(spec.embedding, device="cpu")


@pytest.mark.parametrize("kind", TINY)
def test_less_than_all_moves_need_is_split(kind):
    budget = forecast(least_on_gpu(kind)).peak_reserved_bytes - SEGMENT
    choice = auto_plan(small_spec(kind), budget, CONTEXT)
    on_gpu = choice.plan.layer_devices().count("gpu")
    assert off_card_seconds(choice.plan) > 0
    assert body_formats(choice.plan) == {"int4"}
    if on_gpu < LAYERS:
        assert not forecast(choice.plan.with_gpu_layers(on_gpu + 1), budget).fits  # as many as there is room for
        assert f"{on_gpu} of {LAYERS} layers" in choice.why[-1]
    else:
        assert "head on the CPU" in choice.why[-1]
        assert "head" in choice.plan.summary() or choice.plan.spec.tied


def test_what_loses_nothing_comes_before_a_lower_recipe():
    spec = small_spec("qwen2")
    plan = Plan.uniform(spec, "bf16", context=CONTEXT)
    spared = replace(plan.with_modules(spec.embedding, device="cpu"), prefill_chunk=256)
    budget = forecast(spared).peak_reserved_bytes
    assert budget < forecast(plan).peak_reserved_bytes
    choice = auto_plan(spec, budget, CONTEXT)
    assert body_formats(choice.plan) == {"bf16"}
    assert choice.plan.kv_format == "bf16"
    assert choice.why[-1].startswith("bf16 with ")


@pytest.mark.parametrize(("kind", "kernels"), [("llama", "cpu"), ("qwen2", "cuda")])
def test_more_budget_is_never_a_worse_plan(kind, kernels):
    spec, costs = small_spec(kind), []
    for budget in range(needed(kind, "int4", 1, kernels), needed(kind, "bf16", LAYERS, kernels) + 1, SEGMENT):
        card = replace(GpuBudget.parse(budget), kernels=kernels)
        choice = auto.auto_plan(spec, card, CONTEXT)
        again = dry_run.forecast(choice.plan, card)
        assert again.fits
        assert again.phases == choice.forecast.phases
        assert again.peak_reserved_bytes <= budget
        costs.append(cost(choice.plan))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]
    assert costs[-1][:2] == (0, 0)


@pytest.mark.parametrize("kind", TINY)
def test_more_context_is_never_a_better_plan_and_more_ram_never_a_worse_one(kind):
    spec, budget = small_spec(kind), needed(kind, "int8", 1)
    found = [auto_plan(spec, budget, context).plan for context in (300, 600, 1024)]
    costs = [(off_card_seconds(plan) / plan.context, forecast_loss(plan)) for plan in found]
    assert costs == sorted(costs)
    small = needed(kind, "int4", 1)
    free = auto_plan(spec, small, CONTEXT).plan
    ranks = []
    for share in (0.6, 0.8, 1.0, 4.0):
        try:
            ranks.append(cost(auto_plan(spec, small, CONTEXT, ram=int(share * auto.ram_bytes(free))).plan))
        except BudgetError:
            assert not ranks
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == cost(free)


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
    least = Plan.uniform(spec, recipes[-1], context=CONTEXT).with_modules("*", device="cpu")
    least = replace(least, kv_format="int4", prefill_chunk=256)
    least = least.with_modules("model.norm", device="gpu")
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
        ranks.append(cost(choice.plan, "fidelity"))
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] > ranks[-1]
    assert choice.plan.layer_devices() == ["gpu"] * LAYERS


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


def test_few_of_all_plans_are_replayed(monkeypatch):
    """Of three recipes with three KV formats each; before RAM and earlier refusals ruled plans out, 66 and 118."""
    spec, budget, replayed = small_spec("qwen2"), needed("qwen2", "int4", 0), []
    options = {"prefer": "speed", "recipes": RECIPES, "machine": Flat({"bf16": 3.0, "int8": 2.0, "int4": 1.0})}
    replay = dry_run._replay
    monkeypatch.setattr(dry_run, "_replay", lambda plan, *a, **k: (replayed.append(plan), replay(plan, *a, **k))[1])
    free = auto_plan(spec, budget, CONTEXT, **options).plan
    assert len(set(replayed)) == len(replayed) <= 52
    replayed.clear()
    with pytest.raises(BudgetError):
        auto_plan(spec, budget, CONTEXT, ram=auto.ram_bytes(free) - 1, **options)
    assert 0 < len(replayed) <= 31


NANOSECONDS = {"bf16": 4.0, "int8": 2.0, "int6": 1.7, "int5": 1.5, "int4": 1.0, "int3": 1.2, "int2": 1.2}
"""A weight, in proportion to what it takes on the CPU of a small model."""


def test_speed_weighs_what_each_recipe_leaves_on_the_gpu():
    spec = small_spec("llama")
    budget = needed("llama", "int8", 2)
    quick_int4 = auto_plan(spec, budget, CONTEXT, prefer="speed", machine=Flat(NANOSECONDS))
    assert body_formats(quick_int4.plan) == {"int4"}
    slow_int4 = auto_plan(
        spec, budget, CONTEXT, recipes=RECIPES, prefer="speed", machine=Flat({**NANOSECONDS, "int4": 90.0})
    )
    assert body_formats(slow_int4.plan) == {"int8"}
    assert slow_int4.speed.origin == "forecast"
    assert len(slow_int4.why) <= 5
    assert any("forecast tokens/s: bf16" in line for line in slow_int4.why)
    even = auto_plan(spec, budget, CONTEXT, prefer="speed", machine=Flat(dict.fromkeys(NANOSECONDS, 0.0)))
    assert body_formats(even.plan) == {"bf16"}  # as fast, and more precise


def test_speed_takes_int3_where_it_is_the_fastest_and_says_what_it_costs():
    spec, quick_int3 = small_spec("llama"), Flat({**NANOSECONDS, "int3": 0.7})
    choice = auto_plan(spec, "1GiB", CONTEXT, prefer="speed", machine=quick_int3)
    assert (choice.recipe, body_formats(choice.plan)) == ("int3", {"int3"})
    assert any("; int3 costs a small model a KL of " in line for line in choice.why)
    assert auto_plan(spec, "1GiB", CONTEXT, machine=quick_int3).recipe == "bf16"  # only speed was asked to
    named = auto_plan(spec, "1GiB", CONTEXT, prefer="speed", recipes=RECIPES, machine=quick_int3)
    assert named.recipe == "int4"


def test_speed_takes_int3_where_int4_does_not_fit_whole():
    """A layer of int3 takes longer on the card than one of int4, but far less than one of int4 on the CPU."""
    spec = small_spec("llama")
    least = replace(Plan.uniform(spec, "int3", context=CONTEXT), kv_format="int8", prefill_chunk=256)
    budget = forecast(least).peak_reserved_bytes
    assert not forecast(replace(least_on_gpu("llama"), kv_format="int8"), budget).fits
    choice = auto_plan(spec, budget, CONTEXT, kv_format="int8", prefer="speed", machine=Flat(NANOSECONDS))
    assert body_formats(choice.plan) == {"int3"}
    assert off_card_seconds(choice.plan) == 0
    roomy = auto_plan(spec, "1GiB", CONTEXT, kv_format="int8", prefer="speed", machine=Flat(NANOSECONDS))
    assert body_formats(roomy.plan) == {"int4"}


@pytest.mark.parametrize("recipe", ["int6", "int5", "int3"])
def test_speed_takes_any_format_that_is_the_fastest(recipe):
    choice = auto_plan(small_spec("qwen2"), "1GiB", CONTEXT, prefer="speed", machine=Flat({**NANOSECONDS, recipe: 0.5}))
    assert choice.recipe == recipe


def test_int2_is_taken_by_name_alone():
    spec, machine = small_spec("llama"), Flat({**NANOSECONDS, "int2": 0.1})
    assert auto_plan(spec, "1GiB", CONTEXT, prefer="speed", machine=machine).recipe == "int4"
    recipes = ("int4", "int2")
    assert auto_plan(spec, "1GiB", CONTEXT, prefer="speed", recipes=recipes, machine=machine).recipe == "int2"


@pytest.mark.parametrize("recipes", [None, ("int3", "nf4", "int4", "int8", "int5")])  # in no order
@pytest.mark.parametrize("slow", ["int6", "int5", "nf4", "int3"])
def test_speed_never_takes_what_another_dominates(recipes, slow):
    spec, machine = small_spec("llama"), Flat({**NANOSECONDS, "nf4": 1.0, slow: 1.01})
    plans = [Plan.uniform(spec, name, context=CONTEXT) for name in recipes or (*RECIPES, *QUICK)]
    points = [(plan.weight_bytes(), forecast_loss(plan), 1 / speed_of(plan, machine)) for plan in plans]
    chosen = auto_plan(spec, "1GiB", CONTEXT, prefer="speed", recipes=recipes, machine=machine).plan
    mine = (chosen.weight_bytes(), forecast_loss(chosen), 1 / speed_of(chosen, machine))
    assert not any(all(a <= b for a, b in zip(point, mine, strict=True)) and point != mine for point in points)


def speed_of(plan: Plan, machine: Flat) -> float:
    return forecast_speed(plan, machine=machine).decode_tokens_per_s


def test_recipes_for_speed_are_in_the_order_of_the_one_table_of_losses():
    assert quick_recipes(RECIPES) == ("bf16", "int8", "int6", "int5", "int4", "int3")
    assert quick_recipes(("fp16", "int8", "nf4")) == ("fp16", "int8", "int6", "int5", "nf4", "int3")


def test_more_budget_is_never_slower():
    spec, machine = small_spec("qwen2"), Flat(NANOSECONDS)
    speeds = [
        auto_plan(spec, budget, CONTEXT, prefer="speed", recipes=RECIPES, machine=machine).speed.decode_tokens_per_s
        for budget in range(needed("qwen2", "int4", 0), needed("qwen2", "bf16") + 1, 3 * SEGMENT)
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


def without_one_change(changed, plan):
    """The changed plan with each of its changes that cost something taken back by itself."""
    for name in ("kv_format", "prefill_chunk"):
        if getattr(changed, name) != getattr(plan, name):
            yield replace(changed, **{name: getattr(plan, name)})
    spec = plan.spec
    moved = changed.modules[spec.embedding].device != plan.modules[spec.embedding].device
    if moved and not spec.tied:
        yield changed.with_modules(spec.embedding, device="gpu")


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
        spare = again.budget.usable_bytes - again.peak_reserved_bytes
        assert str(suggestion).endswith(f"fits with {format_bytes(spare)} to spare")
        on_cpu = suggestion.plan.layer_devices().count("cpu")
        assert (f"{on_cpu} of {LAYERS} layers to the CPU" in suggestion.text) == (on_cpu > 0)
        assert (f"context {suggestion.plan.context}" in suggestion.text) == (suggestion.plan.context < CONTEXT)
        moved = suggestion.plan.modules[spec.embedding].device == "cpu"
        assert ("embedding" in suggestion.text.replace("embedding in", "")) == moved
        if body_formats(suggestion.plan) != body_formats(plan):
            assert body_formats(suggestion.plan).pop() in suggestion.text
        for smaller in without_one_change(suggestion.plan, plan):
            assert not forecast(smaller, budget).fits, (suggestion.text, smaller.summary())
    assert len({suggestion.text for suggestion in found}) == len(found)


@pytest.mark.parametrize(
    ("kind", "recipe", "budget"), [("llama", "int8", 8), ("qwen2", "int8", 10), ("qwen2", "int4", 6)]
)
def test_layers_on_the_cpu_leave_no_other_change_needless(kind, recipe, budget):
    plan, budget = Plan.uniform(small_spec(kind), recipe, context=1024), stand_in(budget * MiB - 1)
    split = [suggestion for suggestion in suggest(plan, budget) if "layers to the CPU" in suggestion.text]
    assert split
    for suggestion in split:
        assert suggestion.forecast.fits
        for smaller in without_one_change(suggestion.plan, plan):
            assert not forecast(smaller, budget).fits, (suggestion.text, smaller.summary())


@pytest.mark.parametrize("share", [0.7, 0.85])
def test_a_suggestion_says_that_weights_travel_no_more(share):
    plan = Plan.uniform(small_spec("qwen2"), "bf16", context=1024).with_gpu_layers(2)
    plan = replace(plan, stream_from=300)
    found = suggest(plan, stand_in(round(forecast(plan, stand_in()).peak_reserved_bytes * share)))
    assert any(suggestion.plan.stream_from is None for suggestion in found)
    for suggestion in found:
        said = "long prompts computed where the layers are" in suggestion.text
        assert said == (suggestion.plan.stream_from is None), suggestion.text


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


def test_layers_are_suggested_where_the_allocator_alone_would_help(monkeypatch):
    """And no move is left that keeps layers where they are: everything cheap is done in this plan."""
    plan = replace(least_on_gpu("llama"), prefill_chunk=128)
    budget = stand_in(forecast(plan).peak_reserved_bytes - SEGMENT)
    other_mode = levers.Suggestion("the other mode", plan, forecast(plan), "X=1")  # as on a card: models here are tiny
    monkeypatch.setattr(levers, "_expandable", lambda plan, budget: [other_mode])
    first, *others = suggest(plan, budget)
    assert first is other_mode
    assert any("to the CPU" in each.text for each in others)


def test_default_4_bit_of_qwen_4b_does_not_fit_4_gib():
    spec, budget = packaged_spec("qwen1.5-4b"), GpuBudget.parse("4GiB")
    plan = Plan.uniform(spec, "nf4", context=4096)
    assert least_bytes(plan) > budget.usable_bytes
    assert least_bytes(plan) / GiB == pytest.approx(4.67, abs=0.01)  # 3.11 of weights, 1.56 of KV cache
    first, *_ = suggest(plan, budget)
    assert "embedding to the CPU" in first.text
    assert first.plan.modules["model.embed_tokens"].device == "cpu"
    assert first.forecast.peak_reserved_bytes <= budget.usable_bytes
