"""Attention as a card computes it, for forecasts: what each of PyTorch's kernels allocates, and which one runs.

On meta, torch decomposes ``scaled_dot_product_attention`` into the math path, with a full score matrix. The real run
takes a fused kernel where there is one. Which, depends on the card: the order of preference on CUDA is that of
``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``, on the CPU of ``transformers/sdp_utils_cpp.cpp``. Their
allocations were read off PyTorch's allocator, kernel by kernel (``tests/fakecuda``), with torch 2.13 and 2.14.
"""

import math
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.memory.torch_release import torch_release

aten = torch.ops.aten


_imitated: ContextVar[DryRunGpu | None] = ContextVar("imitated", default=None)


def kernels_at(tensor: torch.Tensor) -> str:
    """Whose kernels compute with a tensor, ``"cpu"`` or ``"cuda"``; of one on meta, in the run that is imitated."""
    gpu = _imitated.get()
    if tensor.is_meta and gpu is not None:
        return gpu.kernels_of(gpu.meter.place_of(tensor))
    return tensor.device.type


class ImitateAttention(TorchFunctionMode):
    """Replaces attention on meta tensors by the fused kernel of the place it runs at.

    Args:
        gpu: The dry-run GPU; says which place a tensor is at and whose kernels run there.
    """

    def __init__(self, gpu: DryRunGpu):
        super().__init__()
        self.gpu = gpu

    def __enter__(self):
        """From here on ``kernels_at`` knows the places of tensors on meta."""
        self._token = _imitated.set(self.gpu)
        return super().__enter__()

    def __exit__(self, *error):
        """As before."""
        _imitated.reset(self._token)
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Intercepts attention; passes everything else on."""
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **kwargs)
        return (self._on_cuda if kernels_at(args[0]) == "cuda" else _on_the_cpu)(*args, **kwargs)

    def _on_cuda(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """The first kernel that takes these: cuDNN's, flash, efficient, math."""
        card, sizes, release = self.gpu.card, (q.shape[-1], v.shape[-1]), torch_release()
        narrow = q.dtype != torch.float32
        aligned = all(size % (8 if narrow else 4) == 0 for size in sizes)
        shares = q.shape[1] != k.shape[1]  # heads that share keys
        told = enable_gqa or (k.shape[1] == 1 and release >= EFFICIENT_SHARES)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = _additive(attn_mask, q.dtype)
        if narrow and aligned and max(sizes) <= CUDNN_HEADS.get(card.capability[0], 0) and (told or not shares):
            return _cudnn(q, v)
        flashes = attn_mask is None and narrow and card.capability >= (8, 0) and sizes[0] == sizes[1] <= 256
        if flashes and (told or not shares):
            return _flash(q, k, card.multiprocessors)
        fuses = not shares or (told and release >= EFFICIENT_SHARES)
        if not fuses or not aligned or (q.dtype == torch.bfloat16 and not card.fuses_bf16):
            return _math(q, k, v, attn_mask, is_causal, scale, enable_gqa, self.gpu.watched)
        if attn_mask is not None and attn_mask.shape[-1] % MASK_COLUMNS:
            attn_mask = F.pad(attn_mask, (0, -attn_mask.shape[-1] % MASK_COLUMNS))
        return _efficient(q, v, seeds=release >= EFFICIENT_SHARES)


