"""Formats to compressed-tensors' config block and back, what others write, what is refused, and the tensors beside it.

The library of that name is the oracle where it is installed: for the block, for which target counts, for the tensors.
"""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram_lab.engine.load import load
from lowvram_lab.errors import CheckpointError, PlanError, SourceError
from lowvram_lab.layouts.block import layouts_of
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.compressed import is_plain, quantization_config, stored_formats
from lowvram_lab.model.formats import FORMATS, get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source, read_config
from lowvram_lab.model.spec import ModelSpec, ModuleSpec
from lowvram_lab.weights.solvers import round_to_nearest
from lowvram_lab.weights.stored import check_stored, read_stored, stored_tensors, tensor_names, to_stored
from tests.helpers.checkpoints import directory_spec, restored_state, write_model
from tests.helpers.tiny import (
    TOLERANCES,
    DictCheckpoint,
    random_ids,
    relative_error,
    seeded,
    tiny_config,
    tiny_spec,
    tiny_stock,
    tiny_tokenizer,
)

INTEGERS = [name for name, fmt in FORMATS.items() if fmt.storable and fmt.planes == 1]
WIDE = 768
"""A multiple of every group size."""

Q = "model.layers.1.self_attn.q_proj"


def wide_modules(tied: bool = False) -> list[ModuleSpec]:
    shape = (64, WIDE)
    return [
        ModuleSpec("model.embed_tokens", "embedding", {"weight": shape}),
        *(ModuleSpec(f"model.layers.0.{n}", "linear", {"weight": shape}, 0) for n in ("q_proj", "k_proj", "up_proj")),
        ModuleSpec("model.norm", "other", {"weight": (WIDE,)}),
        ModuleSpec("lm_head", "linear", {"weight": shape}, tied_to="model.embed_tokens" if tied else None),
    ]


def by_llm_compressor(**changes) -> dict:
    """The block llm-compressor 0.8 writes for its scheme W4A16, all fields; ``weights_…`` change the weights'."""
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": 128,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    group = {
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    block = {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.0",
    }
    for name, value in changes.items():
        place = weights if name.startswith("weights_") else group if name in group and name != "format" else block
        place[name.removeprefix("weights_")] = value
    return block


@pytest.mark.parametrize("name", INTEGERS)
def test_every_integer_format_comes_back(name):
    modules = wide_modules()
    formats = {m.name: name for m in modules if m.kind != "other"}
    block = json.loads(json.dumps(quantization_config(formats)))
    assert stored_formats(block, modules, "x") == formats


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_mixture_comes_back(data):
    modules = wide_modules(tied := data.draw(st.booleans()))
    names = [m.name for m in modules if m.kind != "other" and not (tied and m.tied_to)]
    formats = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(INTEGERS), min_size=1))
    expected = dict(formats)
    if tied and "model.embed_tokens" in formats:
        expected["lm_head"] = formats["model.embed_tokens"]  # it shares the codes, whether it is named or not
    block = json.loads(json.dumps(quantization_config(formats)))
    assert stored_formats(block, modules, "x") == expected
    assert stored_formats(quantization_config(expected), modules, "x") == expected


def test_compressed_tensors_reads_the_block_the_same_way():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    formats = {f"model.layers.{index}.q_proj": name for index, name in enumerate(INTEGERS)}
    parsed = quantization.QuantizationConfig.model_validate(quantization_config(formats))
    assert (str(parsed.quantization_status.value), parsed.kv_cache_scheme) == ("compressed", None)
    found = {target: group for group in parsed.config_groups.values() for target in group.targets}
    for module, name in formats.items():
        fmt, weights = get_format(name), found[module].weights
        assert (weights.num_bits, weights.group_size, weights.symmetric) == (fmt.bits, fmt.group_size, True)
        assert weights.strategy == ("group" if fmt.group_size else "channel")
        assert found[module].input_activations is None
        assert found[module].format == ("naive-quantized" if fmt.kind == "int8" else "pack-quantized")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "int4-g128"),
        ({"weights_group_size": 64}, "int4"),
        ({"weights_group_size": 32, "weights_num_bits": 3}, "int3-g32"),
        ({"weights_actorder": "static"}, "int4-g128"),  # an order of rounding alone: nothing of it is stored
        ({"weights_actorder": "weight"}, "int4-g128"),
        (
            {"format": "naive-quantized", "weights_num_bits": 8, "weights_strategy": "channel"}
            | {"weights_group_size": None},
            "int8",
        ),
    ],
)
def test_what_llm_compressor_writes_is_understood(changes, expected):
    block, spec = by_llm_compressor(**changes), tiny_spec("qwen2")
    if "format" in changes:
        block["config_groups"]["group_0"]["format"] = changes["format"]
    modules = [m for m in spec.modules if "down_proj" not in m.name]  # 192 columns: no group of 128 divides them
    found = stored_formats(block, modules, "x")
    assert found == {m.name: expected for m in modules if m.kind == "linear" and m.name != "lm_head"}


