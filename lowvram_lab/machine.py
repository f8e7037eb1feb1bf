"""This machine (processor, memory, card, versions), CPU threads for a while, new interpreters. Knows no model."""

import contextlib
import json
import os
import platform
import signal
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import psutil
import torch

from lowvram_lab.units import format_bytes

PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "safetensors", "gguf")


@contextmanager
def cpu_threads(count: int | None):
    """Runs the block with so many CPU threads (``None``: as many as there are), and sets torch's number back."""
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread():
    """A single one: many small operations only wait for a second thread, 8 ms each where its core is busy."""
    return cpu_threads(1)


def processor_name() -> str:
    """The processor as the system calls it."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """What a compiler makes code for: another processor may not know these instructions."""
    lines = [line for line in _cpuinfo() if line.startswith(("model name", "flags", "Features"))]
    return "".join(dict.fromkeys(lines)) or platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return []


def card() -> str:
    """The CUDA card and what is free on it, in words."""
    if not torch.cuda.is_available():
        return "none: GPU budgets are simulated in RAM"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {format_bytes(free)} of {format_bytes(total)} free"


def version(name: str) -> str | None:
    """Version of an installed package, or ``None``."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def versions(names: Iterable[str]) -> dict[str, str]:
    """Python's version, and those of the packages that are installed."""
    found = {name: version(name) for name in names}
    return {"python": platform.python_version(), **{name: text for name, text in found.items() if text}}


def facts() -> dict[str, str | int]:
    """Plain data that belongs beside any figure measured here: versions, processor, memory, card."""
    return {
        "python": platform.python_version(),
        **{name: version(name) or "not installed" for name in PACKAGES},
        "cpu": processor_name(),
        "cpu_cores": os.cpu_count() or 1,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "ram": format_bytes(psutil.virtual_memory().total),
        "system": platform.platform(terse=True),
        "gpu": card(),
    }


def fresh_python(entry: str) -> list[str]:
    """The command that calls ``module:function`` in a new interpreter, which imports from where this one does.

    Not multiprocessing: its new interpreters run the caller's script again where that has no ``__main__`` guard.
    """
    module, function = entry.split(":")
    start = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import {function}; {function}()"
    return [sys.executable, "-P", "-c", start, json.dumps([str(place) for place in sys.path])]


def why_ended(status: int, said: str) -> str:
    """Why a process ended as it did, in words that go on from its name.

    Args:
        status: As ``subprocess`` gives it: a signal is negative.
        said: What it wrote to stderr.
    """
    if status < 0:
        name = signal.Signals(-status).name
        causes = {"SIGKILL": "the system had no memory left", "SIGILL": "it is built for another processor"}
        return f"was ended by {name}" + (f": {causes[name]}, probably" if name in causes else "")
    lines = said.strip().splitlines()
    return f"ended with status {status}" + (f": {lines[-1][:200]}" if lines else "")
