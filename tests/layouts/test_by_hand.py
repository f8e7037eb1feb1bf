"""GPTQ's, AWQ's and fp8's files as they are: their tools do not install here, so words are put together bit by bit."""

import json

import pytest
import torch

from lowvram_lab.engine.load import load
from lowvram_lab.errors import CheckpointError, SourceError
from lowvram_lab.layouts.weights import QuantizedWeights
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source, read_config
from lowvram_lab.planner.moves import weights_loss
from lowvram_lab.planner.suited import RECIPES, not_above_held
from tests.helpers.tiny import random_ids, relative_error, tiny_config, tiny_stock
from tests.layouts.forecasts import check_forecast
from tests.layouts.writers import awq, fp8, gptq, write

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}


def by_gptq(bits, size, symmetric, reorder=False, version=1, **changes):
    settings = {"bits": bits, "group_size": size, "sym": symmetric, "desc_act": reorder}
    block = GPTQ | settings | ({"checkpoint_format": "gptq_v2"} if version == 2 else {}) | changes
    options = {"symmetric": symmetric, "reorder": reorder, "version": version}
    return block, lambda weight: gptq(weight, bits, size, **options)


CASES = {  # config's block, writer, and the formats that matrices of 128 and 192 columns are held in
    "gptq, 4 bits": (*by_gptq(4, 64, False), {"int4"}),
    "gptq, 4 bits, no zeros": (*by_gptq(4, 32, True), {"int4-g32"}),
    "gptq, 4 bits, version 2": (*by_gptq(4, 64, False, version=2), {"int4"}),
    "gptq, 4 bits, a row a group": (*by_gptq(4, -1, False), {"int4-g128", "int4"}),
    "gptq, 2 bits": (*by_gptq(2, 64, False), {"int2-asym"}),
    "gptq, 2 bits, no zeros": (*by_gptq(2, 64, True), {"int2"}),
    "gptq, 3 bits": (*by_gptq(3, 32, False), {"int3-g32-asym"}),
    "gptq, 3 bits, no zeros": (*by_gptq(3, 64, True), {"int3"}),
    "gptq, 8 bits, no zeros": (*by_gptq(8, 64, True), {"int8-g32"}),
    "gptq, 8 bits, no zeros, a row a group": (*by_gptq(8, -1, True), {"int8"}),
    "gptq, 8 bits, no zeros, groups of 16": (*by_gptq(8, 16, True), {"int8-g16"}),
    "awq": (AWQ, awq, {"int4"}),
}
NEAR = {
    "gptq, 8 bits": (*by_gptq(8, 64, False), {"int8-g32"}),
    "gptq, act-order": (*by_gptq(4, 64, False, reorder=True), {"int8-g32"}),
    "fp8": (FP8, fp8, {"int8-g32"}),
    "fp8 in blocks": (FP8 | {"weight_block_size": [48, 80]}, lambda w: fp8(w, (48, 80)), {"int8-g32"}),
}


@pytest.fixture(scope="module", params=CASES | NEAR, ids=str)
def written(request, tmp_path_factory):
    """A directory, what its weights stand for, their formats, and whether these take the codes as they lie."""
    block, make, formats = (CASES | NEAR)[request.param]
    folder = tmp_path_factory.mktemp("made") / "m"
    return folder, write(folder, "qwen2", block, make), formats, request.param in CASES


def test_formats_are_known_from_the_config_alone(written, tmp_path):
    folder, _, formats, _ = written
    (tmp_path / "config.json").write_text((folder / "config.json").read_text("utf-8"), encoding="utf-8")
    for place in (folder, tmp_path):
        spec = find_source(place).spec()
        assert set(spec.held.values()) == formats and spec.stored == {}
        assert len(spec.held) == 7 * 3 and spec.head not in spec.held
        assert Plan.uniform(spec, "stored", context=64).modules["model.layers.0.mlp.up_proj"].format in formats


def test_floats_are_what_the_codes_stand_for(written):
    folder, restored, *_ = written
    weights = find_source(folder).checkpoint()
    assert isinstance(weights, QuantizedWeights) and set(weights) == set(restored)
    for name, expected in restored.items():
        assert weights.shape(name) == expected.shape
        assert torch.equal(weights.read(name), expected.bfloat16()), name
        assert torch.equal(weights.rows(name)(slice(3, 50)), expected.bfloat16()[3:50]), name
        some = torch.tensor([5, 0, 5, 31])
        assert torch.equal(weights.rows(name)(some), expected.bfloat16()[some]), name


def test_a_layer_holds_the_files_own_codes(written):
    folder, restored, formats, exact = written
    spec = find_source(folder).spec()
    plan = Plan.uniform(spec, "stored", context=64).with_modules("*", device="cpu")
    model = load(plan, StandInGpu(None), progress=False)
    for name in spec.held:
        found = model.get_submodule(name).weight_rows(slice(None), torch.float32)
        # scales and zeros are rounded to eight bits of mantissa, and a near format has steps of its own
        assert relative_error(found, restored[f"{name}.weight"]) < (2.0**-8 if exact else 0.012), name


def test_logits_are_those_of_stock_transformers_on_the_restored_weights(written):
    folder, restored, _, exact = written
    plan = Plan.uniform(find_source(folder).spec(), "stored", context=64, dtype="fp32")
    model = load(plan.with_modules("*", device="cpu"), StandInGpu(None), progress=False)
    with torch.no_grad():
        expected, found = tiny_stock("qwen2", restored)(random_ids(40)).logits, model(random_ids(40)).logits
    assert relative_error(found, expected) < (0.02 if exact else 0.03)