def _on_the_cpu(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Not fused are heads that only broadcast (multi-query), and values of another size."""
    if (q.shape[1] != k.shape[1] and not enable_gqa) or v.shape[-1] != q.shape[-1]:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = _additive(attn_mask, q.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def _math(q, k, v, attn_mask, is_causal, scale, enable_gqa, watched):
    """Attention without a fused kernel: ``_scaled_dot_product_attention_math`` in ATen's attention.cpp.

    It computes in float32 and looks for rows that are masked altogether; where a dispatch mode watches, as in a
    measured run, it does not write a mask over the scores. What it holds goes in the order of C++: what
    came last first, and at the very end what it returns beside the result. (On meta torch's own would hide what its
    softmax takes.)
    """
    dtype, root = q.dtype, (scale or q.shape[-1] ** -0.5) ** 0.5
    wide_q, wide_k, wide_v = q.float(), k.float(), v.float()
    scaled = wide_q * root
    if is_causal:
        attn_mask = _additive(scaled.new_ones((q.shape[-2], k.shape[-2]), dtype=torch.bool).tril(), scaled.dtype)
    shared_k, shared_v = wide_k, wide_v
    if enable_gqa and q.shape[1] != k.shape[1]:
        groups = q.shape[1] // k.shape[1]
        shared_k, shared_v = wide_k.repeat_interleave(groups, 1), wide_v.repeat_interleave(groups, 1)
    scores = scaled @ (shared_k.transpose(-2, -1) * root)
    if attn_mask is not None:
        scores = scores + attn_mask if watched else scores.add_(attn_mask)
    weights = scores.softmax(-1)
    masked = scores.isneginf()
    rows, zero = masked.all(-1, keepdim=True), weights.new_zeros(())
    weights.masked_fill_(rows, zero)
    del zero, rows, masked, scores
    narrow = weights.to(dtype)
    result = (weights @ shared_v).to(dtype)
    del weights, shared_v, shared_k, scaled, attn_mask, wide_v, wide_k, wide_q
    del narrow
    return result


CUDNN_HEADS = {9: 256, 10: 128}
"""By major capability: the largest heads that cuDNN's attention, preferred there, takes (``check_prefer_cudnn``)."""

EFFICIENT_SHARES = (2, 14)
"""From this release of torch on memory-efficient attention takes heads that share keys, and one head of keys is shared
by all without being asked; before, both took the math path. Source: https://github.com/pytorch/pytorch/pull/191085.
In the same release its seed and offset of dropout are on the card (read off torch 2.14.1)."""

MASK_COLUMNS = 8
"""A mask's rows are copied to a multiple of so many columns (``pad_bias`` in ATen's native attention.cpp)."""


def _efficient(q: torch.Tensor, v: torch.Tensor, seeds: bool) -> torch.Tensor:
    """What memory-efficient attention allocates, and its output (``_efficient_attention_forward`` in attention.cu)."""
    shape = q.shape[0], q.shape[2], q.shape[1], v.shape[-1]
    held = [q.new_empty(1, dtype=torch.int64) for _ in range(2)] if seeds else []
    output = q.new_empty(shape)
    if v.shape[-1] > 128 and q.dtype != torch.float32:  # more than a block keeps: sums are gathered in float32
        q.new_empty(shape, dtype=torch.float32)
    del held
    return output.transpose(1, 2)


def _cudnn(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What cuDNN's attention allocates through torch, and its output; cuDNN's own workspace is not known."""
    held = [q.new_empty(1, dtype=torch.int64) for _ in range(2)]  # seed and offset of dropout
    output = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[-1])).transpose(1, 2)
    del held
    return output


def _flash(q: torch.Tensor, k: torch.Tensor, multiprocessors: int) -> torch.Tensor:
    """What flash attention allocates, and its output (``mha_fwd`` in ATen's flash_api.cpp)."""
    size = q.shape[-1]
    if size % 8:
        q, k, values = (F.pad(each, (0, -size % 8)) for each in (q, k, k))  # values, too, are held to the end
    output = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # kernel's layout: (batch, tokens, heads, dim)
    held = [q.new_empty(q.shape[:3], dtype=torch.float32)]  # log-sum-exp, dropped with the call
    if (splits := _splits(q, k, multiprocessors)) > 1:
        held.append(q.new_empty((splits, *q.shape[:3]), dtype=torch.float32))
        held.append(q.new_empty((splits, *q.shape[:3], -(-q.shape[-1] // 32) * 32), dtype=torch.float32))
    held += [q.new_empty(2, dtype=torch.int64), q.new_empty(1, dtype=torch.int64)]  # seed and offset of dropout
    del held
    return output[..., :size]


def _splits(q: torch.Tensor, k: torch.Tensor, multiprocessors: int) -> int:
    """In how many parts flash attention reads the keys, so that few queries fill all multiprocessors.

    ``num_splits_heuristic`` and ``set_params_splitkv`` in ATen's flash_api.cpp: the fewest parts that keep the
    multiprocessors 85 % as busy as the best number does.
    """
    batch, heads, queries, size = q.shape
    if queries == 1 and heads > k.shape[1]:
        queries, heads = heads // k.shape[1], k.shape[1]  # query heads that share keys become rows
    columns = 256 if size <= 64 else 128 if size <= 128 else 64
    blocks, work, slots = -(-k.shape[2] // columns), batch * heads * -(-queries // 64), 2 * multiprocessors
    if work >= 0.8 * slots:
        return 1
    busy = {}
    for parts in range(1, min(128, slots, blocks) + 1):
        if parts == 1 or -(-blocks // parts) != -(-blocks // (parts - 1)):
            waves = work * parts / slots
            busy[parts] = waves / math.ceil(waves)
    return next(parts for parts, share in busy.items() if share >= 0.85 * max(busy.values()))


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as torch's own attention turns it into one to add (``convert_boolean_attn_mask``)."""
    zero, minus_infinity = (mask.new_full((), value, dtype=dtype) for value in (0.0, -math.inf))
    found = torch.where(mask, zero, minus_infinity)
    del zero, minus_infinity  # before the mask, which a caller may let go of
    return found
