"""A card made for one test: a process of its own on the fake CUDA runtime, whose settings are read when it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def on_fake_card(script: str, **settings: str) -> dict:
    """Runs Python with these settings of the fake (``tests/fakecuda/README.md``).

    Args:
        script: Prints JSON as its last line.
        settings: Environment variables.

    Returns:
        That JSON.
    """
    if not (torch.cuda.is_available() and torch.cuda.get_device_name().startswith("fake CUDA")):
        pytest.skip("needs the fake CUDA runtime: make fake-cuda")
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | settings,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])
