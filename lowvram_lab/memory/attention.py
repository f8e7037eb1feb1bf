"""Make a dry run call the attention kernel that the real run will take.

On meta, torch decomposes ``scaled_dot_product_attention`` into the math path, with a full score matrix. The real run
takes a fused kernel that allocates its output and a row of log-sum-exps. The order of preference on CUDA is that of
``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``, on the CPU of ``transformers/sdp_utils_cpp.cpp``.
"""

import torch
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class ImitateAttention(TorchFunctionMode):
    """Replaces attention on meta tensors by the fused kernel of the place it runs at.

    Args:
        gpu: The dry-run GPU; says which place a tensor is at and whose kernels run there.
    """

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Intercepts attention; passes everything else on."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].is_meta:
            broadcast = args[0].shape[1] != args[1].shape[1] and not kwargs.get("enable_gqa")
            if not broadcast:  # heads that only broadcast (multi-query) take the math path in the real run as well
                return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = _additive(attn_mask, q.dtype)
        if self.gpu.kernels_of(self.gpu.meter.place_of(q)) == "cpu":
            return aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        if attn_mask is None and q.dtype != torch.float32 and q.shape[-1] <= 256:
            output = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # kernel's layout: (batch, tokens, heads, dim)
            q.new_empty(q.shape[:3], dtype=torch.float32)  # log-sum-exp, dropped with the call
            return output
        if enable_gqa:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, False, dropout_p, is_causal, scale=scale
        )[0]


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as torch's own attention turns it into one to add (``convert_boolean_attn_mask``)."""
    zero, minus_infinity = (
        torch.scalar_tensor(value, dtype=dtype, device=mask.device) for value in (0.0, float("-inf"))
    )
    return torch.where(mask, zero, minus_infinity)
