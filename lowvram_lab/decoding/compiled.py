"""A layer's and the head's function compiled ahead of time, once for a machine; later processes open them at once.

torch.compile would do it anew in every process, and its checks before each call take as long as a small layer's own
work (37 us of 211, SmolLM2): AOTInductor's library is called directly. What it is called with is the caller's duty.
Compiling is another process's work (``compiling.py``); this module finds, asks for and opens libraries.
"""

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import torch
from tqdm.auto import tqdm

from lowvram_lab.decoding import compiling, llama_layer
from lowvram_lab.decoding.compiling import DIGEST, LIBRARY, OPTIONS, Library
from lowvram_lab.engine import cache_layers
from lowvram_lab.errors import LowvramError
from lowvram_lab.files import cache_dir, discard_partial, is_finished, sha256_file, writable, write_atomically
from lowvram_lab.kernels import product, token_attention
from lowvram_lab.kernels.compiler import compiler_command
from lowvram_lab.machine import fresh_python, instruction_set, why_ended

LONGEST_S = 900
"""A compiler that takes longer for a library hangs: that is 50 times what one takes on two slow cores."""

_POLL_S = 0.2

logger = logging.getLogger(__name__)


def open_libraries(libraries: Sequence[Library], progress: bool = True) -> list[Callable]:
    """Opens libraries; compiles first, in other processes, those that this machine does not have yet.

    Args:
        libraries: Which; several may be the same.
        progress: Show that it takes a while (10 to 20 s each, once for a machine).

    Returns:
        For each library a function of a list of its arguments. It returns a list whose first is the result, a layer's
        hidden states or the logits.

    Raises:
        LowvramError: The compiler fails, or the cache folder cannot be written to.
    """
    found = {library: _found(library) for library in dict.fromkeys(libraries)}
    if missing := [library for library, run in found.items() if run is None]:
        _compile(missing, progress)
        found |= {library: _open(_directory(library)) for library in missing}
    return [found[library] for library in libraries]


def _found(library: Library) -> Callable | None:
    """What was compiled before, if it can be opened."""
    directory = _directory(library)
    if not is_finished(directory, _identity(library)):
        return None
    try:
        return _open(directory)
    except (RuntimeError, OSError) as error:  # damaged since it was made, or no library any more
        logger.warning("%s cannot be opened (%s): compiling again", directory, (str(error).splitlines() or ["?"])[0])
        shutil.rmtree(directory, ignore_errors=True)
        return None


@functools.cache
def _open(directory: Path) -> Callable:
    if sha256_file(directory / LIBRARY) != (directory / DIGEST).read_text():
        raise RuntimeError("its checksum is another")
    # not torch._inductor.aoti_load_package: that imports the whole compiler (a second; and setuptools, which fails
    # where distutils came first), and its model takes the arguments apart and puts them together, 40 us each time.
    # Nor AOTIModelPackageLoader: it unpacks a copy into the temporary folder, which a killed process leaves there
    return torch._C._aoti.AOTIModelContainerRunnerCpu(str(directory / LIBRARY), 1).run


def _compile(libraries: list[Library], progress: bool) -> None:
    """Has libraries compiled by other processes, as many as there are cores, which end with this block."""
    folder = writable(cache_dir() / "compiled")
    jobs = [(library, _directory(library), _identity(library)) for library in libraries]
    workers = min(len(jobs), os.cpu_count() or 1)
    with (
        tempfile.TemporaryDirectory(prefix="lowvram-compile-", ignore_cleanup_errors=True) as scratch,
        tempfile.TemporaryFile("w+", errors="replace") as log,
    ):
        processes = []
        try:
            for number in range(workers):
                processes.append(_start(Path(scratch, str(number)), log))
                with contextlib.suppress(BrokenPipeError):  # it ended already; the log says why
                    processes[-1].stdin.write(pickle.dumps(jobs[number::workers]))
                    processes[-1].stdin.flush()
            failed = _wait(processes, jobs, progress)
        finally:
            for process in processes:
                _end(process)
            for _, directory, _ in jobs:
                discard_partial(directory)
        if failed:
            log.seek(0)
            raise LowvramError(_explained(failed, log.read(), folder / "failure.log"))


def _start(scratch: Path, log: IO[str]) -> subprocess.Popen:
    """Starts a process that compiles what it is sent."""
    scratch.mkdir()
    # its intermediate files are its own: what a killed compiler left half-written is never met again
    places = {"TMPDIR": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(scratch), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return subprocess.Popen(
        fresh_python("lowvram_lab.decoding.compiling:main"),
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env=os.environ | places | {"PYTHONWARNINGS": "ignore"},  # torch deprecates what its compiler itself calls
        start_new_session=True,  # Ctrl-C is this process's to handle, and the compiler is ended with its parent
    )


def _wait(processes: list[subprocess.Popen], jobs: list[tuple], progress: bool) -> int:
    """Waits until all have ended, or one has failed, whose status it returns; the bar counts what is finished."""
    deadline = time.monotonic() + LONGEST_S * len(jobs)
    shown = None if progress else True  # None: on a terminal and in a notebook, not in a pipe
    with tqdm(desc="compile, once for this machine", total=len(jobs), disable=shown, leave=False) as bar:
        while None in (ended := [process.poll() for process in processes]) and not any(ended):
            if time.monotonic() > deadline:
                longest = LONGEST_S * len(jobs)
                raise LowvramError(f"{compiler_command()} did not end within {longest} s; see what hangs there")
            time.sleep(_POLL_S)
            bar.n = sum(is_finished(directory, identity) for _, directory, identity in jobs)
            bar.refresh()
    return next((status for status in ended if status), 0)


def _end(process: subprocess.Popen) -> None:
    """Ends the process, with the compiler it has started, unless it has ended."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.wait()
    with contextlib.suppress(OSError):
        process.stdin.close()


def _explained(status: int, said: str, log: Path) -> str:
    """Why compiling failed, in one line: the C++ compiler's first error, else the last line; the rest is in the log."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1] if status > 0 and lines else f"the process that compiles {why_ended(status, said)}"
    reason = next((line for line in lines if "error: " in line), last)[:300]
    with contextlib.suppress(LowvramError):
        write_atomically(log, said)
        reason += f"; the whole log is {log}"
    return reason


def _directory(library: Library) -> Path:
    name = hashlib.sha256(repr(sorted(_identity(library).items())).encode()).hexdigest()[:16]
    return cache_dir().absolute() / "compiled" / name


def _identity(library: Library) -> dict:
    """What makes it another library: the function, what of its arguments is fixed, and what makes and runs it."""
    fixed = []
    for argument, free in zip(library.arguments, library.free_sizes(), strict=True):
        sizes = tuple(size for dim, size in enumerate(argument.shape) if dim not in free)
        fixed.append((str(argument.dtype), sizes, argument.unusual_stride))
    return {"function": repr(library.function), "arguments": repr(fixed), "made_by": _made_by()}


@functools.cache
def _made_by() -> str:
    """Version of torch, the processor's vector unit, and the text of what is compiled."""
    modules = (llama_layer, cache_layers, compiling, product, token_attention)
    sources = "".join(Path(module.__file__).read_text() for module in modules)
    made = (torch.__version__, torch.backends.cpu.get_cpu_capability(), instruction_set(), OPTIONS, compiler_command())
    return hashlib.sha256(repr((made, sources)).encode()).hexdigest()
