"""What PyTorch allocates by itself on CUDA, release by release; read off the releases' own allocators."""

import pytest
import torch

from lowvram_lab.memory import dry_run
from lowvram_lab.memory.allocator import MIN_BLOCK
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.torch_release import torch_release
from lowvram_lab.units import GiB, MiB


@pytest.mark.parametrize(
    ("words", "release"), [("2.13.0+cpu", (2, 13)), ("2.9.1", (2, 9)), ("2.12.0.dev20260401", (2, 12))]
)
def test_the_release_is_read_from_the_version(monkeypatch, words, release):
    monkeypatch.setattr(torch, "__version__", words)
    assert torch_release() == release


def _held_by_products(release, monkeypatch, *, bias: bool) -> int:
    monkeypatch.setattr(torch, "__version__", "{}.{}.0".format(*release))
    gpu = dry_run.DryRunGpu(GpuBudget.parse(4 * GiB, card="t4"))
    with gpu.active():
        x, weight = gpu.zeros((4, 64), torch.float16, "gpu"), gpu.zeros((64, 64), torch.float16, "gpu")
        added = gpu.zeros((64,), torch.float16, "gpu") if bias else None
        before = gpu.meter.allocator.allocated
        for _ in range(2):  # the second product takes nothing more
            torch.nn.functional.linear(x, weight, added)
        return gpu.meter.allocator.allocated - before


@pytest.mark.parametrize("release", [(2, 11), (2, 12), (2, 13)])
def test_before_2_12_a_product_with_a_bias_keeps_a_second_workspace(monkeypatch, release):
    alone = _held_by_products(release, monkeypatch, bias=False)
    assert alone == 8_519_680
    assert _held_by_products(release, monkeypatch, bias=True) - alone == (MiB if release < (2, 12) else 0)


@pytest.mark.parametrize(
    ("release", "seeds", "small_segments"), [((2, 11), 2, 2), ((2, 12), 4, 1), ((2, 13), 4, 1), ((2, 14), 0, 1)]
)
def test_where_the_seeds_of_two_graphs_lie(monkeypatch, release, seeds, small_segments):
    """Before 2.12 one pair for all, on the stream that captures; from 2.14 on none where nothing random is drawn."""
    monkeypatch.setattr(torch, "__version__", "{}.{}.0".format(*release))
    gpu = dry_run.DryRunGpu(None)
    with gpu.active():
        weights = gpu.zeros((16,), torch.float16, "gpu")
        graphs = gpu.graphs()
        for _ in range(2):
            with graphs.capturing():
                pass
    allocator = gpu.meter.allocator
    assert allocator.allocated == weights.nbytes // 32 * MIN_BLOCK + seeds * MIN_BLOCK
    assert allocator.reserved == small_segments * 2 * MiB
