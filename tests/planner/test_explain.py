"""Out of memory, explained: what was asked, by whom, who held it, and changes that really make it fit."""

import functools
import gc
import json
import random
from dataclasses import replace

import pytest
import torch

from lowvram_lab.engine.load import load
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.explain import TOP, OomExplanation, explain_oom
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from lowvram_lab.units import MiB
from tests.helpers.machines import stand_in
from tests.helpers.tiny import TINY, DictCheckpoint, load_tiny, random_ids, tiny_config, tiny_plan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="budgets this small are the stand-in's")
LAYERS = 3


@functools.cache
def small_spec(kind: str) -> ModelSpec:
    """Large enough that formats and splits show through the allocator's 2 MiB segments, small enough to run often."""
    sizes = {"hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": LAYERS, "vocab_size": 3072}
    return ModelSpec.from_config(tiny_config(kind, **sizes), f"small-{kind}")


@functools.cache
def small_checkpoint(kind: str) -> DictCheckpoint:
    generator = torch.Generator().manual_seed(1)
    return DictCheckpoint(
        {
            f"{module.name}.{key}": torch.randn(shape, generator=generator) * 0.05
            for module in small_spec(kind).modules
            for key, shape in module.parameters.items()
        }
    )


def run_plan(kind, plan, budget, workload=None):
    """Loads a plan on a stand-in of so many bytes and runs it, by default over its whole context."""
    gpu = StandInGpu(GpuBudget(budget))
    model = load(plan, gpu, checkpoint=small_checkpoint(kind), progress=False)
    return run_workload(model, workload or Workload.full_context(plan.context))


def needed(kind, plan, phase=None):
    profile = forecast(plan, stand_in())
    return profile.phase(phase).peak_reserved_bytes if phase else profile.peak_reserved_bytes


def random_cases(count):
    """Plans, and for each a budget that it does not fit, seeded."""
    source, cases = random.Random(20), []
    while len(cases) < count:
        kind, recipe = source.choice(TINY), source.choice(["fp32", "bf16", "int8", "int4", "int4-g32", "nf4"])
        plan = Plan.uniform(small_spec(kind), recipe, context=source.randrange(300, 1000))
        plan = plan.with_gpu_layers(source.choice([LAYERS, LAYERS, 2]))
        if source.random() < 0.3:
            plan = replace(plan, kv_format="int8")
        whole = needed(kind, plan)
        cases.append((kind, recipe, plan, int(whole * source.uniform(0.45, 0.999))))
    return cases


def apply_all_suggestions(cases):
    """Fails each case for real, applies every suggestion for real; texts of what was tried, and how many by case."""
    counts, tried = [], {}
    for kind, recipe, plan, budget in cases:
        with explain_oom() as found:
            run_plan(kind, plan, budget)
        case = (kind, recipe, plan.context, budget)
        assert found.happened, case
        assert not found.within_forecast, case
        counts.append(len(found.suggestions))
        for suggestion in found.suggestions:
            again = forecast(suggestion.plan, stand_in(budget))
            assert again.fits, (case, suggestion.text)
            assert again.peak_reserved_bytes <= budget
            assert (suggestion.plan, budget) not in tried, (case, suggestion.text)
            real = run_plan(kind, suggestion.plan, budget)  # raises if it does not fit
            tried[suggestion.plan, budget] = suggestion.text
            assert (again.compare(real)["difference"] == 0).all(), (case, suggestion.text)
            assert real.peak_reserved_bytes <= budget
    return list(tried.values()), counts


def test_every_suggestion_for_five_random_failures_really_fits():
    tried, counts = apply_all_suggestions(random_cases(5))
    assert len(tried) == sum(counts) >= 5


@pytest.mark.slow
def test_every_suggestion_for_thirty_random_failures_really_fits():
    tried, counts = apply_all_suggestions(random_cases(30))
    print(f"{len(tried)} suggestions for {len(counts)} failures, {counts.count(0)} of them beyond help")
    assert counts.count(0) <= 10  # some budgets are too small for anything
    for lever in ("context", "int8", "int4", "embedding to the CPU", "layers to the CPU", "KV cache in int8"):
        assert any(lever in text for text in tried), lever


