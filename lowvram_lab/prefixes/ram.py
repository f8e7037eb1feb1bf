"""Remembered blocks in RAM: as many slots as the plan gives, taken at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import psutil
import torch

from lowvram_lab.engine.kv_cache import PreallocatedCache
from lowvram_lab.engine.loaded import loaded
from lowvram_lab.errors import BudgetError
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.rules import BLOCK_TOKENS
from lowvram_lab.prefixes.layout import Layout
from lowvram_lab.prefixes.worth import Worth
from lowvram_lab.units import format_bytes

OWNER = "remembered prompts"
"""What the meter calls them."""


class Slots:
    """Blocks in RAM.

    Args:
        gpu: Whose meter counts them, on the CPU.
        layout: Of a block.
        size: Bytes, a whole number of blocks.

    Raises:
        BudgetError: There is less RAM.
    """

    def __init__(self, gpu: Gpu, layout: Layout, size: int):
        self._layout = layout
        free = psutil.virtual_memory().available
        if size > free and not gpu.meta:
            raise BudgetError(
                f"remembering prompts in RAM takes {format_bytes(size)}, found {format_bytes(free)} free; give less "
                "(remember_ram)"
            )
        with gpu.active(), gpu.meter.scope(owner=OWNER, category="kv"):
            self._room = gpu.zeros((size // layout.size, layout.size), torch.uint8, "cpu")
        self._free = list(range(len(self._room)))
        self._at: dict[str, int] = {}
        self._parents: dict[str, str] = {}
        self._seconds: dict[str, float] = {}
        self._worth = Worth()

    def __contains__(self, name: str) -> bool:
        return name in self._at

    def __len__(self) -> int:
        return len(self._at)

    def seconds(self, name: str) -> float:
        """What a block that is there saves."""
        return self._seconds.get(name, 0.0)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a block that is there."""
        return self._layout.views(self._room[self._at[name]])

    def put(self, name: str, parent: str, kept: Collection[str], fill: Callable[[dict], None]) -> bool:
        """Keeps a block, where what must stay leaves room; whether it is there now.

        Args:
            name: The block's.
            parent: Name of the one before it; empty for the first.
            kept: Names of blocks that are not to make room.
            fill: Writes its tensors, which it is given.
        """
        if name in self:
            return True
        if not self._free:
            least = self._worth.least(self._parents, kept)
            if least is None:
                return False
            self._worth.given_up(least)
            self._parents.pop(least)
            self._seconds.pop(least, None)
            self._free.append(self._at.pop(least))
        slot = self._free.pop()
        try:
            fill(self._layout.views(self._room[slot]))
        except BaseException:  # Ctrl-C too
            self._free.append(slot)
            raise
        self._at[name], self._parents[name] = slot, parent  # only now: whatever stops it before leaves no half of it
        return True

    def used(self, found: Mapping[str, float]) -> None:
        """See ``Folder``."""
        for name, seconds in found.items():
            if name in self:
                self._seconds[name] = seconds
                self._worth.used(name, seconds, self._layout.size)


class Rehearsal:
    """What remembering takes, in a workload that is measured or forecast: no file is written, no text is kept.

    Args:
        model: From ``load``, real or a dry run.
        cache: Of the model.
    """

    def __init__(self, model: torch.nn.Module, cache: PreallocatedCache):
        state = loaded(model)
        self._gpu, self._cache, self._layout = state.gpu, cache, Layout.of(cache)
        self._slots = Slots(self._gpu, self._layout, state.plan.remembered_ram_bytes)

    def run(self) -> None:
        """Takes each whole block out of the cache, and puts it back."""
        with self._gpu.active(), self._gpu.meter.scope(owner=OWNER, category="kv"):
            block = self._layout.views(self._gpu.zeros((self._layout.size,), torch.uint8, "cpu"))
            for start in range(0, self._cache.get_seq_length() // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS):
                self._layout.take(self._cache, start, block, self._gpu)
                self._layout.put(block, self._cache, start, self._gpu)
