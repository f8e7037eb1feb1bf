"""Weights laid side by side: the modules answer as before, nothing is held twice, one can be put back by itself."""

from dataclasses import replace

import pytest
import torch

from lowvram_lab.decoding.decode import ModuleDecoder
from lowvram_lab.decoding.lean import LeanDecoder
from lowvram_lab.engine.fuse import fuse
from lowvram_lab.engine.load import replan
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.planner.measure import run_speed
from lowvram_lab.planner.profile import Workload
from tests.helpers.tiny import TOLERANCES, load_tiny, random_ids, relative_error, tiny_plan

simulated = pytest.mark.skipif(torch.cuda.is_available(), reason="weights on a card stay as they were loaded")


@torch.no_grad()
def logits(model):
    return model(random_ids(40)).logits.float()


@simulated
@pytest.mark.parametrize("recipe", ["fp32", "bf16", "int8", "int4", "int4-g32", "int4+4"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_modules_answer_as_before_on_one_common_storage(kind, recipe):
    model = load_tiny(kind, tiny_plan(kind, recipe), open_gpu(None))
    before, held = logits(model), model.lowvram.gpu.meter.category_bytes("weights")
    decoder = LeanDecoder(model, compiled=False)
    assert torch.equal(logits(model), before)
    attention = model.model.layers[0].self_attn
    tensors = [next(iter(m.state_dict().values())) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert model.lowvram.gpu.meter.category_bytes("weights") <= held  # fewer blocks, fewer roundings
    where = [tensor.data_ptr() for tensor in tensors]
    LeanDecoder(model, compiled=False)  # finds them so
    assert [next(iter(m.state_dict().values())).data_ptr() for m in (attention.q_proj, attention.k_proj)] == where[:2]
    assert decoder.tokens == 0


@simulated
def test_within_a_budget_or_on_disk_weights_stay_where_they_are():
    plan = tiny_plan("qwen2", "int8")
    for case, gpu in ((plan, open_gpu("1000MiB")), (plan.with_gpu_layers(0, disk=3), open_gpu(None))):
        model = load_tiny("qwen2", case, gpu)
        where = model.model.layers[0].mlp.up_proj.weight.data_ptr()
        LeanDecoder(model, compiled=False)
        assert model.model.layers[0].mlp.up_proj.weight.data_ptr() == where


@simulated
def test_a_replan_of_one_of_them_leaves_nothing_behind():
    plan = tiny_plan("qwen2", "int4")
    model = load_tiny("qwen2", plan, open_gpu(None))
    LeanDecoder(model, compiled=False)
    mixed = plan.with_modules("*.k_proj", format="int8").with_modules("*.1.mlp.gate_proj", format="bf16")
    replan(model, mixed, progress=False)
    fresh = load_tiny("qwen2", mixed, open_gpu(None))
    assert torch.equal(logits(model), logits(fresh))
    kept = model.model.layers[1].mlp.up_proj.packed
    assert kept.untyped_storage().nbytes() == kept.nbytes
    found = LeanDecoder(model, compiled=False)
    token = torch.ones(1, 1, dtype=torch.long)
    expected = LeanDecoder(fresh, compiled=False)
    for decoder in (found, expected):
        decoder.prefill(random_ids(9))
    assert torch.equal(found.decode(token), expected.decode(token))
    replan(model, replace(plan, context=64), progress=False)
    assert torch.equal(logits(model), logits(load_tiny("qwen2", plan, open_gpu(None))))


@simulated
@pytest.mark.parametrize("placement", ["gpu", "half"])
def test_a_timing_without_the_meter_leaves_every_weight_at_its_place(placement):
    plan = tiny_plan("qwen2", "int8", placement)
    model = load_tiny("qwen2", plan, open_gpu(None))
    before, held = logits(model), model.lowvram.gpu.meter.category_bytes("weights")
    with model.lowvram.gpu.unmetered():
        LeanDecoder(model, compiled=False)
    assert model.lowvram.gpu.meter.category_bytes("weights") == held
    run_speed(model, Workload(20, 2))
    assert 0 < model.lowvram.gpu.meter.category_bytes("weights") <= held
    assert torch.equal(logits(model), before)


def both_ways(model) -> list[torch.Tensor]:
    """Logits by both planes, and by the high ones."""
    found = []
    for both in (True, False):
        with model.lowvram.planes.taking(both):
            found.append(logits(model))
    return found


def decoded(model, decoder=None) -> list[torch.Tensor]:
    """Logits after a token by both planes, and after another by the high ones."""
    decoder, found = decoder or LeanDecoder(model, compiled=False), []
    decoder.prefill(random_ids(9))
    for both in (True, False):
        with model.lowvram.planes.taking(both):
            found.append(decoder.decode(torch.ones(1, 1, dtype=torch.long)).clone())
    return found


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True, True]
    assert not torch.equal(*found)


@simulated
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_low_planes_lie_side_by_side_among_themselves(kind):
    model = load_tiny(kind, tiny_plan(kind, "int4+4"), open_gpu(None))
    before, held = both_ways(model), model.lowvram.gpu.meter.category_bytes("weights")
    LeanDecoder(model, compiled=False)
    assert_equal(both_ways(model), before)
    attention = model.model.layers[0].self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    for planes in (projections, [projection.low for projection in projections]):
        assert len({plane.packed.untyped_storage().data_ptr() for plane in planes}) == 1
        assert planes[0].packed.untyped_storage().nbytes() == sum(plane.packed.nbytes for plane in planes)
    assert model.lowvram.gpu.meter.category_bytes("weights") <= held


@simulated
def test_a_replan_of_one_of_two_planes_leaves_nothing_behind():
    plan = tiny_plan("qwen2", "int4+4")
    model = load_tiny("qwen2", plan, open_gpu(None))
    expected = decoded(model)
    mixed = plan.with_modules("*.k_proj", format="int4").with_modules("*.1.mlp.gate_proj", format="int8")
    replan(model, mixed, progress=False)
    fresh = load_tiny("qwen2", mixed, open_gpu(None))
    assert_equal(both_ways(model), both_ways(fresh))
    for kept in (model.model.layers[1].mlp.up_proj, model.model.layers[0].self_attn.v_proj):
        for plane in (kept, kept.low):
            assert plane.packed.untyped_storage().nbytes() == plane.packed.nbytes
    assert_equal(decoded(model), decoded(fresh))
    replan(model, plan, progress=False)
    assert_equal(decoded(model), expected)


@simulated
@pytest.mark.parametrize("pattern", ["*.q_proj", "*.gate_proj", "*.up_proj", "*.[qkv]_proj", "*.mlp.*", "*.1.*_proj"])
def test_a_layer_of_both_kinds_decodes_as_its_modules_do(pattern):
    plan = tiny_plan("qwen2", "int4+4").with_modules(pattern, format="int4")
    fused, apart = (load_tiny("qwen2", plan, open_gpu(size)) for size in (None, "1000MiB"))
    assert_equal(decoded(fused), decoded(apart))
    for found, expected in zip(decoded(fused), decoded(apart, ModuleDecoder(apart)), strict=True):
        assert relative_error(found, expected) < TOLERANCES["bf16"]


def test_what_differs_is_not_fused():
    plan = (
        tiny_plan("qwen2", "int4").with_modules("*.k_proj", format="int4-g32").with_modules("*.up_proj", format="int8")
    )
    layer = load_tiny("qwen2", plan, open_gpu(None)).model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert fuse([attention.q_proj, attention.k_proj, attention.v_proj]) is None
    assert fuse([mlp.gate_proj, mlp.up_proj]) is None
    assert fuse([attention.o_proj]) is None
