"""Tiny models that really were trained, for seconds: to them it matters whether a window begins with BOS."""

import functools
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lowvram_lab.packaged import calibration_text

# as in helpers/tiny.py: matrices this small only wait for a second thread
torch.set_num_threads(1)

CONTEXT = 96
STEPS = 160
VOCABULARY = 400
CONTROL = ("<unk>", "<s>", "</s>")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
TRAINED = {"llama": True, "mistral": True, "qwen2": False}
"""Kind → whether its windows began with BOS in training."""


@functools.cache
def _backend(kind: str) -> str:
    """The JSON of a tokenizer without a post-processor: byte-level, or as SentencePiece does it.

    Its merges are counted here: what the tokenizers library trains differs from run to run.
    """
    text = calibration_text()[:20_000]
    if kind == "qwen2":
        splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
        words = [word for word, _ in splitter.pre_tokenize_str(text)]
        base = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    else:
        words = [word.replace(" ", "▁") for word in re.findall(r" ?\S+", text)]
        letters = [letter for letter, _ in _commonest("".join(words), 60)]
        base = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    pairs = [pair for pair, _ in _commonest((pair for word in words for pair in pairwise(word)), None)]
    merges = [pair for pair in pairs if set(pair) <= set(base)][: VOCABULARY - len(base)]
    vocabulary = {token: index for index, token in enumerate([*base, *map("".join, merges)])}
    spoken = {} if kind == "qwen2" else {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, **spoken))
    tokenizer.add_special_tokens(list(CONTROL))
    if kind == "qwen2":
        tokenizer.pre_tokenizer = splitter
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if kind == "llama":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    if kind == "mistral":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return tokenizer.to_str()


def _commonest(things, count: int | None) -> list[tuple]:
    return sorted(Counter(things).items(), key=lambda item: (-item[1], item[0]))[:count]


def write_tokenizer(folder: Path, kind: str, begins: bool) -> None:
    """Files as checkpoints have them: BOS in the post-processor (llama, qwen2), or in ``add_bos_token`` alone."""
    tokenizer = Tokenizer.from_str(_backend(kind))
    if begins and kind != "mistral":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    classes = {"llama": "LlamaTokenizer", "mistral": "PreTrainedTokenizerFast", "qwen2": "Qwen2Tokenizer"}
    facts = {
        "tokenizer_class": classes[kind],
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
    }
    if kind == "mistral":
        facts["add_bos_token"] = begins
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


def _config(kind: str):
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    if kind == "llama":
        return LlamaConfig(**SIZES, tie_word_embeddings=True)
    if kind == "mistral":
        return MistralConfig(**SIZES, sliding_window=None)
    return Qwen2Config(**SIZES, tie_word_embeddings=False)


@functools.cache
def _trained(kind: str):
    """A stock model in float32, trained on windows that all begin with BOS, or none of them."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    ids = torch.tensor(Tokenizer.from_str(_backend(kind)).encode(calibration_text()[:60_000]).ids)
    model = AutoModelForCausalLM.from_config(_config(kind))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    body = 32 - TRAINED[kind]
    for step in range(STEPS):
        starts = torch.randint(0, len(ids) - body, (16, 1))
        batch = ids[starts + torch.arange(body)]
        if TRAINED[kind]:
            batch = torch.cat((torch.ones(16, 1, dtype=torch.int64), batch), dim=1)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - (step + 1) / STEPS)
    return model.eval()


def write_trained(folder: Path, kind: str, begins: bool | None = None) -> Path:
    """A model directory.

    Args:
        folder: Made.
        kind: Of ``TRAINED``.
        begins: Whether its tokenizer adds BOS; by default as it was trained.
    """
    _trained(kind).save_pretrained(folder)
    write_tokenizer(folder, kind, TRAINED[kind] if begins is None else begins)
    return folder
