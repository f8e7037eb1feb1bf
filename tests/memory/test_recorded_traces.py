"""PyTorch's own allocator beside the simulator: a thousand traces recorded and replayed, equal in every step.

Each block lies in the same segment at the same place, segments are made and given back in the same order, and as many
bytes are reserved after each step. Nothing is computed: the fake CUDA runtime is as good as a card.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

RANDOM, MODELS = 230, 20  # times four: 1,000 traces


def record(request, what: str, count: int, expandable: bool, addresses: str) -> dict:
    """Counts of what the traces held; see ``record_traces``."""
    if addresses == "down" and not torch.cuda.get_device_name().startswith("fake CUDA"):
        pytest.skip("a card chooses its addresses itself")
    first = 1000 * (2 * expandable + (addresses == "down"))
    settings = {"PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable}", "FAKE_CUDA_ADDRESSES": addresses}
    command = [sys.executable, "-m", "tests.memory.record_traces", what, str(first), str(first + count)]
    ended = subprocess.run(
        command, env=os.environ | settings, cwd=request.config.rootpath, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("addresses", ["up", "down"])
@pytest.mark.parametrize("expandable", [False, True])
def test_random_traces_are_replayed_step_by_step(expandable, addresses, request):
    found = record(request, "random", RANDOM, expandable, addresses)
    assert found["traces"] == RANDOM
    assert found["blocks"] > 80 * RANDOM
    assert found["refused"] > RANDOM  # the cache was emptied for these, and it was not enough
    assert found["given back"] > RANDOM


@pytest.mark.gpu
@pytest.mark.parametrize("addresses", ["up", "down"])
@pytest.mark.parametrize("expandable", [False, True])
def test_model_runs_are_replayed_step_by_step(expandable, addresses, request):
    found = record(request, "models", MODELS, expandable, addresses)
    assert found["traces"] == MODELS
    assert found["blocks"] > 300 * MODELS
    assert found["refused"] > 0
