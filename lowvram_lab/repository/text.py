"""Text as token ids, in windows that begin as the model was trained: after the ids its checkpoint puts before a text.

One place decides that: every perplexity, divergence and calibration, and every text that a chat goes on with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def first_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that come before any text: mostly BOS (``<s>``) where the checkpoint adds it, and none where it does not.

    What the tokenizer does counts; where it adds nothing, what the files that it was opened from say: some classes of
    transformers pass over the post-processor of ``tokenizer.json``, and all of them over ``add_bos_token`` beside it.
    """
    text = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    added = next((whole[:at] for at in range(len(whole)) if whole[at : at + len(text)] == text), [])
    return added or _stated_ids(tokenizer)


def begins_with(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokens of ``first_ids`` as they are written, such as ``"<s>"``; ``None`` where there are none."""
    return "".join(tokenizer.convert_ids_to_tokens(first_ids(tokenizer))) or None


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """``(tokens,)`` int64: the text's own ids, with nothing before or after them."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def equal_windows(ids: torch.Tensor, first: list[int], length: int) -> torch.Tensor:
    """A text in windows that follow one another, each begun anew; what is left over is dropped.

    Args:
        ids: ``(tokens,)``, from ``plain_ids``; one token or more.
        first: From ``first_ids``.
        length: Of a window, ``first`` included.

    Returns:
        ``(windows, length)`` int64; of a text that does not fill a window, the one it is.
    """
    body = min(length - len(first), len(ids))
    rows = ids[: len(ids) // body * body].view(-1, body)
    return torch.cat((torch.tensor(first, dtype=ids.dtype).expand(len(rows), -1), rows), dim=1)


def windows_in_words(window: int, begun_with: str | None) -> str:
    """What a figure must say of its windows.

    Args:
        window: Tokens that see each other.
        begun_with: From ``begins_with``.
    """
    return f"in windows of {window} with {begun_with or 'nothing'} before each"


def _stated_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The same, from the files of the tokenizer's directory; nothing, if it was not opened from one."""
    folder = Path(tokenizer.name_or_path) if tokenizer.name_or_path else None
    if folder is None or not folder.is_dir():
        return []
    if template := _template_ids(_json(folder / "tokenizer.json").get("post_processor")):
        return template
    stated = _json(folder / "tokenizer_config.json").get("add_bos_token") is True
    return [tokenizer.bos_token_id] if stated and tokenizer.bos_token_id is not None else []


def _template_ids(processor: dict | None) -> list[int]:
    """What a post-processor, as the tokenizers library writes it, puts before a single text."""
    kind = (processor or {}).get("type")
    if kind == "Sequence":
        return [index for step in processor["processors"] for index in _template_ids(step)]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]]
    ids: list[int] = []
    for piece in processor["single"] if kind == "TemplateProcessing" else ():
        if "SpecialToken" not in piece:
            break
        ids += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids


def _json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
