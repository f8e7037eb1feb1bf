"""A config as GGUF metadata, and back: one is the inverse of the other, and what changes logits is never dropped.

What llama.cpp would compute otherwise is refused when a file is written, what is not read here when one is opened.

Source: the GGUF specification, ggml-org/ggml ``docs/gguf.md``; the keys, ``gguf.constants.Keys``.
"""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from lowvram_lab.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

    from lowvram_lab.repository.gguf_header import GgufHeader

logger = logging.getLogger(__name__)

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""``model_type`` of a config → what llama.cpp calls that architecture. Others are read by transformers alone."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor that holds what llama3's scaling divides each rotary frequency by."""

_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",  # without it transformers' reader leaves q and k as they lie
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_NONE_IF_0 = ("rope.scaling.factor", "rope.scale_linear")
_MAY_BE_MISSING = ("rope.freq_base", "rope.scaling.original_context_length", *_NONE_IF_0)
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}

# ---- the keys of an architecture, and what becomes of each ----

_READ = {
    *_SIZES.values(),
    "attention.key_length",
    "attention.sliding_window",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "vocab_size",
}
# values that change nothing: those llama.cpp has where the key is absent
_NEUTRAL = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_beta_fast": (32,),
    "rope.scaling.yarn_beta_slow": (1,),
    "rope.scaling.yarn_ext_factor": (-1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
# of what is done with text or hidden states, not of logits; held by the tensors' shapes; without effect but beside a
# scaling that is looked at itself
_HARMLESS = {
    "context_length",
    "decoder_start_token_id",
    "feed_forward_length",
    "pooling_type",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "vocab_size",
}
# what llama3 says beside its factor; llama.cpp reads the factors alone, and none of these
_LLAMA3 = {
    "original_max_position_embeddings": ("rope.scaling.original_context_length", 8192),
    "low_freq_factor": ("rope.scaling.low_freq_factor", 1.0),
    "high_freq_factor": ("rope.scaling.high_freq_factor", 4.0),
}


class Sizes(Protocol):
    """What is to be known of a model beside its config; a ``ModelSpec`` is one."""

    name: str
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values in a layer."""

    @property
    def head_dim(self) -> int:
        """Features of a head."""

    @property
    def sliding_window(self) -> int | None:
        """Tokens the shortest-sighted layer attends to, if any."""


def is_read_here(header: GgufHeader) -> bool:
    """Whether the file is of an architecture whose config :func:`config_values` makes."""
    return header.architecture in ARCHITECTURES.values()


def check_keys(path: Path, header: GgufHeader, config: PretrainedConfig) -> None:
    """Decides on every key of the architecture: read, of no effect at its value, unknown (a warning), or refused.

    Args:
        path: The file, for messages.
        header: Of the file.
        config: What was made of it.

    Raises:
        CheckpointError: A key that changes logits, with a value that the config does not have.
    """
    architecture = header.architecture
    read = _READ if is_read_here(header) else _read_by_transformers(architecture, config)
    known = _known_keys() | _NEUTRAL.keys()
    for key, value in header.metadata.items():
        prefix, _, short = key.partition(".")
        if prefix != architecture or short in read or short in _HARMLESS or value in _NEUTRAL.get(short, ()):
            continue
        stated = stated_by(config, short)
        if _same(value, stated):
            continue
        if short in known:
            instead = "nothing that is read here" if stated is None else f"{stated!r} in the config made of it"
            raise CheckpointError(
                f"{path}: its metadata has {key} = {str(value)[:60]}, which changes what the model computes, and is "
                f"{instead}; pick another conversion of the model, or the model's own directory"
            )
        if short not in {name for name, _ in _LLAMA3.values()}:
            logger.warning("%s: unknown metadata %s is not read", path.name, key)


def stated_by(config: PretrainedConfig, key: str) -> object:
    """What a config says of one of GGUF's keys, in GGUF's terms; ``None`` where it says nothing."""
    rope = _rope_of(config)
    head_dim = _head_dim(config)
    attributes = {
        "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
        "attention.sliding_window": ("sliding_window",),
        "attn_logit_softcapping": ("attn_logit_softcapping",),
        "final_logit_softcapping": ("final_logit_softcapping",),
        "use_parallel_residual": ("use_parallel_residual",),
        "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads", "num_attention_heads"),
    }
    computed = {
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)) if head_dim else None,
        "rope.freq_base": rope.get("rope_theta"),
        "rope.scaling.type": {"default": "none"}.get(rope.get("rope_type"), rope.get("rope_type")),
        "rope.scaling.factor": rope.get("factor"),
        "rope.scaling.yarn_ext_factor": 1.0 if rope.get("rope_type") == "yarn" else None,
    }
    found = (getattr(config, name, None) for name in attributes.get(key, ()))
    return next((value for value in found if value is not None), computed.get(key))


def _same(value: object, stated: object) -> bool:
    numbers = all(isinstance(number, int | float) for number in (value, stated))
    return math.isclose(value, stated, rel_tol=1e-6) if numbers else stated is not None and value == stated


def complete(config: PretrainedConfig, header: GgufHeader) -> None:
    """Sets what transformers' reader leaves at its default though the file says it: window, rotary base, factor."""
    stated = {key.partition(".")[2]: value for key, value in header.metadata.items()}
    window = stated.get("attention.sliding_window")
    if window and hasattr(config, "sliding_window") and not getattr(config, "layer_types", None):
        config.sliding_window = window
    rope = _rope_of(config)
    if "rope_theta" in rope:
        rope["rope_theta"] = stated.get("rope.freq_base", rope["rope_theta"])
        if rope["rope_type"] == "default" and stated.get("rope.scaling.type") == "linear":
            rope |= {"rope_type": "linear", "factor": stated.get("rope.scaling.factor", 1.0)}


def _read_by_transformers(architecture: str, config: PretrainedConfig) -> set[str]:
    """Sizes that its reader makes part of the config, or that the shapes of the tensors hold it to."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    mapped = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text"), GGUF_CONFIG_MAPPING.get(architecture, {}))
    compared = {"rope.freq_base", "rope.dimension_count", "attention.sliding_window"}
    return {key for key, name in mapped.items() if name is not None} - compared


def _known_keys() -> set[str]:
    """Every key that gguf knows an architecture to have, without the architecture's name."""
    from gguf.constants import Keys

    groups = [group for group in vars(Keys).values() if isinstance(group, type)]
    groups += [inner for group in groups for inner in vars(group).values() if isinstance(inner, type)]
    values = [value for group in groups for value in vars(group).values() if isinstance(value, str)]
    return {value.removeprefix("{arch}.") for value in values if value.startswith("{arch}.")}


def _rope_of(config: PretrainedConfig) -> dict:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)  # kept by layer type where layers differ; GGUF's keys are of the full ones


