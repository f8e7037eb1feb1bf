"""Watch a real run: peak and growth of GPU memory by module, and every allocation in order.

Hooks go on when the context is entered and leave no trace when it is left.

Derived in: notebooks/02_watch_memory.ipynb
"""

import fnmatch
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median

from torch import nn

from lowvram_lab.errors import LowvramError
from lowvram_lab.memory.meter import Meter
from lowvram_lab.memory.timeline import Timeline


@dataclass
class ModuleMemory:
    """GPU memory over the calls of one module, in bytes.

    Attributes:
        module: Its path.
        calls: How often it ran.
        peak_bytes: Most it added to what was live when it was entered, over all calls.
        kept_bytes: What it left behind, all calls added up: its result, its KV cache.
    """

    module: str
    calls: int = 0
    peak_bytes: int = 0
    kept_bytes: int = 0


@dataclass
class Watched:
    """What ``watch`` saw.

    Attributes:
        modules: By path.
        timeline: Every allocation and release in order.
    """

    modules: dict[str, ModuleMemory] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline, repr=False)

    def table(self):
        """One row a module, largest peak first. A DataFrame."""
        import pandas as pd

        rows = sorted((vars(memory) for memory in self.modules.values()), key=lambda row: -row["peak_bytes"])
        return pd.DataFrame(rows, columns=["module", "calls", "peak_bytes", "kept_bytes"])

    def _repr_html_(self) -> str:
        return self.table().head(20).to_html(index=False)


@contextmanager
def watch(model: nn.Module, include: str = "*") -> Iterator[Watched]:
    """Watches a loaded model's GPU memory while the block runs.

    Args:
        model: From ``load``.
        include: Glob pattern over module paths, e.g. ``"model.layers.0.*"`` or ``"*.mlp"``.

    Yields:
        A ``Watched``, filled as the model runs.

    Raises:
        LowvramError: No module matches.
    """
    chosen = {path: module for path, module in model.named_modules() if path and fnmatch.fnmatch(path, include)}
    if not chosen:
        example = next(path for path, _ in model.named_modules() if path)
        raise LowvramError(f"no module matches {include!r}; paths look like {example}")
    gpu, seen = model.lowvram.gpu, Watched()
    earlier, gpu.meter.timeline = gpu.meter.timeline, seen.timeline
    handles = []
    for path, module in chosen.items():
        seen.modules[path] = ModuleMemory(path)
        opened: list = []
        enter = functools.partial(_enter, gpu.meter, path, opened)
        leave = functools.partial(_leave, seen.modules[path], opened)
        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with gpu.watching():
            yield seen
    finally:
        for handle in handles:
            handle.remove()
        gpu.meter.timeline = earlier


def measure_overhead(model: nn.Module, run: Callable[[], object], repeats: int = 5) -> float:
    """How many times longer a run takes with the meter and module hooks than without either.

    Args:
        model: From ``load``.
        run: Called without arguments; runs the model once.
        repeats: Pairs of runs, in alternation; the ratio of medians is returned.
    """
    plain, watched = [], []
    for _ in range(repeats):
        for times, context in ((plain, model.lowvram.gpu.unmetered()), (watched, watch(model))):
            with context:
                started = time.perf_counter()
                run()
                times.append(time.perf_counter() - started)
    return median(watched) / median(plain)


def _enter(meter: Meter, path: str, opened: list, module: nn.Module, args: tuple) -> None:
    stack = ExitStack()
    stack.enter_context(meter.scope(owner=path))
    opened.append((stack, stack.enter_context(meter.window())))


def _leave(memory: ModuleMemory, opened: list, module: nn.Module, args: tuple, result: object) -> None:
    if not opened:  # always_call hooks run too when entering failed
        return
    stack, window = opened.pop()
    stack.close()
    memory.calls += 1
    memory.peak_bytes = max(memory.peak_bytes, window.peak - window.start)
    memory.kept_bytes += window.end - window.start
