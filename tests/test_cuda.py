"""What only a CUDA card can show: its counters beside the forecast, its kernels beside the CPU's, its own OOM.

Skipped where there is none (`make gpu-check` runs these). Every model is random and made on the fly.
"""

import functools
from dataclasses import replace

import pytest
import torch

from lowvram_lab.chat.session import ChatSession
from lowvram_lab.decoding.decode import ModuleDecoder
from lowvram_lab.decoding.lean import LeanDecoder
from lowvram_lab.engine.layers import quantized_linear
from lowvram_lab.engine.load import load, replan
from lowvram_lab.errors import BudgetError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.memory.torch_release import torch_release
from lowvram_lab.model.checkpoint import ShapesOnly
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.explain import explain_oom
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import Workload
from lowvram_lab.units import GiB, MiB
from lowvram_lab.weights.solvers import dequantize, quantize
from tests.helpers.card import clean, computes
from tests.helpers.checkpoints import RandomCheckpoint
from tests.helpers.tiny import (
    PLACEMENTS,
    TINY,
    TOLERANCES,
    decoded,
    letters_state,
    load_tiny,
    random_ids,
    relative_error,
    stock_logits,
    tiny_config,
    tiny_plan,
    tiny_tokenizer,
)

pytestmark = pytest.mark.gpu
SHARES = {"peak_allocated_bytes": 0.02, "end_allocated_bytes": 0.02, "peak_reserved_bytes": 0.05}
SLACK = 2 * MiB  # of a tiny model, two per cent would be less than one allocation of cuBLAS' that meta cannot see


@functools.cache
def mid_spec(kind: str) -> ModelSpec:
    """160 M parameters: segments of the large pool, heads of 64, products that tinygemm takes."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "vocab_size": 32000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    return ModelSpec.from_config(tiny_config(kind, **sizes, **heads), f"mid-{kind}")


def load_mid(plan, gpu):
    spec = mid_spec(plan.model.removeprefix("mid-"))
    return load(plan, gpu, checkpoint=RandomCheckpoint(spec), progress=False)


def on_the_fake() -> bool:
    """Whether these counters are the fake CUDA runtime's: there a forecast is to be exact."""
    return torch.cuda.get_device_name().startswith("fake CUDA")


def assert_near(dry, real, slack=0):
    """Allocated within 2 %, reserved within 5 % in every phase; on the fake CUDA runtime to the byte."""
    assert [phase.name for phase in dry.phases] == [phase.name for phase in real.phases]
    exact = on_the_fake()
    for mine, theirs in zip(dry.phases, real.phases, strict=True):
        for figure, share in SHARES.items():
            a, b = getattr(mine, figure), getattr(theirs, figure)
            room = slack + (20 * MiB if slack and "reserved" in figure else 0)  # a segment more or less
            assert abs(a - b) <= (0 if exact else share * b + room), (theirs.name, figure, a, b)


@pytest.mark.parametrize("placement", ["gpu", "half"])
@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4", "nf4"])
@pytest.mark.parametrize("kind", TINY)
def test_forecast_and_counters_of_a_tiny_model(kind, recipe, placement):
    gpu, plan, workload = open_gpu(), tiny_plan(kind, recipe, placement), Workload(290, 3)
    dry = forecast(plan, gpu, workload=workload)
    real = run_workload(load_tiny(kind, plan, gpu), workload)
    assert_near(dry, real, SLACK)
    assert dry.weights_bytes == real.weights_bytes
    assert dry.kv_bytes == real.kv_bytes
    assert dry.transferred_bytes == real.transferred_bytes
    assert "simulated" not in real.gpu


@pytest.mark.parametrize("low", ["gpu", "cpu", "disk"])
@pytest.mark.parametrize("kind", TINY)
def test_forecast_and_counters_of_weights_in_two_planes(kind, low):
    """The high planes on the card; the low ones beside them, or computed by the CPU."""
    gpu, workload = open_gpu(), Workload(290, 3)
    plan = tiny_plan(kind, "int4+4").with_modules("*", low=low)
    dry = forecast(plan, gpu, workload=workload)
    real = run_workload(load_tiny(kind, plan, gpu), workload)
    assert_near(dry, real, SLACK)
    assert dry.weights_bytes == real.weights_bytes
    assert dry.transferred_bytes == real.transferred_bytes