def test_the_forecast_is_what_is_metered(written):
    folder, *_ = written
    check_forecast(folder)


def test_codes_that_are_rounded_again_are_said_and_count_as_loss(tmp_path, caplog):
    exact, near = (tmp_path / "exact", tmp_path / "near")
    for folder, (block, make, _) in ((exact, CASES["gptq, 4 bits"]), (near, NEAR["gptq, act-order"])):
        write(folder, "qwen2", block, make)
    exact, near = find_source(exact).spec(), find_source(near).spec()
    assert not exact.rounded and near.rounded == near.held.keys()
    losses = [weights_loss(Plan.uniform(spec, "stored", context=64)) for spec in (exact, near)]
    assert losses[0] == 0 < losses[1]
    assert not_above_held(exact, RECIPES, fidelity=True)[0] == not_above_held(near, RECIPES)[0] == "stored"
    assert not_above_held(near, RECIPES, fidelity=True)[:2] == ("bf16", "stored")
    said = [record.getMessage() for record in caplog.records]
    text = "no format here takes the codes of {} of its matrices as they lie: these are rounded to int8-g32"
    assert said == [f"near: {text.format(len(near.held))}"]


def test_a_row_of_many_columns_in_one_group(tmp_path):
    """Its scale is spread over the largest groups that a format has."""
    config = tiny_config("qwen2", intermediate_size=512)
    block = GPTQ | {"group_size": -1}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": block}))
    held = find_source(tmp_path).spec().held
    assert held["model.layers.0.mlp.down_proj"] == "int4-g256" and held["model.layers.0.mlp.up_proj"] == "int4-g128"
    assert all(get_format(fmt) for fmt in held.values())


REFUSED = {
    "another method": ({"quant_method": "aqlm"}, r"already quantised \(aqlm\); expected 16-bit weights, or"),
    "bits": (GPTQ | {"bits": 5}, "bits 5; expected 2 or 3 or 4 or 8"),
    "no bits": ({"quant_method": "gptq"}, "bits None"),
    "its own settings for some": (GPTQ | {"dynamic": {"-:.*": {}}}, "dynamic"),
    "another layout of gptq": (GPTQ | {"checkpoint_format": "marlin"}, "format 'marlin'"),
    "a group of none": (GPTQ | {"group_size": 0}, "group_size 0"),
    "awq packed the other way": (AWQ | {"version": "gemv"}, "AWQ packed as gemv; expected gemm"),
    "awq of 3 bits": (AWQ | {"bits": 3}, "bits 3"),
    "fp8 in odd blocks": (FP8 | {"weight_block_size": [128]}, "weight_block_size"),
    "fp8 of compressed-tensors in blocks of words": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"], "format": "float-quantized",
                    "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x128"},
                }
            },
        },
        "blocks of '128x128'",
    ),
    "bitsandbytes without bits": ({"quant_method": "bitsandbytes"}, "neither 4 nor 8 bits"),
    "bitsandbytes of another type": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "'af4'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_not_read_are_refused_by_the_config(tmp_path, name):
    block, words = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama").to_dict() | {"quantization_config": block}))
    with pytest.raises(SourceError, match=words) as error:
        read_config(tmp_path)
    assert "name the 16-bit original" in str(error.value) and "\n" not in str(error.value)


def spoilt(change):
    def make(weight):
        tensors, restored = gptq(weight)
        change(tensors)
        return tensors, restored

    return make


SPOILT = {
    "no zero points": (lambda t: t.pop("qzeros"), r"a tensor \S+q_proj.qzeros, .* found bias, g_idx, qweight, scales"),
    "zero points along the other side": (
        lambda t: t.update(qzeros=t["qzeros"].T.contiguous()), r"qzeros: expected shape \(2, 16\) of torch.int32, found"
    ),
    "scales of another size": (lambda t: t.update(scales=t["scales"][:, 1:].contiguous()), "scales: expected shape"),
    "codes in bytes": (lambda t: t.update(qweight=t["qweight"].view(torch.uint8)), "qweight: expected shape"),
    "a plain weight": (lambda t: t.clear() or t.update(weight=torch.zeros(1)), "found bias, weight of model.layers.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_files_that_hold_something_else_are_refused_before_a_weight_is_read(tmp_path, name):
    change, words = SPOILT[name]
    write(tmp_path / "m", "qwen2", GPTQ, spoilt(change))
    with pytest.raises(CheckpointError, match=words):
        find_source(tmp_path / "m").checkpoint()


@pytest.mark.parametrize(
    ("block", "make", "words"),
    [
        (GPTQ, lambda w: gptq(w, reorder=True), "in another order than its config says"),
        (GPTQ | {"bits": 3, "sym": True}, lambda w: gptq(w, 3), "zero points are not the middle code"),
    ],
)
def test_codes_that_the_config_denies_are_refused(tmp_path, block, make, words):
    write(tmp_path / "m", "qwen2", block, make)
    plan = Plan.uniform(find_source(tmp_path / "m").spec(), "stored", context=64).with_modules("*", device="cpu")
    with pytest.raises(CheckpointError, match=words) as error:
        load(plan, StandInGpu(None), progress=False)
    assert "model.safetensors: tensor model.layers.0.self_attn.q_proj" in str(error.value)


def test_a_head_in_codes(tmp_path):
    block = GPTQ | {"lm_head": True}
    write(tmp_path / "m", "qwen2", block, gptq, also=("lm_head",))
    spec = find_source(tmp_path / "m").spec()
    assert spec.held["lm_head"] == "int4" and len(find_source(tmp_path / "m").checkpoint()) == 3 * 12 + 3
