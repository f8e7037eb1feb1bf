"""slim_vocabulary: a model without the tokens that a text has no use for, in a directory that stock transformers opens.

Chooses the tokens, then copies tensor by tensor: rows of embedding and head are picked, everything else stays to the
bit.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowvram_lab import __version__
from lowvram_lab.conversion.resumable import PartialDirectory, building
from lowvram_lab.errors import CheckpointError, LowvramError, SourceError, first_line
from lowvram_lab.files import expanded, known_sha256, refuse_occupied, require_space
from lowvram_lab.memory.host import peak_rss_bytes
from lowvram_lab.model.checkpoint import Checkpoint, check_tensor
from lowvram_lab.model.source import Source, config_from_values, find_source, open_tokenizer
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import calibration_text, sample_text
from lowvram_lab.repository import hub
from lowvram_lab.repository.text import equal_windows, first_ids, plain_ids
from lowvram_lab.slimming.card import slim_card
from lowvram_lab.slimming.referee import Refereed, Verdict, rival_of
from lowvram_lab.slimming.rewritten import Changed, Rewritten
from lowvram_lab.slimming.tokenizer_cut import (
    cut_tokenizer,
    ids_found,
    with_added_ids,
    with_setting_ids,
    with_tokenizer_ids,
)
from lowvram_lab.slimming.vocabulary import (
    byte_tokens,
    chat_tokens,
    kept_tokens,
    parents_of,
    refuse_other_models,
    text_tokens,
    with_parents,
)
from lowvram_lab.slimming.yardstick import WINDOW, Yardstick, nats_a_byte, renumbered
from lowvram_lab.weights.calibration import evenly
from lowvram_lab.weights.layerwise import LayerByLayer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_LETTERS = 1024
"""A text shorter than this says nothing about what a model will read."""

REFEREE_TOKENS = 2048
"""Of the text that tokens were chosen by, for the referee."""

_ON_HUB = ("hub", "config")
_SMALL = [*hub.TOKENIZER, "config.json", "generation_config.json"]
_COPIED = ("special_tokens_map.json", "chat_template*", "LICENSE*")
SLIM = "slim.json"


@dataclass(frozen=True, kw_only=True)
class Slimmed(Refereed):
    """What was left out of a model, and what is left; see ``Refereed``; sizes are those of the files.

    Attributes:
        vocab_before: Rows of the model's embedding.
        vocab_after: Rows that are left.
        needed_tokens: Tokens that stay whatever size is wanted: the text's, the chat template's, bytes, added ones,
            and what these are merged from.
        tokens_of_text: Different tokens in the text.
    """

    vocab_before: int
    vocab_after: int
    needed_tokens: int
    tokens_of_text: int

    def summary(self) -> str:
        """What a person wants to know, in three lines."""
        return (
            f"{self.output}: {self.vocab_after:,} of {self.vocab_before:,} tokens; the text has "
            f"{self.tokens_of_text:,} different ones and needs {self.needed_tokens:,}\n{self.sizes}\n"
            f"{self.effort}{self.verdict}"
        )


def slim_vocabulary(
    model: str,
    output: str | Path,
    *,
    vocab: int | str = 16384,
    texts: str | Path | Sequence[str | Path] | None = None,
    referee: bool = True,
    progress: bool = True,
) -> Slimmed:
    """Writes a model without the tokens that a text has no use for.

    A text all of whose tokens stay is read as the same tokens, and their logits are the same (a product of fewer rows
    may be summed in another order). Any other text is mostly spelt in more tokens. Killed, it goes on where it was
    when called again with the same arguments, and ends in the same bytes.

    Args:
        model: Name, hub id, directory or .gguf file of a 16-bit model with byte-pair tokens.
        output: A new or empty directory.
        vocab: How many tokens stay, rounded up to a multiple of 64, or ``"text"``: as many as the text needs.
        texts: Files with text like what the model will read; by default the library's own text.
        referee: Measure what quantising alone reaches in the bytes of the result.
        progress: Show progress bars, on stderr.

    Returns:
        Sizes before and after, and the referee's word.

    Raises:
        LowvramError: Output not empty, text too short, fewer tokens wanted than it needs, no disk space.
        SourceError: No such model, or a tokenizer that cannot be cut.
        CheckpointError: Damaged weights, or a model with more than embedding and head to cut.
    """
    began = time.monotonic()
    output = expanded(output)
    wanted = _wanted(vocab)
    refuse_occupied(output)
    read = _read_texts(texts)
    source = find_source(model)
    spec = _float_spec(source)
    directory = _small_files(source) or source.checkpoint(progress).directory
    files, tokenizer = _Files(directory, source), open_tokenizer(directory)
    rows = spec.module(spec.embedding).weight_shape[0]
    files.refuse_foreign_ids(rows)
    files.add_tokens(tokenizer, rows)
    of_text = set().union(*(text_tokens(tokenizer, text) for text in read.values()))
    needed = of_text | chat_tokens(tokenizer) | set(first_ids(tokenizer)) | files.ids()
    needed = with_parents(needed, parents_of(files.tokenizer))
    kept = kept_tokens(files.tokenizer, needed, wanted, rows)
    checkpoint = source.checkpoint(progress)  # what is wrong with the text or the tokenizer was said before
    _check_weights(spec, checkpoint)
    files.cut(kept, spec)
    small_spec = ModelSpec.from_config(config_from_values(files.config, "config.json"), spec.name)
    cut = _cut_parameters(spec, small_spec)
    small = Rewritten(checkpoint, changed=_picked_rows(checkpoint, torch.tensor(kept), cut))
    facts = {
        "source": source.public_name,
        "vocab_before": rows,
        "vocab_after": len(kept),
        "needed_tokens": len(needed),
        "tokens_of_text": len(of_text),
        "texts": [{"name": name, "sha256": _hash(text)} for name, text in read.items()],
        "source_weight_bytes": small.source_nbytes,
        "weight_bytes": small.nbytes,
    }
    weights = {file.name: known_sha256(file, progress) for file in checkpoint.files}
    with building(output, {"weights": weights, "files": files.hash(), "facts": facts, "by": __version__}) as partial:
        require_space(partial.path, facts["weight_bytes"], "the smaller model")
        small.write(partial, progress)
        if referee:
            text = _Text("\n".join(read.values()), tokenizer, files.tokenizer, kept)
            facts["referee"] = _verdict(source, spec, small_spec, small, text, progress)
        files.write(partial, facts, kept)
        partial.publish()
    sizes = {field.name: facts[field.name] for field in fields(Slimmed) if field.name in facts}
    return Slimmed(output=str(output), **sizes, seconds=time.monotonic() - began, peak_rss_bytes=peak_rss_bytes())


class _Files:
    """A directory's small files: their token ids, and the same files for a part of the vocabulary.

    Attributes:
        tokenizer: Content of ``tokenizer.json``.
        config: Of ``config.json``, with the ids that transformers takes where it states none.
    """

    def __init__(self, directory: Path, source: Source):
        self.directory = directory
        self.tokenizer = _tokenizer_json(directory)
        refuse_other_models(self.tokenizer, directory)
        config = source.config()
        self.config = _read_json(directory / "config.json")
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
        return _hash(json.dumps([self.tokenizer, self.tokenizer_config, self.added, self.generation, self.config]))

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


@dataclass(frozen=True)
class _Text:
    """What tokens were chosen by, and how it is read.

    Attributes:
        text: All of it.
        tokenizer: The whole model's.
        cut: ``tokenizer.json`` with the tokens that stay.
        kept: Old ids of these.
    """

    text: str
    tokenizer: PreTrainedTokenizerBase
    cut: dict
    kept: list[int]

    def windows(self) -> torch.Tensor:
        """``(windows, WINDOW)`` of its tokens, evenly spread."""
        ids = equal_windows(plain_ids(self.tokenizer, self.text), first_ids(self.tokenizer), WINDOW)
        return ids[evenly(len(ids), REFEREE_TOKENS // WINDOW)]


def _verdict(
    source: Source, spec: ModelSpec, small_spec: ModelSpec, small: Rewritten, text: _Text, progress: bool
) -> dict:
    """What the cut costs beside quantising: on the text that tokens were chosen by, and on another.

    Of a model whose layers cannot be run by themselves it says so instead: the cut does not need them.
    """
    from tokenizers import Tokenizer

    try:
        whole = LayerByLayer(spec, small.original)
    except CheckpointError as error:
        return {"summary": f"referee: not measured: {error}"}
    other, first = sample_text(), first_ids(text.tokenizer)
    yardstick, ids = Yardstick(whole, text.windows(), progress=progress), plain_ids(text.tokenizer, other)

    def read(stream: LayerByLayer) -> float:
        return nats_a_byte(stream, ids, first, other, progress)

    rival = rival_of(source, whole, small.nbytes, yardstick, read=read, progress=progress)
    spelt = torch.tensor(Tokenizer.from_str(json.dumps(text.cut)).encode(other, add_special_tokens=False).ids)
    begun = renumbered(torch.tensor(first, dtype=torch.int64), text.kept).tolist() if first else []
    this = nats_a_byte(LayerByLayer(small_spec, small), spelt, begun, other, progress)
    return Verdict(small.nbytes, yardstick.distance(kept=text.kept), rival, (read(whole), this)).to_dict()


def _picked_rows(checkpoint: Checkpoint, rows: torch.Tensor, cut: Iterable[str]) -> dict[str, Changed]:
    """What becomes of the tensors that have a row for each token."""
    return {
        name: Changed((len(rows), *checkpoint.shape(name)[1:]), lambda value: value[rows])
        for name in cut
        if name in checkpoint
    }


def _wanted(vocab: int | str) -> int | None:
    """A number of tokens; ``None`` for as many as are needed."""
    if vocab == "text":
        return None
    if isinstance(vocab, bool) or not isinstance(vocab, int) or vocab < 1:
        raise LowvramError(f'expected a number of tokens above zero or "text" as vocab, found {vocab!r}')
    return vocab


def _read_texts(texts: str | Path | Iterable[str | Path] | None) -> dict[str, str]:
    """Name → text."""
    if texts is None:
        return {"the text that comes with lowvram_lab": calibration_text()}
    files = [Path(file) for file in ([texts] if isinstance(texts, str | Path) else texts)]
    read: dict[str, str] = {}
    for file in files:
        if file.name in read:
            raise LowvramError(f"{file}: expected texts of different names, found two called {file.name}; rename one")
        read[file.name] = calibration_text(file)
    letters = sum(len(text.strip()) for text in read.values())
    if letters < LEAST_LETTERS:
        raise LowvramError(
            f"{', '.join(map(str, files)) or 'no file'}: expected a text of {LEAST_LETTERS} letters or more to choose "
            f"tokens by, found {letters}; give one like what the model will read"
        )
    return read


def _float_spec(source: Source) -> ModelSpec:
    """The spec of a model that is not quantised, and whose tokenizer is not known to be of another kind."""
    spec = source.spec(source.public_name)
    if spec.stored:
        raise LowvramError(
            f"{source.name} is a converted model; make the 16-bit original it was made from smaller, then convert that"
        )
    if (directory := _small_files(source)) is not None:
        refuse_other_models(_tokenizer_json(directory), source.name)
    return spec


def _small_files(source: Source) -> Path | None:
    """Where a tokenizer can be looked at before weights are fetched, if anywhere."""
    if source.kind == "directory":
        return source.path()
    try:
        return hub.snapshot(source.public_name, _SMALL, progress=False) if source.kind in _ON_HUB else None
    except SourceError:
        return None  # fetching says what is wrong


def _tokenizer_json(directory: Path) -> dict:
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


def _cut_parameters(spec: ModelSpec, small: ModelSpec) -> frozenset[str]:
    """Names of the parameters that have a row for each token."""
    names = set()
    for before, after in zip(spec.modules, small.modules, strict=True):
        for key, shape in before.parameters.items():
            if after.parameters[key] == shape:
                continue
            if before.name not in (spec.embedding, spec.head) or after.parameters[key][1:] != shape[1:]:
                raise CheckpointError(
                    f"{spec.name}: {before.name}.{key} depends on the vocabulary too; expected a model whose embedding "
                    "and head alone do, it is not supported"
                )
            names.add(f"{before.name}.{key}")
    if f"{spec.embedding}.weight" not in names:
        raise CheckpointError(f"{spec.name}: expected rows of the embedding by the config's vocabulary, found others")
    return frozenset(names)


def _check_weights(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Refuses files that lack a tensor, or hold one of another shape, before any is written."""
    for module in spec.modules:
        for key, shape in module.own.items():
            check_tensor(f"{module.name}.{key}", shape, checkpoint)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
