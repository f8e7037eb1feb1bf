"""A GPU of meta tensors, for forecasts: every operator is counted as the real run would allocate, nothing is computed.

On meta, torch decomposes ``scaled_dot_product_attention`` into the math path, with a full score matrix. The real run
takes a fused kernel that allocates its output and a row of log-sum-exps. The order of preference on CUDA is that of
``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``, on the CPU of ``transformers/sdp_utils_cpp.cpp``.

A decoder's layers are alike: of some ten thousand operator calls in a forecast a few hundred differ. torch works each
of them out in Python (0.1 to 1 ms); what it returned is remembered by shape, for the forecasts that follow too: a
search makes a hundred of one model.
"""

import functools
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.card import Card, this_card
from lowvram_lab.memory.expandable import ExpandableAllocator
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.units import KiB, MiB

aten = torch.ops.aten


class ImitateAttention(TorchFunctionMode):
    """Replaces attention on meta tensors by the fused kernel of the place it runs at.

    Args:
        gpu: The dry-run GPU; says which place a tensor is at and whose kernels run there.
    """

    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Intercepts attention; passes everything else on."""
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or not args[0].is_meta:
            return func(*args, **kwargs)
        on_cuda = self.gpu.kernels_of(self.gpu.meter.place_of(args[0])) == "cuda"
        return (self._on_cuda if on_cuda else _on_the_cpu)(*args, **kwargs)

    def _on_cuda(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """The first kernel that takes these: cuDNN's, flash, efficient, math."""
        card, sizes = self.gpu.card, (q.shape[-1], v.shape[-1])
        narrow = q.dtype != torch.float32
        aligned = all(size % (8 if narrow else 4) == 0 for size in sizes)
        shares = q.shape[1] != k.shape[1]  # heads that share keys
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = _additive(attn_mask, q.dtype)
        if narrow and aligned and max(sizes) <= CUDNN_HEADS.get(card.capability[0], 0) and (enable_gqa or not shares):
            return _cudnn(q, v)
        flashes = attn_mask is None and narrow and card.capability >= (8, 0) and sizes[0] == sizes[1] <= 256
        if flashes and (enable_gqa or not shares):
            return _flash(q, k, v, card.multiprocessors)
        if shares or not aligned or (q.dtype == torch.bfloat16 and not card.fuses_bf16):
            return _math(q, k, v, attn_mask, is_causal, scale, enable_gqa)
        if attn_mask is not None and attn_mask.shape[-1] % MASK_COLUMNS:
            columns = -(-attn_mask.shape[-1] // MASK_COLUMNS) * MASK_COLUMNS
            attn_mask = attn_mask.new_empty((*attn_mask.shape[:-1], columns))[..., : k.shape[2]]
        return aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_mask, False, dropout_p, is_causal, scale=scale
        )[0]


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


def _math(q, k, v, attn_mask, is_causal, scale, enable_gqa):
    """Attention without a fused kernel: ``_scaled_dot_product_attention_math`` in ATen's attention.cpp.

    It computes in float32, adds the mask in place and looks for rows that are masked altogether. (On meta torch's own
    would add it out of place, and hide what its softmax takes.)
    """
    dtype, root = q.dtype, (scale or q.shape[-1] ** -0.5) ** 0.5
    q, k, v = wide = q.float(), k.float(), v.float()  # these are held to the end
    scaled = q * root
    if is_causal:
        attn_mask = _additive(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(), q.dtype)
    if enable_gqa and q.shape[1] != k.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scaled @ (k.transpose(-2, -1) * root)
    if attn_mask is not None:
        scores.add_(attn_mask)
    weights = scores.softmax(-1)
    masked = scores.isneginf()
    weights.masked_fill_(masked.all(-1, keepdim=True), torch.zeros((), dtype=weights.dtype, device=q.device))
    del masked, scores
    narrow = weights.to(dtype)  # returned beside the result, and dropped
    result = (weights @ v).to(dtype)
    del narrow, wide
    return result


CUDNN_HEADS = {9: 256, 10: 128}
"""By major capability: the largest heads that cuDNN's attention, preferred there, takes (``check_prefer_cudnn``)."""

MASK_COLUMNS = 8
"""A mask's rows are copied to a multiple of so many columns (``pad_bias`` in ATen's native attention.cpp)."""


