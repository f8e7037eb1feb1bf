"""Two planes: the high one alone is an int4 layer to the bit, both are nearer, and each multiplies where it lies."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from lowvram_lab.decoding.decode import ModuleDecoder
from lowvram_lab.decoding.lean import LeanDecoder
from lowvram_lab.engine.layers import quantized_linear
from lowvram_lab.engine.load import replan
from lowvram_lab.engine.nested import NestedLinear, Planes
from lowvram_lab.errors import CheckpointError
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.units import MiB
from lowvram_lab.weights import solvers
from lowvram_lab.weights.solvers import dequantize, low_plane, quantize
from tests.helpers.tiny import TINY, load_tiny, random_ids, relative_error, seeded, tiny_plan

stand_in_only = pytest.mark.skipif(torch.cuda.is_available(), reason="about the simulated GPU")
FORMATS = ["int4+4", "int4+4-g32", "int4+4-g128", "int4+4-g256"]
COLUMNS = 768
ROWS = {"blocks": 192, "torch's packing": 48, "nibbles": 17}
FINER = 12
"""Times, at least: a residual in sixteen levels is a fifteenth of itself off, and scales and zeros are rounded."""


@pytest.fixture(params=["torch's kernels", "ours"])
def kernels(request):
    """The layer multiplies by torch's kernels, or by ours."""
    if request.param == "ours":
        request.getfixturevalue("compiling")
    return request.param


def stay(tensor):
    return tensor


def nested(name: str, rows: int, weight: torch.Tensor, bias: torch.Tensor | None = None) -> NestedLinear:
    fmt = get_format(name)
    layer = NestedLinear(COLUMNS, rows, fmt, "cpu", quantized_linear(COLUMNS, rows, fmt.low_plane, "cpu"), Planes())
    layer.store(weight, stay)
    layer.bias = bias
    return layer


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_by_its_high_plane_it_is_an_int4_layer_to_the_bit(name, rows, dtype, tokens, kernels):
    rows = ROWS[rows]
    weight, bias = seeded(rows, COLUMNS), seeded(rows, seed=2, dtype=dtype)
    x = seeded(tokens, COLUMNS, seed=1, dtype=dtype)
    layer, plain = nested(name, rows, weight, bias), quantized_linear(COLUMNS, rows, get_format(name).plane, "cpu")
    plain.fill(quantize(weight, plain.format), stay)
    plain.bias = bias
    assert layer.layout == plain.layout == layer.low.layout
    assert layer.has_our_kernel() == plain.has_our_kernel()
    with layer.planes.taking(both=False):
        assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.by_high(x), plain.multiply(x))
    both = layer(x)
    assert (both.dtype, both.shape) == (dtype, (tokens, rows))
    assert torch.equal(both, layer.by_high(x) + layer.low.multiply(x) + bias)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", FORMATS)
def test_both_planes_are_much_nearer_to_the_weight(name, rows, kernels):
    rows = ROWS[rows]
    weight, x = seeded(rows, COLUMNS), seeded(5, COLUMNS, seed=1)
    layer, right = nested(name, rows, weight), x @ weight.T
    off = relative_error(layer.by_high(x), right)
    assert 0.05 < off < 0.13  # sixteen levels of a normal weight
    rounded = 2.0**-8  # of x to bf16, by torch's kernel; the sum is rounded by neither
    assert relative_error(layer(x), right) < off / FINER + rounded


@pytest.mark.parametrize("name", FORMATS)
def test_the_planes_sum_is_the_weight_but_for_the_low_planes_rounding(name):
    fmt, weight = get_format(name), seeded(48, COLUMNS)
    high = quantize(weight, fmt.plane)
    low = low_plane(weight, high, fmt)
    first, second = dequantize(high, fmt.plane), dequantize(low, fmt.low_plane)
    assert relative_error(first + second, weight) < relative_error(first, weight) / FINER
    assert (low["codes"].shape, low["codes"].dtype) == (high["codes"].shape, high["codes"].dtype)
    assert low["scale_and_zero"].shape == (COLUMNS // 32, 48, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_plane_made_by_chunks_is_the_same(dtype, monkeypatch):
    fmt, weight = get_format("int4+4"), seeded(200, COLUMNS, dtype=dtype)
    whole = low_plane(weight, quantize(weight, fmt.plane), fmt)
    monkeypatch.setattr(solvers, "CHUNK_BYTES", 1)  # 64 rows at a time, and a rest
    chunks = low_plane(weight, quantize(weight, fmt.plane), fmt)
    assert all(torch.equal(whole[key], chunks[key]) for key in whole)


@pytest.mark.parametrize("value", [0.0, 0.3, -3.0, 1e-30])
def test_a_constant_weight_comes_back_nearer_still(value):
    """All of it is the zero point: in bf16 of the high plane, and what that leaves in bf16 of the low one."""
    layer = nested("int4+4", 48, torch.full((48, COLUMNS), value))
    found = sum(each.weight_rows(slice(None), torch.float32) for each in (layer, layer.low))
    assert found == pytest.approx(torch.full((48, COLUMNS), value).numpy(), rel=2.0**-15, abs=1e-36)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad):
    weight = seeded(48, COLUMNS)
    weight[3, 7] = bad
    with pytest.raises(CheckpointError, match="cannot quantise to int4: the weight has NaN or infinite values"):
        nested("int4+4", 48, weight)


