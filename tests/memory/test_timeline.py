"""The timeline adds up to the meter's figures, and a forecast's is the measured run's, event for event."""

import functools
import gc
from dataclasses import replace

import pytest
import torch

from lowvram_lab.decoding.decode import prefill
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.load import load
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.timeline import CATEGORIES, Timeline
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from tests.helpers.tiny import TINY, DictCheckpoint, load_tiny, random_ids, tiny_plan, tiny_spec, tiny_state

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA kernels take memory the meter does not see")
WORKLOAD = Workload(70, 3)
CASES = [(kind, recipe, placement) for kind in TINY for recipe, placement in [("bf16", "gpu"), ("int4", "half")]]


@functools.cache
def dry(kind, plan, workload=WORKLOAD):
    return forecast(plan, open_gpu("1000MiB"), workload=workload, timeline=True)


def recorded(kind, plan):
    gpu, checkpoint = open_gpu("1000MiB"), DictCheckpoint(tiny_state(kind))
    return load(plan, gpu, checkpoint=checkpoint, progress=False, timeline=True)


@functools.cache
def real(kind, plan, workload=WORKLOAD):
    return run_workload(recorded(kind, plan), workload)


@pytest.mark.parametrize(("kind", "recipe", "placement"), CASES)
def test_a_forecasts_timeline_is_the_measured_runs(kind, recipe, placement):
    plan = tiny_plan(kind, recipe, placement)
    forecasted, measured = (
        [event for event in run(kind, plan).timeline.events if event.place == "gpu"] for run in (dry, real)
    )
    assert len(forecasted) > 100
    assert forecasted == measured  # sizes, owners, categories, phases, and what the allocator held after each


@pytest.mark.parametrize("run", [dry, real])
@pytest.mark.parametrize(("kind", "recipe", "placement"), CASES)
def test_the_peaks_of_the_phases_are_in_it(run, kind, recipe, placement):
    profile = run(kind, tiny_plan(kind, recipe, placement))
    table = profile.timeline.table()
    assert list(dict.fromkeys(table["phase"])) == ["load", "prefill", "decode"]
    assert (table["allocated"] == table[list(CATEGORIES)].sum(axis=1)).all()
    assert (table["allocated"] <= table["reserved"]).all()
    assert (table[[*CATEGORIES]] >= 0).all(axis=None)
    for phase in profile.phases:
        rows = table[(table["phase"] == phase.name) & (table["size"] > 0)]
        assert rows["allocated"].max() == phase.peak_allocated_bytes
        highest = rows.loc[rows["allocated"][::-1].idxmax()]  # the meter keeps the last of equal peaks
        found = {key: highest[key] for key in CATEGORIES if highest[key]}
        assert found == {key: size for key, size in phase.breakdown.items() if size}
        assert table[table["phase"] == phase.name]["reserved"].max() == phase.peak_reserved_bytes


@pytest.mark.parametrize("run", [dry, real])
@pytest.mark.parametrize("kind", TINY)
def test_every_byte_at_the_peak_has_an_owner(run, kind):
    profile = run(kind, tiny_plan(kind, "int8"))
    timeline, spec = profile.timeline, tiny_spec(kind)
    peak = timeline.peak_index()
    assert timeline.events[peak].size > 0
    assert timeline.events[peak].phase == profile.peak.name
    held = timeline.live_at(peak)
    assert held["bytes"].sum() == profile.peak_allocated_bytes
    assert (held["bytes"] > 0).all()
    assert list(held["bytes"]) == sorted(held["bytes"], reverse=True)
    assert (held["module"] != "").all()
    weights = held[held["category"] == "weights"]
    assert {m.name for m in spec.modules if not m.tied_to} <= set(weights["module"])
    kv = held[held["category"] == "kv"]
    assert set(kv["module"]) == {"kv cache"}
    assert timeline.live_at(peak - 1)["bytes"].sum() == profile.peak_allocated_bytes - timeline.events[peak].size


def test_each_release_gives_back_what_was_taken():
    model = recorded("qwen2", tiny_plan("qwen2", "int8"))
    gpu, timeline = model.lowvram.gpu, model.lowvram.gpu.meter.timeline
    cache = PreallocatedCache(model)
    with torch.no_grad():
        logits = prefill(model, random_ids(50), cache)
    for place in ("gpu", "cpu"):
        assert sum(event.size for event in timeline.events if event.place == place) == gpu.meter.allocated[place]
    assert gpu.meter.allocated["gpu"] > model.lowvram.plan.weight_bytes()
    del model, cache, logits
    gc.collect()
    assert gpu.meter.allocated["gpu"] == 0
    assert timeline.table()["allocated"].iloc[-1] == 0
    assert timeline.live_at(len(timeline.events) - 1).empty


def test_a_run_ends_its_timeline():
    model = recorded("llama", tiny_plan("llama"))
    first, second = (run_workload(model, WORKLOAD) for _ in range(2))
    events = len(first.timeline.events)
    assert {event.phase for event in first.timeline.events} == {"load", "prefill", "decode"}
    assert second.timeline is None
    assert model.lowvram.gpu.meter.timeline is None
    del model
    gc.collect()
    assert len(first.timeline.events) == events


def test_a_timeline_begun_late_knows_only_what_came_after():
    model = load_tiny("llama", tiny_plan("llama"))
    gpu = model.lowvram.gpu
    gpu.meter.timeline = timeline = Timeline()
    with torch.no_grad():
        prefill(model, random_ids(50), PreallocatedCache(model))
    del model
    gc.collect()
    assert gpu.meter.allocated["gpu"] == 0
    assert timeline.table()["allocated"].iloc[-1] == 0  # the weights' release is not in it, as their making was not
    assert timeline.table()["weights"].max() == 0


def test_no_timeline_unless_asked_and_none_of_nothing():
    profile = forecast(tiny_plan("llama"), workload=WORKLOAD)
    assert profile.timeline is None
    empty = Timeline()
    assert empty.table().empty
    assert empty.live_at(0).empty
    assert empty.peak_index() == 0


def test_on_the_cpu_there_is_a_timeline_too():
    profile = real("qwen2", tiny_plan("qwen2", "bf16", "half"))
    timeline = profile.timeline
    on_cpu = timeline.live_at(timeline.peak_index("cpu"), "cpu")
    assert "model.layers.0.mlp.up_proj" in set(on_cpu["module"])
    assert not any(name.startswith("model.layers.2") for name in on_cpu["module"])
    assert timeline.table("cpu")["allocated"].max() == on_cpu["bytes"].sum()


def test_forecast_with_other_settings_has_the_workspace_in_it():
    plan = replace(tiny_plan("llama"), context=128)
    profile = forecast(plan, "1000MiB", workload=WORKLOAD, timeline=True)  # CUDA's kernels
    table = profile.timeline.table()
    assert table["workspace"].iloc[-1] > 8 * 2**20
    assert "cuBLAS" in set(profile.timeline.live_at(profile.timeline.peak_index())["module"])
    assert table["allocated"].max() == profile.peak_allocated_bytes
