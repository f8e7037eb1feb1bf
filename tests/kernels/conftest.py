"""What tests of kernels share."""

import pytest

from lowvram_lab.kernels import library as kernels
from tests.helpers.kernels import WAYS, X86


@pytest.fixture
def way(request, monkeypatch, tmp_path_factory):
    """The library compiled in one of the ways."""
    if request.param == "AVX2" and not X86:
        pytest.skip("another processor")
    kernels._library.cache_clear()
    monkeypatch.setattr(kernels, "_WAYS", (WAYS[request.param],))
    monkeypatch.setattr(kernels, "_last", None)  # what was opened before is another library
    yield request.param
    kernels._library.cache_clear()
