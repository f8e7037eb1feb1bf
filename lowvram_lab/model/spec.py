"""ModelSpec: what a model is, from its config alone. Built on meta, so a 7 B model costs a second and no RAM.

Knows modules, shapes and KV geometry; knows nothing about formats, devices or weights.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch.overrides import TorchFunctionMode

from lowvram_lab.errors import CheckpointError, PlanError, first_line
from lowvram_lab.layouts.block import layouts_of
from lowvram_lab.layouts.layout import Layout
from lowvram_lab.model.compressed import is_plain, stored_formats
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.geometry import KVLayer, kv_layers_of, unsupported
from lowvram_lab.model.kinds import kind_of
from lowvram_lab.model.low_plane import KEY as LOW_PLANE
from lowvram_lab.model.low_plane import checked_block, in_two_planes
from lowvram_lab.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModuleSpec:
    """One module that owns parameters.

    Attributes:
        name: Path inside the transformers model, e.g. ``model.layers.0.self_attn.q_proj``.
        kind: ``"linear"``, ``"embedding"`` or ``"other"`` (norms), by what it computes.
        parameters: Parameter name → shape, as a checkpoint stores it.
        layer: Index of the decoder layer it belongs to, or ``None``.
        tied_to: Name of the module whose weight this one shares, or ``None``.
        transposed: Its linear weight is stored ``(in_features, out_features)``, as GPT-2's is.
        scale: What an embedding multiplies its rows by, as Gemma's does.
        shared: Parameters beside ``weight`` that are another module's: name → that one's full name.
    """

    name: str
    kind: str
    parameters: dict[str, tuple[int, ...]]
    layer: int | None = None
    tied_to: str | None = None
    transposed: bool = False
    scale: float = 1.0
    shared: dict[str, str] = field(default_factory=dict)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of ``weight``, a linear one ``(out_features, in_features)``; else of the first parameter."""
        shape = self.parameters.get("weight") or next(iter(self.parameters.values()))
        return shape[::-1] if self.transposed else shape

    @property
    def own(self) -> dict[str, tuple[int, ...]]:
        """The parameters that are its own, not another module's, by name."""
        others = {*self.shared, *(["weight"] if self.tied_to else [])}
        return {key: shape for key, shape in self.parameters.items() if key not in others}


