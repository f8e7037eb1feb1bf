"""slim_layers: a model without some of its layers, repaired and healed, in a directory that stock transformers opens.

Chooses the layers by measured KL, folds what they added into the layers before them, heals those that are left, and
says of each of the three what it comes to on a text that none of them has seen.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from lowvram_lab import __version__
from lowvram_lab.conversion.convert import hash_of
from lowvram_lab.conversion.resumable import PartialDirectory, building
from lowvram_lab.errors import CheckpointError, LowvramError
from lowvram_lab.files import expanded, known_sha256, refuse_occupied, require_space
from lowvram_lab.memory.host import peak_rss_bytes
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.compressed import KEY as QUANTISED
from lowvram_lab.model.source import config_from_values, find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.packaged import calibration_text, sample_text
from lowvram_lab.repository.hub import TOKENIZER
from lowvram_lab.repository.text import equal_windows, first_ids, plain_ids
from lowvram_lab.slimming.card import layers_card
from lowvram_lab.slimming.choice import choice_windows, choose_layers
from lowvram_lab.slimming.heal import LowRank, heal, state_bytes
from lowvram_lab.slimming.referee import Refereed, Verdict, rival_of
from lowvram_lab.slimming.repair import refuse_unrepairable, repair
from lowvram_lab.slimming.rewritten import Changed, Rewritten, say_held
from lowvram_lab.slimming.small_files import SLIM
from lowvram_lab.slimming.yardstick import WINDOW, Distance, Yardstick
from lowvram_lab.weights.calibration import LEAST_TOKENS, calibration_windows
from lowvram_lab.weights.layerwise import LayerByLayer

TOKENS = 24576
"""Of the text that repair and healing are fitted to."""

STAGES = CUT, REPAIRED, HEALED = "cut", "repaired", "healed"
"""How far a model is that has fewer layers."""


@dataclass(frozen=True, kw_only=True)
class SlimmedLayers(Refereed):
    """What was left out of a model, and what that costs; see ``Refereed``; sizes are those of the files.

    Attributes:
        layers_before: Of the model.
        removed: Indices of those that were left out, in the order of the model.
        kl: Mean KL to the whole model in nats a token, on a text that nothing was fitted to: ``"cut"``, and where they
            were asked for ``"repaired"`` and ``"healed"``.
        kl_interval: Stage → where the mean lies for 95 % of such texts, see ``Distance``.
        kl_tokens: Measured on.
        explained: Index of the layer before each gap → the share of what the gap added that it gives back.
    """

    layers_before: int
    removed: tuple[int, ...]
    kl: dict[str, float]
    kl_tokens: int
    explained: dict[int, float]
    kl_interval: dict[str, list[float]]

    def to_dict(self) -> dict:
        """Plain data."""
        return {**super().to_dict(), "removed": list(self.removed)}

    def summary(self) -> str:
        """What a person wants to know, in three lines."""
        costs = ", ".join(f"{name} {kl:.4f}{self._gone(name)}" for name, kl in self.kl.items())
        left = self.layers_before - len(self.removed)
        return (
            f"{self.output}: {left} of {self.layers_before} layers, without {', '.join(map(str, self.removed))}\n"
            f"KL to the whole model, nats a token on a text that nothing was fitted to: {costs}\n"
            f"{self.sizes}; {self.effort}{self.verdict}"
        )

    def _gone(self, stage: str) -> str:
        """How much of what the cut costs a stage takes away, in words."""
        if stage == CUT or not self.kl[CUT]:
            return ""
        return f" ({1 - self.kl[stage] / self.kl[CUT]:.0%} of it gone)"


def slim_layers(
    model: str,
    output: str | Path,
    layers: int | Sequence[int],
    *,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    stage: str = REPAIRED,
    referee: bool = True,
    progress: bool = True,
) -> SlimmedLayers:
    """Writes a model without some of its layers.

    Killed, it goes on where it was when called again with the same arguments: what was chosen, repaired and healed is
    kept.

    Args:
        model: Name, hub id, directory or .gguf file of a 16-bit model.
        output: A new or empty directory.
        layers: How many are left out, those whose absence is measured to cost least; or which, by index.
        text: A file like what the model will read; by default the library's own text.
        tokens: Read so many tokens of it at most.
        stage: How far: ``"cut"``; ``"repaired"``, which folds what the layers added into those before them
            (``repair``); ``"healed"``, whose layers then learn low-rank changes (``heal``): minutes for a small model,
            hours for one of billions.
        referee: Measure what quantising alone reaches in the bytes of the result.
        progress: Show progress bars, on stderr.

    Returns:
        What was left out, sizes before and after, KL at each stage, and the referee's word.

    Raises:
        LowvramError: Output not empty, text too short, layers that there are not, no disk space.
        SourceError: No such model.
        CheckpointError: Damaged weights, or layers that cannot be run by themselves.
    """
    began = time.monotonic()
    output = expanded(output)
    refuse_occupied(output)
    if stage not in STAGES:
        raise LowvramError(f"expected a stage of {', '.join(STAGES)}, found {stage!r}")
    if tokens < LEAST_TOKENS:
        raise LowvramError(f"expected {LEAST_TOKENS} tokens of text or more, found {tokens}")
    source = find_source(model)
    spec = source.spec(source.public_name)
    wanted = _checked_layers(layers, spec)
    read = calibration_text(text)  # before weights are fetched: a text may be missing
    checkpoint, tokenizer = source.checkpoint(progress), source.tokenizer()
    ids = calibration_windows(tokenizer, read, tokens, spec.max_position_embeddings)
    held_out = equal_windows(plain_ids(tokenizer, sample_text()), first_ids(tokenizer), min(WINDOW, ids.shape[1]))
    stream = LayerByLayer(spec, checkpoint)
    if stage != CUT:
        refuse_unrepairable(stream, ids)
    identity = _identity(checkpoint, wanted, [ids, held_out], progress)
    facts = {
        "source": source.public_name,
        "layers_before": len(stream),
        "text": Path(text).name if text else "the text that comes with lowvram_lab",
        "text_tokens": ids.numel(),
    }
    with building(output, identity) as partial:
        _begin(partial, stage)
        removed = _removed(partial, stream, ids, wanted, progress)
        config = config_without(checkpoint.directory, spec, removed)
        work = _Work(partial, stream, removed, ids, held_out, progress)
        facts |= {"removed": removed, **work.stages(stage), **work.written()}
        if referee:
            rival = rival_of(source, stream, facts["weight_bytes"], work.yardstick, progress=progress)
            facts["referee"] = Verdict(facts["weight_bytes"], work.distance, rival).to_dict()
        _finish(partial, checkpoint.directory, facts, config)
        partial.publish()
    found = {field.name: facts[field.name] for field in fields(SlimmedLayers) if field.name in facts}
    found |= {"removed": tuple(removed), "explained": {int(at): share for at, share in facts["explained"].items()}}
    return SlimmedLayers(output=str(output), **found, seconds=time.monotonic() - began, peak_rss_bytes=peak_rss_bytes())


def _identity(checkpoint: Checkpoint, wanted: int | list[int], texts: list[torch.Tensor], progress: bool) -> dict:
    """What the work is made from: another run goes on with it only where all of this is the same."""
    files = [checkpoint.directory / "config.json", *checkpoint.files]
    return {
        "weights": {file.name: known_sha256(file, progress) for file in files},
        "layers": wanted,
        "text": [hash_of(ids) for ids in texts],
        "threads": torch.get_num_threads(),
        "by": __version__,
    }


def _begin(partial: PartialDirectory, stage: str) -> None:
    """Takes away weights that an earlier run wrote at another stage; what was chosen and fitted stays."""
    if partial.load_json("state/stage.json") != {"stage": stage}:
        for file in sorted(partial.path.glob("model*.safetensors")):
            partial.forget(file.name)
        partial.save_json("state/stage.json", {"stage": stage})


class _Work:
    """What is fitted, kept in the directory's state.

    Attributes:
        weights: Those that the repair makes others, by name.
        healed: What healing adds to these and to others, by name.
        yardstick: On the held-out text.
        distance: After the last stage.
    """

    distance: Distance

    def __init__(
        self,
        partial: PartialDirectory,
        stream: LayerByLayer,
        removed: list[int],
        ids: torch.Tensor,
        held_out: torch.Tensor,
        progress: bool,
    ):
        self._partial, self._stream, self._removed = partial, stream, removed
        self._ids, self._progress = ids, progress
        self.yardstick = Yardstick(stream, held_out, progress=progress)
        self._kept = [index for index in range(len(stream)) if index not in removed]
        self.weights: dict[str, torch.Tensor] = {}
        self.healed: dict[str, LowRank] = {}

    def stages(self, last: str) -> dict:
        """Repairs and heals as far as that is wanted, and measures each stage on a text that it was not fitted to."""
        found, explained, healing = {CUT: self._distance()}, {}, {}
        if last != CUT:
            explained = self._repair()
            found[REPAIRED] = self._distance()
        if last == HEALED:
            healing = self._heal()
            found[HEALED] = self._distance()
        self.distance = found[last]
        kl = {stage: distance.kl for stage, distance in found.items()}
        intervals = {stage: list(distance.interval) for stage, distance in found.items()}
        measured = {"kl": kl, "kl_interval": intervals, "kl_tokens": self.yardstick.tokens}
        return measured | {"explained": explained, "healing": healing}

    def written(self) -> dict[str, int]:
        """Writes the weights; bytes of all that there were, and of those that are left."""
        checkpoint = self._stream.checkpoint
        names = _names(checkpoint, self._stream.spec, self._removed)
        rewritten = Rewritten(checkpoint, names, _changes(checkpoint, self.weights, self.healed))
        require_space(self._partial.path, rewritten.nbytes, "the smaller model")
        rewritten.write(self._partial, self._progress)
        return {"weight_bytes": rewritten.nbytes, "source_weight_bytes": rewritten.source_nbytes}

    def _repair(self) -> dict[str, float]:
        """See ``Repair.explained``; its keys are text, as in a file."""
        facts, tensors = self._partial.load_json("state/repair.json"), None
        if facts is not None:
            tensors = self._partial.load_tensors("state/repair.safetensors") if facts.get("changed", True) else {}
        if tensors is None:
            states = 4 * self._stream.spec.hidden_size * self._ids.numel()
            require_space(self._partial.path, states, "the hidden states of the repair")
            found = repair(self._stream, self._removed, self._ids, scratch=self._partial.state, progress=self._progress)
            facts, tensors = {"explained": {str(at): share for at, share in found.explained.items()}}, found.weights
            facts["changed"] = bool(tensors)
            if tensors:
                self._partial.save_tensors("state/repair.safetensors", tensors)
            self._partial.save_json("state/repair.json", facts)
        self.weights = tensors
        return facts["explained"]

    def _heal(self) -> dict:
        """What is said of it in slim.json: the KL of each pass, in nats a token, while it was learnt on."""
        keep = _Newest(self._partial)
        if keep.load() is None:  # the one being written beside the one before
            require_space(self._partial.path, 2 * state_bytes(self._stream, self._removed), "the state of healing")
        slim = _with(self._stream, self.weights)
        found = heal(self._stream, slim, self._removed, self._ids, keep=keep, progress=self._progress)
        self.healed = found.changes
        return {"kl_while_learning": list(found.kl), "tokens": found.tokens}

    def _distance(self) -> Distance:
        """From the whole model, of the one with these weights and fewer layers, on the held-out text."""
        return self.yardstick.distance(_with(self._stream, self.weights, self.healed), layers=self._kept)


class _Newest:
    """The last of several states of healing, see ``Keeps``: written beside the one before, which goes after that."""

    _FILES = "state/heal-a.safetensors", "state/heal-b.safetensors"

    def __init__(self, partial: PartialDirectory):
        self._partial, self._next = partial, self._FILES[0]

    def load(self) -> dict[str, torch.Tensor] | None:
        found = {file: tensors for file in self._FILES if (tensors := self._partial.load_tensors(file))}
        if not found:
            return None
        file = max(found, key=lambda name: found[name]["step"].item())
        self._next = self._other(file)
        return found[file]

    def save(self, tensors: dict[str, torch.Tensor]) -> None:
        self._partial.save_tensors(self._next, tensors)
        self._next = self._other(self._next)
        self._partial.forget(self._next)

    def _other(self, file: str) -> str:
        return self._FILES[1 - self._FILES.index(file)]


def _with(
    stream: LayerByLayer, weights: Mapping[str, torch.Tensor], healed: Mapping[str, LowRank] | None = None
) -> LayerByLayer:
    """The same model but for some weights, rounded as the file will have them."""
    changed = _changes(stream.checkpoint, weights, healed or {})
    return LayerByLayer(stream.spec, Rewritten(stream.checkpoint, changed=changed), stream.dtype)


def _checked_layers(layers: int | Sequence[int], spec: ModelSpec) -> int | list[int]:
    count = spec.num_hidden_layers
    if spec.stored:
        raise LowvramError(
            f"{spec.name} is a converted model; leave layers of the 16-bit original out, then convert what is left"
        )
    say_held(spec)
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not 1 <= layers < count:
            raise LowvramError(
                f"expected 1 to {count - 1} layers to leave out ({spec.name} has {count}), found {layers}"
            )
        return layers
    chosen = list(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else [None]
    if not all(type(index) is int and 0 <= index < count for index in chosen) or len(set(chosen)) != len(chosen):
        raise LowvramError(
            f"expected a number of layers, or different indices of 0 to {count - 1}, found {layers!r:.60}"
        )
    if not 1 <= len(chosen) < count:
        raise LowvramError(f"expected 1 to {count - 1} layers to leave out, found {len(chosen)}")
    return sorted(chosen)


def _removed(
    partial: PartialDirectory, stream: LayerByLayer, ids: torch.Tensor, wanted: int | list[int], progress: bool
) -> list[int]:
    """Indices in the order of the model."""
    if not isinstance(wanted, int):
        return wanted
    known = partial.load_json("state/choice.json")
    if known is None:
        known = {"removed": list(choose_layers(stream, choice_windows(ids), wanted, progress=progress).removed)}
        partial.save_json("state/choice.json", known)
    return sorted(known["removed"])


def config_without(directory: Path, spec: ModelSpec, removed: list[int]) -> dict:
    """The config of what is left: everything in it that has an entry for each layer loses those of the removed.

    What the class derives from a layer's index, where the file does not state it, is stated then: in fewer layers it
    would be derived for others.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config.pop(QUANTISED, None)
    count, known = spec.num_hidden_layers, spec.pretrained_config()
    key = type(known).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for name, values in known.to_dict().items():
        if isinstance(values, list) and len(values) == count and name.startswith(("layer", "no_rope", "block")):
            config[name] = [value for index, value in enumerate(values) if index not in removed]
    config |= {key: count - len(removed), "tie_word_embeddings": spec.tied}
    if config.get("max_window_layers", 0) > config[key]:
        config["max_window_layers"] = config[key]
    _check_same(spec, ModelSpec.from_config(config_from_values(config, "config.json"), spec.name), removed)
    return config


