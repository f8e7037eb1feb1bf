"""Solvers keep their error bounds, and every kernel computes with exactly the weight that the solver stored."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import relative_error

from lowvram_lab.errors import CheckpointError
from lowvram_lab.formats import FORMATS, get_format
from lowvram_lab.quantize import linear
from lowvram_lab.quantize.linear import Int8Embedding, quantized_linear
from lowvram_lab.quantize.solvers import dequantize, quantize

INTEGERS = [name for name, fmt in FORMATS.items() if fmt.kind in ("int8", "int4")]
BF16 = 2.0**-8  # half a unit in the last of bf16's eight bits, twice: from rounding the scale and the zero
TOLERANCE = {torch.float32: 2.0**-16, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7}
"""float32: another order of summation; 16 bits: rounding of weight, product and result. Scale: a relative norm."""


def seeded(*shape, seed=0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stay(tensor):
    return tensor


def step_of(tensors, fmt) -> torch.Tensor:
    """The distance between two codes, for every weight."""
    if fmt.kind == "int8":
        return tensors["scale"].float().unsqueeze(1)
    return tensors["scale_and_zero"][..., 0].float().T.repeat_interleave(fmt.group_size, dim=1)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(INTEGERS),
    st.integers(1, 20),
    st.integers(1, 3),
    st.floats(-18, 18),  # powers of two
    st.sampled_from([0.0, 1.0, -30.0]),
    st.integers(0, 1000),
)
def test_no_weight_is_further_off_than_half_a_step(name, rows, groups, magnitude, offset, seed):
    fmt = get_format(name)
    weight = (seeded(rows, groups * (fmt.group_size or 64), seed=seed) + offset) * 2.0**magnitude
    tensors = quantize(weight, fmt)
    restored = dequantize(tensors, fmt)
    largest = weight.abs().amax(dim=1, keepdim=True)
    # rounding of the scale lets the outermost code fall short by 127 (int8) or 15 (int4) times half a bf16 unit of it
    slack = BF16 * (largest + 15 * step_of(tensors, fmt) * (fmt.kind == "int4"))
    assert ((restored - weight).abs() <= step_of(tensors, fmt) / 2 + slack).all()
    # a code that is not the outermost one was rounded, not clamped: half a step, to float32's rounding
    codes = tensors["weight"] if fmt.kind == "int8" else tensors["codes"].to(torch.int16) - 8
    rounded = codes.abs() < (127 if fmt.kind == "int8" else 7)
    limit = step_of(tensors, fmt) * 0.501 + largest * 1e-6
    assert ((restored - weight).abs() <= limit)[rounded].all()


@pytest.mark.parametrize("name", INTEGERS)
def test_quantising_twice_changes_nothing(name):
    fmt = get_format(name)
    once = dequantize(quantize(seeded(16, 256), fmt), fmt)
    assert relative_error(dequantize(quantize(once, fmt), fmt), once) < BF16


@pytest.mark.parametrize("name", [*INTEGERS, "nf4"])
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e-30])
def test_a_constant_weight_comes_back(name, value):
    fmt = get_format(name)
    layer = quantized_linear(256, 16, fmt, "cpu")
    layer.store(torch.full((16, 256), value), stay)
    found = layer(torch.eye(256)[:3].float())
    assert found == pytest.approx(torch.full((3, 16), value).numpy(), rel=2 * BF16, abs=1e-36)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(name, bad):
    weight = seeded(16, 64)
    weight[3, 7] = bad
    with pytest.raises(CheckpointError, match=f"cannot quantise to {name}"):
        quantize(weight, get_format(name))


@pytest.mark.parametrize("name", [*INTEGERS, "nf4"])
def test_solvers_leave_the_weight_alone_and_take_any_float(name):
    weight = seeded(16, 256, dtype=torch.bfloat16)
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
    "int8 many tiles": ("int8", "cuda", None, 3000),
    "int8 a row at a time": ("int8", "cuda", None, 1),
    "int4 torch kernel": ("int4", "cpu", None, None),
    "int4-g32 torch kernel": ("int4-g32", "cpu", None, None),
    "int4-g128 torch kernel": ("int4-g128", "cpu", None, None),
    "int4-g256 torch kernel": ("int4-g256", "cpu", None, None),
    "int4 nibbles": ("int4", "cpu", "nibbles", None),
    "int4-g128 nibbles, many tiles": ("int4-g128", "cpu", "nibbles", 3000),
}


@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("path", PATHS)
def test_a_layer_multiplies_by_the_stored_weight(path, dtype, tokens, monkeypatch):
    name, kernels, layout, tile_bytes = PATHS[path]
    if tile_bytes:
        monkeypatch.setattr(linear, "TILE_BYTES", tile_bytes)
    weight, fmt = seeded(48, 256), get_format(name)
    layer = quantized_linear(256, 48, fmt, kernels)
    layer.layout = layout or getattr(layer, "layout", None)
    layer.store(weight, stay)
    layer.bias = torch.nn.Parameter(seeded(48, seed=2, dtype=dtype), requires_grad=False)
    x = seeded(tokens, 256, seed=1, dtype=dtype)
    result = layer(x)
    expected = x.float() @ dequantize(quantize(weight, fmt), fmt).T + layer.bias.float()
    by_torch = layer.layout == "cpu" if fmt.kind == "int4" else kernels == "cpu" and tokens < linear.DEQUANTIZE_ROWS
    assert (result.dtype, result.shape) == (dtype, (tokens, 48))
    assert relative_error(result, expected) < TOLERANCE[torch.bfloat16 if by_torch else dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_an_int8_embedding_looks_up_the_dequantised_rows(dtype, shape):
    weight, fmt = seeded(50, 24), get_format("int8")
    table = Int8Embedding(50, 24, fmt, dtype)
    table.store(weight, stay)
    ids = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(3))
    result = table(ids)
    assert (result.dtype, result.shape) == (dtype, (*shape, 24))
    assert relative_error(result, dequantize(quantize(weight, fmt), fmt)[ids]) < TOLERANCE[dtype]
    assert "50, 24, int8" in repr(table)


def test_a_tied_head_shares_the_embeddings_tensors():
    fmt = get_format("int8")
    table = Int8Embedding(64, 32, fmt, torch.float32)
    table.store(seeded(64, 32), stay)
    head = quantized_linear(32, 64, fmt, "cpu")
    for key, buffer in table.named_buffers():
        head.register_buffer(key, buffer)
    x = seeded(70, 32, seed=1)
    assert relative_error(head(x), x @ table(torch.arange(64)).T) < TOLERANCE[torch.float32]
