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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lowvram_lab.errors import CheckpointError, PlanError, first_line
from lowvram_lab.model.compressed import stored_formats

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModuleSpec:
    """One module that owns parameters.

    Attributes:
        name: Path inside the transformers model, e.g. ``model.layers.0.self_attn.q_proj``.
        kind: ``"linear"``, ``"embedding"`` or ``"other"`` (norms).
        parameters: Parameter name → shape. A linear weight is ``(out_features, in_features)``.
        layer: Index of the decoder layer it belongs to, or ``None``.
        tied_to: Name of the module whose weight this one shares, or ``None``.
    """

    name: str
    kind: str
    parameters: dict[str, tuple[int, ...]]
    layer: int | None = None
    tied_to: str | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of ``weight`` (of the first parameter, where none has that name)."""
        return self.parameters.get("weight") or next(iter(self.parameters.values()))


@dataclass(frozen=True)
class ModelSpec:
    """A model's modules, shapes, and the geometry of its KV cache.

    Attributes:
        name: What the model was called when it was asked for.
        config: The transformers config as a dictionary; enough to build the model again.
        modules: Every module with parameters, in forward order.
        num_hidden_layers: Decoder layers.
        hidden_size: Features of a hidden state.
        num_key_value_heads: Heads of keys and values in a layer.
        head_dim: Features of a head.
        vocab_size: Tokens in the vocabulary.
        max_position_embeddings: Longest text it was trained for, or 0 where its config does not say.
        layers_path: Path of the list of decoder layers.
        embedding: Path of the embedding table.
        head: Path of the head.
        tied: Whether the head shares the embedding's weight.
        sliding_window: Tokens the shortest-sighted layer attends to, or ``None``.
        stored: Module name → format of the modules a converted checkpoint holds quantised; empty for 16-bit ones.
    """

    name: str
    config: dict = field(repr=False)
    modules: tuple[ModuleSpec, ...] = field(repr=False)
    num_hidden_layers: int = 0
    hidden_size: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    vocab_size: int = 0
    max_position_embeddings: int = 0
    layers_path: str = "model.layers"
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"
    tied: bool = False
    sliding_window: int | None = None
    stored: dict[str, str] = field(default_factory=dict, repr=False)

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
        return sum(
            math.prod(shape)
            for module in self.modules
            for key, shape in module.parameters.items()
            if not (module.tied_to and key == "weight")
        )

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change when a module, a shape or a tie does. Plans carry it."""
        facts = [
            self.config.get("model_type"),
            [[m.name, m.kind, sorted(m.parameters.items()), m.tied_to] for m in self.modules],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @property
    def longest_context(self) -> int:
        """Most tokens a plan may have: positions, sliding window; 2^20 where the config states neither."""
        return min(self.max_position_embeddings or 2**20, self.sliding_window or 2**20)

    def kv_bytes(self, tokens: int, batch_size: int = 1, itemsize: int = 2) -> int:
        """Bytes of keys and values for ``tokens`` cached tokens: 2 x layers x kv heads x head_dim x itemsize each."""
        per_token = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize
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
                "parameters": sum(math.prod(s) for s in m.parameters.values()) * (m.tied_to is None),
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
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    except Exception as error:  # a config can break a constructor in any way; the user needs one line, not which
        raise CheckpointError(
            f"transformers cannot build a {config.model_type!r} causal language model from this config: "
            f"{first_line(error)}"
        ) from error
    model.tie_weights()  # the empty-weights context registers a parameter anew each time, which undoes the tie
    return model.eval()


@functools.lru_cache(maxsize=16)
def _spec_from_json(config_json: str, name: str) -> ModelSpec:
    config_dict = json.loads(config_json)
    block = config_dict.pop("quantization_config", None)
    config = _config_from_dict(config_dict)
    text = config.get_text_config()
    _refuse_unsupported(config, text)
    model = build_on_meta(config)
    layers_path = _find_layers(model, text.num_hidden_layers)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): path for path, module in model.named_modules()}
    if head is None or embedding is None:
        raise CheckpointError(f"{config.model_type}: expected input and output embeddings, found a model without them")
    modules = _modules_of(model, layers_path)
    heads = text.num_attention_heads
    return ModelSpec(
        name=name,
        config=config_dict,
        modules=modules,
        num_hidden_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_key_value_heads=_kv_heads(text),
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab_size=text.vocab_size,
        max_position_embeddings=getattr(text, "max_position_embeddings", 0) or 0,
        sliding_window=_sliding_window(text),
        layers_path=layers_path,
        embedding=names[id(embedding)],
        head=names[id(head)],
        tied=any(m.tied_to for m in modules),
        stored=stored_formats(block, modules, name or config.model_type) if block else {},
    )


def _modules_of(model: PreTrainedModel, layers_path: str) -> tuple[ModuleSpec, ...]:
    """Every module with parameters of its own, in forward order."""
    kinds = {torch.nn.Linear: "linear", torch.nn.Embedding: "embedding"}
    owners: dict[int, str] = {}
    modules = []
    for path, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters:
            continue
        found = re.match(re.escape(layers_path) + r"\.(\d+)\.", path)
        weight = parameters.get("weight")
        tied_to = owners.get(id(weight)) if weight is not None else None
        owners.setdefault(id(weight), path)
        shapes = {key: tuple(value.shape) for key, value in parameters.items()}
        layer = int(found.group(1)) if found else None
        modules.append(ModuleSpec(path, kinds.get(type(module), "other"), shapes, layer, tied_to))
    return tuple(modules)


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _refuse_unsupported(config: PretrainedConfig, text: PretrainedConfig) -> None:
    """Names what a forecast would get silently wrong: experts, attention that is not plain, more than one tower."""
    kind = config.model_type

    def refuse(what: str) -> None:
        raise CheckpointError(f"{kind}: {what} is not supported; name a dense decoder-only model (Llama, Qwen2, …)")

    if getattr(config, "is_encoder_decoder", False):
        refuse("an encoder-decoder model")
    if text is not config:
        refuse("a model with more than one tower (text beside vision or audio)")
    if any((getattr(text, name, None) or 0) > 1 for name in _EXPERTS):
        refuse("a mixture of experts")
    odd = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        refuse(f"attention of type {', '.join(sorted(odd))}")
    if not getattr(text, "num_attention_heads", None):
        refuse("a model without attention heads (state space, recurrent)")


def _kv_heads(text: PretrainedConfig) -> int:
    """Heads of keys and values. Multi-query models say that all queries share one head in a word of their own."""
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    stated = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    return stated or text.num_attention_heads


def _sliding_window(text: PretrainedConfig) -> int | None:
    """The shortest window any layer attends within, or ``None`` where every layer sees everything."""
    window = getattr(text, "sliding_window", None)
    layer_types = getattr(text, "layer_types", None)
    slides = "sliding_attention" in layer_types if layer_types else getattr(text, "use_sliding_window", True)
    return window if window and slides else None


def _config_from_dict(values: dict):
    from transformers import AutoConfig

    values = copy.deepcopy(values)
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
