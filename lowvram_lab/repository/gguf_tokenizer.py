"""A tokenizer from GGUF metadata: the way back from ``conversion/gguf_vocab.py``.

transformers' own reader leaves control tokens out that are written in other than the byte alphabet, and knows neither
what parts digits nor what puts a token before a text. Byte-level and SentencePiece vocabularies
are read here; other kinds are left to it.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_lab.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowvram_lab.repository.gguf_header import GgufHeader

logger = logging.getLogger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's types of tokens."""

DIGITS, GPT2_PATTERN = "digits", "GPT-2's pattern"
_ONE_DIGIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_THREE_DIGITS = _ONE_DIGIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# what is done before the merges, and whether a word that is a token skips them → llama.cpp's name for it
PRE_TOKENIZERS = {
    ((GPT2_PATTERN,), False): "gpt-2",
    ((DIGITS, GPT2_PATTERN), False): "smollm",
    ((_ONE_DIGIT,), False): "qwen2",
    ((_THREE_DIGITS,), True): "llama-bpe",
    ((_THREE_DIGITS,), False): "smaug-bpe",
}
OTHER_NAMES = {
    "gpt-2": (
        *("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum", "modern-bert"),
        *("mpt", "olmo", "jais", "trillion", "granite-docling", "roberta-bpe", "exaone4"),
    ),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "qwen2": ("stablelm2", "hunyuan"),
}
"""Other names of llama.cpp's under which a text is split as under the first."""

UNNAMED = "default"
_UNNAMED_PATTERNS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
"""What llama.cpp splits by, one after the other, where a file names no pre-tokenizer (``llama-vocab.cpp``)."""

NORMALISED = ("qwen2",)
"""Names of pre-tokenizers whose models also normalise Unicode (NFC), of which GGUF has no word."""

# llama.cpp takes a word that is a token whole, and begins a text with bos where the file does not say
_SKIP_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")


def read_tokenizer(header: GgufHeader, path: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer a file describes; ``None`` where it is of a kind that is not read here.

    Args:
        header: Of the file.
        path: The file, for messages.

    Raises:
        CheckpointError: Its lists do not fit together, or its text is split in a way that is not known here.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    found = {k.removeprefix("tokenizer.ggml."): v for k, v in header.metadata.items() if k.startswith("tokenizer.ggml")}
    kind, tokens = found.get("model"), found.get("tokens", [])
    if kind == "gpt2" and "merges" in found:
        steps = _byte_level(found, path)
    elif kind == "llama" and header.architecture == "llama":
        steps = _sentencepiece(found)
    else:
        return None
    types = found.get("token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(f"{path}: has {len(tokens)} tokens and {len(types)} types of them; download it again")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: found.get(f"{key}_token_id") for name, key in names.items()}
    special = {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}
    facts = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "post_processor": _around(found, kind, tokens),
        **steps,
    }
    backend = Tokenizer.from_str(json.dumps(facts))
    template = {"chat_template": header.metadata.get("tokenizer.chat_template")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special, **template)


def check_reopens(tokenizer: PreTrainedTokenizerBase, directory: Path, header: GgufHeader, path: Path) -> None:
    """Refuses a tokenizer that transformers would open otherwise than it was saved.

    For some model types it takes a class of its own, with that family's way to split text, whatever the files say.

    Args:
        tokenizer: As it was saved.
        directory: Where, config and all.
        header: Of the file it was read from.
        path: That file, for messages.

    Raises:
        CheckpointError: Text would be split in another way than the file asks for.
    """
    from transformers import AutoTokenizer

    if header.metadata.get("tokenizer.ggml.pre", UNNAMED) == UNNAMED:
        return  # the file asks for none: the family's is as good a guess as any
    opened = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    saved, found = (
        re.sub(r"trim_offsets=\w+", "", str(one.backend_tokenizer.pre_tokenizer)) for one in (tokenizer, opened)
    )
    if saved != found:
        raise CheckpointError(
            f"{path}: its text is split as {header.metadata['tokenizer.ggml.pre']} asks for, where transformers takes "
            f"{type(opened).__name__} for every {header.architecture} model; open the model's own directory"
        )


def _byte_level(found: dict, path: Path) -> dict:
    """Normalizer, pre-tokenizer, model and decoder of a byte-level vocabulary."""
    name = found.get("pre", UNNAMED)
    split = _split(name)
    if split is None:
        raise CheckpointError(
            f"{path}: its text is split as {name!r} asks for, which is not known here; open the model's own directory"
        )
    if name == UNNAMED:
        logger.warning("%s: names no pre-tokenizer: text is split as llama.cpp does then (by guess)", path.name)
    if split[-1] == GPT2_PATTERN:
        steps = [{"type": "Digits", "individual_digits": True}] * (split[0] == DIGITS)
        steps.append(_byte_level_step(True))
    else:
        steps = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in split
        ]
        steps.append(_byte_level_step(False))
    merges = [merge.split(" ") for merge in found["merges"]]
    return {
        "normalizer": {"type": "NFC"} if name in NORMALISED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "decoder": _byte_level_step(True),
        "model": {**_model(found, merges), "byte_fallback": False, "ignore_merges": name in _SKIP_MERGES},
    }


