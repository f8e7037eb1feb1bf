"""Beyond the GPU's budget: RAM, disk, threads, the longest context, weights that travel; in cost model and planner."""

import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lowvram_lab.engine.load import replan
from lowvram_lab.engine.room import check_room_in_ram
from lowvram_lab.errors import BudgetError, PlanError
from lowvram_lab.memory import host
from lowvram_lab.memory.cuda import CudaGpu, open_gpu
from lowvram_lab.model.host_bytes import forecast_load_bytes
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner import auto
from lowvram_lab.planner import speed as cost
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.search import max_context
from lowvram_lab.planner.speed import forecast_speed, stream_threshold
from lowvram_lab.rates.figures import KernelRates, ProductRates
from lowvram_lab.rates.machine import Machine
from tests.helpers.checkpoints import write_model
from tests.helpers.commands import run_command
from tests.helpers.machines import LINK, Card, Made, stand_in
from tests.helpers.tiny import TINY, load_tiny, random_ids, tiny_config, tiny_plan, tiny_spec
from tests.planner.test_auto import CONTEXT, LAYERS, auto_plan, forecast, least_on_gpu, needed, small_spec


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("kind", TINY)
def test_the_threshold_is_where_the_two_forecasts_cross(kind, layers):
    machine = Card()
    plan = tiny_plan(kind, "int8").with_gpu_layers(layers)
    threshold = stream_threshold(plan, machine)

    def gain(tokens):
        workload = Workload(tokens, 1)
        resident, travelling = (replace(plan, stream_from=start) for start in (None, 2))
        return forecast_speed(resident, workload, machine).ttft_s - forecast_speed(travelling, workload, machine).ttft_s

    assert 2 < threshold < plan.context
    assert gain(threshold) > 0 >= gain(threshold - 1)
    streaming = replace(plan, stream_from=threshold)
    assert forecast_speed(streaming, Workload(threshold - 1, 1), machine).ttft_s == pytest.approx(
        forecast_speed(plan, Workload(threshold - 1, 1), machine).ttft_s
    )
    at = [forecast_speed(each, Workload(400, 20), machine) for each in (streaming, plan)]
    assert at[0].ttft_s < at[1].ttft_s
    assert at[0].decode_tokens_per_s == at[1].decode_tokens_per_s  # a decoded token never makes weights travel
    assert at[0].engine == at[1].engine


def test_no_threshold_without_a_card_without_layers_to_bring_or_within_the_context():
    plan = tiny_plan("qwen2", "int8")
    split = plan.with_gpu_layers(1)
    assert stream_threshold(split, Made()) is None
    assert stream_threshold(plan, Card()) is None
    assert stream_threshold(split, Card(replace(LINK, to_gpu_pinned=1e5))) is None
    slow, fast = (stream_threshold(split, Card(replace(LINK, to_gpu_pinned=rate))) for rate in (5e7, 1e9))
    assert slow > fast


def test_what_travelling_takes_by_hand():
    spec, machine = tiny_spec("qwen2"), Card()
    plan = replace(tiny_plan("qwen2", "int8").with_gpu_layers(1, disk=1), stream_from=2)
    size = {m.layer: 0 for m in spec.modules}
    compute = 0.0
    for m in spec.modules:
        size[m.layer] += plan.module_bytes(m)
        if m.layer in (0, 1) and m.kind == "linear":
            compute += machine.kernel("int8", "gpu").seconds(math.prod(m.weight_shape), 100)
    copying = size[1] / LINK.to_gpu_pinned
    waiting = copying / 2 + max(0.0, copying - compute) / 2 + size[0] / LINK.to_gpu  # 0 is on disk: waited for
    home = 100 * plan.kv_bytes(1, "cpu") / LINK.to_cpu
    parts = cost._prompt(plan, machine, 100, None)
    assert parts["weights on their way"] == pytest.approx(waiting)
    assert parts["keys and values on their way"] == pytest.approx(home)
    assert "int8 weights on the cpu" not in parts