def test_a_format_of_the_whole_file_serves_groups_without_one():
    block = by_llm_compressor()
    del block["config_groups"]["group_0"]["format"]  # as versions before 0.10 wrote it
    assert stored_formats(block, [tiny_spec("llama").module(Q)], "x") == {Q: "int4-g128"}


@pytest.mark.parametrize(
    ("ignore", "kept"),
    [
        (["re:.*self_attn.*"], {"gate_proj", "up_proj"}),
        (["re:self_attn"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}),  # from the beginning
        ([Q], {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}),
        (["Linear"], set()),
    ],
)
def test_what_is_ignored_is_not_stored(ignore, kept):
    modules = [m for m in tiny_spec("llama").modules if m.layer == 1 and "down_proj" not in m.name]
    found = stored_formats(by_llm_compressor(ignore=ignore), modules, "x")
    assert {name.rpartition(".")[2] for name in found} == kept


@pytest.mark.parametrize("order", [pytest.param(1), -1])
@pytest.mark.parametrize(
    "targets",
    [[[Q], ["re:.*q_"], ["Linear"]], [["re:.*q_"], ["Linear"]], [[Q], ["Linear"]], [[Q], ["re:.*q_"]]],
)
def test_the_most_specific_target_counts_as_in_compressed_tensors(targets, order):
    """A name before a pattern before a class, in whatever order the groups stand."""
    match = pytest.importorskip("compressed_tensors.utils.match")
    groups = {}
    for index, (target, bits) in enumerate(list(zip(targets, (4, 3, 2), strict=False))[::order]):
        group = copy.deepcopy(by_llm_compressor(targets=target, weights_num_bits=bits)["config_groups"]["group_0"])
        groups[f"group_{index}"] = group
    block = by_llm_compressor() | {"config_groups": groups}
    first = match.match_targets(Q, torch.nn.Linear(1, 1), [t for group in targets for t in group])[0]
    assert first == targets[0][0]  # the oracle agrees with what this test is called
    assert stored_formats(block, [tiny_spec("llama").module(Q)], "x") == {Q: "int4-g128"}


REFUSED = {
    "weights chosen while running": ({"weights_dynamic": True}, "quantised while running"),
    "floats in words": ({"weights_type": "float", "weights_num_bits": 8}, "pack-quantized of floats with 8 bits"),
    "blocks": ({"weights_strategy": "block"}, "strategy block"),
    "bits no word holds": ({"weights_num_bits": 9}, "9 bits"),
    "outputs": ({"output_activations": {"num_bits": 8, "type": "int"}}, "outputs"),
    "a quantised cache": ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "KV cache"),
    "another method": ({"quant_method": "aqlm"}, r"already quantised \(aqlm\)"),
    "no method": ({"quant_method": None}, "already quantised"),
    "no groups": ({"config_groups": None}, "config_groups"),
    "weights that are a word": ({"weights": "int4"}, "with None bits"),
    "a group size in words": ({"weights_group_size": "large"}, "group_size 'large'"),
    "a named scheme": ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups"),
}


@pytest.mark.parametrize("name", [pytest.param(n) for n in REFUSED])
def test_what_no_format_stands_for_is_refused(tmp_path, name):
    changes, words = REFUSED[name]
    block = by_llm_compressor(**changes)
    with pytest.raises(SourceError, match=words) as error:
        layouts_of(block, tiny_spec("llama").modules, "my-model")
    assert not is_plain(block)
    assert str(error.value).startswith("my-model: ")
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama").to_dict() | {"quantization_config": block}))
    with pytest.raises(SourceError, match=words):  # by the config alone, before a weight is fetched
        read_config(tmp_path)


@pytest.mark.parametrize("block", ["int4", ["gptq"], {"bits": 4}])
def test_a_block_that_is_none(block):
    with pytest.raises(SourceError, match="already quantised"):
        layouts_of(block, (), "x")


def test_a_tied_head_stored_apart_from_its_table_is_refused():
    with pytest.raises(SourceError, match="lm_head is in int4-g128, but tied to model.embed_tokens, which is not"):
        stored_formats(by_llm_compressor(ignore=[]), wide_modules(tied=True), "x")
    kept = stored_formats(by_llm_compressor(ignore=["lm_head"]), wide_modules(tied=True), "x")
    assert {name.rpartition(".")[2] for name in kept} == {"q_proj", "k_proj", "up_proj"}


def test_a_shape_the_format_cannot_have_is_named():
    with pytest.raises(CheckpointError, match="down_proj: int4-g128 needs in_features divisible by 128, found 192"):
        stored_formats(by_llm_compressor(), tiny_spec("llama").modules, "x")


