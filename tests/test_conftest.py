"""What tests/conftest.py promises."""

import os
import subprocess
import sys
from pathlib import Path

FAILS = """
import weakref

import pytest

pytestmark = pytest.mark.MARK
class Model: pass
alive = weakref.WeakSet()

def test_fails():
    model = Model()
    alive.add(model)
    try:
        raise KeyError("the first")
    except KeyError:
        assert model is None

def test_has_the_room_to_itself():
    assert not list(alive)
"""


def run(folder: Path, mark: str) -> str:
    root = Path(__file__).parents[1]
    test = folder / "test_let_go.py"
    test.write_text(FAILS.replace("MARK", mark))
    # torch is not asked whether there is a card: a stand-in says so, and yes to whatever else
    (folder / "sitecustomize.py").write_text(
        "import sys, types\nclass Card:\n    def __getattr__(self, name): return lambda *options: True\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=Card(), _C=Card())\n"
    )
    words = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-c", os.devnull, "-m", "", str(test)]
    paths = os.pathsep.join((str(folder), str(root)))
    return subprocess.run(
        words, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    ).stdout


def test_a_failed_gpu_test_lets_its_model_go(tmp_path):
    assert "1 failed, 1 passed" in run(tmp_path, "gpu")


def test_without_the_mark_a_traceback_keeps_it(tmp_path):
    """Else the test above could not fail."""
    assert "2 failed" in run(tmp_path, "slow")
