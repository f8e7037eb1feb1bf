"""A directory's small files: the token ids in them, and the same files for a part of the vocabulary."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram_lab.conversion.resumable import PartialDirectory
from lowvram_lab.errors import CheckpointError, SourceError, first_line
from lowvram_lab.model.compressed import KEY as QUANTISED
from lowvram_lab.model.source import Source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.repository import hub
from lowvram_lab.slimming.card import slim_card
from lowvram_lab.slimming.tokenizer_cut import (
    cut_tokenizer,
    ids_found,
    with_added_ids,
    with_setting_ids,
    with_tokenizer_ids,
)
from lowvram_lab.slimming.vocabulary import byte_tokens, refuse_other_models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLIM = "slim.json"
"""What says of a directory what was removed."""

_ON_HUB = ("hub", "config")
_SMALL = [*hub.TOKENIZER, "config.json", "generation_config.json"]
_COPIED = ("special_tokens_map.json", "chat_template*", "LICENSE*")


class SmallFiles:
    """See the module.

    Args:
        directory: Where they lie.
        source: Of the model.

    Attributes:
        tokenizer: Content of ``tokenizer.json``.
        config: Of ``config.json``, with the ids that transformers takes where it states none.
    """

    def __init__(self, directory: Path, source: Source):
        self.directory = directory
        self.tokenizer = tokenizer_json(directory)
        refuse_other_models(self.tokenizer, directory)
        config = source.config()
        self.config = _read_json(directory / "config.json")
        self.config.pop(QUANTISED, None)
        self._vocab_size = type(config).attribute_map.get("vocab_size", "vocab_size")
        assumed = {key: value for key, value in config.to_dict().items() if key.endswith("_token_id")}
        self.config |= {
            key: value
            for key, value in assumed.items()
            if key not in self.config and isinstance(value, int) and 0 <= value < config.vocab_size
        }
        self.generation = _read_json(directory / "generation_config.json")
        self.tokenizer_config = _read_json(directory / "tokenizer_config.json")
        self.added = _read_json(directory / "added_tokens.json")

    def ids(self) -> set[int]:
        """All that the files name, the tokens of bytes among them."""
        return (
            byte_tokens(self.tokenizer)
            | ids_found(with_tokenizer_ids, self.tokenizer)
            | ids_found(with_added_ids, self.tokenizer_config)
            | ids_found(with_setting_ids, self.config)
            | ids_found(with_setting_ids, self.generation)
            | set(self.added.values())
        )

    def refuse_foreign_ids(self, rows: int) -> None:
        """Refuses tokens that the embedding has no row for."""
        added = {token["content"]: token["id"] for token in self.tokenizer["added_tokens"]} | self.added
        without = [token for token, index in added.items() if index >= rows]
        highest = max(self.ids() | set(self.tokenizer["model"]["vocab"].values()))
        if without and max(self.tokenizer["model"]["vocab"].values()) < rows:
            raise CheckpointError(
                f"{self.directory}: {without[0]!r} was added to the tokenizer and has no row among the embedding's "
                f"{rows}; add one (resize_token_embeddings) or take the token out of the tokenizer"
            )
        if highest >= rows:
            raise CheckpointError(
                f"{self.directory}: token {highest} has no row among the embedding's {rows}: tokenizer and weights are "
                "not of one model; take both from one repository"
            )

    def add_tokens(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        """Puts what transformers adds to the vocabulary by itself into ``tokenizer.json``: their ids change as well.

        Those without a row were of no use before, and are left to it.
        """
        known = {*self.tokenizer["model"]["vocab"], *(token["content"] for token in self.tokenizer["added_tokens"])}
        for index, token in sorted(tokenizer.added_tokens_decoder.items()):
            if token.content not in known and index < rows:
                self.tokenizer["added_tokens"].append({"id": index, **token.__getstate__()})

    def cut(self, kept: list[int], spec: ModelSpec) -> None:
        """Leaves the tokens that are kept, numbered in their order."""
        new = {old: index for index, old in enumerate(kept)}
        self.tokenizer = cut_tokenizer(self.tokenizer, new)
        self.tokenizer_config = with_added_ids(self.tokenizer_config, new.__getitem__)
        self.added = {token: new[index] for token, index in self.added.items()}
        self.generation = with_setting_ids(self.generation, new.__getitem__)
        self.config = with_setting_ids(self.config, new.__getitem__)
        self.config |= {self._vocab_size: len(kept), "tie_word_embeddings": spec.tied}  # which the files decided

    def hash(self) -> str:
        """Of all that is written of them but what is copied."""
        return text_hash(json.dumps([self.tokenizer, self.tokenizer_config, self.added, self.generation, self.config]))

    def write(self, partial: PartialDirectory, facts: dict, kept: list[int]) -> None:
        """Writes everything beside the weights; files that hold the old vocabulary once more are left out."""
        partial.save_json("tokenizer.json", self.tokenizer)
        others = {
            "tokenizer_config.json": self.tokenizer_config,
            "added_tokens.json": self.added,
            "generation_config.json": self.generation,
        }
        for name, values in others.items():
            if values:
                partial.save_json(name, values)
        partial.copy(self.directory, _COPIED)
        partial.save_json(SLIM, facts | {"kept_ids": kept})
        (partial.path / "README.md").write_text(slim_card(facts), encoding="utf-8")
        partial.save_json("config.json", self.config)  # last: a directory without it opens nowhere


def small_files(source: Source) -> Path | None:
    """Where a tokenizer can be looked at before weights are fetched, if anywhere."""
    if source.kind == "directory":
        return source.path()
    try:
        return hub.snapshot(source.public_name, _SMALL, progress=False) if source.kind in _ON_HUB else None
    except SourceError:
        return None  # fetching says what is wrong


def tokenizer_json(directory: Path) -> dict:
    """Content of a directory's ``tokenizer.json``.

    Raises:
        SourceError: There is none, or it has no model.
    """
    if not (directory / "tokenizer.json").is_file():
        found = [file.name for name in ("*.model", "vocab*", "*.tiktoken") for file in sorted(directory.glob(name))]
        raise SourceError(
            f"{directory}: expected tokenizer.json, found {', '.join(found) or 'no tokenizer'}; open it with "
            "AutoTokenizer and save_pretrained, which writes one"
        )
    found = _read_json(directory / "tokenizer.json")
    model, added = found.get("model"), found.setdefault("added_tokens", [])
    if not isinstance(model, dict) or not isinstance(added, list):
        raise SourceError(
            f"{directory / 'tokenizer.json'}: expected a model and added tokens, found neither or other "
            "things; copy it anew from the model's own repository"
        )
    return found


def _read_json(file: Path) -> dict:
    """A file's content, ``{}`` where it is not there."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file}: not readable as JSON ({first_line(error)[:160]}); download it again") from error
    if not isinstance(values, dict):
        raise SourceError(f"{file}: expected a JSON object, found {type(values).__name__}; download it again")
    return values


def text_hash(text: str) -> str:
    """SHA-256, in hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()
