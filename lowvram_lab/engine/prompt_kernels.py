"""What a model's own modules leave to our kernels when they compute on the CPU, above all when they read a prompt.

Attention of any model that would call torch's; and of the Llama family, in bfloat16, norms, rotary positions and gates:
one operator each, where transformers' code takes 2 to 8. Anything else is as transformers has it, and so is everything
where there is no C++ compiler.
"""

import functools

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowvram_lab.kernels.attention import attends, attention
from lowvram_lab.kernels.elementwise import gated, rms_norm, rotated
from lowvram_lab.kernels.library import multiplies_pairs, opened, there
from lowvram_lab.memory.attention import kernels_at

NAME = "lowvram"
"""Of our attention: transformers asks an implementation by name."""

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Whose norms, attention and MLPs are written alike; how their classes' names begin."""


def use_our_kernels(model: PreTrainedModel) -> None:
    """Lets a model's modules call our kernels, where those are there and transformers' code would do the same."""
    if not there():
        return
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    for module in model.modules():
        forward = _FORWARDS.get(type(module).__name__)
        if forward is not None and not isinstance(module, forward):
            module.__class__ = _class_with(forward, type(module))


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: queries ``(batch, heads, tokens, features)`` → ``(batch, tokens, heads, features)``."""
    plain = not dropout and not any(others.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
    ours = plain and multiplies_pairs() and kernels_at(query) == "cpu" and attends(query, key, value, attention_mask)
    if ours and _has_kernels(query):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is None and causal and key.shape[2] > query.shape[2]:
            # without a mask these are the first queries, of a cache that gives its empty places too
            key, value = (each[:, :, : query.shape[2]] for each in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(query, key, value, attention_mask, causal and attention_mask is None, scale), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )


class _Norm:
    """The forward of an RMS norm."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As in transformers."""
        if _is_ours(hidden_states) and self.weight.dtype == torch.bfloat16:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class _GatedMLP:
    """The forward of an MLP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As in transformers."""
        if _is_ours(x) and self.config.hidden_act == "silu":
            return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return super().forward(x)


class _Attention:
    """The forward of a layer's attention."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **others,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in transformers; a window that slides is in the mask."""
        cos, sin = position_embeddings
        turned = cos.dtype == torch.bfloat16 and cos.shape[-1] == self.head_dim
        plain = self.config._attn_implementation == NAME and not self.training  # no dropout
        if not (plain and turned and _is_ours(hidden_states)):
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **others)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape)
        k = self.k_proj(hidden_states).view(shape)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotated(q, cos, sin).transpose(1, 2)
        k = rotated(k, cos, sin).transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        mixed, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **others)
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1)), weights


def _is_ours(states: torch.Tensor) -> bool:
    return states.dtype == torch.bfloat16 and kernels_at(states) == "cpu" and _has_kernels(states)


def _has_kernels(states: torch.Tensor) -> bool:
    """Whether they are there, or would be in the run that is imitated; they give no gradients."""
    wants_gradients = torch.is_grad_enabled() and states.requires_grad
    return not wants_gradients and (states.is_meta or opened() is not None)


_FORWARDS = {
    family + kind: forward
    for family in FAMILIES
    for kind, forward in (("RMSNorm", _Norm), ("MLP", _GatedMLP), ("Attention", _Attention))
}
"""By the names of transformers' classes."""


@functools.cache
def _class_with(forward: type, stock: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name with another forward: one of a module's own would hold the module for ever."""
    return type(stock.__name__, (forward, stock), {"__module__": stock.__module__})


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
