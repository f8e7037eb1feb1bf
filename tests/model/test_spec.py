"""ModelSpec against the packaged facts and against the models transformers builds."""

import pytest
import torch

from lowvram_lab.errors import CheckpointError, PlanError
from lowvram_lab.model import spec as spec_module
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import packaged_facts
from lowvram_lab.units import GiB, KiB
from tests.helpers.tiny import TINY, packaged_spec, tiny_config, tiny_spec, tiny_stock

# name: hidden, layers, kv heads, vocabulary, tied, fp16 GiB, KV KiB a token. The published architectures.
KNOWN = {
    "qwen1.5-0.5b": (1024, 24, 16, 151936, True, 0.86, 96),
    "qwen1.5-1.8b": (2048, 24, 16, 151936, False, 3.42, 192),
    "qwen1.5-4b": (2560, 40, 20, 151936, False, 7.36, 400),
    "qwen1.5-7b": (4096, 32, 32, 151936, False, 14.38, 512),
    "qwen2.5-3b": (2048, 36, 2, 151936, True, 5.75, 36),
    "qwen3-4b": (2560, 36, 8, 151936, True, 7.49, 144),
    "smollm2-135m": (576, 30, 3, 49152, True, 0.25, 22.5),
    "smollm2-1.7b": (2048, 24, 32, 49152, True, 3.19, 192),
}


def test_every_packaged_model_is_known_here():
    assert set(packaged_facts()) == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_packaged_models(name):
    spec = packaged_spec(name)
    hidden, layers, kv_heads, vocabulary, tied, fp16_gib, kv_kib = KNOWN[name]
    assert spec.num_parameters == packaged_facts()[name]["parameters"]
    assert 2 * spec.num_parameters / GiB == pytest.approx(fp16_gib, abs=0.006)
    assert spec.kv_bytes(1) == kv_kib * KiB
    assert (spec.hidden_size, spec.num_hidden_layers, spec.num_key_value_heads) == (hidden, layers, kv_heads)
    assert (spec.vocab_size, spec.tied) == (vocabulary, tied)


def test_head_dim_may_differ_from_hidden_over_heads():
    assert packaged_spec("qwen3-4b").head_dim == 128 != 2560 // 32


@pytest.mark.parametrize("kind", TINY)
def test_modules_are_those_of_the_real_model(kind):
    spec, model = tiny_spec(kind), tiny_stock(kind)
    found = {f"{m.name}.{key}": shape for m in spec.modules for key, shape in m.parameters.items()}
    real = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    assert found == real
    assert spec.num_parameters == model.num_parameters()
    assert spec.module(spec.embedding).kind == "embedding"
    assert {spec.module(name).kind for name in (spec.head, "model.layers.0.mlp.up_proj")} == {"linear"}
    assert spec.module("model.norm").kind == "other"
    assert spec.module("model.layers.2.mlp.up_proj").layer == 2
    assert spec.module("model.norm").layer is None


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen2", False)])
def test_ties_are_found_not_believed(kind, tied):
    for value in (tied, not tied):
        spec = ModelSpec.from_config(tiny_config(kind, tie_word_embeddings=value))
        assert spec.tied is value
        assert spec.module("lm_head").tied_to == ("model.embed_tokens" if value else None)
    tiny = 320 * 128
    both = [ModelSpec.from_config(tiny_config(kind, tie_word_embeddings=value)) for value in (True, False)]
    assert both[1].num_parameters - both[0].num_parameters == tiny


@pytest.mark.parametrize(
    "changes",
    [{"num_key_value_heads": 4}, {"vocab_size": 336}, {"num_hidden_layers": 2}, {"tie_word_embeddings": False}],
)
def test_the_fingerprint_changes_with_a_shape(changes):
    assert ModelSpec.from_config(tiny_config("llama", **changes)).fingerprint != tiny_spec("llama").fingerprint


@pytest.mark.parametrize("changes", [{}, {"rms_norm_eps": 1e-3}, {"eos_token_id": 7}])
def test_the_fingerprint_does_not_change_with_the_name_or_a_number(changes):
    other = ModelSpec.from_config(tiny_config("llama", **changes), "another name")
    assert other.name == "another name"
    assert other.fingerprint == tiny_spec("llama").fingerprint


@pytest.mark.parametrize("kind", TINY)
def test_a_spec_can_build_its_model_again(kind):
    config = tiny_spec(kind).pretrained_config()
    assert ModelSpec.from_config(config).fingerprint == tiny_spec(kind).fingerprint


def test_kv_bytes_by_hand():
    spec = tiny_spec("llama")
    assert spec.kv_bytes(10, batch_size=2, itemsize=4) == 2 * 3 * 2 * 32 * 10 * 2 * 4


def test_an_unknown_module_is_named():
    with pytest.raises(PlanError, match="tiny-llama has no module 'model.layers.9.mlp'"):
        tiny_spec("llama").module("model.layers.9.mlp")


def test_numbers_and_table_agree():
    spec = tiny_spec("llama")
    assert spec.table()["parameters"].sum() == spec.num_parameters == spec.to_dict()["parameters"]
    assert spec.to_dict()["kv_bytes_per_token"] == spec.kv_bytes(1)


def encoder_config():
    from transformers import T5Config

    return T5Config(d_model=16, num_layers=1, num_heads=2, vocab_size=32)


def broken_config():
    return tiny_config("llama", hidden_act="no-such-function")


@pytest.mark.parametrize("make", [encoder_config, broken_config])
def test_a_config_that_transformers_cannot_build(make):
    config = make()
    with pytest.raises(CheckpointError) as error:
        ModelSpec.from_config(config)
    assert config.model_type in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_whose_layers_are_not_found_says_what_was_looked_for():
    model = torch.nn.Module()
    with pytest.raises(CheckpointError, match=r"looked for a list .* of 4 decoder layers .*, found no list at all"):
        spec_module._find_layers(model, 4)
    model.stack = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(CheckpointError, match="found stack of 3: this architecture is not supported"):
        spec_module._find_layers(model, 4)
    assert spec_module._find_layers(model, 3) == "stack"