def test_planes_are_as_before_after_a_block_whatever_happens_in_it():
    planes = Planes()
    with pytest.raises(KeyError), planes.taking(both=False):
        with planes.taking(both=True):
            assert planes.both
        assert not planes.both
        raise KeyError
    assert planes.both


# --- in a model ---


def apart(plan: Plan, low: str) -> Plan:
    return plan.with_modules("*", low=low)


@torch.no_grad()
def logits(model, tokens: int = 20) -> torch.Tensor:
    return model(random_ids(tokens)).logits.cpu()


def both_ways(model) -> list[torch.Tensor]:
    """By both planes, and by the high ones."""
    found = []
    for both in (True, False):
        with model.lowvram.planes.taking(both):
            found.append(logits(model))
    return found


@pytest.mark.parametrize("tokens", [1, 20, 70])
@pytest.mark.parametrize("kind", TINY)
def test_a_model_by_its_high_planes_is_the_int4_model_to_the_bit(kind, tokens, kernels):
    fast = load_tiny(kind, replace(tiny_plan(kind, "int4+4"), precision="fast"))
    expected = logits(load_tiny(kind, tiny_plan(kind, "int4")), tokens)
    assert torch.equal(logits(fast, tokens), expected)
    for precision in (None, "precise", "auto"):
        model = load_tiny(kind, replace(tiny_plan(kind, "int4+4"), precision=precision))
        assert not torch.equal(logits(model, tokens), expected)
        with model.lowvram.planes.taking(both=False):
            assert torch.equal(logits(model, tokens), expected)


@stand_in_only
@pytest.mark.parametrize("low", ["cpu", "disk"])
@pytest.mark.parametrize("kind", TINY)
def test_where_the_low_planes_are_changes_no_bit(kind, low):
    plan = tiny_plan(kind, "int4+4")
    expected = both_ways(load_tiny(kind, plan))
    for layers, disk in ((3, 0), (1, 0), (1, 1)):
        found = both_ways(load_tiny(kind, apart(plan, low).with_gpu_layers(layers, disk)))
        assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True, True]


def crossed(plan: Plan, tokens: int, both: bool = True) -> Counter:
    model = load_tiny(plan.model.removeprefix("tiny-"), plan)
    before = Counter(model.lowvram.gpu.recording.transfers)
    with model.lowvram.planes.taking(both):
        logits(model, tokens)
    return Counter(model.lowvram.gpu.recording.transfers) - before


@stand_in_only
@pytest.mark.parametrize("low", ["cpu", "disk"])
@pytest.mark.parametrize("layers", [3, 1])
@pytest.mark.parametrize("kind", TINY)
def test_of_a_low_plane_in_ram_only_activations_cross(kind, layers, low):
    plan, tokens = tiny_plan(kind, "int4+4").with_gpu_layers(layers), 20
    on_card = [m for m in plan.spec.modules if m.kind == "linear" and m.layer is not None and m.layer >= 3 - layers]
    assert len(on_card) == 7 * layers
    rows_in, rows_out = (sum(m.weight_shape[side] for m in on_card) for side in (1, 0))
    more = crossed(apart(plan, low), tokens)
    more.subtract(crossed(plan, tokens))
    assert +more == {("gpu", "cpu"): tokens * rows_in * 2, ("cpu", "gpu"): tokens * rows_out * 2}  # bf16
    assert crossed(apart(plan, low), tokens, both=False) == crossed(plan, tokens, both=False)


@stand_in_only
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("kind", [LeanDecoder, ModuleDecoder])
def test_of_a_decoded_token_as_much_crosses_by_either_decoder(kind, both):
    plan = tiny_plan("qwen2", "int4+4").with_gpu_layers(1)
    crossed = []
    for each in (apart(plan, "cpu"), plan):
        decoder = kind(load_tiny("qwen2", each), batch_size=2)
        decoder.prefill(random_ids(5, batch=2))
        transfers = decoder.model.lowvram.gpu.recording.transfers
        before = Counter(transfers)
        with decoder.model.lowvram.planes.taking(both):
            decoder.decode(torch.ones(2, 1, dtype=torch.long))
        crossed.append(transfers - before)
    shapes = [m.weight_shape for m in plan.spec.modules if m.kind == "linear" and m.layer == 2]
    rows_in, rows_out = (2 * 2 * sum(shape[side] for shape in shapes) for side in (1, 0))
    assert crossed[0] - crossed[1] == ({("gpu", "cpu"): rows_in, ("cpu", "gpu"): rows_out} if both else {})