@dataclass(frozen=True)
class ModelSpec:
    """A model's modules, shapes, and the geometry of its KV cache.

    Attributes:
        name: What the model was called when it was asked for.
        config: The transformers config as a dictionary; enough to build the model again.
        modules: Every module with parameters, in forward order.
        num_hidden_layers: Decoder layers.
        hidden_size: Features of a hidden state.
        num_attention_heads: Heads of queries in a layer.
        kv_layers: What each decoder layer keeps of every token, or ``None`` where it reads another's keys and values.
        vocab_size: Tokens in the vocabulary.
        max_position_embeddings: Most tokens by its config, or 0 where that does not say.
        layers_path: Path of the list of decoder layers.
        embedding: Path of the embedding table.
        head: Path of the head.
        tied: Whether the head shares the embedding's weight.
        stored: Module name → format of the modules a converted checkpoint holds quantised; empty for 16-bit ones.
        held: Module name → format in which a file holds a weight that can be read in floats as well: what the recipe
            ``"stored"`` means then, and another format may be made of.
        rounded: Of ``held``, the modules whose codes that format does not take as they lie: they are rounded to it.
    """

    name: str
    config: dict = field(repr=False)
    modules: tuple[ModuleSpec, ...] = field(repr=False)
    num_hidden_layers: int = 0
    hidden_size: int = 0
    num_attention_heads: int = 0
    kv_layers: tuple[KVLayer | None, ...] = ()
    vocab_size: int = 0
    max_position_embeddings: int = 0
    layers_path: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    tied: bool = False
    stored: dict[str, str] = field(default_factory=dict, repr=False)
    held: dict[str, str] = field(default_factory=dict, repr=False)
    rounded: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def as_it_is(self) -> dict[str, str]:
        """Module name → format, of what the model's files hold quantised."""
        return self.stored or self.held

    @classmethod
    def from_config(cls, config: PretrainedConfig, name: str = "") -> ModelSpec:
        """Builds the spec of a transformers config on the meta device.

        Args:
            config: A ``PretrainedConfig`` of a causal language model.
            name: What to call the model.

        Raises:
            CheckpointError: transformers cannot build the model from this config, it has no decoder layers, or it is of
                a kind whose memory is not forecast here (experts, linear attention, several towers); it is named.
        """
        return _spec_from_json(json.dumps(config.to_dict(), sort_keys=True, default=str), name)

    @property
    def num_parameters(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(math.prod(shape) for module in self.modules for shape in module.own.values())

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change when a module, a shape or a tie does. Plans carry it."""
        facts = [self.config.get("model_type"), [_facts(module) for module in self.modules]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @property
    def longest_context(self) -> int:
        """Most tokens a plan may have: positions, sliding window; 2^20 where the config states neither."""
        return min(self.max_position_embeddings or 2**20, self.sliding_window or 2**20)

    @property
    def sliding_window(self) -> int | None:
        """Tokens the shortest-sighted layer attends to, or ``None`` where every layer sees everything."""
        return min((each.window for each in self.kv_layers if each and each.window), default=None)

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values, of the layer that has most."""
        return max(each.heads for each in self.kv_layers if each)

    @property
    def head_dim(self) -> int:
        """Features of a key in one head, of the layer with the widest."""
        return max(each.key_dim for each in self.kv_layers if each)

    def kv_bytes(self, tokens: int, batch_size: int = 1, itemsize: int = 2) -> int:
        """Bytes of keys and values for ``tokens`` cached tokens, summed over the layers."""
        per_token = sum(each.features for each in self.kv_layers if each) * itemsize
        return per_token * tokens * batch_size

    def module(self, name: str) -> ModuleSpec:
        """The module called ``name``.

        Raises:
            PlanError: There is none.
        """
        for module in self.modules:
            if module.name == name:
                return module
        raise PlanError(f"model {self.name or self.config.get('model_type')} has no module {name!r}")

    def without_low_planes(self) -> ModelSpec:
        """The same model by its high planes alone, where it is stored in two."""
        return replace(self, stored={name: get_format(fmt).plane.name for name, fmt in self.stored.items()})

    def pretrained_config(self):
        """A fresh transformers config object of this model."""
        return _config_from_dict(self.config)

    def to_dict(self) -> dict:
        """Sizes as plain numbers, without the modules."""
        return {
            "model": self.name,
            "model_type": self.config.get("model_type"),
            "parameters": self.num_parameters,
            "num_hidden_layers": self.num_hidden_layers,
            "hidden_size": self.hidden_size,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "tied": self.tied,
            "max_position_embeddings": self.max_position_embeddings,
            "kv_bytes_per_token": self.kv_bytes(1),
            "fingerprint": self.fingerprint,
        }

    def table(self):
        """One row a module: name, kind, shape, parameters, 16-bit bytes. A DataFrame."""
        import pandas as pd

        rows = [
            {
                "module": m.name,
                "kind": m.kind,
                "shape": " x ".join(map(str, m.weight_shape)),
                "parameters": sum(math.prod(shape) for shape in m.own.values()),
            }
            for m in self.modules
        ]
        return pd.DataFrame(rows).assign(fp16_bytes=lambda t: 2 * t["parameters"])


def build_on_meta(config: PretrainedConfig):
    """A transformers model whose parameters are on meta and whose buffers (rotary frequencies) are real.

    Raises:
        CheckpointError: transformers has no such causal language model, or its constructor fails.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, PreTrainedModel

    try:
        with init_empty_weights(include_buffers=False), _WithoutDraws():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config can break a constructor in any way; the user needs one line, not which
        raise CheckpointError(
            f"transformers cannot build a {config.model_type!r} causal language model from this config: "
            f"{first_line(error)}"
        ) from error
    model.tie_weights()  # the empty-weights context registers a parameter anew each time, which undoes the tie
    for part in model.modules():
        if isinstance(part, PreTrainedModel):  # it would read a prompt's ends back from the card at every step
            part.warn_if_padding_and_no_attention_mask = _do_not_look_for_padding
        if getattr(part, "rope_type", None) == "longrope":
            _make_long_frequencies(part)
        for name, value in list(vars(part).items()):  # as GPT-J has its tables: buffers have a place, and travel
            if isinstance(value, torch.Tensor):
                delattr(part, name)
                part.register_buffer(name, value, persistent=False)
    return model.eval()


_DRAWS = {"normal_", "uniform_", "kaiming_uniform_"}


class _WithoutDraws(TorchFunctionMode):
    """Leaves parameters on meta as they are where a constructor draws numbers: that would take most of its time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Passes over draws into tensors on meta, and everything else on."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:  # transformers puts its own in the place of torch's
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _make_long_frequencies(rotary: torch.nn.Module) -> None:
    """Makes now what transformers makes in the first forward, from lists of Python's, whose place no meter knows."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    trained = rotary.config.rope_parameters["original_max_position_embeddings"]
    rotary.long_inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, "cpu", seq_len=trained + 1)


def _do_not_look_for_padding(ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Stands in for transformers' own, which only warns."""


@functools.lru_cache(maxsize=16)
def _spec_from_json(config_json: str, name: str) -> ModelSpec:
    config_dict = json.loads(config_json)
    block = config_dict.pop("quantization_config", None)
    low_plane = checked_block(config_dict, name)
    config_dict.pop(LOW_PLANE, None)
    config = _config_from_dict(config_dict)
    text = config.get_text_config()
    _refuse_towers(config, text)
    model = build_on_meta(config)
    _refuse_experts(model)
    layers = _stated(text, "num_hidden_layers")
    layers_path = _find_layers(model, layers)
    _refuse_other_layers(model, layers_path)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): path for path, module in model.named_modules()}
    if head is None or embedding is None:
        raise CheckpointError(f"{config.model_type}: expected input and output embeddings, found a model without them")
    modules = _modules_of(model, layers_path, embedding)
    stored, layouts = _of_files(block, modules, name or config.model_type)
    return ModelSpec(
        name=name,
        config=config_dict,
        modules=modules,
        num_hidden_layers=layers,
        hidden_size=_stated(text, "hidden_size"),
        kv_layers=kv_layers_of(model.to("meta"), layers),
        num_attention_heads=_stated(text, "num_attention_heads"),
        vocab_size=_stated(text, "vocab_size"),
        max_position_embeddings=_positions(model, text),
        layers_path=layers_path,
        embedding=names[id(embedding)],
        head=names[id(head)],
        tied=embedding.weight is head.weight,
        stored=in_two_planes(stored, low_plane),
        held={name: layout.held for name, layout in layouts.items()},
        rounded=frozenset(name for name, layout in layouts.items() if not layout.exact),
    )


