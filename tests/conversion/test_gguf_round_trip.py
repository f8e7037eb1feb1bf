"""Out to GGUF and back: the same logits, config and token ids, or a refusal; and llama.cpp computes them too.

Random models of every family, written here, opened here, run by stock transformers. llama.cpp's part is skipped where
llama-cpp-python is not installed.
"""

import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowvram_lab.conversion.gguf_export import export_gguf
from lowvram_lab.errors import CheckpointError
from lowvram_lab.model.source import find_source
from tests.conversion.test_gguf_export import (
    MEAN,
    byte_level,
    make_model,
    open_in_llama_cpp,
    own_cache,  # noqa: F401
    sentencepiece,
)

THETAS = (1e4, 5e5, 12345.5)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "default": [{}],
    "linear": [{"factor": 2.0}, {"factor": 3.7}],
    "yarn": [
        {"factor": 4.0, "original_max_position_embeddings": 128},
        {"factor": 2.5, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0},
    ],
    "llama3": [LLAMA3, LLAMA3 | {"factor": 32.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 96}],
}
FACTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "rms_norm_eps", "tie_word_embeddings", "eos_token_id",
)  # fmt: skip

tokenizer_of = functools.cache(byte_level)


@st.composite
def configs(draw) -> dict:
    """A family, and what may differ between two models of it."""
    kind = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]))
    heads = draw(st.sampled_from([1, 2, 4]))
    values = {
        "model_type": kind,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "hidden_size": draw(st.sampled_from([32, 64, 96])),
        "intermediate_size": draw(st.sampled_from([48, 80, 100])),
        "num_attention_heads": heads,
        "num_key_value_heads": draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        "vocab_size": draw(st.sampled_from([503, 512, 521])),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "max_position_embeddings": draw(st.sampled_from([256, 1000])),
        "bos_token_id": draw(st.sampled_from([0, None])),
        "pad_token_id": draw(st.sampled_from([2, None])),
    }
    if kind == "qwen3" or (kind != "qwen2" and draw(st.booleans())):
        values["head_dim"] = draw(st.sampled_from([16, 24, 40]))
    if kind == "llama":
        values |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    scaling = draw(
        st.sampled_from(list(SCALINGS)[: -1 if kind.startswith("qwen") and draw(st.integers(0, 9)) else None])
    )
    rope = {
        "rope_type": scaling,
        "rope_theta": draw(st.sampled_from(THETAS)),
        **draw(st.sampled_from(SCALINGS[scaling])),
    }
    values["rope_parameters"] = rope
    if kind != "llama":
        values["sliding_window"] = draw(st.sampled_from([None, 1000, 200]))
    if kind.startswith("qwen"):
        values |= {"use_sliding_window": draw(st.booleans()), "max_window_layers": draw(st.integers(0, 2))}
    return values


