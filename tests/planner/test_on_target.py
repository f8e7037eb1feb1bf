"""Plans for another machine: they fit its RAM, speeds are sums by hand, and nothing of this machine is asked."""

import math
from dataclasses import replace

import psutil
import pytest
import torch

from lowvram_lab.errors import BudgetError, PlanError
from lowvram_lab.model.host_bytes import forecast_load_bytes
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.moves import forecast_loss
from lowvram_lab.planner.on_target import forecast_on, plan_on, to_cpu
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.rates.machine import Machine
from lowvram_lab.rates.target import find_target, targets
from tests.helpers.machines import BOARD, stand_in
from tests.helpers.tiny import packaged_spec, tiny_plan, tiny_spec

GiB = 1 << 30


@pytest.fixture
def asks_nothing_of_this_machine(monkeypatch):
    """Fails where this machine's rates are measured, or its RAM or cores are asked for."""

    def asked(*_, **__):
        raise AssertionError("this machine was asked")

    for name in ("__init__", "_rates", "kernel", "product"):
        monkeypatch.setattr(Machine, name, asked)
    monkeypatch.setattr("lowvram_lab.rates.machine.time_calls", asked)
    monkeypatch.setattr(psutil, "virtual_memory", asked)
    monkeypatch.setattr("os.cpu_count", asked)


def with_room(room: int):
    return replace(BOARD, ram_bytes=room, reserved_bytes=0)


@pytest.mark.parametrize("fmt", ["bf16", "int8", "int4", "nf4"])
def test_speed_is_the_sum_made_by_hand(fmt, monkeypatch, asks_nothing_of_this_machine):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)  # the board has two cores, whatever there is here
    spec = tiny_spec("llama")
    plan = to_cpu(tiny_plan("llama", fmt))
    found = forecast_speed(plan, Workload(100, 20), BOARD.machine)
    queries, keys = spec.config["num_attention_heads"] * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    sizes = {"bf16": 2, "int8": 1 + 2 / 6144, "int4": 0.5625, "nf4": 0.5625}
    cycles = {"bf16": 0.75, "int8": 1.9, "int4": 2.25, "nf4": 1.9}
    each, first = 1e5 / 1e9, 1.2e6 / 1e9
    for module in spec.modules:
        if module.kind == "linear":
            weights, its = math.prod(module.weight_shape), plan.modules[module.name].format
            weight_s = sizes[its] / 4e9 + cycles[its] / 2e9
            fed = 1 if module.name == spec.head else 100
            each += weights * weight_s
            row_s = 2.25 / 2e9 if its == "int4" else 1 / 0.6e9
            first += 1e5 / 1e9 + weights * (weight_s + row_s * (fed - 1))
    for _ in range(spec.num_hidden_layers):
        each += 2e4 / 1e9 + 110 * (queries * 2 * 0.75 / 2e9 + keys * 4 / 4e9)
        first += 1.2e6 / 1e9 + 99 * spec.hidden_size * 12 / 2e9 + 100 * 99 / 2 * queries * 2 / 0.6e9
    assert 1 / found.decode_tokens_per_s == pytest.approx(each)
    assert found.ttft_s == pytest.approx(first)
    assert (found.origin, found.where) == ("assumed", "an imagined board")
    assert "(assumed, an imagined board" in found.summary()


def test_weights_on_disk_are_read_at_the_profiles_rate(asks_nothing_of_this_machine):
    tiny_spec("llama")
    plan = to_cpu(tiny_plan("llama", "int8"), disk_layers=2)
    held = plan.weight_bytes("cpu") + plan.kv_bytes(plan.context, "cpu")
    tight, roomy = (forecast_speed(plan, machine=with_room(max(1 << 20, size)).machine) for size in (held, GiB))
    assert "weights from disk" not in roomy.parts
    if held > 1 << 20:  # else the least of a profile has room for the pages
        assert tight.parts["weights from disk"] == pytest.approx(plan.weight_bytes("disk") / 1e8)
    alone = forecast_speed(plan, machine=BOARD.machine, ram=held)
    assert alone.parts["weights from disk"] == pytest.approx(plan.weight_bytes("disk") / 1e8)


@pytest.mark.parametrize("fmt", ["bf16", "int8"])
def test_what_of_the_ram_is_taken_is_what_loading_and_the_stand_in_take(fmt):
    tiny_spec("llama")
    plan = to_cpu(tiny_plan("llama", fmt))
    found = forecast_on(plan, BOARD)
    measured = forecast(plan.with_modules("*", device="gpu"), stand_in())
    assert found.load_bytes == forecast_load_bytes(plan, gpu_in_ram=False)
    tile = 0 if fmt == "bf16" else 16 << 20
    assert found.run_bytes == pytest.approx(measured.peak_allocated_bytes + tile, abs=64 << 10)  # blocks of 512 bytes
    assert found.run_bytes >= plan.weight_bytes() + plan.kv_bytes(plan.context)
    assert found.origin == "assumed" and found.to_dict()["origin"] == "assumed"
    assert list(found.table()["origin"]) == ["assumed"] * 2


