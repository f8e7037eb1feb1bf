"""What remembering takes is forecast to the byte: RAM, and what crosses to a card and lies there meanwhile."""

from dataclasses import replace

import pytest

from lowvram_lab.errors import PlanError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from tests.helpers.tiny import TINY, load_tiny, tiny_plan


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("placement", ["gpu", "half", "disk"])
def test_bytes_are_as_forecast(kind, kv_format, placement):
    plan = replace(tiny_plan(kind, "int8", placement), kv_format=kv_format, remember_ram=1 << 20)
    gpu, workload = open_gpu("64MiB"), Workload(300, 2)
    model = load_tiny(kind, plan, gpu)
    measured, foreseen = run_workload(model, workload), forecast(plan, gpu, workload=workload)
    assert list(measured.compare(foreseen)["difference"]) == [0] * 4
    assert [phase.name for phase in measured.phases] == ["load", "prefill", "remember", "decode"]
    assert measured.remembered_bytes == foreseen.remembered_bytes == plan.remembered_ram_bytes > 0
    assert measured.transferred_bytes == foreseen.transferred_bytes


def test_prompts_that_are_remembered_take_less_at_once():
    plan = tiny_plan("llama")
    whole, blocks = (forecast(each, "64MiB") for each in (plan, replace(plan, remember=1 << 30)))
    assert blocks.phase("prefill").peak_allocated_bytes < whole.phase("prefill").peak_allocated_bytes


def test_pieces_end_where_blocks_do():
    plan = replace(tiny_plan("llama"), remember=1 << 30)
    assert plan.pieces(0, 300) == [128, 128, 44]
    assert plan.pieces(100, 300) == [28, 128, 128, 16]
    assert replace(plan, prefill_chunk=100).pieces(0, 300) == [100, 28, 100, 28, 44]
    assert replace(plan, remember=None).pieces(100, 300) == [300]
    assert replace(plan, remember=None, prefill_chunk=128).pieces(100, 300) == [128, 128, 44]


def test_a_budget_smaller_than_a_block_is_refused():
    plan = tiny_plan("llama")
    with pytest.raises(PlanError, match="a block of 128 tokens takes 96.0 KiB .* found room for 50.0 KiB"):
        replace(plan, remember=50 << 10)


def test_weights_that_travel_for_longer_prompts_than_a_block_are_refused():
    plan = replace(tiny_plan("llama", placement="half"), stream_from=200)
    with pytest.raises(PlanError, match="128 tokens at a time, found weights that travel for 200"):
        replace(plan, remember=1 << 30)


def test_a_plan_says_what_it_remembers_in_its_json_too():
    plan = replace(tiny_plan("llama"), remember=1 << 30, remember_ram=1 << 20)
    assert type(plan).from_json(plan.to_json(), plan.spec) == plan
    assert "prompts remembered in 0.9 MiB of RAM and 1.00 GiB of disk" in plan.summary()
    assert plan.digest != replace(plan, remember=None).digest
