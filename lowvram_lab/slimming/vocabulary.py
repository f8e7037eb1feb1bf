"""Which tokens of a byte-pair vocabulary stay: what texts and chats are made of, every byte, and what makes these.

A token stays together with all that any merge makes it of. So by induction over the merges a text all of whose tokens
stay is read by the tokens that stay as it was by all: of the merges possible at each step the first is among those
that are left. Any other text is mostly spelt in more tokens, at worst byte
by byte.

Source: byte-pair encoding, Sennrich et al. 2016, https://arxiv.org/abs/1508.07909.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import date
from typing import TYPE_CHECKING

from lowvram_lab.errors import LowvramError, SourceError
from lowvram_lab.repository.template_text import on_day

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MULTIPLE = 64
"""Rows are a multiple of it, as kernels like them."""

_PIECE = 1 << 18  # letters that are tokenised at once: some hundred MiB for any more
_OVERLAP = 1 << 10  # of pieces, so that a cut hides no token
_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
_USER = {"role": "user", "content": "What is 2 + 2?"}
_ASSISTANT = {"role": "assistant", "content": "2 + 2 is 4."}
_DATES = tuple([date(2025 + month, 1 + month, 1) for month in range(12)] + [date(2026, 1, day) for day in range(1, 32)])
"""That templates are rendered on: every month, every day of one, twelve years."""

_CHATS = tuple([*system, *chat] for system in ([], [_SYSTEM]) for chat in ([_USER], [_USER, _ASSISTANT, _USER]))


def refuse_other_models(tokenizer_json: dict, where: object) -> None:
    """Refuses a tokenizer that is no byte-pair encoding, or one that cannot read every byte.

    Args:
        tokenizer_json: Content of ``tokenizer.json``.
        where: What to call it.

    Raises:
        SourceError: It is; what it is, in words.
    """
    model = tokenizer_json.get("model") or {}
    kind = model.get("type") or ("BPE" if "merges" in model else "no type")
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if kind != "BPE" or odd:
        found = f"BPE with {', '.join(odd)}" if kind == "BPE" else kind
        raise SourceError(f"{where}: expected byte-pair merges (BPE) to choose tokens by, found {found}; keep it whole")
    if not (model.get("byte_fallback") or _is_byte_level(tokenizer_json)):
        raise SourceError(
            f"{where}: expected tokens for bytes (ByteLevel or byte_fallback), found none: letters that are removed "
            "could not be read; keep it whole"
        )


def byte_tokens(tokenizer_json: dict) -> set[int]:
    """Ids of the tokens of single bytes, and of the unknown one."""
    from tokenizers.pre_tokenizers import ByteLevel

    model = tokenizer_json["model"]
    names = {f"<0x{byte:02X}>" for byte in range(256)} if model.get("byte_fallback") else set()
    if _is_byte_level(tokenizer_json):
        names |= set(ByteLevel.alphabet())
    names.add(model.get("unk_token"))
    return {model["vocab"][name] for name in names if name in model["vocab"]}


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> set[int]:
    """Ids of the tokens that a text is made of; of a long one a few more, where it is cut."""
    found: set[int] = set()
    for piece in _pieces(text):
        found.update(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
    return found


def chat_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of what a chat template writes around messages, with a system message and without; none without one.

    One that writes the date writes those of ``_DATES``: what stays is the same whatever day it is.
    """
    templates = getattr(tokenizer, "chat_template", None) or {}
    templates = templates if isinstance(templates, dict) else {"default": templates}
    texts: set[str] = set()
    for template in templates.values():
        for chat in _CHATS:
            for dated in {on_day(template, day) for day in _DATES}:
                try:
                    text = tokenizer.apply_chat_template(
                        chat, chat_template=dated, tokenize=False, add_generation_prompt=True
                    )
                except Exception:  # some refuse a system message, or want more than messages: such chats cannot be had
                    continue
                texts.add(text)
    return set().union(*(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts))


def kept_tokens(tokenizer_json: dict, needed: Iterable[int], wanted: int | None, rows: int) -> list[int]:
    """The ids that stay.

    Args:
        tokenizer_json: Content of ``tokenizer.json``.
        needed: Ids that stay in any case.
        wanted: How many are to stay. Where fewer are needed, the lowest ids fill it up: merges are found by
            frequency. ``None``: as many as are needed. Rounded up to a multiple of ``MULTIPLE`` either way.
        rows: Of the embedding. Those without a token are taken when there are no more tokens.

    Returns:
        Old ids in ascending order; their places are the new ids.

    Raises:
        LowvramError: More are needed than wanted, or none would go.
    """
    parents = parents_of(tokenizer_json)
    kept = with_parents(needed, parents)
    if wanted is not None and len(kept) > wanted:
        raise LowvramError(
            f"expected a vocabulary that holds what the text needs, {len(kept)} tokens, found {wanted}; ask for "
            f"{rounded_up(len(kept))} or more, or for as many as the text needs (text)"
        )
    size = rounded_up(len(kept) if wanted is None else wanted)
    if size >= rows:
        why = f"the text needs {len(kept)}" if wanted is None else f"found {size} wanted"
        raise LowvramError(f"expected fewer tokens than the model's {rows}, {why}: there is nothing to remove")
    tokens = sorted({*tokenizer_json["model"]["vocab"].values()} - kept)
    for index in tokens:
        more = with_parents([index], parents, kept)
        if len(kept) + len(more) <= size:
            kept |= more
        if len(kept) == size:
            break
    spare = (row for row in range(rows) if row not in kept)
    return sorted(kept | {row for row, _ in zip(spare, range(size - len(kept)), strict=False)})


def rounded_up(tokens: int) -> int:
    """To a multiple of ``MULTIPLE``."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def halves(merge: str | Collection[str]) -> tuple[str, str]:
    """What a merge joins, in either spelling: ``"a b"`` or ``["a", "b"]``."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def parents_of(tokenizer_json: dict) -> dict[int, set[int]]:
    """Id of a token → ids of all that any merge makes it of."""
    vocab = tokenizer_json["model"]["vocab"]
    parents: dict[int, set[int]] = {}
    for merge in tokenizer_json["model"]["merges"]:
        left, right = halves(merge)
        parents.setdefault(vocab[left + right], set()).update((vocab[left], vocab[right]))
    return parents


def with_parents(ids: Iterable[int], parents: Mapping[int, set[int]], known: Collection[int] = ()) -> set[int]:
    """Ids and all that they are made of, down to single letters; without those that are known already."""
    found: set[int] = set()
    ahead = [index for index in ids if index not in known]
    while ahead:
        index = ahead.pop()
        if index not in found:
            found.add(index)
            ahead += [parent for parent in parents.get(index, ()) if parent not in known]
    return found


def _is_byte_level(tokenizer_json: dict) -> bool:
    return any(
        step == "ByteLevel" for key in ("pre_tokenizer", "normalizer") for step in _steps(tokenizer_json.get(key))
    )


def _steps(step: dict | None) -> Iterator[str]:
    """Types of a step and of what it is a sequence of."""
    if step:
        yield step["type"]
        for part in (*step.get("pretokenizers", ()), *step.get("normalizers", ())):
            yield from _steps(part)


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), _PIECE):
        yield text[max(0, start - _OVERLAP) : start + _PIECE]