def _cudnn(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What cuDNN's attention allocates through torch, and its output; cuDNN's own workspace is not known."""
    held = [q.new_empty(1, dtype=torch.int64) for _ in range(2)]  # seed and offset of dropout
    output = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[-1])).transpose(1, 2)
    del held
    return output


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, multiprocessors: int) -> torch.Tensor:
    """What flash attention allocates, and its output (``mha_fwd`` in ATen's flash_api.cpp)."""
    size = q.shape[-1]
    if size % 8:
        q, k, v = (F.pad(each, (0, -size % 8)) for each in (q, k, v))
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
    zero, minus_infinity = (
        torch.scalar_tensor(value, dtype=dtype, device=mask.device) for value in (0.0, float("-inf"))
    )
    return torch.where(mask, zero, minus_infinity)


_MATRIX_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}


def cublas_workspace_bytes(card: Card) -> int:
    """What the first matrix product on CUDA allocates for good (``parseChosenWorkspaceSize`` in ATen's CUDABlas.cpp).

    32 MiB on Hopper and Blackwell, 2 x 4096 + 8 x 16 KiB on others; what
    ``CUBLAS_WORKSPACE_CONFIG`` says comes first.
    """
    stated = re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ""))
    if stated:
        return sum(int(size) * int(count) for size, count in stated) * KiB
    return 32 * MiB if card.capability >= (9, 0) else (2 * 4096 + 8 * 16) * KiB


