"""What is recorded about a GPU while a model is loaded onto it and run: phases, transfers, the first failure."""

from collections import Counter
from dataclasses import dataclass, field

from lowvram_lab.memory.timeline import Timeline


@dataclass
class PhaseMemory:
    """GPU memory of one phase of a run, in bytes.

    Attributes:
        name: As recorded: ``load``, ``prefill``, ``decode`` and so on.
        peak_allocated_bytes: Most bytes live at once, in 512-byte blocks, without the CUDA context.
        end_allocated_bytes: Bytes live when the phase ended.
        peak_reserved_bytes: Most bytes the caching allocator held (simulated unless CUDA counted them).
        breakdown: Bytes at the moment of the allocated peak by category (weights, kv, activations, workspace). Sums to
            the peak.
        reserved_breakdown: The same at the moment of the reserved peak, with ``fragmentation`` for what was reserved
            and not allocated. Sums to the reserved peak.
        process_bytes: What the driver says the process held at the end, CUDA context included; ``None`` where unknown.
    """

    name: str
    peak_allocated_bytes: int = 0
    end_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    breakdown: dict[str, int] = field(default_factory=dict)
    reserved_breakdown: dict[str, int] = field(default_factory=dict)
    process_bytes: int | None = None


@dataclass
class OomEvent:
    """One allocation that did not fit: who asked for how much, when, and who held the memory.

    CUDA states ``requested_bytes`` only in the text of its error; it is ``None`` then.
    """

    phase: str
    module: str
    requested_bytes: int | None
    allocated_bytes: int
    reserved_bytes: int
    holders: list[tuple[str, int]]


@dataclass(eq=False)
class Recording:
    """All that is recorded about a GPU since a model was loaded onto it; the next model's load begins another.

    Attributes:
        phases: Every phase measured, oldest first; of a loaded model the first is its load.
        transfers: (from, to) → bytes moved.
        first_oom: The first allocation that did not fit, or ``None``.
        timeline: Every allocation from the load to the end of the first ``run_workload``, where that was asked for.
    """

    phases: list[PhaseMemory] = field(default_factory=list)
    transfers: Counter[tuple[str, str]] = field(default_factory=Counter)
    first_oom: OomEvent | None = None
    timeline: Timeline | None = None
