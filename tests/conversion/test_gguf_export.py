"""Writing GGUF: what is in the file, read with other code than wrote it; what llama.cpp makes of it; what is refused.

llama.cpp's part is skipped where llama-cpp-python is not installed.
"""

import argparse
import json
import re
import weakref
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from lowvram_lab.cli import export as cli_export
from lowvram_lab.conversion import gguf_export
from lowvram_lab.conversion.convert import convert
from lowvram_lab.conversion.gguf_export import TYPES, export_gguf
from lowvram_lab.errors import CheckpointError, LowvramError, SourceError
from lowvram_lab.model import low_plane
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.compressed import quantization_config
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.repository.gguf_header import read_gguf_header
from lowvram_lab.weights.solvers import round_to_nearest
from lowvram_lab.weights.stored import to_stored
from tests.helpers.checkpoints import directory_spec, restored_state
from tests.helpers.tiny import CHAT_TEMPLATE, SIZES, random_state, relative_error

TEXT = (
    "The quick brown fox doesn't jump over 12 lazy dogs in 2024; they'll say: 'We've had it!' Numbers: 3.14159, 007. "
    "1000000. Grüße, déjà vu, naïve. Привет, мир! 你好，世界。こんにちは。 مرحبا 🙂 e\u0301\n\n\tx = y  +   z\r\n"
) * 3
MEAN = [
    "Hello world",
    "I'd say we'LL do it, they've gone; don't",
    "0 12 123 1234 12345678 3.14 ١٢٣ ½ ²",
    "a   1  b    22\t\t333",
    "  leading and trailing   ",
    "\n\n\nnew\r\nlines \n \n x",
    "你好，世界 12 こんにちは안녕",
    "🙂👩‍👩‍👧🇩🇪 e\u0301 \u200b\u00a0|",
    "snake_case CamelCase http://x.y/z?a=1&b=2 {[()]} ---- ====",
    "<|im_start|>user\nhi 5<|im_end|>\n<|im_start|>assistant\n",
    "half <|im_end| of a token, <|pad|>, and <tool>twice<tool> ",
    "Ünïcödé ǅ ß ẞ ﬁ Ω≈ç√∫",
    "tab\tand\x0bother \u2003 spaces\u3000",
]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
THREE_DIGITS = PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|")
SPLITS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "qwen2": [PRETOKENIZE_REGEX],
    "llama-bpe": [THREE_DIGITS],  # Llama 3's
    "smaug-bpe": [THREE_DIGITS],
}


