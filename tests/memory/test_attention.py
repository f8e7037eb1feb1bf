"""Attention as it is forecast beside PyTorch's own allocator: peak and rest of one call, for the card that is there.

On the fake CUDA runtime ``FAKE_CUDA_CC`` chooses the card, and with it the kernel; it says nothing about values.
"""

import itertools
import random
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from lowvram_lab.memory import attention
from lowvram_lab.memory.attention import ImitateAttention
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.card import CARDS
from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.memory.meter import Meter

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEADS = ((4, 4, True), (4, 2, True), (8, 1, True), (8, 1, False), (20, 20, False))
SIZES = ((16, 16), (20, 20), (64, 64), (64, 32), (80, 80), (128, 128), (192, 192), (256, 256))
TOKENS = ((1, 290), (1, 512), (1, 4000), (100, 100), (290, 290), (100, 700), (1500, 1500))
MASKS = (None, "bool", "added")


def arguments(place, dtype, heads, sizes, tokens, mask):
    """Of one call; a mask where not all keys are seen."""
    (queries, keys, shared), (size, value_size), (new, seen) = heads, sizes, tokens
    make = {"dtype": dtype, "device": place}
    q = torch.empty(1, queries, new, size, **make)
    k, v = torch.empty(1, keys, seen, size, **make), torch.empty(1, keys, seen, value_size, **make)
    options = {"is_causal": mask is None and new == seen, "enable_gqa": shared}
    if mask:
        make["dtype"] = torch.bool if mask == "bool" else dtype
        options["attn_mask"] = torch.empty(1, 1, new, seen, **make)
    return (q, k, v), options


def forecast(card, *case, watched=True):
    """Bytes at the peak and after one call, beyond its arguments."""
    gpu = DryRunGpu(GpuBudget(2**40, card=card), "cuda")
    with gpu.active():
        square = gpu.zeros((16, 16), torch.float32, "gpu")
        square @ square  # cuBLAS has its workspace now
    tensors, options = arguments("meta", *case)
    gpu.watched = watched
    with torch.no_grad(), gpu.phase("a call"), ImitateAttention(gpu):
        for tensor in (*tensors, *options.values()):
            if isinstance(tensor, torch.Tensor):
                gpu.meter.count(tensor, "gpu")
        held = gpu.meter.allocated["gpu"]
        gpu.reset_peak()
        output = F.scaled_dot_product_attention(*tensors, **options)
        found = gpu.peak_allocated_bytes - held, gpu.meter.allocated["gpu"] - held
    del output
    return found


def measured(*case, watched=True):
    """The same by PyTorch's counters, under a meter as measured phases are, or without as a chat is."""
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()  # the size of a block depends on what the allocator keeps
    torch.ones(16, 16, device="cuda") @ torch.ones(16, 16, device="cuda")  # cuBLAS has its workspace now
    tensors, options = arguments("cuda", *case)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad(), Meter(by_device=True) if watched else nullcontext():
        output = F.scaled_dot_product_attention(*tensors, **options)
    found = torch.cuda.max_memory_allocated() - held, torch.cuda.memory_allocated() - held
    del output
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mask", "watched"), [*((mask, True) for mask in MASKS), ("bool", False), ("added", False)])
def test_attention_takes_what_is_forecast(dtype, mask, watched):
    if not watched and torch.cuda.get_device_name() == "fake CUDA":
        pytest.skip("the fake CUDA runtime looks on by a dispatch mode of its own where it computes values")
    major, minor = torch.cuda.get_device_capability()
    cases = list(itertools.product([dtype], HEADS, SIZES, TOKENS, [mask]))
    wrong = []
    for case in random.Random(f"{major}.{minor}").sample(cases, 60):
        found = forecast(GpuBudget(2**40).card, *case, watched=watched)
        expected = measured(*case, watched=watched)
        if found != expected:
            wrong.append((case, found, expected))
    assert not wrong, f"{len(wrong)} of 60, the first: {wrong[:3]}"


CALL = (torch.bfloat16, (16, 8, True), (64, 64), (1500, 1500), None)
SCORES = 16 * 1500 * 1500


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("t4", 4 * SCORES),  # at least one matrix of scores in float32: no fused kernel for bf16
        ("rtx3050", 16 * 1500 * (2 * 64 + 4)),  # the output, and a sum for each query
        ("h100", 16 * 1500 * 2 * 64),  # cuDNN's: the output
    ],
)
def test_the_card_decides_which_kernel_runs(card, peak):
    """Values read off PyTorch's own allocator on the fake runtime, torch 2.13."""
    found = forecast(CARDS[card], *CALL)[0]
    assert peak <= found < (3 * peak if card == "t4" else peak + 2048)


@pytest.mark.parametrize(("release", "fused"), [((2, 13), False), ((2, 14), True)])
@pytest.mark.parametrize("heads", [(16, 8, True), (16, 1, False)])
def test_heads_that_share_keys_are_fused_on_a_t4_from_torch_2_14_on(heads, release, fused, monkeypatch):
    monkeypatch.setattr(attention, "torch_release", lambda: release)
    found = forecast(CARDS["t4"], torch.float16, heads, (64, 64), (1500, 1500), None)[0]
    assert (found < 4 * SCORES) == fused


def test_few_queries_are_split_over_the_multiprocessors():
    """A buffer for each part of the keys: more parts on a larger card."""
    call = (torch.bfloat16, (16, 8, True), (64, 64), (1, 4000), None)
    small, large = (forecast(CARDS[name], *call)[0] for name in ("rtx3050", "rtx3090"))
    assert 0 < small < large