@pytest.mark.parametrize("room", [12 * GiB, 8 * GiB, 5 * GiB, 4 * GiB])
def test_the_plan_fits_and_no_more_precise_one_does(room, asks_nothing_of_this_machine):
    spec, target = packaged_spec("qwen1.5-4b"), with_room(room)
    choice = plan_on(spec, target)
    assert choice.memory.fits and choice.memory.peak_bytes <= room
    assert choice.plan.weight_bytes("cpu") + choice.plan.kv_bytes(2048, "cpu") <= room
    assert {place for each in choice.plan.modules.values() for place in each.places} == {"cpu"}
    assert choice.plan.threads == target.cores
    for recipe in ("bf16", "int8", "int6", "int5", "int4", "int3"):
        other = replace(to_cpu(Plan.uniform(spec, recipe)), threads=target.cores)
        if forecast_loss(other) < forecast_loss(choice.plan):
            assert not forecast_on(other, target).fits


def test_less_room_gives_up_precision():
    spec = packaged_spec("qwen1.5-4b")
    losses = [forecast_loss(plan_on(spec, with_room(room)).plan) for room in (12 * GiB, 6 * GiB, 4 * GiB)]
    assert losses == sorted(losses) and losses[0] == 0 < losses[1] < losses[2]


def test_the_refusal_says_how_much_is_lacking(asks_nothing_of_this_machine):
    spec = packaged_spec("qwen1.5-4b")
    with pytest.raises(BudgetError) as error:
        plan_on(spec, with_room(3 * GiB))
    smallest = to_cpu(Plan.uniform(spec, "int3"))
    lacking = forecast_load_bytes(smallest, gpu_in_ram=False) - 3 * GiB
    assert f"{lacking / (1 << 20):.1f} MiB too much (assumed)" in str(error.value)
    assert "\n" not in str(error.value) and "an imagined board" in str(error.value)


def test_layers_stay_on_disk_where_ram_is_too_small():
    spec, target = packaged_spec("qwen1.5-4b"), with_room(3 * GiB)
    choice = plan_on(spec, target, disk="4GiB")
    assert choice.memory.fits and 0 < choice.memory.disk_weights_bytes <= 4 * GiB
    fewer = to_cpu(choice.plan, choice.plan.layer_devices().count("disk") - 1)
    assert not forecast_on(fewer, target).fits
    precise = plan_on(spec, target, disk="4GiB", prefer="fidelity")
    assert forecast_loss(precise.plan) < forecast_loss(choice.plan)
    assert precise.memory.disk_weights_bytes > choice.memory.disk_weights_bytes
    with pytest.raises(BudgetError, match="1.0 MiB of disk"):
        plan_on(spec, target, disk="1MiB")


def test_the_fastest_is_not_slower_than_the_most_precise():
    spec = packaged_spec("smollm2-135m")
    target = find_target("pi5-8gb")
    precise, fast = plan_on(spec, target), plan_on(spec, target, prefer="speed")
    assert fast.speed.decode_tokens_per_s > precise.speed.decode_tokens_per_s
    assert any(line.startswith("assumed tokens/s") for line in fast.why)


@pytest.mark.parametrize("model", ["smollm2-135m", "qwen1.5-4b"])
@pytest.mark.parametrize("name", list(targets()["target"]))
def test_every_shipped_target_has_a_plan_or_a_refusal(model, name, asks_nothing_of_this_machine):
    target = find_target(name)
    if (model, name) == ("qwen1.5-4b", "pi4-4gb"):
        with pytest.raises(BudgetError, match="too much"):
            plan_on(packaged_spec(model), target)
        return
    choice = plan_on(packaged_spec(model), target)
    assert choice.memory.peak_bytes <= target.usable_bytes
    assert choice.speed.origin == choice.memory.origin == "assumed"
    # no token is read faster than the memory's bandwidth allows
    linear = choice.plan.weight_bytes("cpu") - choice.plan.module_bytes(choice.plan.spec.module("model.embed_tokens"))
    assert choice.speed.decode_tokens_per_s < target.memory_bytes_per_s / linear
    assert "assumed" in choice._repr_html_()


def test_more_threads_than_cores_are_refused():
    with pytest.raises(PlanError, match="2 cores, found threads 3"):
        plan_on(packaged_spec("smollm2-135m"), BOARD, threads=3)


def test_a_plan_with_something_on_a_gpu_has_no_memory_there():
    tiny_spec("llama")
    with pytest.raises(PlanError, match="has no GPU"):
        forecast_on(tiny_plan("llama", "int8"), BOARD)


def test_settings_reach_the_plan():
    spec = packaged_spec("smollm2-135m")
    choice = plan_on(spec, BOARD, kv_format="int8", prefill_chunk=256, remember_ram=64 << 20, threads=1)
    plan = choice.plan
    assert (plan.kv_format, plan.prefill_chunk, plan.threads) == ("int8", 256, 1)
    assert choice.memory.remembered_bytes == plan.remembered_ram_bytes > 0
    with pytest.raises(PlanError, match="prefer"):
        plan_on(spec, BOARD, prefer="luck")
