"""Forecast of speed: the sum against one made by hand, what the rates are asked for, that they are measured once."""

import math
from dataclasses import replace

import pytest

from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_speed
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.rates.figures import LinkRates
from tests.helpers.machines import Made, stand_in
from tests.helpers.tiny import TINY, load_tiny, tiny_plan, tiny_spec


def by_hand(plan, prompt, new_tokens, link=None, lean=True) -> tuple[float, float]:
    """First-token and per-token seconds at ``Made``'s rates: a prompt by modules, a token by the decoder."""
    spec = plan.spec
    queries, keys = spec.config["num_attention_heads"] * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    first, each, cached = 1e-4, 5e-5, prompt + new_tokens // 2
    for m in spec.modules:
        if m.kind == "linear":
            weights, fed = math.prod(m.weight_shape), 1 if m.name == "lm_head" else prompt
            on_cpu = plan.modules[m.name].device == "cpu"
            first += 1e-6 + weights * ((2e-9 if on_cpu else 1e-9) + 1e-11 * (fed - 1))
            by_module = 1e-6 + weights * (2e-9 if on_cpu else 1e-9)
            each += weights * (5e-10 if on_cpu else 4e-10) if lean else by_module
    for _ in range(spec.num_hidden_layers):
        first += 2e-4 + 1e-8 * (prompt - 1) * spec.hidden_size + 1e-10 * queries * prompt * (prompt - 1) / 2
        each += 3e-5 + cached * (3e-10 * queries + 4e-10 * keys)
    if link:
        first += 2 * (link.crossing_s + 2 * prompt * spec.hidden_size / link.to_cpu)
        each += 2 * (link.crossing_s + 2 * spec.hidden_size / link.to_cpu)
    return first, each


@pytest.mark.parametrize("kind", TINY)
def test_a_prompt_in_pieces_reads_its_weights_once_a_piece(kind):
    spec = tiny_spec(kind)
    plan = replace(tiny_plan(kind, "int4").with_gpu_layers(1), prefill_chunk=40)
    pieces = [by_hand(plan, length, 1)[0] for length in (40, 40, 20)]
    across = (100 * 99 - 2 * 40 * 39 - 20 * 19) / 2  # pairs of tokens that lie in two pieces
    queries = spec.config["num_attention_heads"] * spec.head_dim
    expected = sum(pieces) + spec.num_hidden_layers * 1e-10 * queries * across
    found = forecast_speed(plan, Workload(100, 20), Made())
    at_once = forecast_speed(replace(plan, prefill_chunk=None), Workload(100, 20), Made())
    assert found.ttft_s == pytest.approx(expected)
    assert found.ttft_s > at_once.ttft_s
    assert found.decode_tokens_per_s == at_once.decode_tokens_per_s
    whole = replace(plan, prefill_chunk=100)
    assert forecast_speed(whole, Workload(100, 20), Made()).ttft_s == pytest.approx(at_once.ttft_s)


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("kind", TINY)
def test_the_parts_add_up_to_the_sum_made_by_hand(kind, layers):
    tiny_spec(kind)
    plan = tiny_plan(kind, "int4").with_gpu_layers(layers)
    found = forecast_speed(plan, Workload(100, 20), Made())
    first, each = by_hand(plan, 100, 20)
    assert found.ttft_s == pytest.approx(first)
    assert found.decode_tokens_per_s == pytest.approx(1 / each)
    assert sum(found.parts.values()) == pytest.approx(each)
    assert (found.origin, found.prompt_tokens, found.new_tokens) == ("forecast", 100, 20)
    assert found.where == ("this CPU" if layers == 0 else "this CPU, standing in for a GPU (simulated)")
    assert "tokens/s" in found.summary()
    assert f"{found.prompt_tokens} tokens" in found._repr_html_()


