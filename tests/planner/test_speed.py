"""Forecast of speed: the sum against one made by hand, what the rates are asked for, that they are measured once."""

import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from lowvram_lab import timing
from lowvram_lab.decoding.bind import product_of
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.model.formats import FORMATS, get_format
from lowvram_lab.planner import measure_rates
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_speed
from lowvram_lab.planner.measure_rates import Machine
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.rates import LinkRates
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.timing import Circumstances, Timing
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


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Small weights and short rounds; the cache folder is empty."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    for name, value in {"COPIES_BYTES": 2**18, "SMALL": 64, "LARGE": 512, "PRODUCT_BITS": (10, 15), "DEEP": 6}.items():
        monkeypatch.setattr(measure_rates, name, value)
    monkeypatch.setattr(timing, "ROUND_S", 0.0005)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "ATTEMPTS", 1)
    monkeypatch.setattr(Circumstances, "STEADY_SPREAD", math.inf)
    monkeypatch.setattr(Circumstances, "STEADY_OTHERS", math.inf)


def test_rates_are_measured_once_and_kept(quick, monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    machine = Machine()
    found = {fmt: machine.kernel(fmt) for fmt in ("bf16", "int4", "int5")}
    prompt, token = machine.prompt("int8", threads=1), machine.token("lean", "int4", "int8", threads=1)
    assert torch.get_num_threads() == threads
    for rates in (
        *found.values(),
        prompt,
        token,
        machine.product("lean", "int4", (512, 512)),
        machine.attention("lean", "int8"),
    ):
        assert all(math.isfinite(value) and value >= 0 for value in vars(rates).values())
    monkeypatch.setattr(measure_rates, "time_calls", lambda *_: pytest.fail("measured again"))
    assert machine.kernel("int4") == found["int4"] == Machine().kernel("int4")
    assert Machine().prompt("int8", threads=1) == prompt
    assert Machine().token("lean", "int4", "int8", threads=1) == token
    if not torch.cuda.is_available():
        assert machine.kernel("int4", "gpu") == found["int4"]  # the stand-in is this CPU
        assert machine.link() is None
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        Machine(anew=True).kernel("int4")
    (file,) = (tmp_path / "rates").iterdir()
    for text in ("not JSON", "[]", '{"kernel int4 cpu 1": {"rates": {}}}'):
        file.write_text(text)
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            Machine().kernel("int4")


def test_rates_that_were_disturbed_are_used_said_and_measured_anew(quick, monkeypatch):
    monkeypatch.setattr(Circumstances, "STEADY_OTHERS", 0.25)
    busy = Circumstances(time.time() - 7200, spread=1.1, others=1.6)
    monkeypatch.setattr(measure_rates, "time_calls", lambda calls, *_: Timing(dict.fromkeys(calls, 1e-3), {}, busy))
    machine = Machine()
    machine.kernel("int4")
    assert machine.circumstances() == busy
    assert busy.words(time.time()) == "measured 2 h ago, rounds within 10%, disturbed: other work held 1.6 cores"
    again = []
    quiet = Circumstances(time.time(), spread=1.02, others=0.0)
    monkeypatch.setattr(
        measure_rates, "time_calls", lambda calls, *_: again.append(1) or Timing(dict.fromkeys(calls, 1e-4), {}, quiet)
    )
    Machine().kernel("int4")
    Machine().kernel("int4")
    assert again == [1]  # once more, since the first was disturbed; not a third time
    assert "disturbed" not in quiet.words(time.time())


def test_a_disturbed_timing_is_repeated_and_the_least_disturbed_counts(monkeypatch):
    others = iter([2.0, 0.1, 9.0])
    calls = []

    def attempt(given, wait):
        calls.append(1)
        return Timing({"": 1.0}, {}, Circumstances(0.0, 1.0, next(others)))

    monkeypatch.setattr(timing, "_attempt", attempt)
    assert timing.time_calls({"": lambda: None}).circumstances.others == 0.1
    assert len(calls) == 2


def test_other_work_on_the_cores_is_seen():
    burn = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(burn) for _ in range(os.cpu_count() or 1)]
    try:
        found = timing.time_calls({"": lambda: sum(range(20000))}).circumstances
    finally:
        for process in others:
            process.kill()
            process.wait()
    assert found.others > Circumstances.STEADY_OTHERS
    assert not found.steady


@pytest.mark.parametrize("fmt", [name for name, fmt in FORMATS.items() if fmt.kind != "nf4"])
def test_every_format_has_rates(quick, fmt):
    """Groups of 96 and 192 divide no power of two; a tied int4 table has a layout of its own."""
    for shared in (False, True):
        rates = Machine(remember=False).kernel(fmt, shared=shared)
        assert rates.seconds(10**6, 8) >= 0
    if product_of(measure_rates._weight(fmt, 64, measure_rates._whole_groups(64, fmt), "cpu")):
        dtype = fmt if get_format(fmt).kind == "float" else "bf16"
        assert Machine(remember=False).token("lean", fmt, dtype, dtype).layer_s >= 0


def test_a_measured_speed_compares_with_its_forecast():
    plan, workload = tiny_plan("qwen2"), Workload(20, 4)
    forecast, measured = forecast_speed(plan, workload, Made()), run_speed(load_tiny("qwen2", plan), workload)
    assert measured.origin == "measured"
    table = forecast.compare(measured)
    assert list(table.columns) == ["", "forecast", "measured", "difference_percent"]
    assert table["difference_percent"][1] == pytest.approx(
        100 * (forecast.decode_tokens_per_s / measured.decode_tokens_per_s - 1)
    )
