"""The table of formats against what solvers and layers allocate, against published sizes, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import packaged_spec

from lowvram_lab.errors import PlanError
from lowvram_lab.formats import DTYPES, FORMATS, TensorSpec, format_of_dtype, get_format
from lowvram_lab.plan import Plan
from lowvram_lab.quantize.linear import Int8Embedding, quantized_linear
from lowvram_lab.quantize.solvers import quantize
from lowvram_lab.units import GiB

QUANTISED = [name for name, fmt in FORMATS.items() if fmt.kind != "float"]
FLOATS = [name for name, fmt in FORMATS.items() if fmt.kind == "float"]
SHAPES = [(32, 256), (16, 512), (48, 768)]


def buffer_bytes(module) -> int:
    return sum(buffer.nbytes for buffer in module.buffers())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("kernels", ["cpu", "nibbles"])
def test_a_layer_allocates_what_the_table_says(name, shape, kernels):
    fmt = get_format(name)
    layer = quantized_linear(shape[1], shape[0], fmt, "cpu")
    if kernels == "nibbles":
        layer.layout = "nibbles"
    layer.store(torch.randn(shape), lambda tensor: tensor)
    assert buffer_bytes(layer) == fmt.weight_bytes(shape)
    expected = fmt.tensors(shape, torch.bfloat16)
    found = {key: TensorSpec(tuple(b.shape), b.dtype) for key, b in layer.named_buffers()}
    assert {key: (spec.nbytes, spec.dtype) for key, spec in found.items()} == {
        key: (spec.nbytes, spec.dtype) for key, spec in expected.items()
    }


@pytest.mark.parametrize("name", QUANTISED)
def test_a_layer_on_meta_has_the_same_bytes(name):
    layer = quantized_linear(256, 32, get_format(name), "cuda")
    layer.store(torch.empty(32, 256, device="meta"), lambda tensor: tensor)
    assert buffer_bytes(layer) == get_format(name).weight_bytes((32, 256))
    assert all(buffer.is_meta for buffer in layer.buffers())


def test_an_embedding_allocates_what_the_table_says():
    fmt = get_format("int8")
    table = Int8Embedding(50, 24, fmt, torch.bfloat16)
    table.store(torch.randn(50, 24), lambda tensor: tensor)
    assert buffer_bytes(table) == fmt.weight_bytes((50, 24)) == 50 * 24 + 50 * 2


@given(st.integers(1, 40), st.integers(1, 8))
def test_int4_bytes_count_codes_scales_and_zeros(rows, groups):
    for name in ("int4", "int4-g32", "int4-g128"):
        fmt = get_format(name)
        tensors = quantize(torch.zeros(rows, groups * fmt.group_size), fmt)
        stored = tensors["codes"].numel() // 2 + tensors["scale_and_zero"].nbytes
        assert fmt.weight_bytes((rows, groups * fmt.group_size)) == stored


@pytest.mark.parametrize("name", FLOATS)
def test_float_bytes_follow_the_format_not_the_activations(name):
    assert get_format(name).weight_bytes((3, 5), torch.float32) == 15 * get_format(name).bits // 8
    assert get_format(name).tensors((3, 5), torch.float32)["weight"].dtype == DTYPES[name]


@pytest.mark.parametrize(
    ("recipe", "gib"),
    [("fp16", 7.36), ("nf4", 3.11), ("int8", 3.68)],  # FACTS: fp16 7.36, nf4 with 16-bit embedding and head 3.11
)
def test_known_sizes_of_qwen_4b(recipe, gib):
    spec = packaged_spec("qwen1.5-4b")
    assert Plan.uniform(spec, recipe).weight_bytes(spec) / GiB == pytest.approx(gib, abs=0.006)


def test_qwen_4b_in_16_bits_to_the_byte():
    spec = packaged_spec("qwen1.5-4b")
    assert Plan.uniform(spec, "fp16").weight_bytes(spec) == 7_900_738_560 == 2 * 3_950_369_280


def test_nf4_of_qwen_4b_by_hand():
    spec = packaged_spec("qwen1.5-4b")
    quantised = 40 * (4 * 2560 * 2560 + 3 * 2560 * 6912)
    left = 3_950_369_280 - quantised  # embedding, head, norms and biases stay in 16 bits
    assert Plan.uniform(spec, "nf4").weight_bytes(spec) == quantised // 2 + quantised // 64 * 4 + 2 * left


@pytest.mark.parametrize(
    ("name", "kind", "shape", "words"),
    [
        ("int4", "linear", (8, 96), ["int4 ", "divisible by 64", "96"]),
        ("int4-g128", "linear", (8, 192), ["int4-g128", "128", "192"]),
        ("int4", "embedding", (8, 128), ["int4", "embedding"]),
        ("nf4", "linear", (3, 3), ["nf4", "multiple of 64", "3 x 3"]),
        ("nf4", "embedding", (64, 64), ["nf4", "embedding"]),
        ("int8", "other", (64,), ["int8", "other"]),
    ],
)
def test_refusals_say_what_and_why(name, kind, shape, words):
    reason = get_format(name).refuse(kind, shape)
    assert all(word in reason for word in words)


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [("int4", "linear", (3, 128)), ("nf4", "linear", (32, 2)), ("int8", "embedding", (5, 7)), ("fp32", "other", (9,))],
)
def test_what_is_not_refused(name, kind, shape):
    assert get_format(name).refuse(kind, shape) is None


@pytest.mark.parametrize("name", ["int5", "INT8", "", None, 8, ["int8"]])
def test_an_unknown_format_is_named_beside_those_there_are(name):
    with pytest.raises(PlanError) as error:
        get_format(name)
    assert repr(name) in str(error.value)
    assert "int4-g128" in str(error.value)


def test_dtypes_and_float_formats_are_one_to_one():
    assert [format_of_dtype(DTYPES[name]) for name in FLOATS] == FLOATS
    with pytest.raises(PlanError, match="found dtype int8"):
        format_of_dtype(torch.int8)
