"""Out of memory in words: who asked for how much, what was free, and who held the rest."""

from collections import Counter

from lowvram_lab.memory.meter import OomEvent
from lowvram_lab.units import format_bytes


def oom_message(event: OomEvent, budget) -> str:
    """An out-of-memory message in CUDA's order of facts, plus what CUDA leaves out: who asked, who held.

    Args:
        event: The allocation that did not fit.
        budget: The card's ``GpuBudget``.
    """
    free = max(0, budget.usable_bytes - event.reserved_bytes)
    context = f", {format_bytes(budget.context_bytes)} of it the CUDA context" if budget.context_bytes else ""
    return (
        f"simulated GPU out of memory. Tried to allocate {format_bytes(event.requested_bytes)} for "
        f"{event.module or 'the model'} during {event.phase}. The GPU has a total capacity of "
        f"{format_bytes(budget.total_bytes)}{context}, of which {format_bytes(free)} is free. "
        f"{format_bytes(event.allocated_bytes)} is allocated by tensors and "
        f"{format_bytes(event.reserved_bytes - event.allocated_bytes)} is reserved but unallocated. "
        f"Held by: {describe_holders(event.holders)}."
    )


def describe_holders(holders: list[tuple[str, int]], top: int = 4) -> str:
    """Holders in one line, decoder layers joined: ``model.layers.0-21 (137.0 MiB), model.embed_tokens (54.0 MiB)``."""
    totals, layers = Counter(), {}
    for owner, size in holders:
        parts = owner.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        key = ".".join(parts[:index]) if index is not None else owner or "other"
        totals[key] += size
        if index is not None:
            layers.setdefault(key, set()).add(int(parts[index]))
    named = []
    for key, size in totals.most_common(top):
        span = layers.get(key)
        label = f"{key}.{min(span)}-{max(span)}" if span and len(span) > 1 else key + (f".{min(span)}" if span else "")
        named.append(f"{label} ({format_bytes(size)})")
    return ", ".join(named) or "nothing"