@pytest.mark.parametrize("low", ["gpu", "cpu"])
@pytest.mark.parametrize("gpu_layers", [8, 4])
def test_forecast_and_counters_of_a_mid_size_model_in_two_planes(gpu_layers, low):
    gpu, spec = open_gpu(), mid_spec("qwen2")
    plan = Plan.uniform(spec, "int4+4", context=2048).with_gpu_layers(gpu_layers)
    plan = plan.with_modules("*", low="cpu") if low == "cpu" else plan
    workload = Workload(1500, 3, follow_up_tokens=100)
    dry = forecast(plan, gpu, workload=workload)
    assert_near(dry, run_workload(load_mid(plan, gpu), workload))


@pytest.mark.parametrize("kv_format", ["16 bits", "int8", "int4"])
@pytest.mark.parametrize("placement", ["gpu", "half"])
@pytest.mark.parametrize("kind", TINY)
def test_forecast_and_counters_of_prompts_that_are_remembered(kind, placement, kv_format):
    """Blocks are taken off the card and put back on it; what that takes there, and what crosses, is forecast."""
    gpu, workload = open_gpu(), Workload(290, 3)
    plan = replace(tiny_plan(kind, "int8", placement), remember_ram=1 << 20)
    plan = replace(plan, kv_format=plan.dtype if kv_format == "16 bits" else kv_format)
    dry = forecast(plan, gpu, workload=workload)
    real = run_workload(load_tiny(kind, plan, gpu), workload)
    assert_near(dry, real, SLACK)
    assert dry.transferred_bytes == real.transferred_bytes
    assert dry.remembered_bytes == real.remembered_bytes == plan.remembered_ram_bytes


@pytest.mark.parametrize("gpu_layers", [8, 4])
def test_forecast_and_counters_of_a_mid_size_model_that_remembers(gpu_layers):
    gpu, spec = open_gpu(), mid_spec("qwen2")
    plan = Plan.uniform(spec, "int4", context=2048).with_gpu_layers(gpu_layers)
    plan, workload = replace(plan, remember_ram=64 * MiB), Workload(1500, 3, follow_up_tokens=100)
    dry = forecast(plan, gpu, workload=workload)
    assert_near(dry, run_workload(load_mid(plan, gpu), workload))


@pytest.mark.parametrize("gpu_layers", [8, 4])
@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4", "nf4"])
def test_forecast_and_counters_of_a_mid_size_model(recipe, gpu_layers):
    gpu, spec = open_gpu(), mid_spec("qwen2")
    plan = Plan.uniform(spec, recipe, context=2048).with_gpu_layers(gpu_layers)
    workload = Workload(1500, 3, follow_up_tokens=100)
    dry = forecast(plan, gpu, workload=workload)
    assert_near(dry, run_workload(load_mid(plan, gpu), workload))


@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4", "nf4"])
def test_weights_that_travel_are_in_the_forecast_and_change_no_answer(recipe):
    gpu, spec = open_gpu(), mid_spec("qwen2")
    plan = Plan.uniform(spec, recipe, context=2048).with_gpu_layers(3, disk=1)
    travelling, workload = replace(plan, stream_from=256), Workload(1500, 3, follow_up_tokens=100)
    dry = forecast(travelling, gpu, workload=workload)
    model = load_mid(travelling, gpu)
    assert_near(dry, run_workload(model, workload))
    assert all(layer.pinned.locked for layer in model.lowvram.placement._weights._order if layer.pinned)
    if not computes():
        return
    ids = random_ids(300)
    with torch.no_grad():
        found = model(ids).logits.cpu()
        replan(model, plan, progress=False)
        assert relative_error(found, model(ids).logits.cpu()) < TOLERANCES["bf16"]


@pytest.mark.parametrize("changes", [{"batch_size": 4}, {"batch_size": 2, "follow_up_tokens": 50}])
def test_forecast_and_counters_of_other_workloads(changes):
    gpu, spec, workload = open_gpu(), mid_spec("llama"), Workload(400, 3, **changes)
    plan = Plan.uniform(spec, "fp16", context=1024)
    dry = forecast(plan, gpu, workload=workload)
    assert_near(dry, run_workload(load_mid(plan, gpu), workload))


