"""The host's side of a load: resident memory, with file-backed pages told apart, measured and forecast.

``rss`` is what the operating system holds in RAM for this process. Pages mapped from a checkpoint file count in it
while they are in use, but they are the system's to drop; anonymous memory is not.

Derived in: notebooks/02_watch_memory.ipynb
"""

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import psutil

from lowvram_lab.units import MiB

INTERVAL_S = 0.005

LARGE_BLOCK = 8 * MiB
"""To ask the system for so much costs little beside a product of such matrices."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass
class HostMemory:
    """Resident memory of this process over a stretch of time, in bytes.

    Attributes:
        before_rss_bytes: Resident when it began.
        before_file_bytes: What of that was backed by files (libraries), or ``None`` as below.
        peak_rss_bytes: Most resident, sampled every 5 ms.
        after_rss_bytes: Resident when it ended.
        peak_file_bytes: Most of it that was backed by files (mapped checkpoints, libraries), or ``None`` where the
            system does not tell (outside Linux).
        peak_anonymous_bytes: Most of it that was not.
    """

    before_rss_bytes: int
    before_file_bytes: int | None = None
    peak_rss_bytes: int = 0
    after_rss_bytes: int = 0
    peak_file_bytes: int | None = None
    peak_anonymous_bytes: int | None = None

    @property
    def growth_bytes(self) -> int:
        """How far the peak rose above the start: what to compare with a forecast."""
        return self.peak_rss_bytes - self.before_rss_bytes

    def to_dict(self) -> dict:
        """Plain data."""
        return {**asdict(self), "growth_bytes": self.growth_bytes}


@contextmanager
def watch_host() -> Iterator[HostMemory]:
    """Samples this process's resident memory while the block runs.

    Yields:
        A ``HostMemory``, complete when the block has ended.
    """
    process, stop = psutil.Process(), threading.Event()
    began = process.memory_info()
    seen = HostMemory(began.rss, getattr(began, "shared", None))

    def sample() -> None:
        info = process.memory_info()
        seen.peak_rss_bytes = max(seen.peak_rss_bytes, info.rss)
        if hasattr(info, "shared"):
            seen.peak_file_bytes = max(seen.peak_file_bytes or 0, info.shared)
            seen.peak_anonymous_bytes = max(seen.peak_anonymous_bytes or 0, info.rss - info.shared)

    def keep_sampling() -> None:
        while not stop.wait(INTERVAL_S):
            sample()

    sampler = threading.Thread(target=keep_sampling, daemon=True)
    sample()
    sampler.start()
    try:
        yield seen
    finally:
        stop.set()
        sampler.join()
        sample()
        seen.after_rss_bytes = process.memory_info().rss


def peak_rss_bytes() -> int:
    """Highest resident memory of this process since it began, as the system kept it (psutil's, on Windows)."""
    try:
        import resource
    except ImportError:
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_heap() -> None:
    """Returns freed memory to the system. glibc keeps it for the next allocation, and layer by layer that adds up."""
    with contextlib.suppress(OSError, AttributeError):  # another C library, another system
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def give_back_large_blocks() -> None:
    """From now on returns blocks of ``LARGE_BLOCK`` or more to the system as soon as they are freed.

    glibc would do so too, but takes each block that is freed for a reason to keep larger ones, up to 32 MiB. Matrices
    of a wide layer are about as large, and those of one layer leave holes that the next one's do not fit into.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(
            _M_TRIM_THRESHOLD, 2 * LARGE_BLOCK
        )  # else it stays at what it was by chance when the other was set
