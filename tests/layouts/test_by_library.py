"""What compressed-tensors, bitsandbytes and transformers write themselves, against stock transformers that opens it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram_lab.engine.load import load
from lowvram_lab.errors import CheckpointError
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from tests.helpers.tiny import random_ids, relative_error, tiny_stock, tiny_tokenizer
from tests.layouts.forecasts import check_forecast

INT8 = {"num_bits": 8, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float"}
ACTIVATIONS = {"num_bits": 8, "strategy": "token", "dynamic": True}
FOUR = {"num_bits": 4, "strategy": "group", "group_size": 64}
SCHEMES = {  # weights, activations, format, and what the matrices are held in
    "asymmetric": (FOUR | {"symmetric": False}, None, "pack-quantized", {"int4"}),
    "asymmetric, 3 bits": (FOUR | {"num_bits": 3, "symmetric": False}, None, "pack-quantized", {"int3-asym"}),
    "a row a group": ({"num_bits": 4, "strategy": "channel"}, None, "pack-quantized", {"int4-g128", "int4"}),
    "8 bits in words": ({"num_bits": 8, "strategy": "group", "group_size": 64}, None, "pack-quantized", {"int8-g32"}),
    "int8 and activations": (INT8, ACTIVATIONS, "int-quantized", {"int8"}),
    "int8, asymmetric": (INT8 | {"symmetric": False}, None, "int-quantized", {"int8-g32"}),
    "fp8": (FP8 | {"strategy": "tensor"}, None, "float-quantized", {"int8-g32"}),
    "fp8 by rows": (FP8 | {"strategy": "channel"}, None, "float-quantized", {"int8-g32"}),
    "fp8 in blocks": (FP8 | {"strategy": "block", "block_structure": [16, 64]}, None, "float-quantized", {"int8-g32"}),
    "mxfp4": (
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        None, "mxfp4-pack-quantized", {"int5-g32"},
    ),
    "nvfp4": (
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        None, "nvfp4-pack-quantized", {"int5-g16"},
    ),
}  # fmt: skip
BITSANDBYTES = {
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"nf4"}),
    "nf4 with scales quantised again": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, {"nf4"}
    ),
    "fp4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {"int8-g32"}),
    "int8": ({"load_in_8bit": True}, {"int8"}),
}  # fmt: skip


def by_compressed_tensors(folder, weights, activations, layout):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization.utils import calculate_qparams

    model = tiny_stock("qwen2", dtype=torch.bfloat16)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": layout}
    config = quantization.QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"], format=layout)
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if not hasattr(module, "weight_scale"):
            continue
        args, weight, shape = module.quantization_scheme.weights, module.weight.data, module.weight_scale.shape
        if hasattr(module, "weight_global_scale"):
            module.weight_global_scale.data.fill_(448 * 6 / float(weight.abs().max()))
        low, high = extremes(weight.float(), shape, args)
        given = getattr(module, "weight_global_scale", None)
        scale, zero = calculate_qparams(low, high, args, global_scale=None if given is None else given.data)
        module.weight_scale.data = scale.reshape(shape).to(module.weight_scale.dtype)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero.reshape(shape).to(module.weight_zero_point.dtype)
    compressor = compressors.ModelCompressor.from_pretrained_model(model, quantization_format=layout)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    tiny_tokenizer().save_pretrained(folder)


def extremes(weight, shape, args):
    """Least and largest value of whatever shares a scale."""
    if args.strategy == "block":
        height, width = args.block_structure
        tiles = weight.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2).flatten(2)
        return tiles.amin(-1), tiles.amax(-1)
    groups = weight.reshape(1, -1) if args.strategy == "tensor" else weight
    groups = groups.unflatten(1, (-1, args.group_size)) if args.group_size else groups.unsqueeze(1)
    return groups.amin(-1), groups.amax(-1)


def by_bitsandbytes(folder, settings):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = folder.with_name("plain")
    tiny_stock("qwen2").save_pretrained(plain)
    config = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module", params=SCHEMES | BITSANDBYTES, ids=str)
def written(request, tmp_path_factory):
    """A directory, and the formats of its matrices."""
    folder = tmp_path_factory.mktemp("made") / "m"
    if request.param in SCHEMES:
        *scheme, formats = SCHEMES[request.param]
        by_compressed_tensors(folder, *scheme)
    else:
        settings, formats = BITSANDBYTES[request.param]
        by_bitsandbytes(folder, settings)
    return folder, formats


@pytest.fixture(scope="module")
def stock(written):
    """What stock transformers opens; packed zero points it does not (5.23): there the weights the library restores."""
    from transformers import AutoModelForCausalLM

    folder, _ = written
    block = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    group = block.get("config_groups", {}).get("group_0", {"format": "", "weights": {"symmetric": True}})
    if group["format"] != "pack-quantized" or group["weights"]["symmetric"]:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    weights = find_source(folder).checkpoint()
    own = {module: restored(folder, module, block) for module in find_source(folder).spec().held}
    state = {name: own.get(name.removesuffix(".weight"), weights.read(name)) for name in weights}
    return tiny_stock("qwen2", state, torch.bfloat16)


def test_formats_are_known_from_the_config_alone(written, tmp_path):
    folder, formats = written
    (tmp_path / "config.json").write_text((folder / "config.json").read_text("utf-8"), encoding="utf-8")
    for place in (folder, tmp_path):
        spec = find_source(place).spec()
        assert set(spec.held.values()) == formats and len(spec.held) == 7 * 3 and spec.head not in spec.held


def test_logits_are_those_of_stock_transformers(written, stock):
    folder, formats = written
    plan = Plan.uniform(find_source(folder).spec(), "stored", context=64, dtype="fp32")
    model = load(plan.with_modules("*", device="cpu"), StandInGpu(None), progress=False)
    with torch.no_grad():
        expected, found = stock(random_ids(40)).logits.float(), model(random_ids(40)).logits
    # stock computes in bf16 from ids to logits, and rounds activations to int8 where it is asked to
    assert relative_error(found, expected) < 0.05


def test_the_forecast_is_what_is_metered(written):
    folder, _ = written
    check_forecast(folder)


def test_floats_are_the_librarys_own(written):
    """Of each matrix, by the library that wrote it."""
    folder, _ = written
    weights = find_source(folder).checkpoint()
    block = json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]
    for module in find_source(folder).spec().held:
        # theirs multiplies in the scale's dtype
        expected = restored(folder, module, block).float()
        assert relative_error(weights.read(f"{module}.weight").float(), expected) < 0.004, module


def restored(folder, module, block):
    """A module's weight by the library that wrote it."""
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    stored = load_file(folder / "model.safetensors")
    own = {name.removeprefix(f"{module}."): value for name, value in stored.items() if name.startswith(f"{module}.")}
    own.pop("bias", None)
    if block["quant_method"] == "compressed-tensors":
        scheme = QuantizationConfig.model_validate(block).config_groups["group_0"]
        return BaseCompressor.get_value_from_registry(scheme.format).decompress(own, scheme)["weight"]
    if block["load_in_8bit"]:
        return own["weight"].float() * own["SCB"].unsqueeze(1) / 127
    state = {key.removeprefix("weight."): value for key, value in own.items() if key.startswith("weight.")}
    return dequantize_4bit(own["weight"], QuantState.from_dict(state, torch.device("cpu")))


def test_a_bitsandbytes_file_without_its_state_is_refused(tmp_path):
    by_bitsandbytes(tmp_path / "m", BITSANDBYTES["nf4"][0])
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "quant_state" not in name}
    save_file(kept, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"expected a tensor \S+q_proj.weight.quant_state.bitsandbytes__nf4"):
        find_source(tmp_path / "m").checkpoint()