def _of_files(block: dict | None, modules: tuple[ModuleSpec, ...], where: str) -> tuple[dict, dict[str, Layout]]:
    """``ModelSpec.stored`` by a config's ``quantization_config``, or the layouts of other tools' files."""
    if not block:
        return {}, {}
    if is_plain(block):
        return stored_formats(block, modules, where), {}
    return {}, layouts_of(block, modules, where)


def _modules_of(model: PreTrainedModel, layers_path: str, embedding: torch.nn.Module) -> tuple[ModuleSpec, ...]:
    """Every module with parameters, in the order of the class but for those that share: they come after who owns."""
    named = list(model.named_modules())
    owners = {id(embedding.weight): (next(path for path, module in named if module is embedding), "weight")}
    modules = []
    for path, module in named:
        parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        if not parameters:
            continue
        found = re.match(re.escape(layers_path) + r"\.(\d+)(?:\.|$)", path)
        found_owners = {key: owners.setdefault(id(value), (path, key)) for key, value in parameters.items()}
        shared = {key: owner for key, owner in found_owners.items() if owner[0] != path}
        kind = kind_of(module)
        modules.append(
            ModuleSpec(
                name=path,
                kind=kind.name,
                parameters={key: tuple(value.shape) for key, value in parameters.items()},
                layer=int(found.group(1)) if found else None,
                tied_to=shared.pop("weight", (None,))[0],
                transposed=kind.transposed,
                scale=kind.scale,
                shared={key: ".".join(owner) for key, owner in shared.items()},
            )
        )
    return tuple(sorted(modules, key=lambda module: bool(module.tied_to or module.shared)))


