"""This machine's rates: measured once, kept, measured anew where other work disturbed them."""

import math
import os
import subprocess
import sys
import time

import pytest
import torch

from lowvram_lab import timing
from lowvram_lab.decoding.bind import product_of
from lowvram_lab.model.formats import FORMATS, get_format
from lowvram_lab.rates import machine as measuring
from lowvram_lab.rates.machine import Machine
from lowvram_lab.timing import Circumstances, Timing


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Small weights and short rounds; the cache folder is empty."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path))
    for name, value in {"COPIES_BYTES": 2**18, "SMALL": 64, "LARGE": 512, "PRODUCT_BITS": (10, 15), "DEEP": 6}.items():
        monkeypatch.setattr(measuring, name, value)
    monkeypatch.setattr(timing, "ROUND_S", 0.0005)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "ATTEMPTS", 1)
    monkeypatch.setattr(Circumstances, "STEADY_SPREAD", math.inf)
    monkeypatch.setattr(Circumstances, "STEADY_OTHERS", math.inf)


def test_rates_are_measured_once_and_kept(quick, monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    machine = Machine()
    found = {fmt: machine.kernel(fmt) for fmt in ("bf16", "int4", "int5")}
    prompt, token = machine.prompt("int8", threads=1), machine.token("lean", "int4", "int8", threads=1)
    assert torch.get_num_threads() == threads
    for rates in (
        *found.values(),
        prompt,
        token,
        machine.product("lean", "int4", (512, 512)),
        machine.attention("lean", "int8"),
    ):
        assert all(math.isfinite(value) and value >= 0 for value in vars(rates).values())
    monkeypatch.setattr(measuring, "time_calls", lambda *_: pytest.fail("measured again"))
    assert machine.kernel("int4") == found["int4"] == Machine().kernel("int4")
    assert Machine().prompt("int8", threads=1) == prompt
    assert Machine().token("lean", "int4", "int8", threads=1) == token
    if not torch.cuda.is_available():
        assert machine.kernel("int4", "gpu") == found["int4"]  # the stand-in is this CPU
        assert machine.link() is None
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        Machine(anew=True).kernel("int4")
    (file,) = (tmp_path / "rates").iterdir()
    for text in ("not JSON", "[]", '{"kernel int4 cpu 1": {"rates": {}}}'):
        file.write_text(text)
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            Machine().kernel("int4")


def test_rates_that_were_disturbed_are_used_said_and_measured_anew(quick, monkeypatch):
    monkeypatch.setattr(Circumstances, "STEADY_OTHERS", 0.25)
    busy = Circumstances(time.time() - 7200, spread=1.1, others=1.6)
    monkeypatch.setattr(measuring, "time_calls", lambda calls, *_: Timing(dict.fromkeys(calls, 1e-3), {}, busy))
    machine = Machine()
    machine.kernel("int4")
    assert machine.circumstances() == busy
    assert busy.words(time.time()) == "measured 2 h ago, rounds within 10%, disturbed: other work held 1.6 cores"
    again = []
    quiet = Circumstances(time.time(), spread=1.02, others=0.0)
    monkeypatch.setattr(
        measuring, "time_calls", lambda calls, *_: again.append(1) or Timing(dict.fromkeys(calls, 1e-4), {}, quiet)
    )
    Machine().kernel("int4")
    Machine().kernel("int4")
    assert again == [1]  # once more, since the first was disturbed; not a third time
    assert "disturbed" not in quiet.words(time.time())


def test_a_disturbed_timing_is_repeated_and_the_least_disturbed_counts(monkeypatch):
    others = iter([2.0, 0.1, 9.0])
    calls = []

    def attempt(given, wait):
        calls.append(1)
        return Timing({"": 1.0}, {}, Circumstances(0.0, 1.0, next(others)))

    monkeypatch.setattr(timing, "_attempt", attempt)
    assert timing.time_calls({"": lambda: None}).circumstances.others == 0.1
    assert len(calls) == 2


def test_other_work_on_the_cores_is_seen():
    burn = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(burn) for _ in range(os.cpu_count() or 1)]
    try:
        found = timing.time_calls({"": lambda: sum(range(20000))}).circumstances
    finally:
        for process in others:
            process.kill()
            process.wait()
    assert found.others > Circumstances.STEADY_OTHERS
    assert not found.steady


@pytest.mark.parametrize("fmt", [name for name, fmt in FORMATS.items() if fmt.kind != "nf4" and fmt.planes == 1])
def test_every_format_has_rates(quick, fmt):
    """Groups of 96 and 192 divide no power of two; a tied int4 table has a layout of its own."""
    for shared in (False, True):
        rates = Machine(remember=False).kernel(fmt, shared=shared)
        assert rates.seconds(10**6, 8) >= 0
    if product_of(measuring._weight(fmt, 64, measuring._whole_groups(64, fmt), "cpu")):
        dtype = fmt if get_format(fmt).kind == "float" else "bf16"
        assert Machine(remember=False).token("lean", fmt, dtype, dtype).layer_s >= 0