def test_hidden_states_that_cross_cost_the_link():
    link = LinkRates(9e9, 2e10, 8e9, 2e10, 2e-5)
    plan = tiny_plan("llama").with_gpu_layers(2)  # embedding gpu, one layer cpu, two gpu: there and back
    torn = tiny_plan("llama").with_modules("model.layers.1.*", device="cpu")  # no one graph: by modules
    for each, lean in ((plan, True), (torn, False)):
        machine = Made(link)
        found = forecast_speed(each, Workload(100, 20), machine)
        assert (found.ttft_s, 1 / found.decode_tokens_per_s) == pytest.approx(by_hand(each, 100, 20, link, lean))
        decoders = {(entry[1], entry[5]) for entry in machine.asked if entry[0] == "token"}
        assert decoders == {("lean" if lean else "modules", "cpu"), ("graphs" if lean else "modules", "gpu")}
    assert found.where == "an imagined machine"
    whole = forecast_speed(tiny_plan("llama"), Workload(100, 20), Made(link))
    assert "crossing" in found.parts
    assert "crossing" not in whole.parts


def test_rates_are_asked_for_the_plans_formats_places_and_threads(monkeypatch):
    monkeypatch.setenv("LOWVRAM_COMPILE", "0")
    machine = Made()
    plan = replace(tiny_plan("qwen2", "int8").with_gpu_layers(1), threads=3, kv_format="int8")
    found = forecast_speed(plan, machine=machine)
    assert found.engine == "the lean decoder"
    places = ("cpu", "gpu")
    assert set(machine.asked) == {
        *(("kernel", "int8", place, 3) for place in places),
        *(("prompt", "int8", "bf16", place, 3) for place in places),
        *(("product", "lean", "int8", place, 3) for place in places),
        *(("token", "lean", "int8", "int8", "bf16", place, 3) for place in places),
        *(("attention", "lean", "int8", "bf16", place, 3) for place in places),
    }


@pytest.mark.parametrize(("fmt", "kv_format", "engine"), [("nf4", None, "modules"), ("int8", "int4", "modules")])
def test_what_modules_decode_is_forecast_by_modules(fmt, kv_format, engine):
    machine = Made()
    plan = tiny_plan("llama", fmt)
    plan = replace(plan, kv_format=kv_format or plan.kv_format)
    found = forecast_speed(plan, machine=machine)
    assert {entry[1] for entry in machine.asked if entry[0] == "token"} == {engine}
    assert found.engine == decoder_for(load_tiny("llama", plan)).name


@pytest.mark.parametrize("compile_it", ["0", ""])
@pytest.mark.parametrize("kind", TINY)
def test_the_engine_that_is_forecast_is_the_one_that_a_dry_run_finds(kind, compile_it, monkeypatch):
    monkeypatch.setenv("LOWVRAM_COMPILE", compile_it)
    tiny_spec(kind)
    for recipe in ("bf16", "int8", "int4", "nf4"):
        plan = tiny_plan(kind, recipe)
        assert forecast_speed(plan, machine=Made()).engine == forecast(plan, stand_in()).engine


@pytest.mark.parametrize("context", [2, 3, 200])
def test_without_a_workload_half_the_context_is_the_prompt(context):
    found = forecast_speed(tiny_plan("llama", context=context), machine=Made())
    assert found.prompt_tokens == context // 2
    assert 1 <= found.new_tokens <= context - found.prompt_tokens


def test_a_measured_speed_compares_with_its_forecast():
    plan, workload = tiny_plan("qwen2"), Workload(20, 4)
    forecast, measured = forecast_speed(plan, workload, Made()), run_speed(load_tiny("qwen2", plan), workload)
    assert measured.origin == "measured"
    table = forecast.compare(measured)
    assert list(table.columns) == ["", "forecast", "measured", "difference_percent"]
    assert table["difference_percent"][1] == pytest.approx(
        100 * (forecast.decode_tokens_per_s / measured.decode_tokens_per_s - 1)
    )