def stock(directory: Path, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def logits_of(directory: Path, ids: list[int], tensor_type: str = "f32") -> torch.Tensor:
    """In float32, of the weights as that type holds them."""
    model = stock(directory)
    with torch.no_grad():
        for parameter in model.parameters() if tensor_type == "f16" else ():
            parameter.copy_(parameter.half())
        return model(torch.tensor([ids])).logits[0]


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def llama_cpp_logits(path: Path, ids: list[int], context: int, last: int) -> torch.Tensor:
    """Of the last tokens, in float32 with a float32 cache."""
    engine = open_in_llama_cpp(path, n_ctx=context, n_batch=512, logits_all=True, type_k=0, type_v=0)
    engine.eval(ids)
    logits = torch.from_numpy(engine.scores[len(ids) - last : len(ids)].copy())
    engine.close()
    return logits


def has_llama_cpp() -> bool:
    from importlib.util import find_spec

    return find_spec("llama_cpp") is not None


def window_of(values: dict) -> int | None:
    """The window of a layer that slides."""
    if values["model_type"] == "mistral":
        return values["sliding_window"]
    slides = values.get("use_sliding_window") and values["max_window_layers"] < values["num_hidden_layers"]
    return values["sliding_window"] if slides else None


def check_round_trip(folder: Path, values: dict, tensor_type: str) -> None:
    """Exports, opens, and compares; where a window is shorter than the context, only a file as short as that."""
    kind = values["model_type"]
    model = make_model(
        folder / "m", kind, tokenizer_of("qwen2" if kind.startswith("qwen") else "gpt-2"), None, False, **values
    )
    out, options = folder / "m.gguf", {"tensor_type": tensor_type, "progress": False}
    longest = values["max_position_embeddings"]
    if (window := window_of(values) or longest) < longest:
        with pytest.raises(CheckpointError, match=f"--context {window}"):
            export_gguf(model, out, **options)
        options["context"] = longest = window
    export_gguf(model, out, **options)
    back, config = find_source(out), find_source(model).config()
    read = back.config()
    for name in FACTS:
        assert getattr(read, name) == getattr(config, name), name
    assert read.max_position_embeddings == longest
    tokenizer = find_source(model).tokenizer()  # whose token it is, where it has one
    assert read.bos_token_id == tokenizer.bos_token_id
    assert read.pad_token_id == (config.pad_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    expected = {key: value for key, value in config.rope_parameters.items() if not key.startswith("beta")}
    assert read.rope_parameters == expected
    ids = torch.randint(3, 490, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = logits_of(model, ids, tensor_type)
    assert error_of(logits_of(back.fetch(progress=False), ids), wanted) < 1e-5
    if has_llama_cpp():
        assert error_of(llama_cpp_logits(out, ids, 160, len(ids)), wanted) < (1e-3 if tensor_type == "f32" else 5e-3)


@settings(max_examples=64, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(values=configs(), tensor_type=st.sampled_from(["f32", "f32", "f16"]))
def test_what_is_written_is_read_back(values, tensor_type):
    folder = Path(tempfile.mkdtemp())
    try:
        check_round_trip(folder, values, tensor_type)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_tokenizer_is_read_back(tmp_path, pre, kind):
    tokenizer = byte_level(pre, bos=pre == "llama-bpe")
    tokenizer.add_special_tokens(["<｜User｜>"])
    tokenizer.add_tokens(["<think>", "工具"])
    model = make_model(tmp_path / "m", kind, tokenizer)
    export_gguf(model, tmp_path / "m.gguf", tensor_type="q8_0", progress=False)
    original, read = find_source(model).tokenizer(), find_source(tmp_path / "m.gguf").tokenizer()
    for text in [*MEAN, "e\u0301<｜User｜>1234<think>工具 ", ""]:
        ids = original(text)["input_ids"]
        assert read(text)["input_ids"] == ids, text
        assert read.decode(ids) == original.decode(ids)
        skipped = original.decode(ids, skip_special_tokens=True)
        assert read.decode(ids, skip_special_tokens=True) == skipped
    for name in ("bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(read, name) == getattr(original, name)
    assert read.chat_template == original.chat_template and len(read) == len(original)


@pytest.mark.parametrize("metaspace", [None, "never"])
def test_a_sentencepiece_tokenizer_is_read_back(tmp_path, metaspace):
    model = make_model(tmp_path / "m", tokenizer=sentencepiece(metaspace), vocab_size=2048, eos_token_id=2)
    export_gguf(model, tmp_path / "m.gguf", tensor_type="q8_0", progress=False)
    original, read = find_source(model).tokenizer(), find_source(tmp_path / "m.gguf").tokenizer()
    for text in [*MEAN, "a</s>b <s> c", " 你ü", ""]:
        ids = original(text)["input_ids"]
        assert read(text)["input_ids"] == ids, text
        assert read.decode(ids) == original.decode(ids)


LONG = {
    "llama": {"tie_word_embeddings": True},
    "llama-llama3": {"rope_parameters": {**LLAMA3, "rope_type": "llama3", "rope_theta": 5e5}, "attention_bias": True},
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "mistral": {"head_dim": 24, "sliding_window": 8192},
    "mistral-yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **SCALINGS["yarn"][0]}},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6000, "max_window_layers": 1},
    "qwen2-yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 2048
        }
    },
    "qwen3": {"head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3-linear": {"head_dim": 16, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}},
}  # fmt: skip
HALF = ("llama-llama3", "mistral-yarn", "qwen2", "qwen3")


@pytest.mark.parametrize(
    ("name", "tensor_type"),
    [
        *((name, "f32") for name in LONG),
        *((name, "f16") for name in ("llama-llama3", "mistral-yarn", "qwen2", "qwen3")),
    ],
)
def test_llama_cpp_agrees_at_64_1024_and_6000_tokens(tmp_path, name, tensor_type):
    """The last 16 rows of each length, logits and greedy tokens; causal attention makes one run three prompts."""
    pytest.importorskip("llama_cpp")
    kind = name.partition("-")[0]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 8192}
    tokenizer = tokenizer_of("qwen2" if kind.startswith("qwen") else "gpt-2")
    model = make_model(tmp_path / "m", kind, tokenizer, **{**sizes, "sliding_window": None, **LONG[name]})
    export_gguf(model, tmp_path / "m.gguf", tensor_type=tensor_type, context=6000, progress=False)
    ids = torch.randint(3, 490, (6000,), generator=torch.Generator().manual_seed(2)).tolist()
    found, expected = llama_cpp_logits(tmp_path / "m.gguf", ids, 8192, len(ids)), logits_of(model, ids)
    for tokens in (64, 1024, 6000):
        rows = slice(tokens - 16, tokens)
        assert error_of(found[rows], expected[rows]) < {"f32": 1e-3, "f16": 5e-3}[tensor_type], tokens
        if tensor_type == "f32":
            assert torch.equal(found[rows].argmax(-1), expected[rows].argmax(-1)), tokens
