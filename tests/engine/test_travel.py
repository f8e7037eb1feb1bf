"""Weights that travel to the GPU for a long prompt: counted, within the forecast, and without a trace afterwards."""

import copy
import gc
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, DynamicCache

from lowvram_lab.decoding.decode import prefill
from lowvram_lab.engine import travel as streaming
from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.load import load, replan
from lowvram_lab.errors import PlanError
from lowvram_lab.memory import cuda as pinned
from lowvram_lab.memory.cuda import PinnedBlock, open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_speed, run_workload
from lowvram_lab.planner.profile import Workload
from tests.helpers.tiny import (
    TINY,
    DictCheckpoint,
    load_tiny,
    random_ids,
    random_state,
    relative_error,
    tiny_plan,
    tiny_spec,
    tiny_stock,
)

stand_in_only = pytest.mark.skipif(torch.cuda.is_available(), reason="about the simulated GPU")
FORMATS = ("bf16", "int8", "int4", "int4+4", "int3", "nf4")
FROM = 16


def streamed(kind="qwen2", recipe="bf16", layers=1, disk=0, tokens=FROM) -> Plan:
    tiny_spec(kind)
    return replace(tiny_plan(kind, recipe).with_gpu_layers(layers, disk=disk), stream_from=tokens)


def layer_bytes(plan: Plan, layers) -> int:
    return sum(plan.module_bytes(module) for module in plan.spec.modules if module.layer in layers)


@torch.no_grad()
def crossed(model, tokens: int, batch: int = 1) -> dict:
    """What prompts move."""
    before = copy.copy(model.lowvram.gpu.recording.transfers)
    with model.lowvram.gpu.active():
        prefill(model, random_ids(tokens, batch), PreallocatedCache(model))
    return dict(model.lowvram.gpu.recording.transfers - before)


@stand_in_only
@pytest.mark.parametrize("recipe", FORMATS)
@pytest.mark.parametrize("kind", TINY)
def test_from_the_threshold_on_weights_travel_once_and_below_it_not_at_all(kind, recipe):
    spec, plan = tiny_spec(kind), streamed(kind, recipe)
    model = load_tiny(kind, plan)
    short, long = crossed(model, FROM - 1), crossed(model, FROM)
    resident = crossed(load_tiny(kind, replace(plan, stream_from=None)), FROM)
    weights = layer_bytes(plan, {0, 1})
    grown = long["cpu", "gpu"] - resident["cpu", "gpu"]
    assert short["cpu", "gpu"] < 8 * FROM * spec.hidden_size * 2  # hidden states, mask and rotary tables
    assert weights - 4 * FROM * spec.hidden_size * 2 < grown < weights + 4 * FROM * spec.hidden_size * 2
    # home come the keys and values of two layers, and no hidden state: all layers compute on the GPU
    assert long["gpu", "cpu"] - plan.kv_bytes(FROM, "cpu") < FROM * spec.hidden_size * 2


@stand_in_only
@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("recipe", FORMATS)
def test_the_two_buffers_are_in_the_forecast(recipe, layers):
    plan = streamed("qwen2", recipe, layers)
    gpu, workload = open_gpu("64MiB"), Workload(40, 3, follow_up_tokens=20)
    foretold = forecast(plan, gpu, workload=workload)
    measured = run_workload(load_tiny("qwen2", plan, gpu), workload)
    assert [p.peak_allocated_bytes for p in measured.phases] == [p.peak_allocated_bytes for p in foretold.phases]
    assert measured.transferred_bytes == foretold.transferred_bytes
    resident = forecast(replace(plan, stream_from=plan.context), gpu, workload=workload)  # by modules as well
    buffers = min(2, 3 - layers) * layer_bytes(plan, {0})
    more = foretold.phase("prefill").breakdown["weights"] - resident.phase("prefill").breakdown["weights"]
    assert buffers <= more < 1.3 * buffers
    assert foretold.phase("decode").peak_allocated_bytes == resident.phase("decode").peak_allocated_bytes


def test_a_forecast_for_cuda_has_the_buffers_and_what_its_kernels_take():
    plan = streamed("qwen2", "int4")
    profiles = [forecast(each, "64MiB") for each in (plan, replace(plan, stream_from=None))]
    more = profiles[0].phase("prefill").peak_allocated_bytes - profiles[1].phase("prefill").peak_allocated_bytes
    assert more >= 2 * layer_bytes(plan, {0})


