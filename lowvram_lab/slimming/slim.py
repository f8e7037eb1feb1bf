"""slim_vocabulary: a model without the tokens that a text has no use for, in a directory that stock transformers opens.

Chooses the tokens, then copies tensor by tensor: rows of embedding and head are picked, everything else stays to the
bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowvram_lab import __version__
from lowvram_lab.conversion.resumable import building
from lowvram_lab.errors import CheckpointError, LowvramError
from lowvram_lab.files import expanded, known_sha256, refuse_occupied, require_space
from lowvram_lab.memory.host import peak_rss_bytes
from lowvram_lab.model.checkpoint import Checkpoint, check_tensor
from lowvram_lab.model.source import Source, config_from_values, find_source, open_tokenizer
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import calibration_text, sample_text
from lowvram_lab.repository.text import equal_windows, first_ids, plain_ids
from lowvram_lab.slimming.referee import Refereed, Verdict, rival_of
from lowvram_lab.slimming.rewritten import Changed, Rewritten, say_held
from lowvram_lab.slimming.small_files import SmallFiles, small_files, text_hash, tokenizer_json
from lowvram_lab.slimming.vocabulary import (
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
    read = read_texts(texts)
    source = find_source(model)
    spec = _float_spec(source)
    chosen = choose_tokens(source, spec, read.values(), wanted, progress=progress)
    files, kept, rows = chosen.files, chosen.kept, spec.module(spec.embedding).weight_shape[0]
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
        "needed_tokens": chosen.needed,
        "tokens_of_text": chosen.of_text,
        "texts": [{"name": name, "sha256": text_hash(text)} for name, text in read.items()],
        "source_weight_bytes": small.source_nbytes,
        "weight_bytes": small.nbytes,
    }
    weights = {file.name: known_sha256(file, progress) for file in checkpoint.files}
    with building(output, {"weights": weights, "files": files.hash(), "facts": facts, "by": __version__}) as partial:
        require_space(partial.path, facts["weight_bytes"], "the smaller model")
        small.write(partial, progress)
        if referee:
            text = _Text("\n".join(read.values()), chosen.tokenizer, files.tokenizer, kept)
            facts["referee"] = _verdict(source, spec, small_spec, small, text, progress)
        files.write(partial, facts, kept)
        partial.publish()
    sizes = {field.name: facts[field.name] for field in fields(Slimmed) if field.name in facts}
    return Slimmed(output=str(output), **sizes, seconds=time.monotonic() - began, peak_rss_bytes=peak_rss_bytes())


@dataclass(frozen=True)
class ChosenTokens:
    """Tokens that stay.

    Attributes:
        files: The model's small files, which are whole still.
        tokenizer: The whole model's.
        kept: Old ids in ascending order; their places are the new ids.
        needed: How many stay whatever size is wanted.
        of_text: Different tokens in the text.
    """

    files: SmallFiles
    tokenizer: PreTrainedTokenizerBase
    kept: list[int]
    needed: int
    of_text: int


def choose_tokens(
    source: Source, spec: ModelSpec, texts: Iterable[str], wanted: int | None, *, progress: bool = True
) -> ChosenTokens:
    """Chooses the tokens that stay, without the model's weights where its tokenizer can be had alone.

    Args:
        source: The model's.
        spec: The same on paper.
        texts: Like what the model will read.
        wanted: How many stay; ``None`` for as many as the texts need.
        progress: Show what is fetched, on stderr.

    Raises:
        LowvramError: Fewer are wanted than the texts need, or none would go.
        SourceError: A tokenizer that cannot be cut.
        CheckpointError: Tokens that the embedding has no row for.
    """
    directory = small_files(source) or source.checkpoint(progress).directory
    files, tokenizer = SmallFiles(directory, source), open_tokenizer(directory)
    rows = spec.module(spec.embedding).weight_shape[0]
    files.refuse_foreign_ids(rows)
    files.add_tokens(tokenizer, rows)
    of_text = set().union(*(text_tokens(tokenizer, text) for text in texts))
    needed = of_text | chat_tokens(tokenizer) | set(first_ids(tokenizer)) | files.ids()
    needed = with_parents(needed, parents_of(files.tokenizer))
    kept = kept_tokens(files.tokenizer, needed, wanted, rows)
    return ChosenTokens(files, tokenizer, kept, len(needed), len(of_text))


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


def read_texts(texts: str | Path | Iterable[str | Path] | None) -> dict[str, str]:
    """Name → text of some files, or of the library's own.

    Raises:
        LowvramError: Not readable, too short to choose by, or two of one name.
    """
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
    say_held(spec)
    if (directory := small_files(source)) is not None:
        refuse_other_models(tokenizer_json(directory), source.name)
    return spec


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