def explained(kind="qwen2", phase="prefill", **options):
    """An out-of-memory error on purpose: one segment too small for the phase."""
    plan = Plan.uniform(small_spec(kind), "bf16", context=900)
    budget = needed(kind, plan, phase) - 1
    with explain_oom(**options) as found:
        run_plan(kind, plan, budget)
    return found, plan, budget


@pytest.mark.parametrize("phase", ["load", "prefill"])
def test_who_asked_and_who_held(phase):
    found, plan, budget = explained(phase=phase)
    event = forecast(plan, stand_in(budget)).first_oom
    assert found.happened
    assert (found.event.phase, found.event.module) == (event.phase, event.module) == (phase, found.event.module)
    assert found.event.module.startswith(("model.layers.", "lm_head", "model.norm"))
    assert found.fragmentation_bytes == found.event.reserved_bytes - found.event.allocated_bytes >= 0
    table = found.table()
    assert list(table.columns) == ["module", "bytes"]
    assert len(table) == TOP
    assert list(table["bytes"]) == sorted(table["bytes"], reverse=True)
    assert sum(size for _, size in found.event.holders) == found.event.allocated_bytes
    first, *lines = found.summary().split("\n")
    assert f"Out of memory (simulated) during {phase}: {found.event.module} asked for" in first
    assert lines[0].startswith("Held then: ")
    assert lines[1].startswith("Reserved but unused (fragmentation): ")
    assert [line.startswith("Would fit: ") for line in lines[2:]] == [True] * len(found.suggestions)
    assert "simulated GPU out of memory" in found.message
    assert repr(found) == found.summary()
    assert "<table" in found._repr_html_()
    numbers = json.loads(json.dumps(found.to_dict()))
    assert numbers["event"]["module"] == found.event.module
    assert len(numbers["suggestions"]) == len(found.suggestions) > 0


def test_nothing_of_a_model_that_failed_to_load_stays():
    found, *_ = explained(phase="load")
    gc.collect()
    assert found.gpu.meter.allocated["gpu"] == 0


def test_without_suggestions():
    found, *_ = explained(suggestions=False)
    assert found.happened
    assert found.suggestions == []


def test_a_run_longer_than_planned():
    plan = tiny_plan("llama", context=64)
    gpu = StandInGpu(GpuBudget(4 * MiB))
    model = load_tiny("llama", plan, gpu)
    with explain_oom() as found, torch.no_grad():
        model(random_ids(1000))
    assert found.within_forecast
    assert found.suggestions == []
    assert "fits at its context of 64: this run was longer" in found.summary()


def test_somebody_elses_error_is_explained_without_suggestions():
    with explain_oom() as found:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert found.happened
    assert (found.event, found.gpu, found.suggestions, found.fragmentation_bytes) == (None, None, [], 0)
    assert found.summary().startswith("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "not loaded by lowvram_lab" in found.summary()
    assert found.table().empty
    assert json.loads(json.dumps(found.to_dict()))["event"] is None
    assert "<table" not in found._repr_html_()


def test_an_error_outside_the_model_is_explained_too():
    gpu = StandInGpu(GpuBudget(4 * MiB))
    with explain_oom() as found, gpu.phase("sampling"), gpu.meter.scope(place="gpu"):
        torch.zeros(8 * MiB, dtype=torch.uint8)
    assert found.happened
    assert (found.event.phase, found.event.requested_bytes) == ("sampling", 8 * MiB)
    assert found.suggestions == []
    assert "simulated" in f"{found.message}"
    assert "the model asked for 8.0 MiB" in found.summary()
    assert found.table().empty


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RuntimeError])
def test_other_errors_pass(error):
    with pytest.raises(error), explain_oom() as found:
        raise error("something else")
    assert not found.happened


def test_nothing_happened():
    with explain_oom() as found:
        run_plan("llama", Plan.uniform(small_spec("llama"), "int8", context=64), 100 * MiB, Workload(8, 1))
    assert not found.happened
    assert found.summary() == OomExplanation().summary() == "no out-of-memory error happened"
    assert found.table().empty
    assert found.to_dict()["message"] is None
