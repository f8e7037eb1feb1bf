"""Tiny tokenizers of every kind that models come with, trained on the fly; their control tokens under any names."""

import functools
import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

NAMES = {"start": "<|im_start|>", "end": "<|im_end|>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "think": "<think>"}
NAMESAKES = {
    "start": "<|qz_kj|>",
    "end": "<|qz_v|>",
    "bos": "<zqj>",
    "eos": "<zqv>",
    "unk": "<zqw>",
    "think": "<zqvjk>",
}
"""The same tokens under names that nobody types: a stock tokenizer with these reads the former as mere letters."""

PLAIN = ("  ", "    ", "\n\n", "<table>", "</table>", "für", "www")
TEMPLATE = (
    "BOS{% for m in messages %}{% if m.role == 'assistant' %}START{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] }}END\n"
    "{% else %}START{{ m.role }}\n{{ m.content CONTENT }}END\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}STARTassistant\nTHINK{% endif %}"
)
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? It is Paris.",
    "def add(a, b):\n    return a + b\n\n\nsay <b>hello</b> |> one <| two 3 < 4 > 2 / 1 im_start im_end s unk table",
    "one two three four five six seven eight nine ten " * 3,
    "für naïve 日本語 END end_of the table",
]
_TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _llama_decoder():
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _pieces_of_lowercase_bert():
    return normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()


def _split_bytes():
    split = pre_tokenizers.Split(Regex(_TIKTOKEN), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _metaspace(scheme, split=True):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split), decoders.Metaspace(prepend_scheme=scheme)


_LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
_T5 = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {3,}"), "   ")])
_XLNET = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
_BYTES_AND_SPACE = pre_tokenizers.ByteLevel(add_prefix_space=True)
LEGACY = "SentencePiece BPE as Llama 2 had it"
"""Where control tokens are normalised it reads its own as text after a letter: its normaliser puts a space before."""
KINDS = {  # model, normaliser, pre-tokenizer, decoder
    "byte-level BPE": ("bpe", None, _BYTES, decoders.ByteLevel()),
    "byte-level BPE with a space before": ("bpe", None, _BYTES_AND_SPACE, decoders.ByteLevel()),
    "byte-level BPE as tiktoken splits": ("whole words", None, _split_bytes(), decoders.ByteLevel()),
    "SentencePiece BPE, space always": ("bytes", None, *_metaspace("always")),
    "SentencePiece BPE, space first": ("bytes", None, *_metaspace("first", split=False)),
    "SentencePiece BPE, no space": ("bytes", None, *_metaspace("never")),
    LEGACY: ("bytes", _LEGACY, None, _llama_decoder()),
    "Unigram as T5 has it": ("unigram", _T5, *_metaspace("always")),
    "Unigram as XLNet has it": ("unigram", _XLNET, *_metaspace("first")),
    "WordPiece as BERT has it": ("wordpiece", *_pieces_of_lowercase_bert()),
    "WordPiece of whole words": ("wordpiece", None, pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()),
}
LOSSLESS = ["byte-level BPE", "byte-level BPE as tiktoken splits"]


@functools.cache
def _trained(kind: str) -> str:
    """A tokenizer.json trained on a few sentences, control tokens first in its vocabulary and not yet added."""
    model, normalizer, pre_tokenizer, decoder = KINDS[kind]
    specials, unk = list(NAMES.values()), NAMES["unk"]
    if model == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=260, special_tokens=specials, unk_token=unk, show_progress=False)
    elif model == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=unk))
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=unk))
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if model == "bytes" else []
        alphabet = [] if bytes_ else pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=420 + len(bytes_),
            special_tokens=specials + bytes_,
            initial_alphabet=alphabet,
            show_progress=False,
        )
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoder
    tokenizer.train_from_iterator(_CORPUS, trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = []
    values["model"] |= {"bytes": {"byte_fallback": True, "fuse_unk": True}, "whole words": {"ignore_merges": True}}.get(
        model, {}
    )
    return json.dumps(values)


def _named(kind: str, names: dict[str, str]) -> Tokenizer:
    """A trained tokenizer whose control tokens are called otherwise."""
    values = json.loads(_trained(kind))
    new = dict(zip(NAMES.values(), names.values(), strict=True))
    model = values["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new.get(piece, piece): index for piece, index in model["vocab"].items()}
    else:
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names["unk"]
    return Tokenizer.from_str(json.dumps(values))


@functools.cache
def tokenizer_of(kind: str, named: str = "names", bos: str = "template", trims: bool = False, **flags):
    """A tokenizer with a chat template.

    Args:
        kind: Of ``KINDS``.
        named: ``"names"`` or ``"namesakes"``: what its control tokens are called.
        bos: Who writes it: ``"template"``, ``"post-processor"``, or ``""``.
        trims: Whether the template trims what the user says.
        **flags: Of the added tokens: ``normalized``, ``lstrip``, ``rstrip``, ``single_word``.
    """
    names = NAMES if named == "names" else NAMESAKES
    tokenizer = _named(kind, names)
    for role, name in names.items():
        special = role != "think"
        tokenizer.add_tokens([AddedToken(name, **{"normalized": False, **flags}, special=special)])
    normalised = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    plain = {normalised(text): text for text in PLAIN}.values()  # which of two that are one then is read is chance
    tokenizer.add_tokens([AddedToken(text, **{"normalized": False, **flags}, special=False) for text in plain])
    if bos == "post-processor":
        first = (names["bos"], tokenizer.token_to_id(names["bos"]))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{names['bos']} $A", special_tokens=[first])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=names["bos"], eos_token=names["eos"], unk_token=names["unk"]
    )
    written = {"BOS": "{{ bos_token }}" if bos == "template" else "", "CONTENT": "| trim" if trims else ""}
    written |= {"START": names["start"], "END": names["end"], "THINK": names["think"]}
    fast.chat_template = functools.reduce(lambda text, word: text.replace(word, written[word]), written, TEMPLATE)
    return fast
