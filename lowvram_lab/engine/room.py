"""Refuse a load that RAM or disk cannot take, before it begins: a process that the system ends cannot say why."""

import shutil
from collections.abc import Iterable

import psutil

from lowvram_lab.errors import BudgetError, CheckpointError
from lowvram_lab.memory.disk import scratch_folder
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.host_bytes import in_flight_bytes, weights_in_ram
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModuleSpec
from lowvram_lab.units import format_bytes


def check_room_on_disk(size_bytes: int) -> None:
    """Refuses, by a ``CheckpointError``, what the disk of the cache folder has no room for."""
    if not size_bytes:
        return
    folder = scratch_folder()
    free = shutil.disk_usage(folder).free
    if size_bytes > free:
        raise CheckpointError(
            f"{folder}: the layers on disk take {format_bytes(size_bytes)}, found {format_bytes(free)} free; set "
            "LOWVRAM_CACHE to a folder on a larger disk, or plan fewer of them"
        )


def check_room_in_ram(plan: Plan, gpu: Gpu, modules: Iterable[ModuleSpec], loaded: Plan | None = None) -> None:
    """Refuses a load that the host's free memory cannot take.

    Args:
        plan: What is to be loaded.
        gpu: Where it goes; the stand-in lies in RAM too.
        modules: Those that really are loaded, of the spec's.
        loaded: The plan that is there already, and whose weights make room.

    Raises:
        BudgetError: Says what it takes and what is free.
    """
    needed = weights_in_ram(plan, gpu.simulated) + in_flight_bytes(modules)
    needed -= weights_in_ram(loaded, gpu.simulated) if loaded else 0
    if needed > (free := psutil.virtual_memory().available):
        helps = "a smaller format, layers on disk" + ("" if gpu.simulated else ", more layers on the GPU")
        raise BudgetError(
            f"loading this takes {format_bytes(needed)} of RAM, found {format_bytes(free)} free; choose {helps}"
        )