@stand_in_only
def test_each_plane_is_charged_to_its_place_and_a_forward_leaves_nothing():
    plan = apart(tiny_plan("qwen2", "int4+4"), "cpu")
    model = load_tiny("qwen2", plan)
    layer, gpu = model.model.layers[0].mlp.up_proj, model.lowvram.gpu
    assert {gpu.meter.place_of(tensor) for tensor in (layer.packed, layer.scale_and_zero)} == {"gpu"}
    assert {gpu.meter.place_of(tensor) for tensor in (layer.low.packed, layer.low.scale_and_zero)} == {"cpu"}
    before = dict(gpu.meter.allocated)
    logits(model)
    assert gpu.meter.allocated == before


CHANGES = {
    "low planes to the CPU": lambda plan: apart(plan, "cpu"),
    "low planes to disk": lambda plan: apart(plan, "disk"),
    "one plane": lambda plan: plan.with_modules("model.layers.*_proj", format="int4"),
    "no int4": lambda plan: plan.with_modules("model.layers.*_proj", format="int8"),
    "other groups": lambda plan: plan.with_modules("*.o_proj", format="int4+4-g32"),
    "layers to the CPU": lambda plan: plan.with_gpu_layers(1),
    "a layer to disk": lambda plan: apart(plan, "cpu").with_gpu_layers(1, disk=1),
}


@stand_in_only
@pytest.mark.parametrize("change", CHANGES)
def test_planned_anew_and_back_it_is_as_it_was(change):
    plan = tiny_plan("qwen2", "int4+4")
    model, other = load_tiny("qwen2", plan), CHANGES[change](plan)
    before, held = both_ways(model), model.lowvram.gpu.meter.allocated["gpu"]
    for target, expected in ((other, both_ways(load_tiny("qwen2", other))), (plan, before)):
        replan(model, target, progress=False)
        assert [torch.equal(*pair) for pair in zip(both_ways(model), expected, strict=True)] == [True, True]
        stored, place_of = Counter(), model.lowvram.gpu.meter.place_of
        for tensor in (*model.parameters(), *model.buffers()):
            stored[place_of(tensor)] += tensor.nbytes * (tensor.dtype != torch.float32)  # rotary frequencies
        assert stored["gpu"] == target.weight_bytes("gpu")
        assert stored["cpu"] == target.weight_bytes("cpu") + target.weight_bytes("disk")
    # a block may be larger than was asked for, where what was left of it would have been of no use
    assert model.lowvram.gpu.meter.allocated["gpu"] == pytest.approx(held, abs=4096)


def test_a_plan_of_another_precision_is_computed_so():
    plan = tiny_plan("qwen2", "int4+4")
    fast, precise = replace(plan, precision="fast"), replace(plan, precision="precise")
    model = load_tiny("qwen2", fast)
    by_high = logits(model)
    for each, both in ((precise, True), (fast, False), (replace(plan, precision="auto"), True)):
        replan(model, each, progress=False)
        assert model.lowvram.planes.both == both
        assert torch.equal(logits(model), by_high) != both


def test_a_plan_that_decodes_alike_leaves_the_planes_as_they_were_set():
    plan = tiny_plan("qwen2", "int4+4")
    model = load_tiny("qwen2", plan)
    model.lowvram.planes.both = False
    replan(model, replace(plan, context=64), progress=False)
    assert not model.lowvram.planes.both


@stand_in_only
def test_out_of_memory_while_low_planes_come_leaves_the_model_as_it_was():
    plan, gpu = apart(tiny_plan("qwen2", "int4+4"), "cpu"), open_gpu("3MiB")
    model = load_tiny("qwen2", plan, gpu)
    before = both_ways(model)
    with gpu.active(), gpu.meter.scope(owner="another model", place="gpu"):  # one segment of 2 MiB: leaves 0.1
        rest = 19 * MiB // 10 - gpu.meter.allocated["gpu"]
        kept = [torch.zeros(rest // 4, dtype=torch.uint8) for _ in range(4)]
    with pytest.raises(torch.OutOfMemoryError) as error:
        replan(model, apart(plan, "gpu"), progress=False)
    assert "model.layers." in error.value.lowvram.event.module
    del error, kept
    assert model.lowvram.plan == plan
    assert [torch.equal(*pair) for pair in zip(both_ways(model), before, strict=True)] == [True, True]


def test_the_lean_decoder_takes_the_planes_that_are_asked_for(kernels):
    plan = tiny_plan("qwen2", "int4+4")
    model, one = load_tiny("qwen2", plan), load_tiny("qwen2", tiny_plan("qwen2", "int4"))
    decoder, expected = LeanDecoder(model, compiled=False), LeanDecoder(one, compiled=False)
    ids, token = random_ids(9), torch.ones(1, 1, dtype=torch.long)
    expected.prefill(ids)
    decoder.prefill(ids)
    for held, other in zip(decoder.cache.layers, expected.cache.layers, strict=True):
        held.keys.copy_(other.keys)  # prompts are read by both planes
        held.values.copy_(other.values)
    with model.lowvram.planes.taking(both=False):
        assert torch.equal(decoder.decode(token), expected.decode(token))
    decoder.cache.keep(9)
    assert not torch.equal(decoder.decode(token), expected.decode(token))
