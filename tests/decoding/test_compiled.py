"""The process that compiles: whatever the caller has imported it works, and whatever ends it leaves nothing behind."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from lowvram_lab.decoding import compiled
from lowvram_lab.decoding.compiled import open_libraries
from lowvram_lab.decoding.compiling import Argument, Library
from lowvram_lab.decoding.llama_layer import HeadShape, LayerShape, Product, head
from lowvram_lab.errors import LowvramError
from tests.helpers.tiny import relative_error

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
SHAPE = HeadShape(Product("float"), 1e-5)
ROOT = Path(__file__).parents[2]
HURDLES = """
import importlib.util, os
importlib.util.find_spec("pip")  # from here on setuptools leaves the standard library's distutils in place,
try:
    import distutils.core  # and refuses to be imported once that is there
except ImportError:
    pass  # Python 3.12 has none
"""
COMPILE = """
import sys, torch
from tests.decoding.test_compiled import SHAPE, arguments
from lowvram_lab.decoding.compiled import open_libraries
from lowvram_lab.decoding.compiling import Library
run, = open_libraries([Library.called_with(SHAPE, arguments())], progress=False)
torch.save(run(arguments())[0], sys.argv[1])
"""


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """A cache folder and a folder for temporary files, both empty."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("LOWVRAM_COMPILE", "1")
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONWARNINGS", "error")  # a deprecation in torch's compiler is no reason not to compile
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)  # it remembers the first answer


def arguments() -> list[torch.Tensor]:
    """Of a small head."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in ((1, 64), (64,), (32, 64))]


def leftovers(tmp_path) -> list[str]:
    """Names of what was given up half-way, or left in the temporary folder."""
    found = [*(tmp_path / "cache").rglob("*.partial-*"), *(tmp_path / "scratch").iterdir()]
    return [path.name for path in found]


def compile_it(tmp_path, before: str = "") -> subprocess.Popen:
    command = [sys.executable, "-c", before + COMPILE, str(tmp_path / "result.pt")]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a shell's background job
    )


def until(condition, what: str) -> None:
    """Waits for something another process does; only one that hangs takes this long."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_ended_while_it_compiles_the_next_run_goes_on(tmp_path, end):
    """The next run meets what broke the first one of ``lowvram demo``: distutils, imported before setuptools."""
    process = compile_it(tmp_path)
    until(lambda: list((tmp_path / "cache").rglob("*.partial-*")), "the compiler to begin")
    helpers = psutil.Process(process.pid).children(recursive=True)
    assert helpers
    process.send_signal(end)
    assert process.wait() != 0
    until(lambda: not any(map(running, helpers)), "the processes it had started to end")
    until(lambda: not list((tmp_path / "scratch").iterdir()), "its temporary files to go")
    if end == signal.SIGINT:
        assert leftovers(tmp_path) == []
    else:
        assert compile_it(tmp_path, HURDLES).wait() == 0
        expected = head(SHAPE, arguments()[0], arguments()[1:])
        assert relative_error(torch.load(tmp_path / "result.pt"), expected) < 1e-5
        assert leftovers(tmp_path) == []


def running(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def fake_compiler(tmp_path, monkeypatch, does: str) -> None:
    """A compiler that says it is g++ and then, asked to compile, does something else."""
    file = tmp_path / "fake-g++"
    file.write_text(f'#!/bin/sh\ncase "$*" in *-c*) {does};; esac\nexec g++ "$@"\n')
    file.chmod(0o755)
    monkeypatch.setenv("CXX", str(file))


FAILURES = {
    "an error": ("echo 'x.cpp:1:1: error: no such thing' >&2; exit 1", "x.cpp:1:1: error: no such thing"),
    "killed": ("kill -9 $PPID", "process that compiles was ended by SIGKILL: the system had no memory left"),
}


@pytest.mark.parametrize(("does", "expected"), FAILURES.values(), ids=FAILURES)
def test_a_compiler_that_fails_is_one_line_and_a_log(tmp_path, monkeypatch, does, expected):
    fake_compiler(tmp_path, monkeypatch, does)
    with pytest.raises(LowvramError) as error:
        open_libraries([Library.called_with(SHAPE, arguments())], progress=False)
    log = tmp_path / "cache" / "compiled" / "failure.log"
    assert expected in str(error.value) and str(error.value).endswith(f"the whole log is {log}")
    assert "\n" not in str(error.value) and log.is_file()
    assert not list((tmp_path / "cache").rglob("library.so"))
    assert leftovers(tmp_path) == []


def test_of_two_compilers_the_one_that_failed_says_why(tmp_path, monkeypatch):
    """The other is ended, and is not to blame; which of them comes first must not matter."""
    ended = iter([[None, None], [None, 3]])

    class Process:
        def poll(self):
            return self.found.pop(0)

    both = [Process(), Process()]
    both[0].found, both[1].found = (list(column) for column in zip(*ended, strict=True))
    monkeypatch.setattr(compiled, "_POLL_S", 0)
    assert compiled._wait(both, [(None, tmp_path, {})], progress=False) == 3


def test_a_compiler_that_hangs_is_given_up(tmp_path, monkeypatch):
    begun = tmp_path / "begun"
    fake_compiler(tmp_path, monkeypatch, f"touch {begun}; sleep 1000")
    monkeypatch.setattr(compiled.time, "monotonic", lambda: 1e9 if begun.exists() else 0.0)
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(LowvramError, match="did not end within 900 s"):
        open_libraries([Library.called_with(SHAPE, arguments())], progress=False)
    assert not set(psutil.Process().children(recursive=True)) - before
    assert leftovers(tmp_path) == []


def test_what_makes_it_another_library():
    """Sizes of cache and prompt are free; a stride that is not the usual one is not: the library computes with it."""
    product = (Product("float"),)
    shape = LayerShape(2, 2, 8, 1.0, 1e-5, (product,) * 4, False, ("keys", "values"), True, torch.float32)

    def layer(room: int, tokens: int = 2, **changes) -> Library:
        weights = {"norms": torch.ones(2, 16), "qkv": torch.ones(48, 16), "o": torch.ones(16, 16)}
        weights |= {"gate_up": torch.ones(64, 16), "down": torch.ones(16, 32), **changes}
        named = [torch.ones(1, 16), torch.ones(8), torch.ones(8), torch.arange(tokens)]
        cache = [torch.ones(1, 2, room, 8)] * 2
        return Library.called_with(shape, named + [*weights.pop("norms"), *weights.values()] + cache)

    same = compiled._identity(layer(60))
    assert same == compiled._identity(layer(90, tokens=7))
    assert same != compiled._identity(layer(60, o=torch.ones(16, 16).T.contiguous().T))
    assert same != compiled._identity(layer(60, o=torch.ones(16, 16, dtype=torch.bfloat16)))
    assert Argument.like(torch.ones(1, 4)).unusual_stride == Argument.like(torch.ones(4, 1).T).unusual_stride == ()
    assert pickle.loads(pickle.dumps(layer(60))) == layer(60)
