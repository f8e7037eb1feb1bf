"""All combinations of fewer tokens, layers and bits within some bytes: priced, the best of them made and measured."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lowvram_lab import __version__
from lowvram_lab.conversion.convert import CALIBRATION_TOKENS, convert, hash_of, known_sensitivity
from lowvram_lab.errors import BudgetError, LowvramError, SourceError
from lowvram_lab.files import known_sha256, write_atomically
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import Source, config_from_values, find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.repository.text import equal_windows, first_ids, plain_ids
from lowvram_lab.slimming.card import joint_card
from lowvram_lab.slimming.choice import choice_windows, choose_layers
from lowvram_lab.slimming.slim import choose_tokens, slim_vocabulary
from lowvram_lab.slimming.slim_layers import config_without, renaming, slim_layers
from lowvram_lab.slimming.small_files import SLIM
from lowvram_lab.slimming.yardstick import WINDOW, Yardstick
from lowvram_lab.units import format_bytes
from lowvram_lab.weights.calibration import calibration_windows
from lowvram_lab.weights.layerwise import LayerByLayer
from lowvram_lab.weights.recipe import WeightBudget, recipe
from lowvram_lab.weights.restored import RestoredLayers
from lowvram_lab.weights.sensitivity import Sensitivity

LEAST_WINDOWS = 4
"""Of the text that is measured on: an interval of fewer says nothing."""

BITS, SLIM_ALONE, JOINT = "bits alone", "tokens and layers alone", "together"


@dataclass(frozen=True)
class Candidate:
    """A way to the bytes.

    Attributes:
        fewer_tokens: Whether the tokens that the text does not need go.
        layers: How many go.
        weight_bytes: What the result takes.
        estimated: The sum of the price lists, nats a token.
        quantised: Whether any weight has fewer than 16 bits.
    """

    fewer_tokens: bool
    layers: int
    weight_bytes: int
    estimated: float
    quantised: bool

    @property
    def kind(self) -> str:
        """Which tools it uses."""
        slimmed = self.fewer_tokens or self.layers > 0
        return (JOINT if slimmed else BITS) if self.quantised else SLIM_ALONE

    @property
    def key(self) -> str:
        """A name for files."""
        return f"{'text' if self.fewer_tokens else 'all'}-{self.layers}-{'recipe' if self.quantised else '16'}"


class Folder:
    """Beside the output, where parts are made.

    Args:
        output: Where the result will be.
        identity: What it is made from; parts that were made from anything else go.
    """

    def __init__(self, output: Path, identity: dict):
        self.path = output.with_name(f".{output.name}.parts")
        note = self.path / "identity.json"
        known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else None
        if known != identity:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            write_atomically(note, json.dumps(identity))

    def kept(self, name: str, make) -> dict:
        """Plain data that an earlier run has found, else what ``make()`` gives."""
        file = self.path / f"{name}.json"
        if not file.is_file():
            write_atomically(file, json.dumps(make()))
        return json.loads(file.read_text(encoding="utf-8"))

    def directory(self, name: str, make) -> Path:
        """A finished directory; ``make`` is given its path, and leaves nothing there unless it ends."""
        path = self.path / name
        if not path.is_dir():
            make(path)
        return path

    def text(self, name: str, content: str) -> Path:
        """A file with some text."""
        file = self.path / name
        if not file.is_file():
            write_atomically(file, content)
        return file


class Search:
    """All combinations of one model within some bytes.

    Args:
        source: The model's.
        spec: The same on paper.
        budget: Bytes of all weights.
        texts: What is fitted to, and what is measured on.
        progress: Show progress bars.

    Raises:
        LowvramError: A text that is too short.
        CheckpointError: Layers that cannot be run by themselves.
    """

    def __init__(self, source: Source, spec: ModelSpec, budget: int, texts: tuple[str, str], progress: bool):
        self.source, self.spec, self.budget, self.progress = source, spec, budget, progress
        self.fitted, self.held_out = texts
        self.checkpoint, tokenizer = source.checkpoint(progress), source.tokenizer()
        self.ids = calibration_windows(tokenizer, self.fitted, CALIBRATION_TOKENS, spec.max_position_embeddings)
        held_out = plain_ids(tokenizer, self.held_out)
        self.measured_ids = equal_windows(held_out, first_ids(tokenizer), min(WINDOW, self.ids.shape[1]))
        if self.measured_ids.shape[0] < LEAST_WINDOWS:
            raise LowvramError(
                f"expected a text with {LEAST_WINDOWS * WINDOW} tokens to measure on, an eighth of it, found "
                f"{self.measured_ids.numel()}; give a longer one"
            )
        self.whole = LayerByLayer(spec, self.checkpoint)
        files = [self.checkpoint.directory / "config.json", *self.checkpoint.files]
        self.hashes = {file.name: known_sha256(file, progress) for file in files}

    def identity(self, most: int) -> dict:
        """What a result is made from."""
        return {
            "weights": self.hashes,
            "texts": [hash_of(self.ids), hash_of(self.measured_ids)],
            "budget": [self.budget, most],
            "threads": torch.get_num_threads(),
            "by": __version__,
        }

    def run(self, folder: Folder, most: int) -> dict:
        """Prices all combinations, makes and measures the best; gives what ``slim.json`` says of it, and where it is.

        Args:
            folder: For the parts.
            most: Layers that may go.

        Raises:
            BudgetError: Nothing is so small.
        """
        self.folder, self.yardstick = folder, Yardstick(self.whole, self.measured_ids, progress=self.progress)
        self.fitted_file = folder.text("fitted.txt", self.fitted)
        self.held_out_file = folder.text("held_out.txt", self.held_out)
        self.kept = folder.kept("tokens", self._tokens)
        self.order = folder.kept("layers", lambda: self._layers(most))
        candidates = self._candidates()
        if not candidates:
            raise BudgetError(
                f"nothing of {self.spec.name} is as small as {format_bytes(self.budget)}, with fewer bits, fewer "
                f"tokens and up to {most} layers less; allow more bytes"
            )
        found = {}
        for each in _best(candidates):
            found[each.key] = folder.kept(f"found-{each.key}", lambda each=each: self._found(each))
        rows = [self._row(each, found.get(each.key)) for each in sorted(candidates, key=lambda each: each.estimated)]
        best = min((each for each in candidates if each.key in found), key=lambda each: found[each.key]["kl"])
        return {
            "source": self.source.public_name,
            "layers_before": self.spec.num_hidden_layers,
            "vocab_before": self._rows(self.spec),
            "source_weight_bytes": weight_bytes_of(self.spec),
            "kind": best.kind,
            "kept_ids": self.kept["kept"] if best.fewer_tokens else None,
            **found[best.key],
            "candidates": rows,
        }

    def _tokens(self) -> dict:
        """Those that the texts need, and what the others were likely; none go where none can."""
        try:
            chosen = choose_tokens(self.source, self.spec, [self.fitted, self.held_out], None, progress=self.progress)
        except (LowvramError, SourceError) as error:
            return {"kept": None, "kl": 0.0, "why": str(error)}
        return {"kept": chosen.kept, "kl": self.yardstick.distance(kept=chosen.kept).kl}

    def _layers(self, most: int) -> dict:
        """The order in which layers go, and what each step costs in all."""
        if not most:
            return {"removed": [], "kl": []}
        found = choose_layers(self.whole, choice_windows(self.ids), most, progress=self.progress)
        return {"removed": list(found.removed), "kl": list(found.kl)}

    def _candidates(self) -> list[Candidate]:
        options = {"scratch": self.folder.path, "progress": self.progress}
        sensitivity = known_sensitivity(self.whole, self.ids, self.hashes, **options)
        return [
            candidate
            for fewer_tokens in ([False, True] if self.kept["kept"] else [False])
            for layers in range(len(self.order["removed"]) + 1)
            for candidate in self._ways(fewer_tokens, layers, sensitivity)
        ]

    def _ways(self, fewer_tokens: bool, layers: int, sensitivity: Sensitivity) -> list[Candidate]:
        """With so few tokens and layers: in 16 bits, if that is small enough; else with the best recipe, if any is."""
        removed = self.order["removed"][:layers]
        spec, cost = self._small_spec(fewer_tokens, removed), self.kept["kl"] if fewer_tokens else 0.0
        cost += self.order["kl"][layers - 1] if layers else 0.0
        if 2 * spec.num_parameters <= self.budget:
            return [Candidate(fewer_tokens, layers, 2 * spec.num_parameters, cost, False)]
        try:
            found = recipe(spec, _of_layers(sensitivity, self.spec, removed), weight_bytes=self.budget)
        except BudgetError:
            return []
        return [Candidate(fewer_tokens, layers, found.weight_bytes, cost + found.estimated_kl, True)]

    def _small_spec(self, fewer_tokens: bool, removed: list[int]) -> ModelSpec:
        config = config_without(self.checkpoint.directory, self.spec, sorted(removed))
        if fewer_tokens:
            known = type(self.spec.pretrained_config())
            config[known.attribute_map.get("vocab_size", "vocab_size")] = len(self.kept["kept"])
            config = {key: value for key, value in config.items() if not key.endswith("_token_id")}
        return ModelSpec.from_config(config_from_values(config, "config.json"), self.spec.name)

    def _found(self, candidate: Candidate) -> dict:
        """Makes a candidate, and measures it."""
        made, removed = self.source.name, sorted(self.order["removed"][: candidate.layers])
        fitted, texts = self.fitted_file, [self.fitted_file, self.held_out_file]
        slim = {"referee": False, "progress": self.progress}
        steps = []  # of each what it is called, and what it makes of the model before it
        if candidate.fewer_tokens:
            steps.append(("text", lambda of, path: slim_vocabulary(of, path, vocab="text", texts=texts, **slim)))
        if removed:
            steps.append((f"{len(removed)}", lambda of, path: slim_layers(of, path, removed, text=fitted, **slim)))
        if candidate.quantised:
            options = {"calibration": fitted, "progress": self.progress}
            steps.append(("recipe", lambda of, path: convert(of, path, WeightBudget(self.budget), **options)))
        name = "made"
        for called, step in steps:
            name, before = f"{name}-{called}", made
            made = str(self.folder.directory(name, lambda path, of=before, step=step: step(of, path)))
        return {"directory": name, "removed": removed, **self._measured(made, candidate.fewer_tokens)}

    def _measured(self, directory: str, fewer_tokens: bool) -> dict:
        source = find_source(directory)
        spec = source.spec()
        stream = RestoredLayers(spec, source.checkpoint(False))
        distance = self.yardstick.distance(stream, self.kept["kept"] if fewer_tokens else None)
        return {
            "vocab_after": self._rows(spec),
            "weight_bytes": weight_bytes_of(spec),
            "parameters": spec.num_parameters,
            "kl": distance.kl,
            "kl_interval": list(distance.interval),
            "kl_tokens": distance.tokens,
        }

    def _row(self, candidate: Candidate, found: dict | None) -> dict:
        low, high = found["kl_interval"] if found else (None, None)
        return {
            "kind": candidate.kind,
            "tokens": len(self.kept["kept"]) if candidate.fewer_tokens else self._rows(self.spec),
            "layers": self.spec.num_hidden_layers - candidate.layers,
            "weight_bytes": found["weight_bytes"] if found else candidate.weight_bytes,
            "estimated": candidate.estimated,
            "kl": found["kl"] if found else None,
            "low": low,
            "high": high,
        }

    def publish(self, output: Path, facts: dict) -> None:
        """Moves the best to its place, says there what it is, and removes the rest.

        Args:
            output: Its place.
            facts: From ``run``.

        Raises:
            LowvramError: Something stands in the way.
        """
        best = self.folder.path / facts.pop("directory")
        write_atomically(best / SLIM, json.dumps(facts, indent=1) + "\n")
        write_atomically(best / "README.md", joint_card(facts))
        recipe_file = best / "recipe.json"
        if recipe_file.is_file():  # ``convert`` knew a part of the work by its folder's name
            values = json.loads(recipe_file.read_text(encoding="utf-8"))
            write_atomically(recipe_file, json.dumps(values | {"source": facts["source"]}, indent=1) + "\n")
        try:
            if output.is_dir():
                output.rmdir()  # an empty one was allowed
            os.replace(best, output)
        except OSError as error:
            raise LowvramError(
                f"cannot rename {best} to {output}: {error.strerror}; see what stands in the way, then run the same "
                "command again: all is made"
            ) from error
        shutil.rmtree(self.folder.path, ignore_errors=True)

    @staticmethod
    def _rows(spec: ModelSpec) -> int:
        return spec.module(spec.embedding).weight_shape[0]


def _best(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those to be made: the two closest by estimate, and the closest of each kind."""
    ranked = sorted(candidates, key=lambda each: each.estimated)
    of_kind = {each.kind: each for each in reversed(ranked)}
    return list(dict.fromkeys([*ranked[:2], *of_kind.values()]))


def _of_layers(sensitivity: Sensitivity, spec: ModelSpec, removed: list[int]) -> Sensitivity:
    """The estimate of a model whose layers are some of this one's, under their new names."""
    rename = renaming(spec, removed)

    def renamed(costs: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        return {new: of for name, of in costs.items() if (new := rename(name)) is not None}

    return replace(
        sensitivity, costs=renamed(sensitivity.costs), activation_costs=renamed(sensitivity.activation_costs)
    )


def weight_bytes_of(spec: ModelSpec) -> int:
    """Of a model as its files hold it, in bf16 where they hold floats."""
    return Plan.uniform(spec, "stored" if spec.as_it_is else "bf16", context=2).weight_bytes()
