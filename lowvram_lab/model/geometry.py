"""What each decoder layer keeps of the tokens it has seen, read off transformers' own cache after a run on meta.

A config's names say it in a dozen ways (``multi_query``, ``num_kv_heads``, ``kv_lora_rank``, ``num_kv_shared_layers``);
the cache that the model's own forward has filled says it in one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from lowvram_lab.errors import CheckpointError, first_line
from lowvram_lab.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 3
"""Read on meta; not 1, which would broadcast where it is mistaken for another dimension."""


@dataclass(frozen=True)
class KVLayer:
    """Keys and values of one decoder layer.

    Attributes:
        heads: Of keys and of values.
        key_dim: Features of a key in one head.
        value_dim: Features of a value in one head.
        window: Most tokens it attends to, or ``None`` for all.
    """

    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    @property
    def features(self) -> int:
        """Numbers that one token adds: of all heads, keys and values."""
        return self.heads * (self.key_dim + self.value_dim)

    def room(self, batch: int, tokens: int) -> KVShape:
        """Shapes of keys and values of so many tokens."""
        return KVShape(batch, self.heads, tokens, self.key_dim, self.value_dim)


class KVShape(NamedTuple):
    """Room for one layer's keys, ``(batch, heads, tokens, key_dim)``, and values, ``(…, value_dim)``."""

    batch: int
    heads: int
    tokens: int
    key_dim: int
    value_dim: int

    @property
    def keys(self) -> tuple[int, int, int, int]:
        """Of the keys."""
        return (self.batch, self.heads, self.tokens, self.key_dim)

    @property
    def values(self) -> tuple[int, int, int, int]:
        """Of the values."""
        return (self.batch, self.heads, self.tokens, self.value_dim)


@contextlib.contextmanager
def unpadded() -> Iterator[None]:
    """Lets transformers' code run on meta: an attention mask that a model makes for itself hides no token.

    It asks so of the mask's values, which a tensor on meta has not got. Nothing here ever passes a mask with padding.
    """
    from transformers import masking_utils

    asked = masking_utils.fast_all

    def fast_all(mask: torch.Tensor) -> torch.Tensor | bool:
        found = asked(mask)  # allocates what it allocates in a real run
        return True if found.is_meta else found

    masking_utils.fast_all = fast_all
    try:
        yield
    finally:
        masking_utils.fast_all = asked


class _AttentionLeftOut(TorchFunctionMode):
    """Half of a run on meta is torch working attention out in small steps, of which the cache knows nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            queries, values = args[0], args[2]
            return queries.new_empty(*queries.shape[:-1], values.shape[-1])
        return func(*args, **kwargs or {})


def kv_layers_of(model: PreTrainedModel, layers: int) -> tuple[KVLayer | None, ...]:
    """Runs a model on meta, and reads what its cache holds then.

    Args:
        model: All of it on meta; it is of no other use afterwards.
        layers: How many decoder layers it has.

    Returns:
        Of each layer its keys and values, or ``None`` where it reads those of another.

    Raises:
        CheckpointError: It cannot be run on meta, or keeps something else than keys and values.
    """
    from transformers import DynamicCache

    kind, cache = model.config.model_type, DynamicCache(config=model.config)
    for held in cache.layers:
        _refuse_states(held, kind)
    ids = torch.ones(1, TOKENS, dtype=torch.long, device="meta")
    keep_frequencies(model)
    try:
        with torch.no_grad(), unpadded(), quiet_transformers(), _AttentionLeftOut():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as error:  # whatever a model's own code raises; the user needs one line, not which
        raise CheckpointError(
            f"{kind}: its memory cannot be forecast, since it does not run on tensors without data "
            f"({first_line(error)[:160]})"
        ) from error
    found = [_layer_of(held, kind) for held in cache.layers]
    if len(found) > layers:
        raise CheckpointError(f"{kind}: expected keys and values of {layers} layers, found {len(found)} in its cache")
    return (*found, *[None] * (layers - len(found)))


def keep_frequencies(model: PreTrainedModel) -> None:
    """Lets a model on meta not ask its positions whether they are beyond the context: no plan's are.

    Up to there the frequencies of dynamic NTK scaling are those that its constructor has made.
    """
    for module in model.modules():
        found = getattr(module, "rope_type", None)
        if isinstance(found, dict):  # one for each kind of layer, as Gemma 3 has them
            module.rope_type = {layers: "default" if "dynamic" in kind else kind for layers, kind in found.items()}
        elif isinstance(found, str) and "dynamic" in found:
            module.rope_type = "default"


def unsupported(kind: str, what: str) -> CheckpointError:
    """The error that names what of a model type is not supported, and a model that is."""
    other = "a dense decoder-only model whose layers keep keys and values (Llama, Qwen2, …)"
    return CheckpointError(f"{kind}: {what} is not supported; name {other}")


def _refuse_states(held: object, kind: str) -> None:
    """Refuses a layer that keeps something else of its tokens."""
    from transformers.cache_utils import DynamicIndexedLayer, LinearAttentionCacheLayerMixin

    if isinstance(held, LinearAttentionCacheLayerMixin):
        raise unsupported(kind, "linear attention (a state of fixed size)")
    if isinstance(held, DynamicIndexedLayer):
        raise unsupported(kind, "attention that picks its keys by an index")


def _layer_of(held: object, kind: str) -> KVLayer | None:
    from transformers.cache_utils import DummyLayer

    if isinstance(held, DummyLayer):
        return None
    _refuse_states(held, kind)
    keys, values = getattr(held, "keys", None), getattr(held, "values", None)
    if keys is None or values is None:
        raise unsupported(kind, "a layer that leaves transformers' cache empty")
    window = getattr(held, "sliding_window", None)
    kept = min(TOKENS, window - 1) if window else TOKENS  # what the next token will see
    for states in (keys, values):
        if states.dim() != 4 or states.shape[0] != 1 or states.shape[2] not in (TOKENS, kept):
            raise unsupported(kind, f"a cache of shape {tuple(states.shape)} after {TOKENS} tokens")
    if keys.shape[1] != values.shape[1]:
        raise unsupported(kind, f"a cache of {keys.shape[1]} heads of keys and {values.shape[1]} of values")
    return KVLayer(keys.shape[1], keys.shape[3], values.shape[3], window)
