"""Several processes on one folder: killed while they write, writing the same at once, on a disk that is full.

Whatever happened, another process answers with the bits of one that remembers nothing.
"""

import json
import os
import subprocess

import pytest

from lowvram_lab.machine import fresh_python
from tests.helpers import killed


def found(folder, kind, kv_format, kills):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # forked: no thread may be left behind
    command = [*fresh_python("tests.helpers.killed:main"), str(folder), kind, kv_format, str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def check(found, said, kills):
    one = found["killed"]
    assert one["kills"] == kills
    assert one["wrong"] == one["over"] == one["not removed"] == 0
    assert one["restored"] > 0
    both = found["at once"]
    assert both["kept"] == [2 * killed.BLOCKS] * 2
    assert both["files"] == 2 * killed.BLOCKS - 2  # two blocks in common
    assert both["wrong"][0] == both["left"] == 0
    full = found["full"]
    assert (full["kept"], full["files"], full["left"]) == (0, 0, 0)
    assert full["wrong"] == [0, 0]
    assert said.count("File too large") == 1
    assert "Traceback" not in said


def test_20_kills_while_writing(tmp_path):
    report, said = found(tmp_path, "llama", "bf16", 20)
    check(report, said, 20)
    assert report["killed"]["left"] >= 3  # between writing and renaming too


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kv_format"), [("qwen2", "int8"), ("llama", "int4")])
def test_kills_in_other_formats(kind, kv_format, tmp_path):
    report, said = found(tmp_path, kind, kv_format, 20)
    check(report, said, 20)
