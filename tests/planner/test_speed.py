"""Forecast of speed: the sum against one made by hand, what the rates are asked for, that they are measured once."""

import math
from dataclasses import replace

import pytest
import torch

from lowvram_lab.errors import PlanError
from lowvram_lab.model.formats import FORMATS
from lowvram_lab.planner import rates as module
from lowvram_lab.planner.measure import run_speed
from lowvram_lab.planner.measure_rates import Machine
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.rates import LinkRates
from lowvram_lab.planner.speed import forecast_speed
from tests.helpers.machines import Made
from tests.helpers.tiny import TINY, load_tiny, tiny_plan, tiny_spec


def by_hand(plan, spec, prompt, new_tokens, link=None) -> tuple[float, float]:
    """First-token and per-token seconds at ``Made``'s rates."""
    totals = []
    queries, keys = spec.config["num_attention_heads"] * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    for tokens, cached in ((prompt, 0), (1, prompt + new_tokens // 2)):
        seconds = 1e-4
        for m in spec.modules:
            if m.kind == "linear":
                weights, fed = math.prod(m.weight_shape), 1 if m.name == "lm_head" else tokens
                first = 2e-9 if plan.modules[m.name].device == "cpu" else 1e-9
                seconds += 1e-6 + weights * (first + 1e-11 * (fed - 1))
        for _ in range(spec.num_hidden_layers):
            seconds += 2e-4 + 1e-8 * (tokens - 1) * spec.hidden_size
            seconds += 1e-10 * queries * tokens * (tokens - 1) / 2 + cached * (3e-10 * queries + 4e-10 * keys)
        if link:
            seconds += 2 * (link.crossing_s + 2 * tokens * spec.hidden_size / link.to_cpu)
        totals.append(seconds)
    return totals[0], totals[1]


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("kind", TINY)
def test_the_parts_add_up_to_the_sum_made_by_hand(kind, layers):
    spec = tiny_spec(kind)
    plan = tiny_plan(kind, "int4").with_gpu_layers(spec, layers)
    found = forecast_speed(plan, spec, Workload(100, 20), Made())
    first, each = by_hand(plan, spec, 100, 20)
    assert found.ttft_s == pytest.approx(first)
    assert found.decode_tokens_per_s == pytest.approx(1 / each)
    assert sum(found.parts.values()) == pytest.approx(each)
    assert (found.origin, found.prompt_tokens, found.new_tokens) == ("forecast", 100, 20)
    assert found.where == ("this CPU" if layers == 0 else "this CPU, standing in for a GPU (simulated)")
    assert "tokens/s" in found.summary()
    assert f"{found.prompt_tokens} tokens" in found._repr_html_()


def test_hidden_states_that_cross_cost_the_link():
    spec, link = tiny_spec("llama"), LinkRates(9e9, 2e10, 8e9, 2e10, 2e-5)
    plan = tiny_plan("llama").with_gpu_layers(spec, 2)  # embedding gpu, one layer cpu, two gpu: there and back
    found = forecast_speed(plan, spec, Workload(100, 20), Made(link))
    assert (found.ttft_s, 1 / found.decode_tokens_per_s) == pytest.approx(by_hand(plan, spec, 100, 20, link))
    assert found.where == "an imagined machine"
    whole = forecast_speed(tiny_plan("llama"), spec, Workload(100, 20), Made(link))
    assert "crossing" in found.parts
    assert "crossing" not in whole.parts


def test_rates_are_asked_for_the_plans_formats_places_and_threads():
    spec, machine = tiny_spec("qwen2"), Made()
    plan = replace(tiny_plan("qwen2", "int8").with_gpu_layers(spec, 1), threads=3, kv_format="int8")
    forecast_speed(plan, spec, machine=machine)
    assert set(machine.asked) == {
        ("int8", "cpu", 3),
        ("int8", "gpu", 3),
        ("int8", "bf16", "cpu", 3),
        ("int8", "bf16", "gpu", 3),
    }
    with pytest.raises(PlanError):
        forecast_speed(tiny_plan("llama"), spec, machine=machine)


@pytest.mark.parametrize("context", [2, 3, 200])
def test_without_a_workload_half_the_context_is_the_prompt(context):
    found = forecast_speed(tiny_plan("llama", context=context), tiny_spec("llama"), machine=Made())
    assert found.prompt_tokens == context // 2
    assert 1 <= found.new_tokens <= context - found.prompt_tokens


def test_rates_are_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "ROUND_S", 0.002)
    monkeypatch.setattr(module, "COPIES_BYTES", 2**20)
    monkeypatch.setattr(module, "LARGE", 512)
    threads = torch.get_num_threads()
    machine = Machine()
    found = {fmt: machine.kernel(fmt) for fmt in ("bf16", "int4", "int5")}
    layer = machine.layer("int8", threads=1)
    assert torch.get_num_threads() == threads
    for rates in (*found.values(), layer):
        assert all(math.isfinite(value) and value >= 0 for value in vars(rates).values())
    monkeypatch.setattr(module, "_least_of_each", lambda *_: pytest.fail("measured again"))
    assert machine.kernel("int4") == found["int4"] == Machine().kernel("int4")
    assert Machine().layer("int8", threads=1) == layer
    if not torch.cuda.is_available():
        assert machine.kernel("int4", "gpu") == found["int4"]  # the stand-in is this CPU
        assert machine.link() is None
    (file,) = (tmp_path / "rates").iterdir()
    for text in ("not JSON", "[]"):
        file.write_text(text)
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            Machine().kernel("int4")


@pytest.mark.parametrize("fmt", [name for name, fmt in FORMATS.items() if fmt.kind != "nf4"])
def test_every_format_has_rates(monkeypatch, fmt):
    """Groups of 96 and 192 divide no power of two; a tied int4 table has a layout of its own."""
    for name, value in {"ROUND_S": 0.0005, "COPIES_BYTES": 2**18, "SMALL": 64, "LARGE": 512}.items():
        monkeypatch.setattr(module, name, value)
    for shared in (False, True):
        rates = Machine(remember=False).kernel(fmt, shared=shared)
        assert rates.seconds(10**6, 8) >= 0


def test_a_measured_speed_compares_with_its_forecast():
    plan, spec, workload = tiny_plan("qwen2"), tiny_spec("qwen2"), Workload(20, 4)
    forecast, measured = forecast_speed(plan, spec, workload, Made()), run_speed(load_tiny("qwen2", plan), workload)
    assert measured.origin == "measured"
    table = forecast.compare(measured)
    assert list(table.columns) == ["", "forecast", "measured", "difference_percent"]
    assert table["difference_percent"][1] == pytest.approx(
        100 * (forecast.decode_tokens_per_s / measured.decode_tokens_per_s - 1)
    )