def _check_same(spec: ModelSpec, slim: ModelSpec, removed: list[int]) -> None:
    """Refuses a config whose layers would be others than those that are kept."""
    renamed = renaming(spec, removed)
    before = {new: m.parameters for m in spec.modules if (new := renamed(m.name)) is not None}
    after = {module.name: module.parameters for module in slim.modules}
    if before != after:
        odd = sorted(before.keys() ^ after.keys()) or [name for name in before if before[name] != after[name]]
        raise CheckpointError(
            f"{spec.name}: without these layers {odd[0]} would be another module than it was; leave other layers out"
        )


def renaming(spec: ModelSpec, removed: list[int]):
    """A module's or tensor's name → its new one; ``None`` for one of a removed layer."""
    kept = [index for index in range(spec.num_hidden_layers) if index not in removed]
    new = {old: index for index, old in enumerate(kept)}
    of_layer = re.compile(rf"{re.escape(spec.layers_path)}\.(\d+)\.(.*)", re.DOTALL)

    def rename(name: str) -> str | None:
        found = of_layer.fullmatch(name)
        if found is None:
            return name
        index = int(found[1])
        return f"{spec.layers_path}.{new[index]}.{found[2]}" if index in new else None

    return rename


def _names(checkpoint: Checkpoint, spec: ModelSpec, removed: list[int]) -> dict[str, str]:
    renamed = renaming(spec, removed)
    return {name: new for name in checkpoint if (new := renamed(name)) is not None}


def _changes(
    checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor], healed: Mapping[str, LowRank]
) -> dict[str, Changed]:
    """What becomes of the weights that are replaced, added to, or both; made when one is read, and not held."""

    def changed(name: str):
        def change(original: torch.Tensor) -> torch.Tensor:
            weight = weights.get(name, original)
            if name in healed:
                weight = healed[name].added_to(weight)
            return weight.to(original.dtype)

        return change

    return {name: Changed(checkpoint.shape(name), changed(name)) for name in sorted(weights.keys() | healed.keys())}


def _finish(partial: PartialDirectory, directory: Path, facts: dict, config: dict) -> None:
    """Writes everything beside the weights."""
    partial.copy(directory, [*TOKENIZER, "generation_config.json", "LICENSE*"])
    partial.save_json(SLIM, facts)
    (partial.path / "README.md").write_text(layers_card(facts), encoding="utf-8")
    partial.save_json("config.json", config)  # last: a directory without it opens nowhere