def test_weights_on_disk_are_read_for_every_token_where_ram_cannot_keep_them():
    spec = tiny_spec("qwen2")
    plan = tiny_plan("qwen2", "int8").with_gpu_layers(1, disk=1)
    on_disk = plan.weight_bytes("disk")
    room = plan.weight_bytes("cpu") + plan.kv_bytes(plan.context, "cpu") + on_disk
    parts = [forecast_speed(plan, machine=Card(), ram=ram).parts for ram in (room, room - 1)]
    assert "weights from disk" not in parts[0]
    assert parts[1]["weights from disk"] == pytest.approx(on_disk / 1e9)
    lookup = plan.with_modules(spec.embedding, device="disk")
    assert forecast_speed(lookup, machine=Card(), ram=1).parts["weights from disk"] == pytest.approx(on_disk / 1e9)


def test_the_rate_of_the_disk_is_measured_once(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    found = Machine().disk()
    assert found.read > 1e6
    assert Machine().disk() == found
    assert [path.name for path in tmp_path.iterdir()] == ["rates"]


@pytest.mark.parametrize("kind", TINY)
def test_what_ram_has_no_room_for_goes_to_disk_and_no_more(kind):
    spec = small_spec(kind)
    least = replace(least_on_gpu(kind), kv_format="bf16").with_gpu_layers(1)
    budget = forecast(least).peak_reserved_bytes
    given = {"recipes": ("int4",), "kv_format": "bf16"}
    free = auto_plan(spec, budget, CONTEXT, **given).plan
    taken = auto.ram_bytes(free)
    with pytest.raises(BudgetError, match="give it disk for layers or more RAM"):
        auto_plan(spec, budget, CONTEXT, ram=taken - 1, **given)
    counts = []
    for ram in range(taken, taken - free.weight_bytes("cpu"), -200_000):
        choice = auto_plan(spec, budget, CONTEXT, ram=ram, disk="1GiB", **given)
        plan, devices = choice.plan, choice.plan.layer_devices()
        assert auto.ram_bytes(plan) <= ram
        assert choice.forecast.fits
        assert choice.forecast.disk_weights_bytes == plan.weight_bytes("disk")
        assert plan.layer_places() == free.layer_places()
        assert ("on disk" in choice.why[-1]) == ("disk" in {a.device for a in plan.modules.values()})
        if on_disk := devices.count("disk"):
            assert devices[:on_disk] == ["disk"] * on_disk
            one_less = plan.with_gpu_layers(devices.count("gpu"), disk=on_disk - 1)
            assert auto.ram_bytes(one_less) > ram
        counts.append(on_disk)
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] > 0
    small = {0: budget, "cpu": ram, "disk": 1000}
    with pytest.raises(BudgetError, match="give it more disk or RAM"):
        auto_plan(spec, small, CONTEXT, **given)
    assert auto_plan(spec, {**small, "disk": "1GiB"}, CONTEXT, **given).plan == plan
    with pytest.raises(BudgetError, match="even with the CPU's weights on disk it takes"):
        auto_plan(spec, budget, CONTEXT, ram=1000, disk="1GiB", **given)
    with pytest.raises(PlanError, match="disk in max_memory or in disk, found both"):
        auto_plan(spec, small, CONTEXT, disk="1GiB")


@pytest.mark.parametrize("kind", TINY)
def test_the_longest_context_fits_and_is_the_longest(kind):
    spec = small_spec(kind)
    for budget in (needed(kind, "int4", 2), needed(kind, "int8"), needed(kind, "bf16")):
        choice = auto_plan(spec, budget, None)
        assert choice.forecast.fits
        spared = choice.plan if spec.tied else choice.plan.with_modules(spec.embedding, device="cpu")
        for chunk in (None, 512, 256):  # moves that lose nothing
            assert choice.plan.context >= max_context(replace(spared, prefill_chunk=chunk), stand_in(budget)).value
    most = auto_plan(spec, "1GiB", None).plan.context
    assert most == spec.max_position_embeddings


