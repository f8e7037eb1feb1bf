"""The options that a suggestion names make its plan, whatever was moved."""

import argparse
from dataclasses import replace

import pytest

from lowvram_lab.cli.plan import add_plan_options, options_between, stated_plan
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.moves import head_modules
from tests.helpers.tiny import tiny_spec


def typed(spec, *words):
    parser = argparse.ArgumentParser()
    add_plan_options(parser)
    arguments = parser.parse_args(["a model", "--format", "int8", "--context", "64", *words])
    return stated_plan(arguments, spec, GpuBudget.parse("8GiB", card="rtx3050"), None)


def moved(kind, ends, **changes):
    spec = tiny_spec(kind)
    plan = replace(Plan.uniform(spec, "int8", context=64), **changes)
    modules = {"embedding": [spec.embedding], "head": head_modules(spec), "both": [spec.embedding, *head_modules(spec)]}
    return plan.with_modules(*modules[ends], device="cpu") if ends else plan


@pytest.mark.parametrize("layers", [None, 0, 1])
@pytest.mark.parametrize("changes", [{}, {"kv_format": "int8", "prefill_chunk": 16, "context": 48}])
@pytest.mark.parametrize(
    ("kind", "ends"), [("qwen2", "embedding"), ("qwen2", "head"), ("qwen2", "both"), ("llama", "both"), ("qwen2", "")]
)
def test_the_options_of_a_suggestion_make_its_plan(kind, ends, changes, layers):
    spec = tiny_spec(kind)
    after = moved(kind, ends, **changes)
    after = after if layers is None else after.with_gpu_layers(layers)
    words = options_between(Plan.uniform(spec, "int8", context=64), after).split()
    assert ("--on-cpu" in words) == bool(ends)
    assert typed(spec, *words) == after


@pytest.mark.parametrize("before", ["embedding", "head"])
def test_an_end_that_is_on_the_cpu_already_stays_there(before):
    spec, typed_before = tiny_spec("qwen2"), ["--on-cpu", before]
    words = options_between(moved("qwen2", before), moved("qwen2", "both")).split()
    assert typed(spec, *typed_before, *words) == moved("qwen2", "both")
    assert options_between(moved("qwen2", before), moved("qwen2", before, prefill_chunk=16)) == "--prefill-chunk 16"


def test_weights_that_travel_no_more_have_no_option():
    before = replace(moved("qwen2", "").with_gpu_layers(1), stream_from=32)
    assert options_between(before, replace(before, stream_from=None, prefill_chunk=16)) == ""
    assert options_between(before, replace(before, kv_format="int8")) == "--kv int8"


def test_a_plan_file_goes_with_no_format():
    before, after = (Plan.uniform(tiny_spec("qwen2"), recipe, context=48) for recipe in ("bf16", "int8"))
    assert options_between(before, after) == "--format int8"
    assert options_between(before, after, from_file=True) == ""


def test_one_end_of_a_tied_model_brings_the_other():
    spec = tiny_spec("llama")
    assert typed(spec, "--on-cpu", "embedding") == typed(spec, "--on-cpu", "head") == moved("llama", "both")
    assert typed(spec, "--on-cpu", "head").modules[spec.embedding].device == "cpu"


def test_activations_have_an_option_that_a_suggestion_takes_back():
    spec = tiny_spec("qwen2")
    whole = Plan.uniform(spec, "int8", context=64, dtype="fp32")
    assert typed(spec, "--dtype", "fp32") == whole
    after = Plan.uniform(spec, "int4", context=64)
    words = options_between(whole, after).split()
    assert words == ["--format", "int4", "--dtype", "bf16"]
    assert typed(spec, "--dtype", "fp32", *words) == after


def test_a_suggestion_without_options_names_none():
    spec = tiny_spec("qwen2")
    plan = Plan.uniform(spec, "bf16", context=64)
    assert options_between(plan, plan.with_modules(spec.head, format="int8")) == ""


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("low", ["gpu", "cpu", "disk"])
def test_low_planes_have_an_option_and_never_lie_nearer_than_the_high_ones(low, layers):
    spec = tiny_spec("qwen2")
    before = Plan.uniform(spec, "int4+4", context=64).with_gpu_layers(layers)
    words = ["--format", "int4+4", "--gpu-layers", str(layers), "--low-plane", low]
    after = typed(spec, *words)
    order = ["gpu", "cpu", "disk"]
    for name, assignment in before.modules.items():
        expected = assignment.low and max(low, assignment.device, key=order.index)
        assert after.modules[name] == replace(assignment, low=expected)
    suggested = options_between(before, after).split()
    assert suggested in ([], ["--low-plane", low])
    assert typed(spec, *words[:4], *suggested) == after


def test_a_stated_plan_remembers_what_the_options_say():
    plan = Plan.uniform(tiny_spec("qwen2"), "int8", context=64)
    assert typed(plan.spec, "--remember", "64MiB") == replace(plan, remember=64 << 20)
    assert typed(plan.spec, "--remember-ram", "1,5MiB") == replace(plan, remember_ram=3 << 19)


def test_a_plan_from_a_file_keeps_what_it_remembers_unless_the_options_say_more(tmp_path):
    plan = replace(Plan.uniform(tiny_spec("qwen2"), "int8", context=64), remember=64 << 20)
    plan.to_json(tmp_path / "plan.json")
    parser = argparse.ArgumentParser()
    add_plan_options(parser)
    words = ["a model", "--plan", str(tmp_path / "plan.json")]
    for more, remembered in (([], 64 << 20), (["--remember", "1GiB"], 1 << 30)):
        found = stated_plan(
            parser.parse_args([*words, *more]), plan.spec, GpuBudget.parse("8GiB", card="rtx3050"), None
        )
        assert found == replace(plan, remember=remembered)