@pytest.mark.parametrize("kv_format", ["bf16", "int8"])
@pytest.mark.parametrize("kind", TINY)
def test_a_conversation_of_long_and_short_turns(kind, kv_format):
    """Long prompts compute on the GPU, the tokens between them on the CPU, all on one cache."""
    plan = replace(streamed(kind, disk=1), kv_format=kv_format)
    ids, found = random_ids(90), []
    parts = ids.split([30, 1, 4, 20, 1, 34], dim=1)
    for each in (plan, replace(plan, stream_from=None)):
        model = load_tiny(kind, each)
        cache = PreallocatedCache(model)
        with torch.no_grad():
            found.append([prefill(model, part, cache).cpu() for part in parts])
        places = {model.lowvram.gpu.meter.place_of(layer.keys) for layer in cache.layers[:2]}
        assert (places, cache.get_seq_length()) == ({"cpu"}, 90)
    for streaming_logits, resident_logits in zip(*found, strict=True):
        assert relative_error(streaming_logits, resident_logits) < 0.02


def test_without_a_cache_weights_travel_and_with_one_made_inside_they_stay():
    """The forward of an evaluation, and the one that begins stock ``generate``."""
    plan = replace(tiny_plan("qwen2", "fp32").with_gpu_layers(1), stream_from=FROM)
    model, ids, crossed_bytes = load_tiny("qwen2", plan), random_ids(40), []
    with torch.no_grad():
        expected = tiny_stock("qwen2")(ids).logits
        for options in ({"use_cache": False}, {"use_cache": True}, {}):
            before = model.lowvram.gpu.recording.transfers["cpu", "gpu"]
            assert relative_error(model(ids, **options).logits, expected) < 1e-5
            crossed_bytes.append(model.lowvram.gpu.recording.transfers["cpu", "gpu"] - before)
    weights = layer_bytes(plan, {0, 1})
    assert crossed_bytes[0] > weights > 4 * crossed_bytes[1] == 4 * crossed_bytes[2]


@pytest.mark.parametrize("stock_cache", [False, True])
def test_a_batch_counts_all_its_tokens_and_a_stock_cache_stays_where_it_is(stock_cache):
    """transformers' own caches know no places: with one the weights stay too, and the answer is the same."""
    plan = replace(tiny_plan("qwen2", "fp32").with_gpu_layers(1), stream_from=FROM)
    model, ids = load_tiny("qwen2", plan), random_ids(6, batch=3)
    before = model.lowvram.gpu.recording.transfers["cpu", "gpu"]
    with torch.no_grad():
        cache = DynamicCache() if stock_cache else PreallocatedCache(model, batch_size=3)
        found = model(ids, past_key_values=cache, use_cache=True).logits
        crossed_bytes = model.lowvram.gpu.recording.transfers["cpu", "gpu"] - before
        again = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
        stock = tiny_stock("qwen2")
        other = DynamicCache()
        expected = stock(ids, past_key_values=other, use_cache=True).logits
        assert relative_error(found, expected) < 1e-5
        assert relative_error(again, stock(ids[:, :1], past_key_values=other, use_cache=True).logits) < 1e-5
    assert (crossed_bytes > layer_bytes(plan, {0, 1})) == (not stock_cache)
    assert (crossed_bytes > layer_bytes(plan, {0})) == (not stock_cache)


@stand_in_only
def test_one_token_of_each_of_a_batch_computes_where_the_layers_are():
    model = load_tiny("qwen2", streamed(tokens=4))
    cache = PreallocatedCache(model, batch_size=8)
    with torch.no_grad():
        prefill(model, random_ids(5, batch=8), cache)
        before = sum(model.lowvram.gpu.recording.transfers.values())
        model(random_ids(1, batch=8), past_key_values=cache, use_cache=True)
    assert sum(model.lowvram.gpu.recording.transfers.values()) - before < layer_bytes(model.lowvram.plan, {0}) / 4


