"""The dry run against the metered run: to the byte on the stand-in, and agreeing on where memory ends."""

import gc
import shutil
import subprocess
import sys
from dataclasses import replace

import bitsandbytes  # noqa: F401  (imported before anything is metered: see the last test)
import pytest
import torch

from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.engine.load import load
from lowvram_lab.errors import BudgetError, PlanError, UnitError
from lowvram_lab.memory import dry_run
from lowvram_lab.memory.allocator import round_size
from lowvram_lab.memory.attention import ImitateAttention
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.card import this_card
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.dry_run import DryRunGpu, MetaResults, cublas_workspace_bytes
from lowvram_lab.model.checkpoint import ShapesOnly
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from lowvram_lab.units import GiB, MiB, parse_bytes
from tests.helpers.machines import stand_in
from tests.helpers.tiny import PLACEMENTS, TINY, load_tiny, packaged_spec, tiny_plan, tiny_spec

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA's own counters differ by what kernels hide")
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
RECIPES = ("bf16", "int8", "int4", "int4+4", "nf4")
WORKLOAD = Workload(290, 5)  # 290 tokens take the dequantised paths, one token the kernels
KV_BYTES_A_LAYER = 2 * round_size(295 * 2 * 32 * 2)  # keys and values: tokens, heads, head_dim, bytes


def forecast_and_measure(kind, plan, workload=WORKLOAD, gpu=None):
    gpu = gpu or open_gpu("1000MiB")
    tiny_spec(kind)
    dry = forecast(plan, gpu, workload=workload)
    return dry, run_workload(load_tiny(kind, plan, gpu), workload)


def assert_the_same(dry, real):
    """To the byte, in every phase and every figure; and by the same decoder."""
    table = dry.compare(real)
    turns = ["second turn"] if dry.workload.follow_up_tokens else []
    assert list(table["phase"]) == ["load", "prefill", "decode", *turns]
    assert (table["difference"] == 0).all(), table
    for figure in ("weights_bytes", "cpu_weights_bytes", "kv_bytes", "transferred_bytes", "peak_reserved_bytes"):
        assert getattr(dry, figure) == getattr(real, figure), figure
    for mine, theirs in zip(dry.phases, real.phases, strict=True):
        assert (mine.end_allocated_bytes, mine.breakdown) == (theirs.end_allocated_bytes, theirs.breakdown)
    assert dry.engine == real.engine


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("recipe", ["fp32", *RECIPES])
@pytest.mark.parametrize("kind", TINY)
def test_forecast_minus_measured_is_nought(kind, recipe, placement):
    dry, real = forecast_and_measure(kind, tiny_plan(kind, recipe, placement))
    assert_the_same(dry, real)
    assert (dry.origin, real.origin) == ("forecast", "measured")
    assert "simulated" in real.gpu
    assert dry.fits
    assert real.fits


@pytest.mark.parametrize("kv_format", ["16 or 32 bits", "int8", "int4"])
@pytest.mark.parametrize("placement", ["gpu", "half"])
@pytest.mark.parametrize("recipe", ["fp32", *RECIPES])
@pytest.mark.parametrize("kind", TINY)
def test_what_chats_takes_what_was_foretold(kind, recipe, placement, kv_format):
    """The decoder of a chat, for one sequence and for two, over a second turn."""
    plan = tiny_plan(kind, recipe, placement)
    if kv_format in ("int8", "int4"):
        plan = replace(plan, kv_format=kv_format)
    gpu = open_gpu("1000MiB")
    model = load_tiny(kind, plan, gpu)
    for batch_size in (1, 2):
        workload = Workload(33, 3, follow_up_tokens=9, batch_size=batch_size)
        dry, real = forecast(plan, gpu, workload=workload), run_workload(model, workload)
        assert_the_same(dry, real)
        lean = kv_format != "int4" and recipe != "nf4"
        assert real.engine.startswith("the lean decoder" if lean else "the model's modules (")
        gc.collect()
        assert gpu.meter.category_bytes("kv") == 0


@pytest.mark.parametrize("precision", [None, "fast"])
@pytest.mark.parametrize("low", ["cpu", "disk"])
@pytest.mark.parametrize("placement", ["gpu", "half", "streamed"])
@pytest.mark.parametrize("kind", TINY)
def test_low_planes_off_the_card_take_what_was_foretold(kind, placement, low, precision):
    plan = PLACEMENTS[placement](tiny_plan(kind, "int4+4").with_modules("*", low=low))
    plan = replace(plan, precision=precision)
    one = forecast_and_measure(kind, plan, Workload(70, 3, follow_up_tokens=1))  # decoded, by both planes
    dry, real = forecast_and_measure(kind, plan, Workload(70, 3, follow_up_tokens=20))
    assert_the_same(*one)
    assert_the_same(dry, real)
    for place, figure in {"gpu": "weights_bytes", "cpu": "cpu_weights_bytes", "disk": "disk_weights_bytes"}.items():
        assert getattr(dry, figure) == plan.weight_bytes(place)


