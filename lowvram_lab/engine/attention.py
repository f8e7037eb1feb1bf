"""Attention inside of a model's own modules: our kernel for a prompt on the CPU, otherwise torch's.

transformers asks an implementation by name; a loaded model has this one in place of ``sdpa``, with the same masks.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowvram_lab.kernels.attention import attends, attention
from lowvram_lab.kernels.library import multiplies_pairs, opened, there
from lowvram_lab.memory.attention import kernels_at

NAME = "lowvram"


def attend(
    module: torch.nn.Module,
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
    ours = plain and kernels_at(query) == "cpu" and attends(query, key, value, attention_mask)
    if ours and (query.is_meta or opened()):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return attention(query, key, value, attention_mask, causal and attention_mask is None, scale), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )


def use_our_attention(model: PreTrainedModel) -> None:
    """Puts ``attend`` in the place of torch's attention, where that would be called and our kernel is there."""
    if model.config._attn_implementation == "sdpa" and multiplies_pairs() and there():
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