class DryRunGpu(Gpu):
    """A GPU of meta tensors: nothing is computed, everything is counted. It records the first OOM.

    Args:
        budget: The card, or ``None`` for no limit.
        kernels: Whose kernels to imitate: ``"cuda"`` or ``"cpu"`` (the stand-in's); by default the budget's, or CUDA's.
        expandable_segments: Imitate the allocator's other mode.
        goes_on: Whether to go on after the first OOM, or to raise it.
    """

    name = "dry run"
    meta = True
    _tensor_device = "meta"

    def __init__(
        self,
        budget: GpuBudget | None,
        kernels: str | None = None,
        expandable_segments: bool = False,
        goes_on: bool = True,
    ):
        self.goes_on = goes_on
        self.kernels = kernels or (budget.kernels if budget else "cuda")
        super().__init__(budget)
        if expandable_segments:
            self.meter.allocator = ExpandableAllocator(self.meter.allocator.capacity)
        self.meter.run, self.meter.by_block = self._run, self.kernels == "cuda"
        self._results = _results_of(torch.get_default_dtype())
        self._workspace = self._of_graphs = None

    @property
    def card(self) -> Card:
        """What decides which of CUDA's kernels run."""
        return self.budget.card if self.budget else this_card()

    def _new_workspace(self) -> torch.Tensor:
        with self.meter.scope(owner="cuBLAS", category="workspace"):
            return self._hold(torch.uint8, cublas_workspace_bytes(self.card))

    def _hold(self, dtype: torch.dtype, count: int = 1) -> torch.Tensor:
        """A tensor that the meter counts on the GPU, for what torch allocates by itself."""
        held = torch.empty(count, dtype=dtype, device="meta")
        self.meter.count(held, "gpu")
        return held

    def _run(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict):
        """Runs an operator on meta; the first matrix product on CUDA takes cuBLAS' workspace after its result."""
        wanted = self.kernels == "cuda" and self._workspace is None and func in _MATRIX_PRODUCTS
        try:
            result = self._results(func, args, kwargs)
            if wanted and self.meter.place_of(args[-1]) == "gpu":
                self.meter.count(result, "gpu")
                self._workspace = self._new_workspace()
            return result
        except (RuntimeError, NotImplementedError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            where = self.meter.owner or "the model"
            raise RuntimeError(f"{where} needs data: {func} on meta says: {reason}") from error

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """See ``Gpu``: the block's allocations are the graph's own pool, beside a cuBLAS workspace of its stream.

        What the runs before capturing have taken on that stream is given back (``GraphedStep``).
        """
        outside, allocator = self._workspace, self.meter.allocator
        if self._of_graphs is None:
            with self.meter.scope(owner="CUDA graphs", category="workspace"):
                # seed and offset of random numbers in graphs (``register_graph`` in ATen's CUDAGeneratorImpl.cpp)
                seeds = [self._hold(torch.int64) for _ in range(2)]
            with allocator.own_pool():
                self._of_graphs = [self._new_workspace(), *seeds]
        self._workspace = self._of_graphs[0]
        try:
            with allocator.own_pool():
                yield
        finally:
            self._workspace = outside

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor's shape and dtype on meta."""
        return torch.empty_like(tensor, device="meta")


MOST_REMEMBERED = 100_000
"""Calls that are remembered, some 1 KiB each; then all are forgotten."""


class MetaResults:
    """Runs operators over meta tensors, answering repeated calls from memory.

    Remembered are results with storage of their own, and that an in-place operator gave its first argument back as it
    was. Views say so in their schema; one (``_unsafe_view``) does not, so the storages are compared too.
    """

    def __init__(self):
        self._known: dict[torch._ops.OpOverload, tuple[str, dict]] = {}
        self._count = 0

    def __call__(self, func: torch._ops.OpOverload, args: tuple, kwargs: dict):
        """The operator's result: equal in shape, strides and dtype to what ``func(*args, **kwargs)`` gives on meta."""
        kind, layouts = self._known.get(func) or self._known.setdefault(func, (_kind_of(func), {}))
        if kind == "other":
            return func(*args, **kwargs)
        key = (_signature(args), _signature(sorted(kwargs.items())) if kwargs else ())
        layout = layouts.get(key)
        if layout is None:
            result = func(*args, **kwargs)
            layout = _remembered(kind, args, result)
            in_the_key = all(tensor.is_meta for tensor in _tensors((*args, *kwargs.values())))  # values are not
            if layout is not None and in_the_key and (kind == "fresh" or _signature(result) == key[0][0]):
                self._remember(layouts, key, layout)
            return result
        if layout is _ITS_FIRST_ARGUMENT:
            return args[0]
        return _empty(layout) if isinstance(layout, tuple) else tuple(_empty(one) for one in layout)

    def _remember(self, layouts: dict, key: tuple, layout: object) -> None:
        if self._count >= MOST_REMEMBERED:
            self._known.clear()
            self._count = 0
        layouts[key] = layout
        self._count += 1


_ITS_FIRST_ARGUMENT = object()


@functools.cache
def _results_of(default_dtype: torch.dtype) -> MetaResults:
    """What is remembered in this process; a result may depend on the default dtype, which no argument says."""
    return MetaResults()


def _kind_of(func: torch._ops.OpOverload) -> str:
    """``"fresh"`` for an operator that returns new tensors, ``"in place"`` for one that writes its first argument."""
    schema = func._schema
    written = [a.alias_info is not None for a in schema.arguments]
    returned = [r.alias_info is not None for r in schema.returns]
    if not all(str(r.type) == "Tensor" for r in schema.returns):
        return "other"
    if not any(written + returned):
        return "fresh"
    one = len(returned) == 1 and returned[0] and schema.returns[0].alias_info.is_write
    in_place = one and written[0] and not any(written[1:]) and torch.Tag.inplace_view not in func.tags
    return "in place" if in_place else "other"


def _remembered(kind: str, args: tuple, result: object) -> object | None:
    """What stands for an operator's result from here on; ``None`` where only the operator itself can make it."""
    if kind == "in place":
        same = args and result is args[0] and result.is_meta
        return _ITS_FIRST_ARGUMENT if same else None
    return None if _shares_storage(result, args) else _layout(result)


def _signature(value: object) -> tuple:
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device.type, value.shape, value.stride())
    if isinstance(value, list | tuple):
        return tuple(_signature(item) for item in value)
    return (type(value), value)  # 1 and 1.0 and True are equal as keys, and promote differently


def _layout(result: object) -> tuple | list[tuple] | None:
    if isinstance(result, torch.Tensor):
        return (result.shape, result.stride(), result.dtype) if result.is_meta else None
    if isinstance(result, tuple) and all(isinstance(item, torch.Tensor) and item.is_meta for item in result):
        return [(item.shape, item.stride(), item.dtype) for item in result]
    return None


def _shares_storage(result: object, args: tuple) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
    return any(tensor.untyped_storage()._cdata in storages for tensor in _tensors((result,)))


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _empty(layout: tuple) -> torch.Tensor:
    shape, stride, dtype = layout
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