@pytest.mark.parametrize(("recipe", "placement"), [("int8", "half"), ("bf16", "gpu")])
def test_odd_workloads_to_the_byte(recipe, placement):
    plan, gpu = tiny_plan("qwen2", recipe, placement), open_gpu("1000MiB")
    model = load_tiny("qwen2", plan, gpu)
    for workload in (
        Workload(70, 3, batch_size=2, follow_up_tokens=20),
        Workload(20, 3, follow_up_tokens=20),  # forgets all of the first turn
        Workload(1, 0),
        Workload(2, 0, follow_up_tokens=1),
    ):
        assert_the_same(forecast(plan, gpu, workload=workload), run_workload(model, workload))


@compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "placement", "kv_format"),
    [("bf16", "gpu", "bf16"), ("int8", "half", "int8"), ("int4", "half", "bf16"), ("fp32", "gpu", "fp32")],
)
def test_a_compiled_decoder_takes_what_was_foretold(recipe, placement, kv_format, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWVRAM_COMPILE", "1")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    plan = replace(tiny_plan("qwen2", recipe, placement), kv_format=kv_format)
    for batch_size in (1, 2):
        dry, real = forecast_and_measure("qwen2", plan, Workload(33, 3, follow_up_tokens=9, batch_size=batch_size))
        assert_the_same(dry, real)
        assert real.engine == "the lean decoder, compiled"


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65])
def test_to_the_byte_at_every_length(tokens):
    dry, real = forecast_and_measure("qwen2", tiny_plan("qwen2", "int8"), Workload(tokens, 1))
    assert (dry.compare(real)["difference"] == 0).all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", TINY)
def test_figures_hang_together(kind, recipe):
    plan = tiny_plan(kind, recipe)
    profile = forecast(plan, "1000MiB", workload=WORKLOAD)
    for phase in profile.phases:
        assert sum(phase.breakdown.values()) == phase.peak_allocated_bytes >= phase.end_allocated_bytes
        assert phase.peak_allocated_bytes <= phase.peak_reserved_bytes <= 1000 * MiB
    assert profile.weights_bytes == plan.weight_bytes()
    loaded = profile.phase("load").end_allocated_bytes
    assert profile.weights_bytes < loaded < profile.weights_bytes + 512 * 80  # each tensor rounds up to a block
    assert profile.kv_bytes == KV_BYTES_A_LAYER * 3
    assert profile.transferred_bytes == 290 * 8  # the prompt's ids; those decoded are there already
    numbers = profile.to_dict()
    assert numbers["peak_allocated_bytes"] == max(p["peak_allocated_bytes"] for p in numbers["phases"].values())
    assert numbers["fits"] is True
    assert "fits in" in profile.summary()
    with pytest.raises(KeyError):
        profile.phase("training")


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
def test_what_earlier_forecasts_worked_out_changes_no_figure(kernels, monkeypatch):
    budget = replace(GpuBudget.parse("1GiB"), kernels=kernels)
    plans = [replace(tiny_plan("qwen2", recipe, "half"), kv_format="int4") for recipe in RECIPES]
    known = [forecast(plan, budget, workload=WORKLOAD) for _ in range(2) for plan in plans][len(plans) :]
    monkeypatch.setattr(dry_run, "_results_of", lambda dtype: MetaResults())
    assert known == [forecast(plan, budget, workload=WORKLOAD) for plan in plans]
    monkeypatch.setattr(dry_run, "_results_of", lambda dtype: lambda func, args, kwargs: func(*args, **kwargs))
    assert known == [forecast(plan, budget, workload=WORKLOAD) for plan in plans]


def test_a_result_that_the_arguments_layouts_do_not_say_is_not_remembered():
    """A size that follows from values, and an operator in place that changes its argument's shape."""
    known, meta = MetaResults(), torch.empty(3, 5, device="meta")
    for mask in ([True, False, False], [True, True, True]):
        found = known(torch.ops.aten.index.Tensor, (meta, [torch.tensor(mask)]), {})
        assert found.shape == (sum(mask), 5)
    for _ in range(2):
        assert known(torch.ops.prims.resize.default, (torch.empty(4, device="meta"), [8]), {}).shape == (8,)
    for _ in range(2):  # while one that leaves it as it was is
        assert known(torch.ops.aten.add_.Tensor, (meta, meta), {}) is meta
    assert known._count == 1


