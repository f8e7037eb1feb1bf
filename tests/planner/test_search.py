"""The largest that fits: it does, and the next does not."""

import functools
from dataclasses import replace

import pytest

from lowvram_lab.errors import BudgetError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner import forecast as dry_run
from lowvram_lab.planner import search as limits
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.search import CONTEXT_STEP
from lowvram_lab.units import MiB, format_bytes
from tests.helpers.machines import stand_in
from tests.helpers.tiny import TINY, packaged_spec, tiny_config


def forecast(plan, gpu=None, **options):
    return dry_run.forecast(plan, stand_in(gpu), **options)


def max_context(plan, gpu):
    return limits.max_context(plan, stand_in(gpu))


def max_layers_on_gpu(plan, gpu):
    return limits.max_layers_on_gpu(plan, stand_in(gpu))


@functools.cache
def spec_of(kind: str) -> ModelSpec:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "vocab_size": 1024}
    return ModelSpec.from_config(tiny_config(kind, **sizes, max_position_embeddings=2048), f"small-{kind}")


def plan_of(kind, recipe="int8", context=256):
    return Plan.uniform(spec_of(kind), recipe, context=context)


def fits(plan, kind, budget, **workload):
    return forecast(plan, budget, workload=Workload.full_context(plan.context, **workload)).fits


@pytest.mark.parametrize(("kind", "budget"), [("llama", 6 * MiB), ("qwen2", 9 * MiB)])
def test_the_longest_context(kind, budget):
    plan = plan_of(kind)
    found = max_context(plan, budget)
    assert int(found) == found.value
    assert found.value % CONTEXT_STEP == 0
    assert found.limited_by == "memory"
    assert found.forecast.workload.tokens == found.value
    assert fits(replace(plan, context=found.value), kind, budget)
    assert not fits(replace(plan, context=found.value + CONTEXT_STEP), kind, budget)


@pytest.mark.parametrize("kind", TINY)
def test_where_the_model_ends_first(kind):
    found = max_context(plan_of(kind), "512MiB")
    assert (found.value, found.limited_by) == (2048, "model")
    found = max_layers_on_gpu(plan_of(kind), "512MiB")
    assert (found.value, found.limited_by) == (3, "model")


@pytest.mark.parametrize(
    ("kind", "recipe", "short_by"), [("llama", "bf16", 1), ("qwen2", "int4", 1), ("qwen2", "bf16", 3)]
)
def test_the_most_layers(kind, recipe, short_by):
    plan = plan_of(kind, recipe)
    budget = forecast(plan, "1TiB").peak_reserved_bytes - short_by * 2 * MiB
    found = max_layers_on_gpu(plan, budget)
    assert 0 <= found.value < 3
    assert found.limited_by == "memory"
    assert fits(plan.with_gpu_layers(found.value), kind, budget)
    assert not fits(plan.with_gpu_layers(found.value + 1), kind, budget)


def test_more_memory_never_means_less():
    plans = [plan_of("qwen2"), replace(plan_of("qwen2"), kv_format="int8")]
    rows = [[max_context(plan, n * MiB).value for n in (6, 9)] for plan in plans]
    for row in rows:
        assert row == sorted(row)
        assert row[0] < row[-1]
    assert all(small >= large for small, large in zip(rows[1], rows[0], strict=True))  # int8 KV leaves room for more


def test_what_does_not_fit_at_all_says_what_it_needs():
    for ask, least in [
        (max_context, "16 tokens of context"),
        (max_layers_on_gpu, "the embeddings alone"),
    ]:
        with pytest.raises(BudgetError, match=f"{least} of small-qwen2 in this plan needs") as error:
            ask(plan_of("qwen2", "bf16"), MiB)
        assert "the GPU has 1.0 MiB" in str(error.value)
        assert "\n" not in str(error.value)


def test_the_need_that_is_named_is_enough():
    plan = plan_of("qwen2", "bf16")
    with pytest.raises(BudgetError) as error:
        max_context(plan, MiB)
    needs = forecast(replace(plan, context=CONTEXT_STEP), GpuBudget(2**40)).device_peak_bytes
    assert f"needs {format_bytes(needs)}," in str(error.value)
    assert max_context(plan, needs).value >= CONTEXT_STEP
    with pytest.raises(BudgetError):
        max_context(plan, needs - 1)


def test_an_opened_gpu_and_one_without_a_limit():
    gpu = open_gpu("8MiB")
    if gpu.simulated:
        plan = plan_of("llama")
        by_gpu = limits.max_context(plan, gpu)
        assert by_gpu.value == max_context(plan, GpuBudget(8 * MiB)).value
    with pytest.raises(BudgetError, match="needs a GPU with a budget"):
        limits.max_context(plan_of("llama"), open_gpu())


def test_qwen_4b_in_int4_on_4_gib():
    spec = packaged_spec("qwen1.5-4b")
    plan = Plan.uniform(spec, "int4", context=4096)
    found = limits.max_context(plan, "4GiB")
    print(f"Qwen1.5-4B int4 on 4 GiB: context {found.value}, {found.forecast.summary()}")
    assert found.limited_by == "memory"
    assert 1500 < found.value < 4096  # 400 KiB a token: what 2.4 GiB of weights and the context leave
    longer = replace(plan, context=found.value + CONTEXT_STEP)
    assert not dry_run.forecast(longer, "4GiB").fits