def byte_level(pre: str, bos: bool = False) -> Tokenizer:
    """A byte-level tokenizer with a few hundred merges, its text split as a family's is."""
    tokenizer = Tokenizer(models.BPE())
    patterns = [isinstance(step, str) for step in SPLITS[pre]]
    steps = [pre_tokenizers.Split(Regex(s), "isolated") if isinstance(s, str) else s for s in SPLITS[pre]]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not any(patterns)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_tokens(["<tool>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
        )
    facts = json.loads(tokenizer.to_str())
    facts["model"]["ignore_merges"] = pre == "llama-bpe"
    if pre == "qwen2":
        facts["normalizer"] = {"type": "NFC"}
    return Tokenizer.from_str(json.dumps(facts))


def sentencepiece(metaspace: str | None = None) -> Tokenizer:
    """A SentencePiece vocabulary as byte-pair merges: every way to make a piece is a merge, in the pieces' order."""
    words = sorted({word for word in re.findall(r"\S+", TEXT) if word.isascii()}, key=lambda word: (len(word), word))
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    made = dict.fromkeys(("▁" + word)[:end] for word in words for end in range(2, len(word) + 2))
    made |= dict.fromkeys(word[a : a + 2] for word in words for a in range(len(word) - 1))
    made |= {"▁▁": None, "▁▁▁▁": None}
    characters = sorted({c for word in words for c in word} | {"▁", "ü", "你"})
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *pieces, *made, *characters])}
    merges = [(p[:k], p[k:]) for p in made for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


KINDS = {
    "llama": {"tie_word_embeddings": True},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 48},
    "llama-llama3": {
        "model_type": "llama",
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"head_dim": 48, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": False, "intermediate_size": 176},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"head_dim": 48, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 512}
LONGROPE |= {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}


def make_config(kind: str, **changes):
    from transformers import AutoConfig

    values = {**SIZES, "vocab_size": 512, "bos_token_id": 0, "pad_token_id": 2, **KINDS.get(kind, {}), **changes}
    return AutoConfig.for_model(values.pop("model_type", kind), **values)


def make_model(
    folder: Path, kind: str = "llama", tokenizer: Tokenizer | None = None, state=None, rounded=True, **changes
) -> Path:
    """A directory with random weights (bfloat16 values, stored in float32) and a tokenizer."""
    from transformers import PreTrainedTokenizerFast

    config = make_config(kind, **changes)
    config.save_pretrained(folder)
    state = state or float_state(config, rounded)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    tokenizer = tokenizer or byte_level("qwen2" if "qwen" in kind else "gpt-2")
    names = ("<s>", "</s>", "<unk>") if tokenizer.token_to_id("<s>") else (*SPECIAL[:2], None)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{key: name for key, name in zip(("bos_token", "eos_token", "unk_token"), names, strict=True) if name},
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def float_state(config, rounded: bool = True) -> dict[str, torch.Tensor]:
    """Random weights that move far enough from the embedding that a greedy answer wanders."""
    state = random_state(ModelSpec.from_config(config, "tiny"))
    for name in state:
        state[name] *= 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
    return {name: value.to(torch.bfloat16).float() for name, value in state.items()} if rounded else state


def exported(path: Path, config) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The file's tensors by transformers' names, with rows where transformers has them; and their GGML types."""
    arch = gguf.MODEL_ARCH.LLAMA if config.model_type in ("llama", "mistral") else None
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    weights, types = {}, {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        values = values.reshape(tensor.shape[::-1])
        *layer, short, key = tensor.name.split(".")
        if arch and short in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if short == "attn_q" else config.num_key_value_heads
            values = values.reshape(heads, len(values) // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        name = f"model.layers.{layer[1]}.{names[short]}.{key}" if layer else f"{names[short]}.{key}"
        weights[name], types[name] = torch.from_numpy(values), tensor.tensor_type.name.lower()
    return weights, types


def refused(call, *arguments, error=LowvramError, match=None, **named) -> None:
    with pytest.raises(error, match=match) as caught:
        call(*arguments, **named)
    assert "\n" not in str(caught.value)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path_factory.mktemp("cache")))


# ---- weights ----


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_the_model(tmp_path, kind):
    model = make_model(tmp_path / "m", kind)
    made = export_gguf(model, tmp_path / "m.gguf", tensor_type="f32", progress=False)
    config, state = find_source(model).config(), {name: Checkpoint(model).read(name) for name in Checkpoint(model)}
    weights, types = exported(tmp_path / "m.gguf", config)
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) for name in state)
    assert set(types.values()) == {"f32"}
    has_factors = "rope_freqs.weight" in read_gguf_header(tmp_path / "m.gguf").tensors
    assert has_factors == (kind == "llama-llama3")
    assert made.tensors == len(state) + has_factors
    assert made.tensor_bytes == 4 * (sum(value.numel() for value in state.values()) + 16 * has_factors)
    assert made.file_bytes == (tmp_path / "m.gguf").stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_reads_back_as_the_model(tmp_path, kind):
    """By the other direction: weights, config and chat template."""
    model = make_model(tmp_path / "m", kind)
    export_gguf(model, tmp_path / "m.gguf", tensor_type="f32", progress=False)
    back, config, expected = (
        find_source(tmp_path / "m.gguf"),
        *(find_source(p).config() for p in (tmp_path / "m.gguf", model)),
    )
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_key_value_heads",
        "rms_norm_eps",
        "vocab_size",
        "eos_token_id",
    ):
        assert getattr(config, key) == getattr(expected, key), key
    assert config.rope_parameters == expected.rope_parameters
    assert config.tie_word_embeddings == expected.tie_word_embeddings
    assert getattr(config, "head_dim", 32) == getattr(expected, "head_dim", 32)
    original, read = Checkpoint(model), back.checkpoint()
    assert set(read) == set(original)
    assert all(torch.equal(read.read(name).float(), original.read(name)) for name in original)
    assert back.tokenizer().chat_template == CHAT_TEMPLATE


def test_llama3_factors_divide_the_frequencies(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(tmp_path / "m", "llama-llama3")
    export_gguf(model, tmp_path / "m.gguf", progress=False)
    factors = next(t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight")
    rotary = AutoModelForCausalLM.from_pretrained(model).model.rotary_emb.inv_freq.numpy()
    plain = 10000.0 ** (-np.arange(0, 32, 2) / 32)
    assert factors.shape == (16,) and factors.max() > 2
    np.testing.assert_allclose(plain / factors, rotary, rtol=1e-6)


@pytest.mark.parametrize("type", TYPES)
def test_types(tmp_path, type):
    model = make_model(tmp_path / "m", "qwen2")  # intermediate_size 176: rows that are no multiple of 32
    made = export_gguf(model, tmp_path / "m.gguf", tensor_type=type, progress=False)
    state = {name: Checkpoint(model).read(name) for name in Checkpoint(model)}
    weights, types = exported(tmp_path / "m.gguf", find_source(model).config())
    for name, value in state.items():
        expected = "f32" if value.ndim == 1 else type
        if type in ("q8_0", "q4_1") and value.shape[-1] % 32:
            expected = "f16"
        if type == "q4_1" and name in ("model.embed_tokens.weight", "lm_head.weight"):
            expected = "q8_0"
        assert types[name] == expected, name
        kind = gguf.GGMLQuantizationType[expected.upper()]
        best = gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind)
        assert np.array_equal(weights[name].numpy(), best.reshape(value.shape)), name
    if type.startswith("q"):
        assert types["model.layers.0.mlp.down_proj.weight"] == "f16"
    assert made.types == {kind: list(types.values()).count(kind) for kind in made.types}
    assert sum(made.types.values()) == len(state)


FORMATS = {
    "model.embed_tokens": "int8",
    "self_attn.q_proj": "int3",
    "self_attn.k_proj": "int4-g32",
    "self_attn.v_proj": "int8",
    "self_attn.o_proj": "int2-g128",
    "mlp.gate_proj": "int5",
    "mlp.up_proj": "int4-g128",
    "mlp.down_proj": "int4-g96",
}


def make_converted(folder: Path, kind: str = "llama") -> Path:
    """A directory in the format that ``convert`` writes, each projection in another of its formats."""
    make_model(folder, kind)
    spec = find_source(folder).spec("tiny")
    state, formats = {name: Checkpoint(folder).read(name) for name in Checkpoint(folder)}, {}
    for module in spec.modules:
        fmt = next((fmt for end, fmt in FORMATS.items() if module.name.endswith(end)), None)
        if fmt:
            formats[module.name] = fmt
            solved = round_to_nearest(state.pop(f"{module.name}.weight"), get_format(fmt))
            state |= to_stored(module.name, solved, get_format(fmt))
    if spec.tied:
        formats[spec.head] = formats[spec.embedding]
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config(formats)}))
    return folder


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied"])
@pytest.mark.parametrize("type", ["f32", "q8_0", "q4_1"])
def test_a_converted_directory_keeps_its_weights(tmp_path, kind, type):
    """Exactly: codes times scale, as they are taken out of the stored words bit by bit."""
    model = make_converted(tmp_path / "m", kind)
    made = export_gguf(model, tmp_path / "m.gguf", tensor_type=type, progress=False)
    weights, types = exported(tmp_path / "m.gguf", find_source(model).config())
    expected = restored_state(model)
    assert weights.keys() == expected.keys()
    for name in expected:
        assert torch.equal(weights[name], expected[name]), (name, types[name])
    assert made.kept_codes == (0 if type == "f32" else 1 + 3 * 7)
    if type == "q4_1":
        down, gate = types["model.layers.0.mlp.down_proj.weight"], types["model.layers.0.mlp.gate_proj.weight"]
        assert (down, gate) == ("q4_1", "q8_0")


def test_low_planes_stay_behind_and_a_line_says_so(tmp_path, caplog):
    caplog.set_level("WARNING")
    model = make_model(tmp_path / "m", "qwen2")
    plan = Plan.uniform(directory_spec(model), "int4+4", context=512)
    convert(model, tmp_path / "planes", plan=plan, calibration_tokens=2048, solver="rtn", progress=False)
    export_gguf(tmp_path / "planes", tmp_path / "planes.gguf", tensor_type="q4_1", progress=False)
    (said,) = [record.getMessage() for record in caplog.records if "low planes" in record.getMessage()]
    assert said.endswith("a GGUF file has no low planes; it will hold the high ones, an int4 model")
    (tmp_path / "planes" / low_plane.FILE).unlink()
    export_gguf(tmp_path / "planes", tmp_path / "high.gguf", tensor_type="q4_1", progress=False)
    assert (tmp_path / "planes.gguf").read_bytes() == (tmp_path / "high.gguf").read_bytes()


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    model, alive, most = make_model(tmp_path / "m"), weakref.WeakSet(), []
    original = Checkpoint.read

    def read(self, name):
        tensor = original(self, name)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", read)
    export_gguf(model, tmp_path / "m.gguf", progress=False)
    assert len(most) > 20 and max(most) == 1


@pytest.mark.parametrize("elements", [128, 1000])
def test_pieces_make_the_same_file(tmp_path, monkeypatch, elements):
    model = make_converted(tmp_path / "m")
    for name in ("whole", "pieces"):
        export_gguf(model, tmp_path / f"{name}.gguf", tensor_type="q8_0", progress=False)
        monkeypatch.setattr(gguf_export, "_ELEMENTS_AT_ONCE", elements)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_is_refused_beyond_itself(tmp_path, kind):
    slides = {} if kind == "mistral" else {"use_sliding_window": True, "max_window_layers": 2}
    model = make_model(tmp_path / "m", kind, sliding_window=256, **slides)
    options = {"progress": False, "error": CheckpointError, "match": "sliding window of 256 .*--context 256"}
    for context in (None, 257):
        refused(export_gguf, model, tmp_path / "m.gguf", context=context, **options)
    assert list(tmp_path.iterdir()) == [model]
    made = export_gguf(model, tmp_path / "m.gguf", context=256, progress=False)
    header = read_gguf_header(tmp_path / "m.gguf")
    assert header.metadata[f"{header.architecture}.context_length"] == made.context == 256
    assert find_source(tmp_path / "m.gguf").spec().longest_context == 256


def test_a_context_of_no_effect(tmp_path):
    model = make_model(tmp_path / "m", "mistral", sliding_window=1024)
    assert export_gguf(model, tmp_path / "m.gguf", progress=False).context == 1024
    for context in (0, 1025):
        says = f"context of 1 to 1024 tokens, found {context}"
        refused(export_gguf, model, tmp_path / "n.gguf", context=context, error=CheckpointError, match=says)


# ---- vocabulary ----


@pytest.mark.parametrize("pre", SPLITS)
def test_pre_tokenizer_is_recognised(tmp_path, pre):
    kind = "qwen2" if pre == "qwen2" else "llama"
    model = make_model(tmp_path / "m", kind, byte_level(pre, bos=pre == "llama-bpe"))
    made = export_gguf(model, tmp_path / "m.gguf", tensor_type="q8_0", progress=False)
    found = read_gguf_header(tmp_path / "m.gguf").metadata
    assert made.pre_tokenizer == found["tokenizer.ggml.pre"] == pre
    tokenizer = find_source(model).tokenizer()
    size = len(tokenizer)
    assert found["tokenizer.ggml.tokens"][:size] == tokenizer.convert_ids_to_tokens(list(range(size)))
    assert found["tokenizer.ggml.tokens"][size:] == [f"[PAD{i}]" for i in range(size, 512)]
    types = found["tokenizer.ggml.token_type"]
    assert types[:3] == [3, 3, 3] and types[tokenizer.convert_tokens_to_ids("<tool>")] == 4 and types[-1] == 5
    assert found["tokenizer.ggml.add_bos_token"] is (pre == "llama-bpe")
    assert found["tokenizer.ggml.eos_token_id"] == 1
    assert found["tokenizer.chat_template"] == CHAT_TEMPLATE
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_sentencepiece_scores_follow_the_merges(tmp_path):
    model = make_model(tmp_path / "m", tokenizer=sentencepiece(), vocab_size=2048, eos_token_id=2)
    export_gguf(model, tmp_path / "m.gguf", tensor_type="q8_0", progress=False)
    found = read_gguf_header(tmp_path / "m.gguf").metadata
    tokens, scores = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]
    assert found["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.merges" not in found
    assert found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert len(tokens) == len(scores) == 2048
    score = dict(zip(tokens, scores, strict=True))
    assert score["▁▁"] > score["▁▁▁▁"]  # made first, so the better one
    assert found["tokenizer.ggml.add_space_prefix"] is found["tokenizer.ggml.add_bos_token"] is True
    read = find_source(tmp_path / "m.gguf").tokenizer()
    original = find_source(model).tokenizer()
    for text in ("The quick brown fox", "they'll say: 3.14"):
        assert read(text)["input_ids"] == original(text)["input_ids"]


def test_a_gguf_keeps_its_own_pre_tokenizer(tmp_path):
    model = make_model(tmp_path / "m", tokenizer=byte_level("smollm"))
    export_gguf(model, tmp_path / "a.gguf", progress=False)
    export_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", progress=False)
    first, second = (read_gguf_header(tmp_path / f"{name}.gguf").metadata for name in "ab")
    assert second["tokenizer.ggml.pre"] == "smollm"
    for key in ("tokens", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert second[f"tokenizer.ggml.{key}"] == first[f"tokenizer.ggml.{key}"], key


def test_stop_tokens(tmp_path):
    model = make_model(tmp_path / "m")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|pad|>"}))
    export_gguf(model, tmp_path / "m.gguf", progress=False)
    found = read_gguf_header(tmp_path / "m.gguf").metadata
    assert found["tokenizer.ggml.eos_token_id"] == 2
    assert found["tokenizer.ggml.eot_token_id"] == 1  # <|im_end|>, which the chat template writes
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    export_gguf(model, tmp_path / "n.gguf", progress=False)
    found = read_gguf_header(tmp_path / "n.gguf").metadata
    assert found["tokenizer.ggml.eos_token_id"] == 1 and "tokenizer.ggml.eot_token_id" not in found


def changed(tokenizer: Tokenizer, **changes) -> Tokenizer:
    """The tokenizer with parts replaced; ``model__x`` is a part of its model."""
    facts = json.loads(tokenizer.to_str())
    for key, value in changes.items():
        where, _, part = key.rpartition("__")
        (facts[where] if where else facts)[part] = value
    return Tokenizer.from_str(json.dumps(facts))


def with_spaces(tokenizer: Tokenizer) -> Tokenizer:
    """With a token that takes the spaces after it."""
    tokenizer.add_tokens([AddedToken("<odd>", rstrip=True)])
    return tokenizer


SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (lambda: changed(byte_level("gpt-2"), pre_tokenizer=SPLIT), r"found \\w\+"),
        (lambda: changed(byte_level("gpt-2"), pre_tokenizer={"type": "Whitespace"}), "found Whitespace"),
        (lambda: changed(byte_level("gpt-2"), pre_tokenizer=None), "found none"),
        (lambda: changed(byte_level("gpt-2"), normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
        (lambda: changed(byte_level("gpt-2"), model__ignore_merges=True), "ignore_merges"),
        (lambda: changed(byte_level("gpt-2"), model__dropout=0.1), "dropout"),
        (lambda: changed(byte_level("gpt-2"), model__merges=[]), "expected byte-pair merges"),
        (lambda: Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), "found WordLevel"),
        (
            lambda: changed(byte_level("llama-bpe"), normalizer={"type": "NFC"}),
            "NFC with the pre-tokenizer qwen2 alone",
        ),
        (lambda: changed(byte_level("qwen2"), normalizer=None), "NFC with the pre-tokenizer qwen2 alone"),
        (lambda: with_spaces(byte_level("gpt-2")), "'<odd>' with rstrip"),
        (lambda: byte_level("gpt-2", bos=True), ""),
    ],
)
def test_tokenizers_refused(tmp_path, tokenizer, says):
    tokenizer, out = tokenizer(), tmp_path / "m.gguf"
    if not says:  # a template that puts another token in front
        single = processors.TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 2)])
        tokenizer.post_processor, says = single, "at most bos before"
    model = make_model(tmp_path / "m", tokenizer=tokenizer)
    refused(export_gguf, model, out, progress=False, error=SourceError, match=says)
    assert list(tmp_path.iterdir()) == [model]


def test_merges_that_scores_cannot_say(tmp_path):
    merges = json.loads(sentencepiece().to_str())["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    twice = next(i for i in range(1, len(made)) if made[i] == made[i - 1])
    without, later = [*merges[:twice], *merges[twice + 1 :]], [*merges[:twice], *merges[twice + 1 :], merges[twice]]
    for number, some in enumerate([without, later]):
        tokenizer = changed(sentencepiece(), model__merges=some)
        model = make_model(tmp_path / str(number), tokenizer=tokenizer, vocab_size=2048, eos_token_id=2)
        says = f"scores cannot say how '{re.escape(made[twice])}'"
        refused(export_gguf, model, tmp_path / "m.gguf", progress=False, error=SourceError, match=says)


def test_more_tokens_than_rows(tmp_path):
    model = make_model(tmp_path / "m", vocab_size=300)
    refused(export_gguf, model, tmp_path / "m.gguf", progress=False, error=SourceError, match="no row among.* 300")


# ---- refusals ----


def test_output_refused(tmp_path, monkeypatch):
    model = make_model(tmp_path / "m")
    (tmp_path / "there.gguf").write_text("mine")
    refused(export_gguf, model, tmp_path / "there.gguf", match="exists already")
    assert (tmp_path / "there.gguf").read_text() == "mine"
    refused(export_gguf, model, tmp_path / "m.bin", match="ends in .gguf")
    refused(export_gguf, model, tmp_path / "no" / "m.gguf", match="its folder does not exist")
    refused(export_gguf, model, tmp_path / "m.gguf", tensor_type="q4_k", match="expected type f16, f32.*'q4_k'")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 0, 1000))
    refused(export_gguf, model, tmp_path / "m.gguf", progress=False, match="the export needs .* found 1000 B free")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "there.gguf"]


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("gemma", {}, "expected a model of type llama, mistral, qwen2, qwen3, found gemma"),
        ("llama", {"hidden_act": "gelu"}, "activation silu, found gelu"),
        (
            "llama",
            {"rope_parameters": LONGROPE},
            "RoPE scaling 'longrope'",
        ),
        ("qwen2", {"head_dim": 48}, "expected heads of 32, found of 48"),
        (
            "llama",
            {"rope_parameters": KINDS["llama-llama3"]["rope_parameters"] | {"rope_theta": 2.0}},
            "no frequency of a head of 32 is scaled by llama3's whole factor 8.0",
        ),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "YaRN with beta_fast = 16.0, expected 32"),
        ("mistral", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "YaRN with attention_factor = 1.5"),
        ("qwen3", {"head_dim": 32, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, "mscale = 1.0"),
        ("qwen2", KINDS["llama-llama3"] | {"model_type": "qwen2"}, "RoPE scaling 'llama3' of a qwen2"),
        ("qwen3", {"attention_bias": True}, r"q_proj.bias has no place in a GGUF of a qwen3 model"),
    ],
)
def test_models_refused(tmp_path, kind, changes, says):
    model = make_model(tmp_path / "m", kind, **changes)
    refused(export_gguf, model, tmp_path / "m.gguf", progress=False, error=CheckpointError, match=says)
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(
    ("value", "type", "says"),
    [(float("nan"), "q8_0", "up_proj.weight: expected finite"), (7e4, "f16", "up_proj.weight: .* 65504; choose bf16")],
)
def test_weights_refused_leave_nothing(tmp_path, value, type, says):
    state = float_state(make_config("llama"))
    state["model.layers.2.mlp.up_proj.weight"][3, 5] = value
    model = make_model(tmp_path / "m", state=state)
    options = {"tensor_type": type, "progress": False}
    refused(export_gguf, model, tmp_path / "m.gguf", **options, error=CheckpointError, match=says)
    assert list(tmp_path.iterdir()) == [model]


def test_missing_and_misshapen_tensors(tmp_path):
    state = float_state(make_config("llama"))
    name = "model.layers.2.mlp.up_proj.weight"
    for number, (value, says) in enumerate([(None, "found none"), (state[name][:5], "expected shape .*found")]):
        some = {**state, name: value} if value is not None else {k: v for k, v in state.items() if k != name}
        model = make_model(tmp_path / str(number), state=some)
        refused(export_gguf, model, tmp_path / "m.gguf", progress=False, error=CheckpointError, match=says)


def test_interrupted_leaves_nothing_and_a_leftover_is_written_over(tmp_path, monkeypatch):
    model, written = make_model(tmp_path / "m"), []
    (tmp_path / ".m.gguf.partial").write_bytes(b"of a run that was killed")
    with monkeypatch.context() as patch:
        original = gguf_export._data

        def data(*arguments):
            written.append(1)
            if len(written) > 5:
                raise KeyboardInterrupt
            return original(*arguments)

        patch.setattr(gguf_export, "_data", data)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(model, tmp_path / "m.gguf", progress=False)
        assert list(tmp_path.iterdir()) == [model]
    export_gguf(model, tmp_path / "m.gguf", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.gguf"]


# ---- the command and the result ----


def run_command(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    cli_export.add_export(parser)
    return cli_export.run_export(parser.parse_args([str(word) for word in words]))


def test_command(tmp_path, capsys):
    model = make_converted(tmp_path / "m")
    assert (
        run_command(
            model, "--to", "gguf", "--output", tmp_path / "m.gguf", "--type", "q4_1", "--context", 100, "--json"
        )
        == 0
    )
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["types"] == {"q8_0": 7, "q4_1": 15, "f32": 7} and found["kept_codes"] == 22
    assert found["context"] == 100
    assert "kept their integers" in captured.err and str(tmp_path / "m.gguf") in captured.err
    with pytest.raises(SystemExit):
        run_command(model, "--to", "onnx", "--output", tmp_path / "n.gguf")


def test_result(tmp_path):
    made = export_gguf(make_model(tmp_path / "m"), tmp_path / "m.gguf", progress=False)
    assert "22 in f16" in repr(made) and made.to_dict()["architecture"] == "llama"
    assert made.table().loc["tensors", "found"] == str(made.tensors) and "<table" in made._repr_html_()


# ---- llama.cpp ----


def open_in_llama_cpp(path: Path, **options):
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(path), n_threads=1, n_threads_batch=1, verbose=False, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(tmp_path, kind):
    """Logits of a prompt, and a greedy answer token by token, in float32 with a float32 cache."""
    pytest.importorskip("llama_cpp")
    from transformers import AutoModelForCausalLM

    model = make_model(tmp_path / "m", kind)
    export_gguf(model, tmp_path / "m.gguf", tensor_type="f32", progress=False)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    engine = open_in_llama_cpp(tmp_path / "m.gguf", n_ctx=160, logits_all=True, type_k=0, type_v=0)
    ids = torch.randint(3, 490, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    engine.eval(ids)
    with torch.no_grad():
        logits = stock(torch.tensor([ids])).logits[0]
        assert relative_error(torch.from_numpy(engine.scores[: len(ids)].copy()), logits) < 1e-3
        answer = stock.generate(
            torch.tensor([ids]), max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=2, eos_token_id=511
        )[0][len(ids) :].tolist()
    said = []
    for _ in answer:
        row = engine.scores[engine.n_tokens - 1].copy()
        row[511] = -np.inf  # generate holds its stop token back as well
        said.append(int(row.argmax()))
        engine.eval(said[-1:])
    assert said == answer and len(set(answer)) > 4


@pytest.mark.parametrize("pre", SPLITS)
def test_llama_cpp_sees_the_same_tokens(tmp_path, pre):
    pytest.importorskip("llama_cpp")
    kind = "qwen2" if pre == "qwen2" else "llama"
    model = make_model(tmp_path / "m", kind, byte_level(pre, bos=pre == "llama-bpe"))
    export_gguf(model, tmp_path / "m.gguf", tensor_type="q8_0", progress=False)
    engine, tokenizer = open_in_llama_cpp(tmp_path / "m.gguf", vocab_only=True), find_source(model).tokenizer()
    for text in MEAN:
        text = text.replace("e\u0301", "é") if pre == "qwen2" else text  # NFC is lost: see the vocabulary
        assert engine.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("metaspace", [None, "first", "never"])
def test_llama_cpp_sees_the_same_sentencepieces(tmp_path, metaspace):
    pytest.importorskip("llama_cpp")
    model = make_model(tmp_path / "m", tokenizer=sentencepiece(metaspace), vocab_size=2048, eos_token_id=2)
    export_gguf(model, tmp_path / "m.gguf", tensor_type="q8_0", progress=False)
    engine, tokenizer = open_in_llama_cpp(tmp_path / "m.gguf", vocab_only=True), find_source(model).tokenizer()
    texts = [*MEAN, "a</s>b <s> c"] if metaspace != "first" else [text for text in MEAN if text[0] != " "]
    for text in texts:
        assert engine.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text


def test_llama_cpp_answers_from_a_converted_directory(tmp_path):
    """A float16 file against transformers' arithmetic on the very weights that the stored codes stand for."""
    pytest.importorskip("llama_cpp")
    from transformers import AutoModelForCausalLM

    model = make_converted(tmp_path / "m", "qwen2-tied")
    export_gguf(model, tmp_path / "m.gguf", progress=False)
    stock = AutoModelForCausalLM.from_config(make_config("qwen2-tied"))
    stock.load_state_dict(restored_state(model), strict=False)
    engine = open_in_llama_cpp(tmp_path / "m.gguf", n_ctx=64, logits_all=True)
    ids = list(range(20, 60))
    engine.eval(ids)
    with torch.no_grad():
        logits = stock.eval()(torch.tensor([ids])).logits[0]
    assert relative_error(torch.from_numpy(engine.scores[: len(ids)].copy()), logits) < 5e-3
