"""Tiny models with a vocabulary worth cutting: tokenizers trained on the library's own text, and texts to try them on.

What they are compared with is the ``tokenizers`` library itself, which reads the directory anew.
"""

import functools
import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lowvram_lab.packaged import calibration_text, sample_text
from tests.helpers.checkpoints import write_model
from tests.helpers.tiny import CHAT_TEMPLATE

ROWS = 1984
"""Of the embedding; some more than there are tokens."""

TOKENS = 1900
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
KINDS = ("Qwen's", "GPT-2's", "whole words", "byte fallback")
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def trained(kind: str) -> dict:
    """Content of a ``tokenizer.json``; Qwen's has its special tokens last, as Qwen has, and merges as texts."""
    last = kind == "Qwen's"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if kind == "byte fallback" else None))
    if kind == "byte fallback":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        first = SPECIALS + [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "GPT-2's")
        split = [pre_tokenizers.Split(Regex(_QWEN), "isolated")] * (kind != "GPT-2's")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, bytes_])
        tokenizer.normalizer = normalizers.NFC() if last else None
        tokenizer.decoder = decoders.ByteLevel()
        first = [] if last else SPECIALS
    alphabet = [] if kind == "byte fallback" else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=first, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    # a whole text is one word where nothing splits it: lines are enough for merges then
    tokenizer.train_from_iterator((calibration_text() + sample_text()).replace("。", "。\n").split("\n"), trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = []
    model = values["model"]
    if kind == "byte fallback":
        model |= {"byte_fallback": True, "fuse_unk": True}
    if kind == "whole words":
        model["ignore_merges"] = True
    if last:
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
    return values


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """With special tokens, a run of spaces as an added one, and BOS from the post-processor where bytes fall back."""
    tokenizer = Tokenizer.from_str(json.dumps(trained(kind)))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens(["        "])
    if kind == "byte fallback":
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


def write(folder: Path, kind: str = "Qwen's", model: str = "qwen2", rows: int = ROWS, **options) -> Path:
    """A model directory with such a tokenizer; settings name its special tokens, in lists and pairs too."""
    tokenizer = tokenizer_of(kind)
    ids = dict(zip(SPECIALS, tokenizer.convert_tokens_to_ids(SPECIALS), strict=True))
    stops = {"bos_token_id": ids["<s>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["</s>"]}
    write_model(folder, model, vocab_size=rows, **stops, **options)
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    if kind == "Qwen's":  # transformers writes pairs; older files hold texts
        values = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        values["model"]["merges"] = trained(kind)["model"]["merges"]
        (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    settings = {
        **stops,
        "eos_token_id": [ids["<|im_end|>"], ids["</s>"]],
        "suppress_tokens": [1000, 1001],
        "forced_decoder_ids": [[1, 1002], [2, None]],
        "bad_words_ids": [[1003, 1004]],
        "max_new_tokens": 77,
    }
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def texts(count: int, seed: int = 0):
    """English, Chinese, code, digits, emoji, rare letters, runs of whitespace; now and then a control token."""
    draw = random.Random(seed)
    known, chinese = calibration_text(), sample_text()
    words = known.split()
    makers = (
        lambda: _part(draw, chinese, 60),
        lambda: _part(draw, known, 120),
        lambda: "".join(draw.choice([" ", "  ", "\n", "\t", "    ", "\r\n", "a", "x = ", ")"]) for _ in range(12)),
        lambda: str(draw.randrange(10 ** draw.randrange(1, 12))) + draw.choice(["", ".", "%", " km"]),
        lambda: "".join(chr(draw.choice(_RANGES)(draw)) for _ in range(draw.randrange(1, 12))),
        lambda: " ".join(draw.choice(words) for _ in range(draw.randrange(1, 15))),
        lambda: "".join(draw.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(draw.randrange(1, 9))),
    )
    for _ in range(count):
        text = draw.choice(makers)()
        yield text + "<|im_end|>\n" if draw.random() < 0.1 else text


_RANGES = tuple(
    lambda draw, span=span: draw.randrange(*span)
    for span in ((0x1F300, 0x1F700), (0x4E00, 0xA000), (0x20, 0x7F), (0xA0, 0x600))
)


def _part(draw: random.Random, text: str, longest: int) -> str:
    start = draw.randrange(len(text))
    return text[start : start + draw.randrange(1, longest)]