def _facts(module: ModuleSpec) -> list:
    """What a fingerprint knows of a module; what most modules lack is left out, so that theirs stay what they were."""
    facts = [module.name, module.kind, sorted(module.parameters.items()), module.tied_to]
    odd = {"transposed": module.transposed or None, "scale": module.scale - 1 or None, "shared": module.shared or None}
    odd = {name: value for name, value in odd.items() if value is not None}
    return [*facts, odd] if odd else facts


def _positions(model: PreTrainedModel, text: PretrainedConfig) -> int:
    """Most tokens by the config, without the rows of a position table before the first token's (RoBERTa's padding)."""
    stated = getattr(text, "max_position_embeddings", 0) or getattr(text, "max_seq_len", 0) or 0
    tables = (m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not model.get_input_embeddings())
    lost = [m.padding_idx + 1 for m in tables if m.num_embeddings == stated and m.padding_idx is not None]
    return max(0, stated - max(lost, default=0))


def _stated(text: PretrainedConfig, name: str) -> int:
    value = getattr(text, name, None)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{text.model_type}: expected a config with {name}, found {value!r}; it is not supported")
    return value


def _refuse_towers(config: PretrainedConfig, text: PretrainedConfig) -> None:
    """Names what is more than the one stack of decoder layers that a plan places."""
    if getattr(config, "is_encoder_decoder", False):
        raise unsupported(config.model_type, "an encoder-decoder model")
    if text is not config:
        raise unsupported(config.model_type, "a model with more than one tower (text beside vision or audio)")


def _refuse_other_layers(model: PreTrainedModel, layers_path: str) -> None:
    """A list of blocks with products of their own, beside the decoder layers, is another tower: an image's, say."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not f"{path}.".startswith(f"{layers_path}."):
            inner = (part for block in module for part in block.modules() if part is not block)
            if any(isinstance(part, torch.nn.Linear) for part in inner):
                raise unsupported(model.config.model_type, f"a model with more than one tower ({path})")


def _refuse_experts(model: PreTrainedModel) -> None:
    """transformers fuses a layer's experts into parameters of three dimensions, which no format here holds yet."""
    for module in model.modules():
        fused = any(parameter.dim() > 2 for parameter in module.parameters(recurse=False))
        if fused and "expert" in type(module).__name__.lower():
            raise unsupported(model.config.model_type, "a mixture of experts")


def _config_from_dict(values: dict):
    from transformers import AutoConfig

    values = copy.deepcopy(values)
    with quiet_transformers():  # what it says of odd values, it said when the file was read
        return AutoConfig.for_model(values.pop("model_type"), **values)


def _find_layers(model: PreTrainedModel, count: int) -> str:
    lists = {path: len(m) for path, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    for path, length in lists.items():
        if length == count and path.count(".") <= 2:
            return path
    found = ", ".join(f"{path} of {length}" for path, length in lists.items()) or "no list at all"
    raise CheckpointError(
        f"looked for a list (ModuleList) of {count} decoder layers in {type(model).__name__}, found {found[:200]}: "
        "this architecture is not supported"
    )
