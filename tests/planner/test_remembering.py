"""A chosen plan that also remembers prompts: what is said of it is true of that plan."""

from dataclasses import replace

import pytest

from lowvram_lab.errors import BudgetError, PlanError, UnitError
from lowvram_lab.planner import auto
from lowvram_lab.planner.auto import PlanChoice, auto_plan, remembering
from lowvram_lab.planner.constraints import ram_bytes
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.speed import forecast_speed
from tests.helpers.machines import Made
from tests.helpers.tiny import tiny_plan

CARD = "64MiB"


def travelling(tokens):
    plan = replace(tiny_plan("qwen2", "bf16", "half"), stream_from=tokens)
    profile = forecast(plan, CARD)
    return PlanChoice(plan, profile, ("it fits", auto._travelling(tokens, profile)), "bf16")


def test_the_forecast_and_the_reasons_are_those_of_the_plan_that_remembers():
    choice = auto_plan(tiny_plan("qwen2").spec, CARD, 512, machine=Made())
    found = remembering(choice, CARD, disk="1GiB", ram="1MiB", machine=Made())
    assert found.plan == replace(choice.plan, remember=1 << 30, remember_ram=1 << 20)
    assert found.forecast.to_dict() == forecast(found.plan, CARD).to_dict() != choice.forecast.to_dict()
    assert found.why[:-1] == choice.why
    assert found.why[-1].startswith("prompts that are remembered are read 128 tokens at a time: peak")


def test_weights_that_travel_for_longer_prompts_alone_stay():
    found = remembering(travelling(300), CARD, disk="1GiB")
    assert found.plan.stream_from is None and found.plan.remember == 1 << 30
    assert found.why[0] == "it fits" and not any("travel" in line for line in found.why)
    kept = remembering(travelling(100), CARD, disk="1GiB")
    assert kept.plan.stream_from == 100 and kept.why[1].startswith("prompts of 100 tokens or more")


def test_a_speed_that_was_forecast_is_forecast_anew():
    choice, machine = travelling(300), Made()
    speed = forecast_speed(choice.plan, machine=machine)
    found = remembering(replace(choice, speed=speed, why=(speed.summary(),)), CARD, ram="1MiB", machine=machine)
    assert found.speed == forecast_speed(found.plan, machine=machine) != speed
    assert found.why[-1] == found.speed.summary() and speed.summary() not in found.why


def test_what_is_remembered_in_ram_is_counted_to_the_plans_ram():
    plan = tiny_plan("qwen2")
    assert ram_bytes(replace(plan, remember_ram=1 << 20)) == ram_bytes(plan) + (1 << 20) // 98304 * 98304


def test_what_cannot_be_is_refused(monkeypatch):
    choice = travelling(100)
    with pytest.raises(UnitError, match="expected a unit"):
        remembering(choice, CARD, disk="1")
    with pytest.raises(PlanError, match="a block of 128 tokens"):
        remembering(choice, CARD, ram="1KiB")
    with pytest.raises(BudgetError, match="does not fit 1.0 MiB; give more of the GPU, or remember nothing"):
        remembering(choice, "1MiB", disk="1GiB")
