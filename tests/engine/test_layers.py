"""Solvers keep their error bounds, and every kernel computes with exactly the weight that the solver stored."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_lab.engine import layers as linear
from lowvram_lab.engine.layers import quantized_embedding, quantized_linear
from lowvram_lab.engine.load import load, replan
from lowvram_lab.errors import CheckpointError
from lowvram_lab.kernels import int4_layout
from lowvram_lab.layouts.packing import unpack
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.card import find_card
from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.model.checkpoint import ShapesOnly
from lowvram_lab.model.formats import FORMATS, LOADING_SOLVERS, get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.weights.solvers import dequantize, quantize, search_clip
from tests.helpers.tiny import (
    dequantised_state,
    load_tiny,
    random_ids,
    relative_error,
    seeded,
    tiny_config,
    tiny_plan,
    tiny_stock,
)

INTEGERS = [name for name, fmt in FORMATS.items() if fmt.kind in ("int8", "int4", "packed") and fmt.planes == 1]
COLUMNS = 768  # a multiple of every group size
BF16 = 2.0**-8  # half a unit in the last of bf16's eight bits, twice: from rounding the scale and the zero
TOLERANCE = {torch.float32: 2.0**-16, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7}
"""float32: another order of summation; 16 bits: rounding of weight, product and result. Scale: a relative norm."""


def stay(tensor):
    return tensor


def step_of(tensors, fmt) -> torch.Tensor:
    """The distance between two codes, for every weight."""
    if fmt.kind == "int8" and not fmt.group_size:
        return tensors["scale"].float().unsqueeze(1)
    scale = tensors["scale_and_zero"][..., 0].T if fmt.has_zeros else tensors["scale"]
    return scale.float().abs().repeat_interleave(fmt.group_size, dim=1)  # of a packed format it may be negative


def codes_of(tensors, fmt) -> torch.Tensor:
    """The signed codes."""
    if fmt.kind == "packed":
        return unpack(tensors["packed"], fmt.bits)
    return tensors["weight"] if fmt.kind == "int8" else tensors["codes"].to(torch.int16) - 8


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(INTEGERS),
    st.integers(1, 20),
    st.integers(1, 3),
    st.floats(-18, 18),  # powers of two
    st.sampled_from([0.0, 1.0, -30.0]),
    st.integers(0, 1000),
)
def test_no_weight_is_further_off_than_its_codes_allow(name, rows, groups, magnitude, offset, seed):
    fmt = get_format(name)
    size = max(fmt.group_size or 64, 32)  # codes are packed 32 together
    weight = (seeded(rows, groups * size, seed=seed) + offset) * 2.0**magnitude
    tensors = quantize(weight, fmt)
    restored = dequantize(tensors, fmt)
    largest = weight.abs().amax(dim=1, keepdim=True)
    codes, step, top = codes_of(tensors, fmt), step_of(tensors, fmt), 2 ** (fmt.bits - 1) - 1
    lowest = -top if fmt.kind == "int8" else -top - 1
    assert lowest <= codes.min() <= codes.max() <= top
    # rounding of the scale lets the outermost code fall short by half a bf16 unit of it, once a step
    slack = BF16 * (largest + (2 * top + 1) * step * fmt.has_zeros)
    # a symmetric group reaches as far as its largest weight on that weight's side, a step less far on the other
    outermost = step if fmt.kind == "packed" and not fmt.has_zeros else step / 2
    assert ((restored - weight).abs() <= outermost + slack).all()
    # a code that is not the outermost one was rounded, not clamped: half a step, to float32's rounding
    rounded = (codes > lowest) & (codes < top)
    assert ((restored - weight).abs() <= step * 0.501 + largest * 1e-6)[rounded].all()


@pytest.mark.parametrize("name", INTEGERS)
def test_quantising_twice_changes_nothing(name):
    fmt = get_format(name)
    once = dequantize(quantize(seeded(16, COLUMNS), fmt), fmt)
    assert relative_error(dequantize(quantize(once, fmt), fmt), once) < BF16


@pytest.mark.parametrize("name", [*INTEGERS, "nf4"])
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e-30])
def test_a_constant_weight_comes_back(name, value):
    fmt = get_format(name)
    layer = quantized_linear(COLUMNS, 16, fmt, "cpu")
    layer.store(torch.full((16, COLUMNS), value), stay)
    found = layer(torch.eye(COLUMNS)[:3])
    assert found == pytest.approx(torch.full((3, 16), value).numpy(), rel=2 * BF16, abs=1e-36)


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "nf4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(name, bad):
    weight = seeded(16, 64)
    weight[3, 7] = bad
    with pytest.raises(CheckpointError, match=f"cannot quantise to {name}"):
        quantize(weight, get_format(name))


@pytest.mark.parametrize("name", [*INTEGERS, "nf4"])
def test_solvers_leave_the_weight_alone_and_take_any_float(name):
    weight = seeded(16, COLUMNS, dtype=torch.bfloat16)
    before = weight.clone()
    a, b = quantize(weight, get_format(name)), quantize(weight.float(), get_format(name))
    assert torch.equal(weight, before)
    assert all(torch.equal(a[key], b[key]) for key in b)


def test_nf4_is_bitsandbytes_own():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight, fmt = seeded(32, 128), get_format("nf4")
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    tensors = quantize(weight, fmt)
    assert torch.equal(tensors["packed"], packed)
    assert torch.equal(tensors["absmax"], state.absmax)
    layer = quantized_linear(128, 32, fmt, "cpu")
    layer.store(weight, stay)
    x = seeded(5, 128, seed=1)
    assert relative_error(layer(x), x @ dequantize_4bit(packed, state).T) < TOLERANCE[torch.float32]
    assert relative_error(dequantize_4bit(packed, state), weight) < 0.1  # 4 bits of a normal weight: 9 %


# Every way a layer can compute on this machine: (format, kernels, layout or None, bytes of a tile or None).
PATHS = {
    "int8 torch kernel or tiles": ("int8", "cpu", None, None),
    "int8 one tile": ("int8", "cuda", None, None),
    "int8 many tiles": ("int8", "cuda", None, 10_000),
    "int8 a row at a time": ("int8", "cuda", None, 1),
    "int4 torch kernel": ("int4", "cpu", None, None),
    "int4-g32 torch kernel": ("int4-g32", "cpu", None, None),
    "int4-g128 torch kernel": ("int4-g128", "cpu", None, None),
    "int4-g256 torch kernel": ("int4-g256", "cpu", None, None),
    "int4 nibbles": ("int4", "cpu", "nibbles", None),
    "int4-g128 nibbles, many tiles": ("int4-g128", "cpu", "nibbles", 10_000),
    "int4-g96 has no kernel": ("int4-g96", "cpu", None, None),
    "int6 one tile": ("int6", "cpu", None, None),
    "int5-g192 a row at a time": ("int5-g192", "cuda", None, 1),
    "int3 many tiles": ("int3", "cpu", None, 10_000),
    "int2-g96 one tile": ("int2-g96", "cuda", None, None),
}


@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("path", PATHS)
def test_a_layer_multiplies_by_the_stored_weight(path, dtype, tokens, monkeypatch):
    name, kernels, layout, tile_bytes = PATHS[path]
    if tile_bytes:
        monkeypatch.setattr(linear, "TILE_BYTES", tile_bytes)
    weight, fmt = seeded(48, COLUMNS), get_format(name)
    layer = quantized_linear(COLUMNS, 48, fmt, kernels)
    layer.layout = layout or getattr(layer, "layout", None)
    layer.store(weight, stay)
    layer.bias = torch.nn.Parameter(seeded(48, seed=2, dtype=dtype), requires_grad=False)
    x = seeded(tokens, COLUMNS, seed=1, dtype=dtype)
    result = layer(x)
    expected = x.float() @ dequantize(quantize(weight, fmt), fmt).T + layer.bias.float()
    by_torch = layer.layout == "cpu" or fmt.kind == "int8" and kernels == "cpu" and tokens < linear.DEQUANTIZE_ROWS
    assert (result.dtype, result.shape) == (dtype, (tokens, 48))
    assert relative_error(result, expected) < TOLERANCE[torch.bfloat16 if by_torch else dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["int8", "int4", "int3", "nf4"])
def test_three_dimensions_and_no_side_effects(name, dtype):
    layer = quantized_linear(128, 32, get_format(name), "cpu")
    layer.store(seeded(32, 128), stay)
    before = copy.deepcopy(dict(layer.named_buffers()))
    x = seeded(2, 40, 128, seed=1, dtype=dtype)
    result = layer(x)
    assert (result.dtype, result.shape) == (dtype, (2, 40, 32))
    # 80 tokens and 40 may take different kernels
    assert relative_error(result[1], layer(x[1])) < TOLERANCE[torch.bfloat16]
    assert all(torch.equal(before[key], buffer) for key, buffer in layer.named_buffers())
    assert f"128, 32, {name}, bias=False" in repr(layer)


def test_rows_that_are_no_multiple_of_16_take_the_nibbles():
    weight, fmt = seeded(17, 128), get_format("int4")
    layer = quantized_linear(128, 17, fmt, "cpu")
    layer.store(weight, stay)
    x = seeded(3, 128, seed=1)
    assert layer.layout == "nibbles"
    assert relative_error(layer(x), x @ dequantize(quantize(weight, fmt), fmt).T) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["int8", "int4", "int4-g96", "int6", "int3", "int2-g192"])
def test_a_layer_multiplies_by_a_solution_with_negative_scales(name):
    weight, fmt = seeded(48, COLUMNS), get_format(name)
    found = search_clip(weight, fmt)
    assert 0.1 < (found.scale < 0).float().mean() < 0.9
    layer = quantized_linear(COLUMNS, 48, fmt, "cpu")
    layer.fill(found.tensors(fmt), stay)
    x = seeded(3, COLUMNS, seed=1)
    assert relative_error(layer(x), x @ found.dequantize().T) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("rows", [64, 208, 48])
def test_packing_for_the_int4_kernel_by_blocks_changes_nothing(rows, monkeypatch):
    weight, packed = seeded(rows, 128), []
    for block in (64, rows):
        monkeypatch.setattr(int4_layout, "PACK_ROWS", block)
        layer = quantized_linear(128, rows, get_format("int4"), "cpu")
        layer.store(weight, stay)
        assert layer.layout == "cpu"
        packed.append(layer.packed)
    assert torch.equal(*packed)


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 80, 112, 208])
def test_codes_come_back_from_the_cpu_kernels_layout(rows):
    codes = (seeded(rows, 96) * 1e4).long().remainder(16).to(torch.uint8)
    packed = int4_layout.pack_for_cpu(codes)
    assert torch.equal(int4_layout.unpack_from_cpu(packed), codes)
    step = int4_layout.cpu_block_rows()
    tiles = [int4_layout.unpack_from_cpu(packed[start : start + step]) for start in range(0, rows, step)]
    assert torch.equal(torch.cat(tiles), codes)


@pytest.mark.parametrize("tile_bytes", [None, 10_000, 1])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["int4-g32", "int4", "int4-g128"])
def test_a_weight_packed_for_the_cpu_is_multiplied_where_its_kernel_is_not(name, dtype, tile_bytes, monkeypatch):
    """What a streamed layer does on CUDA, with the bytes that lie in RAM."""
    if tile_bytes:
        monkeypatch.setattr(linear, "TILE_BYTES", tile_bytes)
    weight, fmt = seeded(208, COLUMNS), get_format(name)
    layer = quantized_linear(COLUMNS, 208, fmt, "cpu")
    layer.store(weight, stay)
    assert layer.layout == "cpu"
    layer.kernels = "cuda"
    x = seeded(5, COLUMNS, seed=1, dtype=dtype)
    expected = x.float() @ dequantize(quantize(weight, fmt), fmt).T
    assert relative_error(layer(x), expected) < TOLERANCE[dtype]


TABLES = ["int8", "int4", "int4-g96", "int6", "int5-g32", "int3", "int2-g192"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", TABLES)
def test_an_embedding_looks_up_the_dequantised_rows(name, dtype):
    weight, fmt = seeded(50, 192), get_format(name)
    table = quantized_embedding(50, 192, fmt, dtype)
    table.store(weight, stay)
    expected = dequantize(quantize(weight, fmt), fmt, dtype)
    for shape in [(), (3,), (2, 5)]:
        ids = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(3))
        result = table(ids)
        assert (result.dtype, result.shape) == (dtype, (*shape, 192))
        assert torch.equal(result, expected[ids])
    assert f"50, 192, {name}" in repr(table)


@pytest.mark.parametrize("name", TABLES)
def test_a_tied_head_shares_the_embeddings_tensors(name):
    fmt = get_format(name)
    table = quantized_embedding(64, 192, fmt, torch.float32)
    table.store(seeded(64, 192), stay)
    head = quantized_linear(192, 64, fmt, "cpu", shared=True)
    for key, buffer in table.named_buffers():
        head.register_buffer(key, buffer)
    x = seeded(70, 192, seed=1)
    assert relative_error(head(x), x @ table(torch.arange(64)).T) < TOLERANCE[torch.float32]
    assert sum(b.nbytes for b in head.buffers()) == fmt.weight_bytes((64, 192))


@pytest.mark.parametrize("solver", LOADING_SOLVERS)
@pytest.mark.parametrize("name", ["int8", "int4", "int3"])
def test_a_loaded_model_has_its_tied_table_once(name, solver):
    plan = replace(tiny_plan("llama", "fp32"), solver=solver)
    plan = plan.with_modules("model.embed_tokens", "lm_head", format=name)
    model, ids = load_tiny("llama", plan), random_ids(70)
    tables = [dict(m.named_buffers()) for m in (model.model.embed_tokens, model.lm_head)]
    assert len(tables[0]) == 2
    assert {key: b.data_ptr() for key, b in tables[0].items()} == {key: b.data_ptr() for key, b in tables[1].items()}
    with torch.no_grad():
        expected = tiny_stock("llama", dequantised_state("llama", plan))(ids).logits
        assert relative_error(model(ids).logits, expected) < 1e-5  # another order of summation


def test_another_solver_is_another_model():
    plan = tiny_plan("llama", "int4")
    nearest = replace(plan, solver="rtn")
    model, ids = load_tiny("llama", nearest), random_ids(30)
    with torch.no_grad():
        expected = load_tiny("llama", plan)(ids).logits
        assert not torch.equal(model(ids).logits, expected)
        for changed in (plan, nearest, plan.with_gpu_layers(1)):
            replan(model, changed, progress=False)
            assert model.lowvram.plan.solver == changed.solver
            assert torch.equal(model(ids).logits, expected) == (changed.solver == "search")


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
def test_a_dry_run_moves_what_a_real_load_does_in_the_same_order(kernels, monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda packed, tiles: packed.clone())
    fmt, moved = get_format("int4"), {"cpu": [], "meta": []}
    for device, seen in moved.items():

        def note(tensor, seen=seen):
            seen.append((tensor.nbytes, tensor.dtype if tensor.dtype != torch.uint8 else "codes"))
            return tensor

        quantized_linear(256, 64, fmt, kernels).store(torch.ones(64, 256, device=device), note)
    assert moved["cpu"] == moved["meta"]
    assert [what for _, what in moved["meta"]] == ["codes", torch.bfloat16]


@pytest.mark.parametrize(("name", "layout"), [("t4", "nibbles"), ("rtx3050", "cuda")])
def test_int4_lies_as_the_card_reads_it(name, layout):
    """Of a forecast: the card that it is for, not this machine's."""
    card = find_card(name)
    assert quantized_linear(1024, 64, get_format("int4"), "cuda", card=card).layout == layout
    gpu = DryRunGpu(GpuBudget(8 << 30, card=card))
    wide = Plan.uniform(ModelSpec.from_config(tiny_config("qwen2", intermediate_size=256), "wide"), "int4", context=64)
    model = load(wide, gpu, checkpoint=ShapesOnly(wide.spec), progress=False)
    assert model.model.layers[0].mlp.down_proj.layout == layout