def test_what_is_remembered_has_a_bound(monkeypatch):
    monkeypatch.setattr(dry_run, "MOST_REMEMBERED", 20)
    monkeypatch.setattr(dry_run, "_results_of", lambda dtype: MetaResults())
    plan = tiny_plan("llama", "int8")
    found = forecast(plan, workload=WORKLOAD)
    monkeypatch.undo()
    assert found == forecast(plan, workload=WORKLOAD)


def test_kv_and_transfers_follow_the_split():
    tiny_spec("qwen2")
    by_layers = [forecast(tiny_plan("qwen2").with_gpu_layers(n), workload=WORKLOAD) for n in range(4)]
    assert [profile.kv_bytes for profile in by_layers] == [KV_BYTES_A_LAYER * n for n in range(4)]
    assert all(a.weights_bytes < b.weights_bytes for a, b in zip(by_layers, by_layers[1:], strict=False))
    everything_on_the_cpu = forecast(tiny_plan("qwen2", "bf16", "cpu"), workload=WORKLOAD)
    assert everything_on_the_cpu.peak_allocated_bytes == everything_on_the_cpu.transferred_bytes == 0


@pytest.mark.parametrize("budget", ["1MiB", "2MiB", "3MiB", "4MiB", "6MiB", "24MiB", "26MiB"])
@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_first_oom_is_where_the_real_run_raises(recipe, budget):
    workload = Workload(900, 2)
    plan = replace(tiny_plan("qwen2", recipe), context=1024)
    dry = forecast(plan, open_gpu(budget), workload=workload)
    gpu = open_gpu(budget)
    try:
        run_workload(load_tiny("qwen2", plan, gpu), workload)
    except torch.OutOfMemoryError as error:
        for fact in ("phase", "module", "requested_bytes", "allocated_bytes", "reserved_bytes", "holders"):
            assert getattr(dry.first_oom, fact) == getattr(error.lowvram.event, fact), fact
        assert not dry.fits
        assert f"first out of memory in {error.lowvram.event.phase}, at {error.lowvram.event.module}" in dry.summary()
        assert dry.to_dict()["first_oom"]["bytes"] == error.lowvram.event.requested_bytes
    else:
        assert dry.fits
        assert dry.peak_reserved_bytes <= parse_bytes(budget)


def test_the_budgets_above_meet_every_outcome():
    workload, found = Workload(900, 2), set()
    plan = replace(tiny_plan("qwen2", "fp32"), context=1024)
    for budget in ("1MiB", "3MiB", "26MiB"):
        event = forecast(plan, open_gpu(budget), workload=workload).first_oom
        found.add(event.phase if event else "fits")
    assert found == {"load", "prefill", "fits"}


def test_beyond_the_first_failure_the_figures_are_those_without_a_limit():
    plan = tiny_plan("qwen2", "fp32")
    small, unlimited = (forecast(plan, budget, workload=WORKLOAD) for budget in ("1MiB", None))
    assert not small.fits
    assert unlimited.fits
    assert (small.compare(unlimited)["difference"] == 0).all()


def test_a_second_model_on_the_same_gpu_has_its_own_load_phase():
    gpu = open_gpu("1000MiB")
    forecast_and_measure("qwen2", tiny_plan("qwen2", "fp32"), gpu=gpu)
    gc.collect()
    dry, real = forecast_and_measure("qwen2", tiny_plan("qwen2", "int8"), gpu=gpu)
    assert (dry.compare(real)["difference"] == 0).all()


def test_a_model_keeps_its_recording_when_another_is_loaded_beside_it():
    gpu = open_gpu("1000MiB")
    first = load_tiny("qwen2", tiny_plan("qwen2"), gpu)
    load_bytes = first.lowvram.recording.phases[0].peak_allocated_bytes
    second = load_tiny("llama", tiny_plan("llama"), gpu)
    assert second.lowvram.recording is gpu.recording is not first.lowvram.recording
    profile = run_workload(first, WORKLOAD)
    assert [phase.name for phase in profile.phases] == ["load", "prefill", "decode"]
    assert profile.phase("load").peak_allocated_bytes == load_bytes
    assert [phase.name for phase in gpu.recording.phases] == ["load", "prefill", "decode"]


