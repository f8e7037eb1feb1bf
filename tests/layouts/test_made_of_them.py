"""What is made of a quantised directory says nothing of its codes: stock transformers opens it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowvram_lab.conversion.convert import convert
from lowvram_lab.conversion.gguf_export import export_gguf
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.slimming.slim import slim_vocabulary
from lowvram_lab.slimming.slim_layers import slim_layers
from tests.layouts.test_by_hand import GPTQ
from tests.layouts.writers import gptq
from tests.slimming.tiny import write


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWVRAM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory in GPTQ's codes whose tokenizer has merges, and the weights that it stands for."""
    folder = tmp_path_factory.mktemp("made") / "m"
    write(folder, "Qwen's", "qwen2", dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    state, restored = {}, {}
    for name, value in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if name.endswith("_proj.weight"):
            tensors, restored[name] = gptq(value, size=32)
            state |= {f"{module}.{part}": tensor for part, tensor in tensors.items()}
        else:
            state[name] = restored[name] = value.bfloat16()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    block = {"dtype": "bfloat16", "quantization_config": GPTQ | {"group_size": 32}}
    (folder / "config.json").write_text(json.dumps(config | block), encoding="utf-8")
    return folder, {name: value.float() for name, value in restored.items()}


def by_vocabulary(source, output):
    text = output.with_suffix(".txt")
    text.write_text("the quick brown fox, 12 + 30 = 42\n" * 90)
    slim_vocabulary(str(source), output, vocab="text", texts=text, referee=False, progress=False)


def by_layers(source, output):
    slim_layers(str(source), output, [1], tokens=2048, stage="cut", referee=False, progress=False)


def by_convert(source, output):
    convert(str(source), output, Plan.uniform(find_source(source).spec(), "bf16", context=64), progress=False)


@pytest.mark.parametrize("make", [by_vocabulary, by_layers, by_convert])
def test_stock_transformers_opens_what_is_made(written, tmp_path, make):
    source, restored = written
    make(source, tmp_path / "made")
    assert "quantization_config" not in json.loads((tmp_path / "made" / "config.json").read_text("utf-8"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(stock.state_dict()[name], restored[name].bfloat16())


def test_a_converted_directory_has_its_own_block(written, tmp_path):
    source, _ = written
    convert(str(source), tmp_path / "c", Plan.uniform(find_source(source).spec(), "int8", context=64), progress=False)
    block = json.loads((tmp_path / "c" / "config.json").read_text("utf-8"))["quantization_config"]
    assert block["quant_method"] == "compressed-tensors" and "bits" not in block
    assert find_source(tmp_path / "c").spec().held == {}


def test_a_gguf_file_of_it(written, tmp_path):
    source, restored = written
    export_gguf(source, tmp_path / "m.gguf", tensor_type="f32", progress=False)
    weights = find_source(tmp_path / "m.gguf").checkpoint(progress=False)
    assert set(weights) == set(restored)
    assert all(torch.equal(weights.read(name), value.bfloat16().float()) for name, value in restored.items())