def test_the_longest_context_keeps_to_the_ram():
    spec, budget = small_spec("qwen2"), needed("qwen2", "int4", 1)
    given = {"recipes": ("int4",), "gpu_layers": 0, "kv_format": "bf16"}
    free = auto_plan(spec, budget, 512, **given)
    ram = auto.ram_bytes(free.plan) + 100 * free.plan.kv_bytes(1, "cpu")
    found = auto_plan(spec, budget, None, ram=ram, **given)
    assert 512 < found.plan.context <= 612
    assert auto.ram_bytes(found.plan) <= ram


def test_a_context_is_halved_until_something_fits():
    config = tiny_config("qwen2", max_position_embeddings=2048, num_key_value_heads=4, hidden_size=256, vocab_size=2048)
    spec = ModelSpec.from_config(config, "wide cache")
    least = Plan.uniform(spec, "int4", context=256)
    budget = forecast(least).peak_reserved_bytes
    with pytest.raises(BudgetError):
        auto_plan(spec, budget, 2048, recipes=("int4",), gpu_layers=3, kv_format="bf16")
    found = auto_plan(spec, budget, None, recipes=("int4",), gpu_layers=3, kv_format="bf16")
    assert 256 <= found.plan.context < 2048
    assert found.forecast.fits


class ManyCores(Card):
    """Decoding is fastest with a certain number of threads."""

    def __init__(self, best):
        super().__init__()
        self.best = best

    def product(self, engine, fmt, shape, place="cpu", threads=None, shared=False):
        return ProductRates(1e-10 if threads == self.best or place == "gpu" else 3e-10)

    def kernel(self, fmt, place="cpu", threads=None, shared=False):
        return KernelRates(0.0, self.product("", fmt, 0, place, threads).weight_s, 0.0)


@pytest.mark.parametrize("best", [1, 4, 8])
def test_speed_finds_the_number_of_threads(best, monkeypatch):
    monkeypatch.setattr(auto.os, "cpu_count", lambda: 8)
    spec, options = small_spec("llama"), {"prefer": "speed", "machine": ManyCores(best)}
    budget = forecast(least_on_gpu("llama").with_gpu_layers(2)).peak_reserved_bytes
    assert auto_plan(spec, budget, CONTEXT, recipes=("int4",), **options).plan.threads == best
    assert auto_plan(spec, budget, CONTEXT, threads=2, **options).plan.threads == 2
    assert auto_plan(spec, "1GiB", CONTEXT, **options).plan.threads is None  # nothing computes on the CPU


def test_weights_travel_where_it_is_faster_and_the_buffers_fit():
    spec, budget = small_spec("qwen2"), needed("qwen2", "int4", 2) + 4 * 2**20
    choice = auto_plan(spec, budget, CONTEXT, recipes=("int4",), gpu_layers=2, machine=Card())
    plan = choice.plan
    assert plan.stream_from == stream_threshold(plan, Card()) < CONTEXT
    assert choice.forecast.fits
    assert f"prompts of {plan.stream_from} tokens or more" in choice.why[-1]
    assert choice.forecast == forecast(plan, budget)
    tight = auto_plan(spec, needed("qwen2", "int4", 2), CONTEXT, recipes=("int4",), gpu_layers=2, machine=Card())
    assert tight.plan.stream_from is None
    assert auto_plan(spec, budget, CONTEXT, gpu_layers=2, machine=Made()).plan.stream_from is None
    fast = auto_plan(spec, budget, CONTEXT, recipes=("int4",), prefer="speed", machine=Card())
    assert len(fast.why) <= 5
    assert LAYERS == 4


def test_ram_that_is_too_small_is_said_before_loading(monkeypatch):
    plan, spec, gpu = tiny_plan("qwen2"), tiny_spec("qwen2"), open_gpu("16MiB")
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(BudgetError, match="found 1000 B free; choose a smaller format, layers on disk"):
        load_tiny("qwen2", plan, gpu)
    room = forecast_load_bytes(plan, gpu_in_ram=True) - plan.weight_bytes()
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(available=room))
    check_room_in_ram(plan, gpu, spec.modules, loaded=plan)  # what is there already makes room
    model = load_tiny("qwen2", plan.with_modules("*", device="disk"), gpu)  # and what stays on disk takes none
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    replan(model, replace(model.lowvram.plan, context=64, threads=1), progress=False)  # nothing is loaded for that