def _byte_level_step(pattern: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern}


def _split(name: str) -> tuple[str, ...] | None:
    """What is done to a text before the merges, by llama.cpp's name for it; ``None`` of a name that is not known."""
    name = next((first for first, others in OTHER_NAMES.items() if name in others), name)
    if name == UNNAMED:
        return _UNNAMED_PATTERNS
    return next((done for (done, _), known in PRE_TOKENIZERS.items() if known == name), None) or _pattern(name)


def _pattern(name: str) -> tuple[str] | None:
    """The pattern that transformers has under another of llama.cpp's names."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    pattern = GGUF_PRE_TOKENIZER_SPLITS.get(name)
    return (pattern,) if pattern else None


def _sentencepiece(found: dict) -> dict:
    """The same of a SentencePiece vocabulary, whose scores become merges: every pair that makes a piece, best first."""
    types = found.get("token_type") or [NORMAL] * len(found["tokens"])
    scored = zip(found["tokens"], found["scores"], types, strict=True)
    score = {token: value for token, value, kind in scored if kind == NORMAL}
    pairs = [
        (-score[token], len(token), cut, token)
        for token in score
        for cut in range(1, len(token))
        if token[:cut] in score and token[cut:] in score
    ]
    merges = [[token[:cut], token[cut:]] for _, _, cut, token in sorted(pairs)]
    unknown = found["tokens"][found.get("unknown_token_id", 0)]
    prefix = found.get("add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decode = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}] * prefix + [spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decode + [strip] * prefix},
        "model": {**_model(found, merges), "unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
    }


def _model(found: dict, merges: list[list[str]]) -> dict:
    """Byte-pair merges over every token but those that only fill up the embedding's rows."""
    types = found.get("token_type") or [NORMAL] * len(found["tokens"])
    listed = enumerate(zip(found["tokens"], types, strict=True))
    vocab = {token: i for i, (token, kind) in listed if kind != UNUSED or not re.fullmatch(r"\[PAD\d+\]", token)}
    return {"type": "BPE", "vocab": vocab, "merges": merges}


def _added(tokens: list[str], types: list[int]) -> list[dict]:
    """Tokens that are found in a text whole, before anything else is done with it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, "special": kind != USER_DEFINED, **plain}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]


def _around(found: dict, kind: str, tokens: list[str]) -> dict | None:
    """What puts bos before a text and eos after it, where llama.cpp does."""
    begins = kind == "llama" or found.get("pre") in _SKIP_MERGES
    first = [found["bos_token_id"]] * found.get("add_bos_token", begins) if "bos_token_id" in found else []
    last = [found["eos_token_id"]] * found.get("add_eos_token", False) if "eos_token_id" in found else []
    if not first + last:
        return None
    before, after = ([{"SpecialToken": {"id": tokens[i], "type_id": 0}} for i in ids] for ids in (first, last))
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    named = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in first + last}
    single, pair = [*before, text, *after], [*before, text, second, *after]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}
