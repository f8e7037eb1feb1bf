"""Test runs are offline, and the `gpu` tests are skipped where there is no CUDA. Markers: pyproject.toml."""

import os
import traceback

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


@pytest.fixture(autouse=True)
def clean_card(request: pytest.FixtureRequest):
    """A gpu test finds the card with nothing reserved, whatever ran before, and leaves it so."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    from tests.helpers.card import clean

    clean()
    yield
    clean()


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch):
    """Lets a test have our kernels; skips it where no C++ compiler is."""
    from lowvram_lab.kernels.library import there

    monkeypatch.setenv("LOWVRAM_COMPILE", "1")
    if not there():
        pytest.skip("no C++ compiler")


@pytest.fixture
def values():
    """Skips a gpu test of what is computed where nothing is."""
    from tests.helpers.card import computes

    if not computes():
        pytest.skip("the fake CUDA runtime computes values only with FAKE_CUDA_ARITHMETIC=1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A failed test's traceback holds its locals, and so its model: on a card no later test would have the room."""
    report = yield
    error = call.excinfo.value if call.excinfo and item.get_closest_marker("gpu") else None
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            frame.f_locals  # noqa: B018  (before Python 3.13 a frame keeps the copy that pytest looked at until asked anew)
        error = error.__cause__ or error.__context__
    return report
