"""The table of formats against what solvers and layers allocate, against published sizes, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowvram_lab.engine.layers import quantized_embedding, quantized_linear
from lowvram_lab.engine.nested import NestedLinear, Planes
from lowvram_lab.errors import PlanError
from lowvram_lab.model.formats import DTYPES, FORMATS, TensorSpec, canonical_name, get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.units import GiB
from tests.helpers.tiny import packaged_spec, tiny_spec

QUANTISED = [name for name, fmt in FORMATS.items() if fmt.kind != "float" and fmt.planes == 1]
NESTED = ["int4+4", "int4+4-g32", "int4+4-g128", "int4+4-g256"]
TABLES = [name for name in QUANTISED if name != "nf4"]
FLOATS = [name for name, fmt in FORMATS.items() if fmt.kind == "float"]
SHAPES = [(32, 1536), (48, 768)]  # columns that every group size divides


def buffer_bytes(module) -> int:
    return sum(buffer.nbytes for buffer in module.buffers())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*QUANTISED, "int4 nibbles", "int4-g128 nibbles"])
def test_a_layer_allocates_what_the_table_says(name, shape):
    name, _, layout = name.partition(" ")
    fmt = get_format(name)
    layer = quantized_linear(shape[1], shape[0], fmt, "cpu")
    if layout:
        layer.layout = layout
    layer.store(torch.randn(shape), lambda tensor: tensor)
    assert buffer_bytes(layer) == fmt.weight_bytes(shape)
    expected = fmt.tensors(shape, torch.bfloat16)
    found = {key: TensorSpec(tuple(b.shape), b.dtype) for key, b in layer.named_buffers()}
    assert {key: (spec.nbytes, spec.dtype) for key, spec in found.items()} == {
        key: (spec.nbytes, spec.dtype) for key, spec in expected.items()
    }


@pytest.mark.parametrize("name", QUANTISED)
def test_a_layer_on_meta_has_the_same_bytes(name):
    layer = quantized_linear(768, 32, get_format(name), "cuda")
    layer.store(torch.empty(32, 768, device="meta"), lambda tensor: tensor)
    assert buffer_bytes(layer) == get_format(name).weight_bytes((32, 768))
    assert all(buffer.is_meta for buffer in layer.buffers())


@pytest.mark.parametrize("name", TABLES)
def test_an_embedding_allocates_what_the_table_says(name):
    fmt = get_format(name)
    for weight in (torch.randn(50, 768), torch.empty(50, 768, device="meta")):
        table = quantized_embedding(50, 768, fmt, torch.bfloat16)
        table.store(weight, lambda tensor: tensor)
        found = {key: TensorSpec(tuple(buffer.shape), buffer.dtype) for key, buffer in table.named_buffers()}
        assert found == fmt.tensors((50, 768), torch.bfloat16)
        assert buffer_bytes(table) == fmt.weight_bytes((50, 768))


def test_what_has_two_planes():
    assert [name for name, fmt in FORMATS.items() if fmt.planes > 1] == NESTED
    assert all(fmt.plane is fmt for fmt in FORMATS.values() if fmt.planes == 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NESTED)
def test_two_planes_are_the_bytes_of_both(name, shape):
    fmt, plane = get_format(name), get_format(name.replace("int4+4", "int4"))
    assert fmt.plane is plane
    assert (plane.planes, plane.kind, plane.group_size) == (1, fmt.kind, fmt.group_size)
    assert fmt.bytes_by_plane(shape) == [plane.weight_bytes(shape), FORMATS["int4-g32"].weight_bytes(shape)]
    assert fmt.weight_bytes(shape) == sum(fmt.bytes_by_plane(shape))
    assert plane.bytes_by_plane(shape) == [plane.weight_bytes(shape)]
    assert fmt.tensors(shape, torch.bfloat16) == plane.tensors(shape, torch.bfloat16)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", NESTED)
def test_a_layer_of_two_planes_allocates_what_the_table_says(name, device):
    fmt, (rows, columns) = get_format(name), SHAPES[0]
    low = quantized_linear(columns, rows, fmt.low_plane, "cpu")
    layer = NestedLinear(columns, rows, fmt, "cpu", low, Planes())
    layer.store(torch.ones(rows, columns, device=device), lambda tensor: tensor)
    assert buffer_bytes(layer) == fmt.weight_bytes((rows, columns))
    assert buffer_bytes(low) == fmt.bytes_by_plane((rows, columns))[1]


@given(st.integers(1, 40), st.integers(1, 8), st.sampled_from(TABLES))
def test_bytes_count_codes_scales_and_zeros(rows, groups, name):
    fmt = get_format(name)
    groups *= 32 // min(fmt.group_size or 32, 32)  # codes are packed 32 together
    columns = groups * (fmt.group_size or 32)
    groups = groups if fmt.group_size else 1
    scale_bytes = rows * groups * (4 if fmt.has_zeros else 2)
    assert fmt.weight_bytes((rows, columns)) == rows * columns * fmt.bits // 8 + scale_bytes


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int2", 2.25),
        ("int3", 3.25),
        ("int4", 4.5),
        ("int5-g32", 5.5),
        ("int6-g256", 6.0625),
        ("int4-g128", 4.25),
        ("int8-g32", 8.5),
        ("int6-g16", 7),
        ("int5-g32-asym", 6),
        ("int2-g16-asym", 4),
        ("int3-asym", 3.5),
    ],
)
def test_bits_a_weight_by_hand(name, bits):
    assert get_format(name).weight_bytes((768, 768)) * 8 / 768**2 == bits


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
    assert Plan.uniform(spec, recipe).weight_bytes() / GiB == pytest.approx(gib, abs=0.006)


def test_qwen_4b_in_16_bits_to_the_byte():
    spec = packaged_spec("qwen1.5-4b")
    assert Plan.uniform(spec, "fp16").weight_bytes() == 7_900_738_560 == 2 * 3_950_369_280


def test_nf4_of_qwen_4b_by_hand():
    spec = packaged_spec("qwen1.5-4b")
    quantised = 40 * (4 * 2560 * 2560 + 3 * 2560 * 6912)
    left = 3_950_369_280 - quantised  # embedding, head, norms and biases stay in 16 bits
    assert Plan.uniform(spec, "nf4").weight_bytes() == quantised // 2 + quantised // 64 * 4 + 2 * left


@pytest.mark.parametrize(
    ("name", "kind", "shape", "words"),
    [
        ("int4", "linear", (8, 96), ["int4 ", "divisible by 64", "96"]),
        ("int4-g128", "linear", (8, 192), ["int4-g128", "128", "192"]),
        ("int4", "embedding", (8, 96), ["int4 ", "divisible by 64", "96"]),
        ("int4-g96", "linear", (8, 256), ["int4-g96", "divisible by 96", "256"]),
        ("int3", "linear", (8, 96), ["int3 ", "divisible by 64", "96"]),
        ("int2-g192", "embedding", (8, 256), ["int2-g192", "divisible by 192", "256"]),
        ("int6", "other", (64,), ["int6", "other"]),
        ("int8-g16", "linear", (8, 48), ["int8-g16", "divisible by 32", "48"]),
        ("nf4", "linear", (3, 3), ["nf4", "multiple of 64", "3 x 3"]),
        ("nf4", "embedding", (64, 64), ["nf4", "embedding"]),
        ("int8", "other", (64,), ["int8", "other"]),
        ("int4+4", "embedding", (64, 64), ["int4+4 ", "for linear modules", "embedding"]),
        ("int4+4", "other", (64,), ["int4+4", "other"]),
        ("int4+4", "linear", (8, 96), ["int4+4 ", "divisible by 64", "96"]),
        ("int4+4-g128", "linear", (8, 192), ["int4+4-g128", "128", "192"]),
    ],
)
def test_refusals_say_what_and_why(name, kind, shape, words):
    reason = get_format(name).refuse(kind, shape)
    assert all(word in reason for word in words)


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        *(("int4", kind, (3, 128)) for kind in ("linear", "embedding")),
        *(("int3", kind, (3, 64)) for kind in ("linear", "embedding")),
        ("int6-g96", "linear", (1, 288)),
        ("nf4", "linear", (32, 2)),
        ("int4+4", "linear", (3, 128)),
        ("int8", "embedding", (5, 7)),
        ("fp32", "other", (9,)),
    ],
)
def test_what_is_not_refused(name, kind, shape):
    assert get_format(name).refuse(kind, shape) is None


UNKNOWN = {
    "int7": "int8, int6, int5",
    "int3-g18": "int3-g16, int3-g32, int3",
    "int4-g512": "int4-g256, int4-g192, int4-g128",
    "int4+4-g96": "int4+4, int4+4-g128, int4+4-g32",
    "int5+4": "int4+4, int5, int4",
    "nf8": "nf4, int8, int4",
    "fp64": "fp16, nf4, fp32",
    "banana": "int8, int4, nf4",
    "": "int8, int4, nf4",
    None: "int8, int4, nf4",
    8: "int8, int4, nf4",
    ("int8",): "int8, int4, nf4",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_format_is_answered_with_the_three_nearest(name):
    with pytest.raises(PlanError) as error:
        get_format(name)
    assert repr(name) in str(error.value)
    assert f"the nearest are {UNKNOWN[name]} (" in str(error.value)


THEIRS = {
    "Q4_K_M": "int4-g32",
    "q4_0": "int4-g32",
    "Q5_K_S": "int5-g32",
    "Q6_K": "int6-g32",
    "Q8_0": "int8",
    "IQ3_XXS": "int3-g32",
    "IQ1_S": "int2-g32",
    "fp8": "int8",
    "MXFP4": "nf4",
    "AWQ": "int4-g128",
    "gptq": "int4-g128",
}


@pytest.mark.parametrize("name", THEIRS)
def test_what_other_tools_call_a_format_is_answered_with_the_nearest(name):
    with pytest.raises(PlanError, match=f"unknown format '{name}'.* the nearest (to it )?is {THEIRS[name]}$"):
        get_format(name)
    get_format(THEIRS[name])


SPELLINGS = {
    "INT8": "int8",
    "8bit": "int8",
    "8-bit": "int8",
    "q8": "int8",
    "4bit": "int4",
    "Q4": "int4",
    " int4-g64 ": "int4",
    "INT4_G128": "int4-g128",
    "int3-g64-asym": "int3-asym",
    "NF4": "nf4",
    "int4+4": "int4+4",
    " INT4+4 ": "int4+4",
    "int4+4-g64": "int4+4",
    "INT4+4_G128": "int4+4-g128",
    "float16": "fp16",
    "half": "fp16",
    "BFloat16": "bf16",
    "float32": "fp32",
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_a_plan_holds_the_one_spelling(text):
    spec, name = tiny_spec("llama"), SPELLINGS[text]
    plan = Plan.uniform(spec, context=64)
    assert get_format(text) is FORMATS[name]
    assert Plan.uniform(spec, text, context=64) == Plan.uniform(spec, name, context=64)
    if name in (*TABLES, *NESTED):  # layers of 128 inputs
        changed = plan.with_modules("*.o_proj", format=text)
        assert changed == plan.with_modules("*.o_proj", format=name)
    if name in ("int8", "int4"):
        assert replace(plan, kv_format=text).kv_format == name
    if name in DTYPES:
        assert Plan.uniform(spec, "int8", context=64, dtype=text).dtype == name


@given(st.text(max_size=10) | st.from_regex(r"\A(int|q|iq|fp)[0-9]{0,3}([-_][a-z0-9]{0,6})?\Z"))
def test_any_text_is_a_format_or_one_clear_error(text):
    assert canonical_name(canonical_name(text)) == canonical_name(text)
    try:
        assert get_format(text).name in FORMATS
    except PlanError as refusal:
        assert str(refusal).startswith(f"unknown format {text!r}; ") and len(str(refusal)) < 200 + len(repr(text))
