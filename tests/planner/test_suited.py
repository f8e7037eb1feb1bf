"""Plans for a card say what suits it: no bf16 and no int4 where a T4 has neither units nor kernel for them."""

import argparse
import json

import pytest

from lowvram_lab.cli.plan import add_plan_options, chosen_plan
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.card import CARDS
from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner import suited
from lowvram_lab.planner.auto import auto_plan
from lowvram_lab.planner.suggest import suggest
from tests.helpers.commands import run_command
from tests.helpers.fake_card import on_fake_card
from tests.helpers.tiny import packaged_spec


def on(card: str, size: str) -> GpuBudget:
    return GpuBudget.parse(size, card=card)


def held(plan: Plan) -> set[str]:
    return {plan.dtype, *(assignment.format for assignment in plan.modules.values())}


@pytest.mark.parametrize("size", ["16GiB", "6GiB", "4GiB"])
@pytest.mark.parametrize("name", ["qwen2.5-3b", "qwen1.5-4b"])
def test_a_plan_for_a_t4_names_nothing_that_it_cannot_run(name, size):
    found = auto_plan(packaged_spec(name), on("t4", size), 2048)
    assert found.plan.dtype == "fp16"
    assert not {"bf16", "int4"} & held(found.plan)
    assert found.why[0].startswith("the card has capability 7.5: fp16, not bf16, which has no units there (with int8")
    assert found.why[0].endswith("; nf4, not int4, which has no kernel there")
    assert len(found.why) <= 5
    assert found.forecast.fits


def test_a_later_card_keeps_the_usual_recipes():
    found = auto_plan(packaged_spec("qwen1.5-4b"), on("rtx3050", "4GiB"), 2048)
    assert found.plan.dtype == "bf16"
    assert "int4" in held(found.plan)
    assert not any("capability" in line for line in found.why)


def test_what_is_asked_for_by_name_is_kept():
    found = auto_plan(packaged_spec("qwen1.5-4b"), on("t4", "16GiB"), 512, recipes=("bf16",))
    assert found.plan.dtype == "bf16"
    found = auto_plan(packaged_spec("qwen1.5-4b"), on("t4", "16GiB"), 512, recipes=("int8",))
    assert held(found.plan) == {"fp16", "int8"}  # 16 bits for activations were not


def test_the_lower_peak_decides_and_is_said(monkeypatch):
    spec = packaged_spec("qwen1.5-4b")
    assert "a peak of 4.60 GiB, not 5.32 GiB" in suited.suited(spec, on("t4", "8GiB"), 2048)[2]
    assert "both peak at" in suited.suited(packaged_spec("qwen2.5-3b"), on("t4", "8GiB"), 256)[2]

    class Peaks:
        def __init__(self, plan, budget):
            self.peak_allocated_bytes = {"fp16": 2, "bf16": 1}[plan.dtype]

    monkeypatch.setattr(suited, "forecast", Peaks)
    assert suited.suited(spec, on("t4", "8GiB"), 2048)[:2] == (("bf16", "int8", "nf4"), "bf16")


def test_suggestions_for_a_t4_name_nf4():
    budget = on("t4", "4GiB")
    plan = Plan.uniform(packaged_spec("qwen1.5-4b"), "fp16", context=2048)
    suggestions = suggest(plan, budget)
    assert suggestions
    assert not any("int4" in held(found.plan) for found in suggestions)
    assert any("nf4" in held(found.plan) for found in suggestions)


def test_the_command_says_it_first(capsys, monkeypatch):
    monkeypatch.setattr("lowvram_lab.cli.plan._speed", lambda plan, ram: Speed())
    status, out, _ = run_command(capsys, "plan", "qwen1.5-4b", "--gpu", "6GiB", "--card", "t4")
    assert status == 0
    assert out.startswith("- the card has capability 7.5: fp16, not bf16")


ASKED = {"int8": None, "bf16": "bf16", "fp16": "fp16", "FP16": "fp16", "float16": "fp16", "bfloat16": "bf16"}


@pytest.mark.parametrize(("card", "dtype"), [("t4", "fp16"), ("rtx3050", "bf16")])
def test_a_format_asked_for_leaves_the_rest_in_what_the_card_has_units_for(capsys, card, dtype):
    words = ("forecast", "smollm2-135m", "--gpu", "8GiB", "--card", card, "--format")
    for recipe, named in ASKED.items():
        _, out, _ = run_command(capsys, *words, recipe)
        assert f"{named or dtype} KV" in out
        assert out.startswith(f"{named or recipe} weights")


def test_without_a_size_a_t4s_16_bits_are_fp16(monkeypatch):
    monkeypatch.setattr("lowvram_lab.memory.dry_run.this_card", lambda: CARDS["t4"])
    parser = argparse.ArgumentParser()
    add_plan_options(parser)
    plan, _, _ = chosen_plan(parser.parse_args(["a model"]), packaged_spec("smollm2-135m"), DryRunGpu(None))
    assert held(plan) == {"fp16"}


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("prefer", ["balance", "fidelity"])
def test_a_dtype_asked_for_is_that_of_every_recipe(dtype, prefer):
    spec = packaged_spec("smollm2-135m")
    for size in ("2GiB", "192MiB"):
        plan = auto_plan(spec, on("rtx3050", size), 512, prefer=prefer, dtype=dtype).plan
        floats = {a.format for a in plan.modules.values() if get_format(a.format).kind == "float"}
        assert plan.dtype == dtype and floats == {dtype}
        assert plan.kv_format in (dtype, "int8", "int4")
    assert auto_plan(spec, on("rtx3050", "2GiB"), 512, dtype=dtype).plan.layer_devices().count("gpu") == 30


class Speed:
    def summary(self):
        return "not measured"


RUN = """
import gc, json, sys
from lowvram_lab import GpuBudget, LowvramError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.planner.auto import auto_plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from tests.helpers.card import clean
from tests.test_cuda import load_mid, mid_spec
found = []
for size, recipes in (("2GiB", None), ("270MiB", None), ("2GiB", ("nf4",))):
    clean()
    gpu = open_gpu(size)
    choice = auto_plan(mid_spec("llama"), gpu, 2048, recipes=recipes)
    workload = Workload(1500, 3)
    dry = forecast(choice.plan, gpu, workload=workload)
    real = run_workload(load_mid(choice.plan, gpu), workload)
    figures = [[[p.peak_allocated_bytes, p.end_allocated_bytes, p.peak_reserved_bytes] for p in profile.phases]
               for profile in (dry, real)]
    found.append({"dtype": choice.plan.dtype, "recipe": choice.recipe, "figures": figures, "why": choice.why})
    del gpu, real
print(json.dumps(found))
"""


@pytest.mark.gpu
def test_the_plan_for_a_t4_takes_what_was_forecast():
    found = on_fake_card(RUN, FAKE_CUDA_CC="7.5", FAKE_CUDA_MEMORY="8GiB")
    assert [case["dtype"] for case in found] == ["fp16"] * 3
    assert [case["recipe"] for case in found] == ["fp16", "int8", "nf4"], json.dumps(found)
    for case in found:
        forecast, measured = case["figures"]
        assert forecast == measured, case