@pytest.fixture(params=[False, True], ids=["default segments", "expandable segments"])
def expandable(request):
    """The allocator's mode, set while nothing is reserved."""
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{request.param}")
    yield request.param
    clean()
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")


@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4", "nf4"])
def test_forecast_and_counters_of_a_chat_that_outgrows_its_graphs(recipe, expandable):
    gpu, workload = open_gpu(), Workload(200, 400, follow_up_tokens=40)
    plan = Plan.uniform(mid_spec("qwen2"), recipe, context=1024)
    dry = forecast(plan, gpu, workload=workload, expandable_segments=expandable)
    real = run_workload(load_mid(plan, gpu), workload)
    assert dry.engine == real.engine
    assert_near(dry, real)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_decoder_that_goes_leaves_another_its_workspace(gone):
    """cuBLAS' workspace is a stream's; the first graph of a stream that goes takes it away (torch 2.12 and later)."""
    spec, dry = mid_spec("qwen2"), DryRunGpu(None)
    plan = Plan.uniform(spec, "fp16", context=64)
    held = []
    for gpu, checkpoint, count in (
        (open_gpu(), RandomCheckpoint(spec), torch.cuda.memory_allocated),
        (dry, ShapesOnly(spec), lambda: dry.meter.allocated["gpu"]),
    ):
        with gpu.active():
            model, found = load(plan, gpu, checkpoint=checkpoint, progress=False), []
            start = count()
            for _ in range(2):  # the second round takes nothing anew
                decoders = [LeanDecoder(model), LeanDecoder(model)]
                found.append(count() - start)
                del decoders[gone]
                found.append(count() - start)
                decoders.clear()
                found.append(count() - start)
        held.append(found)
    assert held[0] == held[1]
    both, one, none, *again = held[0]
    assert again == [both, one, none]
    if torch_release() >= (2, 12):
        assert both - one == one - none > 2 * MiB


