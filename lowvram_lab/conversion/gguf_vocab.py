"""A tokenizer as GGUF metadata: tokens, types, merges or scores, and llama.cpp's name of the pre-tokenizer.

Read off what the tokenizer does, step by step; a step that llama.cpp has no word for is refused, and named.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_lab.errors import SourceError
from lowvram_lab.model.source import Source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.repository.gguf import read_gguf_header
from lowvram_lab.repository.gguf_tokenizer import (
    BYTE,
    CONTROL,
    DIGITS,
    GPT2_PATTERN,
    NORMAL,
    NORMALISED,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Refuse = Callable[[str], SourceError]
"""What was found → the error that says so, with the model's name."""


def vocabulary(source: Source, spec: ModelSpec, directory: Path) -> dict:
    """A source's tokenizer as GGUF has it: metadata key → value. A GGUF's own is taken as it is.

    Raises:
        SourceError: Something about it that llama.cpp has no name for, in words.
    """
    if source.kind == "gguf":
        metadata = read_gguf_header(source.path()).metadata
        return {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    tokenizer = source.tokenizer()

    def refuse(found: str) -> SourceError:
        return SourceError(f"{spec.name}: its tokenizer cannot be written as GGUF: {found}")

    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    model = facts["model"]
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model.get("type") != "BPE" or not model["merges"] or odd:
        raise refuse(f"expected byte-pair merges, found {', '.join(odd) or model.get('type', 'no tokenizer.json')}")
    placed = {index: (token, NORMAL) for token, index in model["vocab"].items()}
    for added in facts["added_tokens"]:
        placed[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
        if taken := [key for key in ("lstrip", "rstrip", "single_word") if added[key]]:
            raise refuse(f"expected tokens to be found as they are, found {added['content']!r} with {', '.join(taken)}")
    if (highest := max(placed)) >= spec.vocab_size:
        raise refuse(f"token {highest} has no row among the embedding's {spec.vocab_size}")
    rows = [placed.get(i, (f"[PAD{i}]", UNUSED)) for i in range(spec.vocab_size)]
    tokens, types = [token for token, _ in rows], [kind for _, kind in rows]
    merges = [tuple(pair) for pair in model["merges"]]
    if model["byte_fallback"]:
        unknown = tokenizer.unk_token_id or 0
        types[unknown] = UNKNOWN
        found = _sentencepiece(facts, tokens, types, merges, refuse) | {"model": "llama", "unknown_token_id": unknown}
    else:
        found = {"model": "gpt2", "pre": _pre(facts, refuse), "merges": [" ".join(pair) for pair in merges]}
    found |= {"tokens": tokens, "token_type": types, **_special_tokens(tokenizer, spec, directory, refuse)}
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    named = {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}
    return named | ({"tokenizer.chat_template": template} if template else {})


def _pre(facts: dict, refuse: Refuse) -> str:
    """llama.cpp's name for what splits text before the merges, read off the tokenizer's own steps and patterns.

    Unicode normalisation (NFC) has no place in GGUF: it is taken for granted with Qwen's pattern, and only there.
    """
    normal = (facts["normalizer"] or {}).get("type")
    if normal not in (None, "NFC"):
        raise refuse(f"expected text to be split as it is, found the normalizer {normal}")
    steps = []
    for step in _flat(facts["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            steps += [GPT2_PATTERN] * step.get("use_regex", True)
        elif step["type"] == "Digits" and step.get("individual_digits"):
            steps.append(DIGITS)
        elif step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
            steps.append(step["pattern"].get("Regex", "plain text"))
        else:
            steps.append(step["type"])
    name = PRE_TOKENIZERS.get((tuple(steps), bool(facts["model"].get("ignore_merges"))))
    if name is None:
        raise refuse(
            f"expected a pre-tokenizer of {', '.join(PRE_TOKENIZERS.values())}, found {' then '.join(steps) or 'none'}"
            + " (ignore_merges)" * bool(facts["model"].get("ignore_merges"))
        )
    if (normal == "NFC") != (name in NORMALISED):
        raise refuse(
            f"expected the normalizer NFC with the pre-tokenizer {', '.join(NORMALISED)} alone, found {normal}"
        )
    return name


def _sentencepiece(facts: dict, tokens: list[str], types: list[int], merges: list[tuple], refuse: Refuse) -> dict:
    """Scores and the leading space of a SentencePiece vocabulary written as merges; sets the types of byte tokens.

    llama.cpp joins whichever neighbours make the token with the best score; merges say which neighbours, in which
    order. The two agree where every way to make a token is a merge, and those of a token follow each other.
    """
    place = {token: i for i, token in enumerate(tokens)}
    for token in (f"<0x{byte:02X}>" for byte in range(256)):
        if token not in place:
            raise refuse(f"expected a token for every byte, found no {token}")
        types[place[token]] = BYTE
    rank = {}
    spread = set()
    last = ""
    listed = set(merges)
    for number, pair in enumerate(merges):
        token = "".join(pair)
        if token in rank and token != last:
            spread.add(token)
        rank.setdefault(token, number)
        last = token
    plain = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    for token in plain:
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if any(a in plain and b in plain and (a, b) not in listed for a, b in halves):
            spread.add(token)
    if spread:
        raise refuse(f"its merges are no SentencePiece vocabulary's: scores cannot say how {min(spread)!r} is made")
    return {"scores": [-float(rank.get(t, 0)) for t in tokens], "add_space_prefix": _leading_space(facts, refuse)}


def _leading_space(facts: dict, refuse: Refuse) -> bool:
    normal, split = _flat(facts["normalizer"], "normalizers"), facts["pre_tokenizer"] or {"type": "nothing"}
    steps = [step["type"] for step in normal]
    if split["type"] == "nothing" and steps in (["Replace"], ["Prepend", "Replace"]):
        return len(steps) == 2
    if split["type"] == "Metaspace" and not steps and not split["split"]:
        if split["prepend_scheme"] != "never":
            logger.warning(
                "llama.cpp puts a space before text that begins with one, and before text after a special token; this "
                "tokenizer does not: such prompts become other tokens"
            )
        return split["prepend_scheme"] != "never"
    raise refuse(f"expected spaces to become U+2581 and nothing else, found {steps} and {split['type']}")


def _special_tokens(tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, directory: Path, refuse: Refuse) -> dict:
    """Which tokens begin and end a text, and which are put there unasked."""
    settings = directory / "generation_config.json"
    stops = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id") if settings.is_file() else None
    stops = stops if isinstance(stops, list) else [stops]
    bos, eos, pad = (
        next((i for i in (getattr(tokenizer, name), *other, spec.config.get(name)) if isinstance(i, int)), None)
        for name, other in (("bos_token_id", ()), ("eos_token_id", stops), ("pad_token_id", ()))
    )
    if eos is None:  # llama.cpp would take a token of its own choice for it
        raise refuse("found no eos_token_id")
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    begins, ends = whole[:1] == [bos] and plain[:1] != [bos], whole[-1:] == [eos] and plain[-1:] != [eos]
    if whole != [bos] * begins + plain + [eos] * ends:
        raise refuse(f"expected at most bos before a text and eos after it, found {whole} for {plain}")
    template = str(tokenizer.chat_template)
    turn = [i for i in stops if isinstance(i, int) and i != eos and tokenizer.convert_ids_to_tokens(i) in template]
    return {
        "bos_token_id": bos,
        "eos_token_id": eos,
        "padding_token_id": pad,
        "eot_token_id": turn[0] if turn else None,
        "add_bos_token": begins,
        "add_eos_token": ends,
    }


def _flat(step: dict | None, children: str) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if step is None:
        return []
    return [leaf for part in step[children] for leaf in _flat(part, children)] if step["type"] == "Sequence" else [step]