OTHERS = {
    "gpt_neox": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    "stablelm": {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 128,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_layers_that_call_their_cache_by_another_name_travel_too(kind):
    config = AutoConfig.for_model(kind, vocab_size=320, max_position_embeddings=256, **OTHERS[kind])
    spec = ModelSpec.from_config(config, kind)
    plan = Plan.uniform(spec, "fp32", context=128).with_gpu_layers(1)
    ids, found = random_ids(40), []
    for each in (plan, replace(plan, stream_from=FROM)):
        gpu, checkpoint = open_gpu("64MiB"), DictCheckpoint(random_state(spec))
        model = load(each, gpu, checkpoint=checkpoint, progress=False)
        cache, before = PreallocatedCache(model), gpu.recording.transfers["cpu", "gpu"]
        with torch.no_grad():
            found.append([prefill(model, part, cache).cpu() for part in ids.split([30, 1, 9], dim=1)])
    assert gpu.recording.transfers["cpu", "gpu"] - before > layer_bytes(plan, {0, 1})
    for streaming_logits, resident_logits in zip(*found, strict=True):
        assert relative_error(streaming_logits, resident_logits) < 1e-5
    foretold = forecast(replace(plan, stream_from=FROM), gpu, workload=Workload(40, 2))
    assert foretold.first_oom is None


@stand_in_only
def test_beside_a_cache_that_cannot_travel_weights_do_not_either():
    with pytest.raises(PlanError, match="weights travel only beside keys and values that can go with them, .* in int4"):
        replace(streamed(), kv_format="int4")


@stand_in_only
def test_out_of_memory_on_the_way_leaves_the_model_whole():
    plan = streamed("qwen2", "int8")
    resident = replace(plan, stream_from=None)
    room = forecast(plan, open_gpu("64MiB"), workload=Workload(64, 1)).peak_reserved_bytes
    gpu = open_gpu(room)
    model = load_tiny("qwen2", plan, gpu)
    weights = {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    held = gpu.meter.allocated["gpu"]
    with pytest.raises(torch.OutOfMemoryError) as error:
        crossed(model, 500, batch=8)
    assert error.value.lowvram.event.module
    assert "weights in flight" in str(error.value)
    del error
    gc.collect()
    assert gpu.meter.allocated["gpu"] == held
    assert weights == {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    replan(model, resident, progress=False)
    assert relative_error(prefilled(model, 8), prefilled(load_tiny("qwen2", resident), 8)) == 0


@torch.no_grad()
def prefilled(model, tokens: int) -> torch.Tensor:
    return prefill(model, random_ids(tokens), PreallocatedCache(model)).cpu()


def test_inference_mode_and_generate():
    plan = replace(tiny_plan("qwen2", "fp32").with_gpu_layers(1), stream_from=FROM)
    model, ids = load_tiny("qwen2", plan), random_ids(30)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = tiny_stock("qwen2").generate(ids, **options)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, **options), expected)


@stand_in_only
def test_a_timing_on_the_stand_in_copies_nothing():
    """Both sides lie in one RAM: copying there says nothing about a card."""
    model = load_tiny("qwen2", streamed())
    before = sum(model.lowvram.gpu.recording.transfers.values())
    assert run_speed(model, Workload(40, 2)).ttft_s > 0
    assert sum(model.lowvram.gpu.recording.transfers.values()) == before


def test_a_deleted_model_is_gone():
    model = load_tiny("qwen2", streamed(disk=1))
    crossed(model, 40)
    gone = weakref.ref(model), weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    gc.disable()  # no cycle may be needed to find it
    try:
        del model
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("recipe", FORMATS)
def test_weights_gathered_into_one_block_are_the_same(recipe, monkeypatch):
    """On CUDA the CPU layers lie in page-locked blocks; here the very same blocks, unlocked."""
    resident, plan = load_tiny("qwen2", streamed("qwen2", recipe, tokens=None)), streamed("qwen2", recipe)
    model = load_tiny("qwen2", plan)
    model.lowvram.placement.remove()
    monkeypatch.setattr(model.lowvram.gpu, "simulated", False)
    stream = streaming.TravellingWeights(model, {}, plan, model.lowvram.gpu)
    monkeypatch.undo()
    for name, tensor in [*resident.named_parameters(), *resident.named_buffers()]:
        assert torch.equal(tensor, dict([*model.named_parameters(), *model.named_buffers()])[name])
    block = stream._order[0].pinned.tensor
    weight = next(iter(model.model.layers[0].mlp.up_proj.state_dict().values()))
    assert block.data_ptr() <= weight.data_ptr() < block.data_ptr() + len(block)
    assert weight.data_ptr() % streaming.ALIGNMENT == 0
    buffer = torch.empty(stream._order[0].size_bytes, dtype=torch.uint8)
    ((target, source),) = stream._order[0].pairs(buffer)
    target.copy_(source)
    for view, (held, key, _) in zip(stream._order[0].views(buffer), stream._order[0].slots, strict=True):
        assert torch.equal(view, held[key])
    stream.close()


@stand_in_only
@pytest.mark.parametrize("low", ["cpu", "disk"])
def test_both_planes_travel_and_one_that_computes_elsewhere_stays(low):
    """Of the layers off the card; of the one on it the low plane computes where it is, for long prompts as well."""
    plan = streamed("qwen2", "int4+4").with_modules("*", low=low)
    model, gpu, workload = load_tiny("qwen2", plan), open_gpu("64MiB"), Workload(40, 3, follow_up_tokens=20)
    resident = load_tiny("qwen2", replace(plan, stream_from=None))
    tokens, features = 40, sum(sum(m.weight_shape) for m in plan.spec.modules if m.kind == "linear" and m.layer == 2)
    one = load_tiny("qwen2", streamed("qwen2", "int4+4"))
    more = Counter(crossed(model, tokens)) - Counter(crossed(one, tokens))
    assert sum(more.values()) == tokens * features * 2
    assert torch.equal(prefilled(model, tokens), prefilled(resident, tokens))
    foretold = forecast(plan, gpu, workload=workload)
    measured = run_workload(load_tiny("qwen2", plan, gpu), workload)
    assert [p.peak_allocated_bytes for p in measured.phases] == [p.peak_allocated_bytes for p in foretold.phases]
    assert measured.transferred_bytes == foretold.transferred_bytes


@pytest.mark.parametrize(("low", "blocks"), [("cpu", 2), ("disk", 0)])
def test_low_planes_on_disk_are_not_gathered_into_ram(low, blocks, monkeypatch):
    plan = streamed("qwen2", "int4+4").with_modules("*", low=low)
    model = load_tiny("qwen2", plan)
    model.lowvram.placement.remove()
    monkeypatch.setattr(model.lowvram.gpu, "simulated", False)
    stream = streaming.TravellingWeights(model, {}, plan, model.lowvram.gpu)
    assert sum(layer.pinned is not None for layer in stream._order) == blocks
    stream.close()


class Runtime:
    """CUDA's, as far as page-locking goes."""

    def __init__(self, status=0):
        self.status, self.locked = status, {}

    def cudaHostRegister(self, pointer, size, flags):  # noqa: N802
        self.locked[pointer] = size
        return self.status

    def cudaHostUnregister(self, pointer):  # noqa: N802
        del self.locked[pointer]


@pytest.mark.parametrize("status", [0, 2])
def test_memory_that_cannot_be_locked_is_used_as_it_is_and_said(status, monkeypatch, caplog):
    runtime = Runtime(status)
    monkeypatch.setattr(pinned.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pinned.torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(PinnedBlock, "refused", False)
    launched = []

    def launch(*args, **kwargs):
        launched.append(1)
        raise RuntimeError("CUDA error: the refusal, reported late")

    block = PinnedBlock(10_000) if status == 0 else None
    monkeypatch.setattr(pinned.torch, "zeros", launch)
    block = block or PinnedBlock(10_000)
    assert len(launched) == bool(status)
    assert PinnedBlock.refused == bool(status)
    assert block.locked == (status == 0)
    assert ("could not page-lock 10000 bytes" in caplog.text) == bool(status)
    block.tensor.fill_(7)
    assert runtime.locked == {block.tensor.data_ptr(): 10_000}
    if status:
        assert not PinnedBlock(10_000).locked  # and it is not asked again
        assert len(runtime.locked) == 1
    block.unlock()
    block.unlock()
    assert bool(runtime.locked) == bool(status)
    assert block.tensor.sum() == 70_000


@pytest.mark.parametrize("tokens", [0, 1, True, 2.0, "64"])
def test_a_threshold_that_is_none(tokens):
    with pytest.raises(PlanError, match="stream_from"):
        streamed(tokens=tokens)
    with pytest.raises(PlanError, match="stream_from"):
        Plan.from_json(streamed().to_json().replace('"stream_from": 16', '"stream_from": "16"'), tiny_spec("qwen2"))


def test_a_plan_keeps_its_threshold_through_json():
    plan = streamed()
    assert Plan.from_json(plan.to_json(), plan.spec) == plan
    assert "stream_from" not in replace(plan, stream_from=None).to_json()
    assert plan.digest != replace(plan, stream_from=None).digest
