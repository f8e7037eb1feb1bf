"""The benchmarks are scripts beside the library that reach into it: whoever renames there finds out here."""

import importlib
from pathlib import Path

import pytest

from tests.helpers.checkpoints import write_model

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture
def imported(monkeypatch):
    """A script by its name, which is run from its folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_can_be_imported(name, imported):
    assert imported(name).__doc__


def test_the_products_of_a_token_are_found(imported, tmp_path):
    """They are the decoder's own, called by themselves."""
    model = write_model(tmp_path / "model", "llama")
    found = imported("engine").products(str(model), 2, (16, 40), 3, "bf16")
    assert [row["cached_tokens"] for row in found["rows"]] == [16, 40]
    assert all(row["decode_ms"] > 0 and row["products_ms"] > 0 for row in found["rows"])
