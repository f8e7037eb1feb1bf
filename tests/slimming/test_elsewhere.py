"""Slimmed models outside this library: stock transformers and llama.cpp say what our decoder says, token for token."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lowvram_lab.chat.completion import CompletionSession
from lowvram_lab.conversion.gguf_export import export_gguf
from lowvram_lab.engine.load import load
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.repository.text import first_ids
from lowvram_lab.slimming.slim import slim_vocabulary
from lowvram_lab.slimming.slim_layers import slim_layers
from tests.conversion.test_gguf_export import make_model, open_in_llama_cpp

TOKENS = 32


def ours(directory, prompt) -> str:
    """What the library's own decoder says, in float32."""
    source = find_source(str(directory))
    model = load(Plan.uniform(source.spec(), "fp32", context=256, dtype="fp32"), open_gpu(None), progress=False)
    return CompletionSession(model, source.tokenizer(), max_new_tokens=TOKENS, progress=False).ask(prompt)


@torch.no_grad()
def stock(directory, ids) -> list[int]:
    """The likeliest token each time, by stock transformers in float32."""
    model, said = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), list(ids)
    for _ in range(TOKENS):
        said.append(model(torch.tensor([said]), use_cache=False).logits[0, -1].argmax().item())
    return said[len(ids) :]


def llama_cpp(directory, ids, tmp_path) -> list[int]:
    """The same by llama.cpp, of a float16 file."""
    export_gguf(directory, tmp_path / "m.gguf", tensor_type="f16", progress=False)
    engine = open_in_llama_cpp(tmp_path / "m.gguf", n_ctx=256, logits_all=True, type_k=0, type_v=0)
    engine.eval(ids)
    said = []
    for _ in range(TOKENS):
        said.append(int(np.argmax(engine.scores[engine.n_tokens - 1])))
        engine.eval(said[-1:])
    return said


def all_say_the_same(directory, prompt, tmp_path):
    tokenizer = find_source(str(directory)).tokenizer()
    ids = first_ids(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    expected = stock(directory, ids)
    assert len(set(expected)) > 4
    ends = [at for at, token in enumerate(expected) if token == tokenizer.eos_token_id]
    whole = tokenizer.decode(ids + expected[: (ends or [TOKENS])[0]], skip_special_tokens=True)
    assert ours(directory, prompt) == whole[len(tokenizer.decode(ids, skip_special_tokens=True)) :].rstrip("\ufffd")
    assert llama_cpp(directory, ids, tmp_path) == expected


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))


def test_fewer_tokens_and_fewer_layers(cache, tmp_path):
    pytest.importorskip("llama_cpp")
    source = make_model(tmp_path / "source", "llama", num_hidden_layers=4)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox, 12 + 30 = 42\n" * 60)
    options = {"referee": False, "progress": False}
    slim_vocabulary(str(source), tmp_path / "tokens", vocab="text", texts=text, **options)
    slim_layers(str(tmp_path / "tokens"), tmp_path / "layers", 1, tokens=2048, **options)
    all_say_the_same(tmp_path / "layers", "the quick brown", tmp_path)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("prompt", ["The capital of France is", "def add(a, b):\n", "水的沸点是"])
def test_the_built_in_model(tmp_path, prompt):
    pytest.importorskip("llama_cpp")
    options = {"referee": False, "progress": False}
    slim_vocabulary("smollm2-135m", tmp_path / "tokens", vocab=16384, **options)
    slim_layers(str(tmp_path / "tokens"), tmp_path / "layers", [13, 14, 17], tokens=4096, **options)
    all_say_the_same(tmp_path / "layers", prompt, tmp_path)