class Taken(CudaGpu):
    """A card of which another process holds a part."""

    def __init__(self, free):
        self.device, self.name, self.budget = torch.device("cuda"), "an imagined card", None


@pytest.mark.parametrize("cached", [0, 300])
def test_a_gpu_taken_by_another_process_is_named(cached, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500 + cached)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    gpu = Taken(1000)
    gpu.check_room(1000 + cached)
    with pytest.raises(BudgetError, match="take 1.3 KiB of an imagined card, found .* free: other processes"):
        gpu.check_room(1301)
    gpu.check_room(10**9 + 1)  # more than the card has: an honest out of memory, not somebody else's fault


def test_a_replan_checks_the_machine_too(monkeypatch):
    model = load_tiny("qwen2", tiny_plan("qwen2", "int8"))
    before = model.lowvram.plan
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    with pytest.raises(BudgetError, match="of RAM"):
        replan(model, tiny_plan("qwen2", "bf16"), progress=False)
    assert model.lowvram.plan == before
    with torch.no_grad():
        assert model(random_ids(3)).logits.isfinite().all()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lowvram_lab.planner.speed.Machine", Made)
    monkeypatch.setattr("lowvram_lab.planner.auto.Machine", Made)
    return write_model(tmp_path / "model", "qwen2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "int8", "--gpu-layers", "4"], "expected GPU layers for"),
        (["--format", "int8", "--gpu-layers", "1", "--disk-layers", "3"], "expected disk layers for"),
        (["--disk-layers", "1"], "--disk-layers goes with --format or --plan"),
        (["--stream-from", "8", "--on-cpu", "head"], "--stream-from and --on-cpu go with --format or --plan"),
        (["--format", "int8", "--stream-from", "1"], "expected stream_from of 2 or more"),
        (["--format", "int8", "--stream-from", "none"], "expected a whole number of tokens above zero, such as 4096"),
        (["--format", "int8", "--context", "longest"], "--context longest is for the planner"),
        (["--context", "short"], "expected a whole number of tokens above zero, such as 4096 or 4k, found 'short'"),
        (
            ["--format", "fp16", "--dtype", "fp32"],
            "compute in fp16: leave --dtype out, or take --format fp32",
        ),
        (["--plan", "plan.json", "--dtype", "fp32"], "a plan file says its own"),
        (["--format", "int8", "--dtype", "fp8"], "fp8"),
        (["--format", "int8", "--disk", "1GiB"], "--prefer and --disk are for the planner"),
        (["--disk", "much", "--ram", "1GiB"], "much"),
        (["--disk", "1GiB"], "give --ram as well"),
        (["--threads", "0"], "expected a whole number above zero, found '0'"),
    ],
)
def test_options_that_make_no_sense_get_one_line(folder, capsys, words, message):
    status, out, err = run_command(capsys, "plan", folder, "--gpu", "64MiB", "--context", "256", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_more_threads_than_cores_get_one_line_from_chat(folder, capsys):
    words = ["chat", folder, "--gpu", "64MiB", "--context", "128", "--prompt", "hello"]
    status, _, err = run_command(capsys, *words, "--threads", 1000)
    assert status == 2
    assert f"expected 1 to {os.cpu_count()} threads on this machine" in err
    status, out, _ = run_command(
        capsys, *words, "--format", "int8", "--gpu-layers", 1, "--disk-layers", 1, "--stream-from", 4, "--threads", 1,
        "--max-new-tokens", 4, "--json",
    )  # fmt: skip
    assert status == 0
    assert '"peak_bytes"' in out


def test_the_command_plans_the_longest_context(folder, capsys):
    status, out, err = run_command(capsys, "plan", folder, "--gpu", "64MiB", "--context", "longest", "--explain")
    assert status == 0 and err.count("\n") == err.count("measuring how fast this machine is")  # unless that is known
    assert "context 1024" in out