def _head_dim(config: PretrainedConfig) -> int | None:
    stated = getattr(config, "head_dim", None)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    return stated or (width // heads if heads and width else None)


# ---- from a file ----


def config_values(path: Path, header: GgufHeader, factors: np.ndarray | None) -> dict:
    """The values of a config, of an architecture that is read here.

    Args:
        path: The file, for messages.
        header: Of the file.
        factors: Its rotary factors, ``(head_dim / 2,)``, or ``None``.

    Raises:
        CheckpointError: Values are missing or impossible, or say what transformers' model cannot compute.
    """
    metadata, prefix = header.metadata, header.architecture

    def refuse(key: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{path}: its metadata has {value!r} for {prefix}.{key}; expected {expected}")

    values = _sizes(header, refuse)
    heads = values["num_attention_heads"]
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(f"{path}: lacks token_embd.weight; expected a whole language model")
    tokens, rows = len(metadata.get("tokenizer.ggml.tokens", ())), header.tensors["token_embd.weight"][0]
    if tokens > rows:
        raise CheckpointError(f"{path}: has {tokens} tokens and {rows} rows for them; pick another conversion")
    head_dim = metadata.get(f"{prefix}.attention.key_length") or values["hidden_size"] // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := metadata.get(f"{prefix}.{key}", head_dim)) != head_dim:
            raise refuse(key, found, f"{head_dim}, as for keys (a part of the head is not supported)")
    window = metadata.get(f"{prefix}.attention.sliding_window") or math.inf
    if window < values["max_position_embeddings"]:
        raise refuse("attention.sliding_window", window, "none, or the whole context: which layers slide is not said")
    values |= {
        "model_type": prefix,
        "vocab_size": rows,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": _rope_values(path, header, head_dim, factors),
        "dtype": header.dtype,
    }
    if prefix != "qwen2" or head_dim * heads != values["hidden_size"]:
        values["head_dim"] = head_dim
    if prefix != "qwen2":  # whose biases are no choice
        values["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if prefix == "llama":
        values["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    return values | {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in _TOKENS.items()}


def _sizes(header: GgufHeader, refuse: Callable[[str, object, str], CheckpointError]) -> dict:
    """The numbers of a config that have to be positive, of which some may be missing."""

    def needed(key: str):
        value = header.metadata.get(f"{header.architecture}.{key}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise refuse(key, value, "a positive number")
        return value

    for key in _MAY_BE_MISSING:
        value = header.metadata.get(f"{header.architecture}.{key}")
        if value is not None and not (value == 0 and key in _NONE_IF_0):
            needed(key)
    values = {name: needed(key) for name, key in _SIZES.items()}
    heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % kv_heads:
        raise refuse("attention.head_count_kv", kv_heads, f"a number that divides the {heads} heads of queries")
    return values


def _rope_values(path: Path, header: GgufHeader, head_dim: int, factors: np.ndarray | None) -> dict:
    """Rotary parameters in transformers' words."""
    metadata, prefix = header.metadata, f"{header.architecture}.rope"
    values = {"rope_type": "default", "rope_theta": metadata.get(f"{prefix}.freq_base", 10000.0)}
    factor = metadata.get(f"{prefix}.scaling.factor", metadata.get(f"{prefix}.scale_linear")) or 1.0
    scaling = metadata.get(f"{prefix}.scaling.type", "linear")
    if scaling == "yarn":
        context = metadata.get(f"{header.architecture}.context_length")
        original = metadata.get(f"{prefix}.scaling.original_context_length", context)
        scaled = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif scaling == "linear" and factor != 1:
        scaled = {"rope_type": "linear", "factor": factor}
    elif scaling in ("none", "linear"):
        scaled = {}
    else:
        raise CheckpointError(f"{path}: its RoPE scaling {scaling!r} is not supported; expected none, linear or yarn")
    if factors is None or np.all(factors == 1):
        return values | scaled
    if scaled or header.architecture != "llama":
        raise CheckpointError(
            f"{path}: {ROPE_FACTORS} in a {header.architecture} model with scaling {scaling!r}; expected it in a "
            "llama model without another scaling"
        )
    stated = {name: metadata.get(f"{header.architecture}.{key}", usual) for name, (key, usual) in _LLAMA3.items()}
    values |= {"rope_type": "llama3", "factor": float(f"{factors.max():.6g}"), **stated}
    expected = _llama3_factors(values, head_dim)
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-5, atol=0):
        raise CheckpointError(
            f"{path}: {ROPE_FACTORS} holds rotary factors that are not Llama 3's, which alone are supported; "
            "open the model's own directory"
        )
    return values


# ---- to a file ----


def config_metadata(spec: Sizes, config: PretrainedConfig, context: int | None = None) -> dict:
    """A config as metadata: key → value.

    Args:
        spec: The model's sizes.
        config: Its config.
        context: Most tokens the file is for; ``None`` for all that the config states.

    Raises:
        CheckpointError: What llama.cpp would compute otherwise, named.
    """

    def refuse(found: str) -> CheckpointError:
        return CheckpointError(f"{spec.name}: cannot be written as GGUF: {found}")

    kind, activation = config.model_type, getattr(config, "hidden_act", "silu")
    if kind not in ARCHITECTURES:
        raise refuse(f"expected a model of type {', '.join(ARCHITECTURES)}, found {kind}")
    if activation != "silu":
        raise refuse(f"expected the activation silu, found {activation}")
    architecture, rope = ARCHITECTURES[kind], config.rope_parameters
    if (share := rope.get("partial_rotary_factor", 1)) != 1:
        raise refuse(f"expected rotary positions of whole heads, found of a share {share}")
    if architecture == "qwen2" and spec.head_dim * config.num_attention_heads != spec.hidden_size:
        raise refuse(f"expected heads of {spec.hidden_size // config.num_attention_heads}, found of {spec.head_dim}")
    attention = f"{architecture}.attention"
    return {
        f"{architecture}.block_count": spec.num_hidden_layers,
        f"{architecture}.context_length": _context(spec, context, refuse),
        f"{architecture}.embedding_length": spec.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.vocab_size": spec.vocab_size,
        f"{attention}.head_count": config.num_attention_heads,
        f"{attention}.head_count_kv": spec.num_key_value_heads,
        f"{attention}.key_length": spec.head_dim,
        f"{attention}.value_length": spec.head_dim,
        f"{attention}.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{architecture}.rope.dimension_count": spec.head_dim,
        f"{architecture}.rope.freq_base": float(rope["rope_theta"]),
        **{f"{architecture}.{key}": value for key, value in _scaling(config, spec, refuse).items()},
    }


def rope_factors(config: PretrainedConfig, head_dim: int) -> np.ndarray | None:
    """What llama3's scaling divides each rotary frequency by, ``(head_dim / 2,)``; ``None`` for any other scaling."""
    rope = config.rope_parameters
    return _llama3_factors(rope, head_dim) if rope.get("rope_type") == "llama3" else None


def _context(spec: Sizes, context: int | None, refuse: Callable) -> int:
    """The file's context: within a sliding window, which llama.cpp does not slide in these architectures."""
    most = spec.max_position_embeddings
    if context is not None and not 0 < context <= most:
        raise refuse(f"expected a context of 1 to {most} tokens, found {context}")
    if spec.sliding_window and spec.sliding_window < (context or most):
        raise refuse(
            f"found a sliding window of {spec.sliding_window} tokens, which llama.cpp does not slide in such a model; "
            f"write a file for no more tokens than that (--context {spec.sliding_window})"
        )
    return context or most


def _scaling(config: PretrainedConfig, spec: Sizes, refuse: Callable) -> dict:
    """Keys of the RoPE scaling, for what llama.cpp computes as transformers does."""
    rope = config.rope_parameters
    scaling = rope.get("rope_type", "default")
    if scaling == "default":
        return {}
    if scaling == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if scaling == "yarn":
        return _yarn(rope, refuse)
    if (scaling, ARCHITECTURES[config.model_type]) != ("llama3", "llama"):
        raise refuse(
            f"RoPE scaling {scaling!r} of a {config.model_type} model is not supported (linear, yarn and, in a llama "
            "model, llama3 are)"
        )
    if not math.isclose(rope_factors(config, spec.head_dim).max(), rope["factor"], rel_tol=1e-5):
        raise refuse(f"no frequency of a head of {spec.head_dim} is scaled by llama3's whole factor {rope['factor']}")
    return {key: rope[name] for name, (key, _) in _LLAMA3.items()}


def _yarn(rope: dict, refuse: Callable) -> dict:
    """YaRN as llama.cpp has it without further keys: betas of 32 and 1, and the usual factor on the attention."""
    usual = 0.1 * math.log(rope["factor"] or 1) + 1 if (rope["factor"] or 1) > 1 else 1.0
    expected = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": usual}
    for name, value in {**expected, "mscale": None, "mscale_all_dim": None}.items():
        found = rope.get(name)
        if found is not None and (value is None or not math.isclose(found, value, rel_tol=1e-6)):
            raise refuse(f"found YaRN with {name} = {found}, expected {value}")
    if not rope["factor"]:
        raise refuse("found YaRN without a factor")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope["factor"]),
        "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
    }


def _llama3_factors(rope: dict, head_dim: int) -> np.ndarray:
    """Plain rotary frequencies over those that transformers scales, float32."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=head_dim, rope_parameters=copy.deepcopy(rope))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return (1 / (rope["rope_theta"] ** exponents) / scaled).numpy()