@pytest.mark.usefixtures("values")
def test_what_inference_made_is_computed_with_outside_of_it():
    with torch.inference_mode():
        made = torch.arange(320, device="cuda", dtype=torch.bfloat16)
    before = made.float()
    torch.full((320,), torch.nan, device="cuda")  # where a result that nobody writes would lie
    assert torch.equal(before.cpu(), made.cpu().float())


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize("recipe", ["fp32", "bf16", "int8", "int4", "nf4"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", TINY)
def test_logits_are_the_cpus(kind, placement, recipe):
    model = load_tiny(kind, tiny_plan(kind, recipe, placement), open_gpu())
    with torch.no_grad():
        logits = model(random_ids(40)).logits
    assert relative_error(logits.cpu(), stock_logits(kind, 40)) < TOLERANCES[recipe] + 1e-4


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("recipe", ["int8", "int4-g32", "int4", "int4-g128", "int4-g256", "nf4"])
def test_a_quantised_product_is_that_of_the_dequantised_weight(recipe, rows):
    fmt, generator = get_format(recipe), torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 1024, generator=generator), torch.randn(rows, 1024, generator=generator)
    layer = quantized_linear(1024, 64, fmt, "cuda")
    layer.store(weight, lambda tensor: tensor.to("cuda"))
    if fmt.kind == "int4" and torch.cuda.get_device_capability() >= (8, 0):
        assert layer.layout == "cuda"  # tinygemm
    if fmt.kind == "nf4":
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        restored = dequantize_4bit(*quantize_4bit(weight, blocksize=fmt.group_size, quant_type="nf4"))
    else:
        restored = dequantize(quantize(weight, fmt), fmt)
    x = x.to(torch.bfloat16)
    product = layer(x.to("cuda")).float().cpu()
    assert product.shape == (rows, 64)
    # x is bf16 on both sides; the weight is rounded to bf16 once more, the result once: some 2^-9 each
    assert relative_error(product, x.float() @ restored.T.float()) < 0.01


def test_the_cap_is_real():
    gpu = open_gpu(GpuBudget(512 * MiB))
    held = torch.empty(400 * MiB, dtype=torch.uint8, device=gpu.device)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(200 * MiB, dtype=torch.uint8, device=gpu.device)
    assert torch.cuda.memory_reserved() <= 512 * MiB
    del held
    again = torch.empty(500 * MiB, dtype=torch.uint8, device=gpu.device)
    assert again.nbytes == 500 * MiB


@pytest.mark.parametrize("phase", ["load", "prefill"])
def test_an_oom_is_cudas_own_and_names_the_module(phase):
    spec = mid_spec("llama")
    plan = Plan.uniform(spec, "fp16", context=8192)
    dry = forecast(plan)
    loaded = dry.phase("load").peak_reserved_bytes
    budget = GpuBudget(loaded // 2 if phase == "load" else (loaded + dry.peak_reserved_bytes) // 2)
    expected = forecast(plan, budget).first_oom
    gpu = open_gpu(budget)
    with pytest.raises(torch.OutOfMemoryError) as error:
        run_workload(load_mid(plan, gpu), Workload.full_context(8192))
    event = error.value.lowvram.event
    assert event.phase == expected.phase == phase
    assert event.module
    assert event.module.split(".")[:2] == expected.module.split(".")[:2]
    assert event.module == expected.module or not on_the_fake()
    assert event.requested_bytes is None and "CUDA out of memory" in str(error.value)  # CUDA says it only in words
    assert event.allocated_bytes <= event.reserved_bytes <= budget.total_bytes
    assert error.value.lowvram.gpu is gpu
    held = sum(size for _, size in event.holders)
    assert held == pytest.approx(event.allocated_bytes, rel=0.1, abs=40 * MiB)  # cuBLAS' workspace is nobody's


@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("gpu_layers", [8, 4])
def test_close_to_the_cap_memory_runs_out_where_it_is_forecast(recipe, gpu_layers):
    """A little too small: no room for graphs, blocks given back and taken again, or an OOM."""
    workload = Workload(300, 3, follow_up_tokens=40)
    plan = Plan.uniform(mid_spec("qwen2"), recipe, context=512).with_gpu_layers(gpu_layers)
    peak = forecast(plan, open_gpu(), workload=workload).peak_reserved_bytes
    for less in (1, 10, 30, 60):
        clean()
        gpu = open_gpu(GpuBudget(peak - less * MiB))
        dry, met = forecast(plan, gpu, workload=workload), None
        try:
            run_workload(load_mid(plan, gpu), workload)
        except torch.OutOfMemoryError as error:
            met = error.lowvram.event.phase, error.lowvram.event.module
            error.__traceback__ = None
        if on_the_fake():
            assert met == (dry.first_oom and (dry.first_oom.phase, dry.first_oom.module))
        ended = [phase for phase in gpu.recording.phases if met is None or phase.name != met[0]]
        assert_near(replace(dry, phases=dry.phases[: len(ended)]), replace(dry, phases=ended))


def test_an_oom_is_explained_and_a_suggestion_really_fits():
    spec = mid_spec("qwen2")
    plan = Plan.uniform(spec, "fp16", context=8192)
    budget = GpuBudget(int(forecast(plan).peak_reserved_bytes * 0.8))
    with explain_oom() as found:
        run_workload(load_mid(plan, open_gpu(budget)), Workload.full_context(8192))
    assert found.happened
    assert "(simulated)" not in found.summary()
    assert found.table()["bytes"].iloc[0] > MiB
    applied = [suggestion for suggestion in found.suggestions if not suggestion.environment]
    assert applied
    for suggestion in applied:
        clean()
        model = load_mid(suggestion.plan, open_gpu(budget))
        profile = run_workload(model, Workload.full_context(suggestion.plan.context))
        del model
        assert profile.peak_reserved_bytes <= budget.total_bytes


def test_nothing_stays_when_a_model_goes():
    before = torch.cuda.memory_allocated()
    model = load_tiny("qwen2", tiny_plan("qwen2", "int8"), open_gpu())
    run_workload(model, Workload(50, 2))
    assert torch.cuda.memory_allocated() > before
    del model
    clean()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.usefixtures("values")
def test_generate_answers_as_on_the_cpu():
    ids = random_ids(20)
    for placement in ("gpu", "half"):
        model = load_tiny("qwen2", tiny_plan("qwen2", "fp32", placement), open_gpu())
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 20:].cpu()
        with torch.no_grad():
            again = model(torch.cat((ids, answer[None]), dim=1)).logits[0, 19:-1].argmax(-1).cpu()
        assert answer.tolist() == again.tolist()


@pytest.mark.parametrize("recipe", ["fp16", "int8", "int4", "nf4"])
def test_forecast_and_counters_of_a_head_alone_on_the_card(recipe):
    gpu, plan = open_gpu(), tiny_plan("llama", recipe).with_gpu_layers(0)
    workload = Workload(290, 3, follow_up_tokens=20)
    dry = forecast(plan, gpu, workload=workload)
    real = run_workload(load_tiny("llama", plan, gpu), workload)
    assert_near(dry, real, SLACK)
    assert dry.transferred_bytes == real.transferred_bytes


def test_a_head_alone_on_the_card():
    """Its temporaries are measured on meta, through the modules that move what comes from the CPU."""
    plan = tiny_plan("qwen2", "int8").with_gpu_layers(0)
    decoder = LeanDecoder(load_tiny("qwen2", plan))
    assert decoder.workspace_bytes >= 4 * plan.spec.hidden_size
    decoder.prefill(random_ids(20))


def test_a_budget_beyond_the_card_is_refused():
    with pytest.raises(BudgetError, match="give a smaller budget"):
        open_gpu(GpuBudget(torch.cuda.mem_get_info()[1] + GiB))


def test_another_card_is_forecast_and_not_run():
    other = "t4" if torch.cuda.get_device_capability() != (7, 5) else "rtx3050"
    budget = GpuBudget.parse("1GiB", card=other)
    assert forecast(tiny_plan("qwen2", "int4"), budget).fits
    with pytest.raises(BudgetError, match="another card can be forecast, not run"):
        open_gpu(budget)


@pytest.mark.usefixtures("values")
@pytest.mark.parametrize("kv_format", ["bf16", "int8"])
@pytest.mark.parametrize("recipe", ["bf16", "int8", "int4", "int4-g32", "int3", "nf4"])
@pytest.mark.parametrize("kind", TINY)
def test_graphs_decode_what_the_modules_do(kind, recipe, kv_format, monkeypatch):
    monkeypatch.setattr("lowvram_lab.decoding.graph.SHORTEST", 16)  # several lengths, hence several graphs
    plan = replace(tiny_plan(kind, recipe, context=128), kv_format=kv_format)
    model, ids = load_tiny(kind, plan), random_ids(60)
    decoder = LeanDecoder(model)
    found, expected = decoded(decoder, ids, 9), decoded(ModuleDecoder(model), ids, 9)
    assert decoder.name == "the lean decoder, as CUDA graphs"
    assert set(decoder._ways[False].graphed._graphs) == {16, 32, 64, 128}
    assert relative_error(found, expected) < 2 * TOLERANCES["bf16"]


def test_decoding_by_graphs_allocates_nothing():
    model = load_tiny("qwen2", tiny_plan("qwen2", "int4", context=1024))
    decoder, token = LeanDecoder(model), torch.ones(1, 1, dtype=torch.long, device="cuda")
    decoder.prefill(random_ids(4))
    for _ in range(260):  # past the length of the first graph
        decoder.decode(token)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    made = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(200):
        decoder.decode(token)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    per_token = (torch.cuda.memory_stats()["allocation.all.allocated"] - made) / 200
    assert per_token == 0


@pytest.mark.usefixtures("values")
def test_a_chat_on_the_card_is_decoded_by_graphs():
    model = load_tiny("qwen2", tiny_plan("qwen2", "bf16", context=256), None, letters_state())
    session = ChatSession(model, tiny_tokenizer(), max_new_tokens=20)
    assert session.engine == "the lean decoder, as CUDA graphs"
    assert session.ask("hello")
    split = load_tiny("qwen2", tiny_plan("qwen2", "bf16", "half", context=256), None, letters_state())
    assert ChatSession(split, tiny_tokenizer()).engine == session.engine
