"""Test runs are offline, and the `gpu` tests are skipped where there is no CUDA. Markers: pyproject.toml."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub; HF_HUB_OFFLINE=0 overrides
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("LOWVRAM_COMPILE", "0")  # ten seconds for every shape of a tiny model; tests of it say 1


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")