def test_cuda_kernels_differ_where_they_should():
    def both(recipe, tokens):
        plan = tiny_plan("qwen2", recipe)
        return [forecast(plan, gpu, workload=Workload(tokens, 1)) for gpu in (None, stand_in())]

    for recipe in RECIPES:
        cuda, cpu = both(recipe, 290)
        assert cuda.weights_bytes == cpu.weights_bytes
        assert cuda.kv_bytes == cpu.kv_bytes
        assert cuda.phase("load").peak_allocated_bytes == cpu.phase("load").peak_allocated_bytes
    # one token: the CPU dequantises an nf4 weight, CUDA has a fused kernel; for int8 it is the other way round
    (nf4_cuda, nf4_cpu), (int8_cuda, int8_cpu) = both("nf4", 1), both("int8", 1)
    assert nf4_cuda.activation_bytes < nf4_cpu.activation_bytes
    assert int8_cuda.activation_bytes > int8_cpu.activation_bytes
    gpu = open_gpu(None)  # whose kernels an opened GPU runs, it says itself
    expected = {"cuda": int8_cuda, "cpu": int8_cpu}[gpu.kernels]
    assert forecast(tiny_plan("qwen2", "int8"), gpu, workload=Workload(1, 1)).phases == expected.phases


@pytest.mark.parametrize("workload", [Workload(511, 2), Workload(512, 1), Workload(1, 512)])
def test_a_workload_longer_than_the_context(workload):
    with pytest.raises(PlanError, match="513 tokens, the plan a context of 512"):
        forecast(tiny_plan("qwen2"), workload=workload)


def test_the_default_workload_is_the_whole_context():
    profile = forecast(tiny_plan("qwen2", context=300))
    assert profile.kv_bytes == 6 * round_size(300 * 128)
    assert Workload.full_context(2) == Workload(1, 1)


@pytest.mark.parametrize("sizes", [(0, 2), (5, -1), (True, 1), (2.5, 1), ("5", 1)])
def test_a_workload_of_nothing_is_refused(sizes):
    with pytest.raises(PlanError, match="expected (prompt|new)_tokens of [01] or more, found"):
        Workload(*sizes)


@pytest.mark.parametrize(("budget", "error"), [("lots", UnitError), (4, BudgetError)])
def test_a_budget_that_cannot_be_used(budget, error):
    with pytest.raises(error):
        forecast(tiny_plan("qwen2"), budget)


def test_a_decoder_of_a_dry_run_gives_the_workspace_of_its_graphs_back():
    gpu = DryRunGpu(None, "cuda")
    model = load(tiny_plan("qwen2"), gpu, checkpoint=ShapesOnly(tiny_spec("qwen2")), progress=False)
    held = []
    for _ in range(2):
        with ImitateAttention(gpu):
            decoder = decoder_for(model, 64)
        held.append(gpu.meter.category_bytes("workspace"))
        del decoder
        held.append(gpu.meter.category_bytes("workspace"))
    with_it, without = held[:2]
    assert held[2:] == [with_it, without]
    assert with_it - without >= cublas_workspace_bytes(this_card())


@pytest.mark.parametrize("kernels", ["gpu", "CUDA", "", None])
def test_kernels_that_are_none(kernels):
    with pytest.raises(BudgetError, match=r"expected kernels cuda or cpu, found"):
        GpuBudget(4 * GiB, kernels=kernels)


def test_qwen_4b_in_16_bits_at_4096_tokens():
    spec = packaged_spec("qwen1.5-4b")
    profile = forecast(Plan.uniform(spec, "fp16", context=4096), "4GiB")
    assert profile.weights_bytes == 7_900_738_560
    assert profile.kv_bytes == 4096 * 400 * 1024
    # CUDA counts whole blocks: a 33.75 MiB projection takes a 34 MiB segment whose rest is too small to split off
    assert profile.phase("load").peak_allocated_bytes == pytest.approx(7_900_738_560 + 120 * MiB // 4, rel=1e-4)
    assert profile.peak_allocated_bytes > profile.weights_bytes + profile.kv_bytes
    assert not profile.fits
    assert profile.first_oom.phase == "load"
    assert profile.first_oom.module.startswith("model.layers.")
    assert profile.overhead_bytes == 384 * MiB
    assert forecast(Plan.uniform(spec, "fp16", context=4096), "12GiB").fits
    assert profile.peak_reserved_bytes < 11.5 * GiB


FIRST_NF4 = """
from tests.helpers.tiny import load_tiny, tiny_plan, tiny_spec, open_gpu
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.measure import run_workload
gpu, plan, spec = open_gpu("1000MiB"), tiny_plan("qwen2", "nf4"), tiny_spec("qwen2")
work = Workload(20, 2)
table = forecast(plan, gpu, workload=work).compare(run_workload(load_tiny("qwen2", plan, gpu), work))
print(table["difference"].tolist())
"""


def test_the_first_nf4_of_a_process(request):
    """bitsandbytes makes tables when it is imported; they are not the model's."""
    command = [sys.executable, "-c", FIRST_NF4]
    result = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[-2] == "[0, 0, 0]"