@pytest.mark.parametrize("name", INTEGERS)
def test_tensors_in_the_file_are_those_of_the_layer(name):
    fmt, module = get_format(name), ModuleSpec("a.b", "linear", {"weight": (48, WIDE)})
    solution = round_to_nearest(seeded(48, WIDE), fmt)
    tensors = to_stored("a.b", solution, fmt)
    checkpoint = DictCheckpoint(tensors)
    checkpoint.dtype = lambda key: tensors[key].dtype
    check_stored(module, fmt, checkpoint)
    found = read_stored("a.b", fmt, checkpoint.read)
    assert torch.equal(found.codes, solution.codes)
    assert torch.equal(found.scale, solution.scale)
    expected = solution.tensors(fmt)
    filled = stored_tensors("a.b", fmt, checkpoint)
    assert filled.keys() == expected.keys()
    assert all(torch.equal(filled[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["int8", "int4", "int3-g32"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, n: t.pop(n["codes"]), "expected a tensor {codes}.*found none"),
        (lambda t, n: t.pop(n["scale"]), "expected a tensor {scale}.*found none"),
        (lambda t, n: t.update({n["codes"]: t[n["codes"]][:-1]}), "{codes}: expected shape"),
        (lambda t, n: t.update({n["scale"]: t[n["scale"]][:, :0]}), "{scale}: expected shape"),
        (lambda t, n: t.update({n["codes"]: t[n["codes"]].float()}), "{codes}: expected shape .* torch.float32"),
    ],
)
def test_a_stored_tensor_that_does_not_belong_is_named(name, change, words):
    fmt, module = get_format(name), ModuleSpec("a.b", "linear", {"weight": (48, 128)})
    tensors = to_stored("a.b", round_to_nearest(seeded(48, 128), fmt), fmt)
    change(tensors, names := tensor_names("a.b", fmt))
    checkpoint = DictCheckpoint(tensors)
    checkpoint.dtype = lambda key: tensors[key].dtype
    with pytest.raises(CheckpointError, match=words.format(**names)):
        check_stored(module, fmt, checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["int8", "int4", pytest.param("int3")])
def test_scales_that_are_not_finite_are_named(name, value):
    fmt = get_format(name)
    tensors = to_stored("a.b", round_to_nearest(seeded(48, 128), fmt), fmt)
    tensors["a.b.weight_scale"][3] = value
    with pytest.raises(CheckpointError, match=r"a\.b\.weight_scale: expected finite scales"):
        stored_tensors("a.b", fmt, DictCheckpoint(tensors))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A tiny qwen2 in 4 bits, quantised and written by compressed-tensors itself."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    model = tiny_stock("qwen2")
    scheme = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64},
    }
    config = quantization.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().unflatten(1, (-1, 64))
            module.weight_scale.data = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.zero_()
    folder = tmp_path_factory.mktemp("theirs")
    compressor = compressors.ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_what_compressed_tensors_writes_opens_here(theirs):
    spec = directory_spec(theirs)
    assert set(spec.stored.values()) == {"int4"}
    assert len(spec.stored) == 7 * 3
    plan = Plan.uniform(spec, "stored", context=64, dtype="fp32")
    model = load(plan, open_gpu("100MiB"), checkpoint=find_source(theirs).checkpoint(), progress=False)
    restored = restored_state(theirs)
    for name in spec.stored:
        weight = restored[f"{name}.weight"]
        assert relative_error(weight, tiny_stock("qwen2").get_submodule(name).weight.detach()) < 0.2, name
    with torch.no_grad():
        expected = tiny_stock("qwen2", restored)(random_ids(40)).logits
        found = model(random_ids(40)).logits
    assert relative_error(found, expected) < TOLERANCES["bf16"]  # torch's int4 kernel casts activations to bf16


def test_a_plan_takes_what_is_stored_or_is_refused(theirs):
    spec = directory_spec(theirs)
    plan = Plan.uniform(spec, "stored", context=64)
    assert plan.modules[Q].format == "int4"
    assert plan.modules["lm_head"].format == "bf16"
    with pytest.raises(PlanError, match="model.embed_tokens: .* holds it in bf16, found int8"):
        Plan.uniform(spec, "int8", context=64)


def test_stored_formats_of_a_16_bit_model_are_none(tmp_path):
    folder = write_model(tmp_path / "m", "qwen2")
    spec = directory_spec(folder)
    assert spec.stored == {}
    assert {a.format for a in Plan.uniform(spec, "stored", context=64).modules.values()} == {"bf16"}


def test_the_spec_of_a_converted_model_is_that_of_its_original():
    config = tiny_config("qwen2")
    values = {m.name: "int4" for m in tiny_spec("qwen2").modules if m.kind == "linear"}
    config.quantization_config = quantization_config(values)
    spec = ModelSpec.from_config(config, "converted")
    assert spec.fingerprint == tiny_spec("qwen2").fingerprint
    assert spec.stored == values
