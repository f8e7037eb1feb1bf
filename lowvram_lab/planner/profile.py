"""One workload, run over a model that is real or on meta, and the one dataclass that holds what it took.

``forecast`` runs it dry, ``measure`` runs it for real; both return a ``MemoryProfile``, so the two subtract.
"""

from dataclasses import asdict, dataclass, field

from lowvram_lab.errors import PlanError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.recording import OomEvent, PhaseMemory
from lowvram_lab.memory.timeline import CATEGORIES, Timeline
from lowvram_lab.model.rules import whole_number
from lowvram_lab.units import format_bytes

STAND_IN = "this CPU, standing in for a GPU (simulated)"
"""Where a speed comes from that has no GPU's behind it."""

MOST_ROWS = 10**12
"""Larger batches overflow the 64 bits in which torch counts elements."""


@dataclass(frozen=True)
class Workload:
    """What is run: one prompt, an answer, and perhaps a second turn.

    Attributes:
        prompt_tokens: Tokens prefilled at once.
        new_tokens: Tokens decoded after them.
        follow_up_tokens: Length of a second message; then one more token is decoded. 0 for none.
        batch_size: Prompts at once.
    """

    prompt_tokens: int
    new_tokens: int = 2
    follow_up_tokens: int = 0
    batch_size: int = 1

    def __post_init__(self):
        lowest = {"prompt_tokens": 1, "new_tokens": 0, "follow_up_tokens": 0, "batch_size": 1}
        for name, least in lowest.items():
            whole_number(name, getattr(self, name), least)
        if self.batch_size > MOST_ROWS:
            raise PlanError(f"expected at most {MOST_ROWS:,} sequences (batch_size), found {self.batch_size:,}")
        if self.follow_up_tokens >= self.tokens:
            raise PlanError(
                f"a second turn of {self.follow_up_tokens} tokens is longer than the first of {self.tokens}; shorten it"
            )

    @classmethod
    def full_context(cls, context: int, **changes) -> "Workload":
        """The worst case of a context: all of it prefilled but for the last two tokens, which are decoded.

        Args:
            context: Tokens in all.
            **changes: Any other attribute.
        """
        new_tokens = min(2, context - 1)
        return cls(context - new_tokens, new_tokens, **changes)

    @property
    def tokens(self) -> int:
        """Most tokens of one sequence in the cache; a second turn forgets enough of the first to stay within it."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class MemoryProfile:
    """GPU memory of a plan, phase by phase: forecast or measured.

    Attributes:
        model: Model name.
        origin: ``"forecast"`` or ``"measured"``.
        gpu: On what, in words; says *simulated* where it is.
        engine: The decoder that ran, in words.
        budget: The card, or ``None`` for no limit.
        weights_bytes: Exact bytes of the weights on the GPU, without the allocator's rounding.
        cpu_weights_bytes: The same on the CPU.
        kv_bytes: KV cache on the GPU at the end of the run, in the allocator's blocks.
        phases: In order: load, prefill, perhaps what remembering the prompt takes, decode, perhaps a second turn.
        workload: What was run.
        first_oom: The first allocation that did not fit, or ``None``.
        transferred_bytes: Bytes that crossed between GPU and CPU after loading.
        disk_weights_bytes: Exact bytes of the weights that are mapped from disk.
        remembered_bytes: What prompts that are remembered take of RAM (``Plan.remember_ram``).
        suggestions: What would make it fit, in words.
        timeline: Every allocation in order, if it was asked for.
    """

    model: str
    origin: str
    gpu: str
    budget: GpuBudget | None
    weights_bytes: int
    cpu_weights_bytes: int
    kv_bytes: int
    phases: tuple[PhaseMemory, ...]
    workload: Workload
    first_oom: OomEvent | None = None
    transferred_bytes: int = 0
    disk_weights_bytes: int = 0
    remembered_bytes: int = 0
    suggestions: tuple[str, ...] = field(default=())
    timeline: Timeline | None = field(default=None, repr=False)
    engine: str = ""

    @property
    def peak(self) -> PhaseMemory:
        """The phase with the highest allocated peak."""
        return max(self.phases, key=lambda phase: phase.peak_allocated_bytes)

    @property
    def peak_allocated_bytes(self) -> int:
        """Most bytes live at once, without the CUDA context."""
        return self.peak.peak_allocated_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """Most bytes held by the caching allocator, without the CUDA context."""
        return max(phase.peak_reserved_bytes for phase in self.phases)

    @property
    def device_peak_bytes(self) -> int:
        """What the card must have: context and the allocator's reserved peak."""
        return self.overhead_bytes + self.peak_reserved_bytes

    @property
    def breakdown(self) -> dict[str, int]:
        """``device_peak_bytes`` by category, fragmentation and context among them. Sums to it exactly."""
        worst = max(self.phases, key=lambda phase: phase.peak_reserved_bytes)
        parts = {key: worst.reserved_breakdown.get(key, 0) for key in (*CATEGORIES, "fragmentation")}
        return {**parts, "context": self.overhead_bytes}

    @property
    def activation_bytes(self) -> int:
        """Bytes at the peak that are neither weights nor KV cache."""
        return self.peak.breakdown.get("activations", 0)

    @property
    def overhead_bytes(self) -> int:
        """The CUDA context."""
        return self.budget.context_bytes if self.budget else 0

    @property
    def fits(self) -> bool:
        """Whether every allocation found room: context + what the allocator reserved stay within the card."""
        return self.first_oom is None

    def phase(self, name: str) -> PhaseMemory:
        """The phase called ``name`` (``KeyError`` if it was not run)."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(name)

    def compare(self, other: "MemoryProfile"):
        """This profile beside another of the same workload: peak by phase and the difference. A DataFrame."""
        import pandas as pd

        rows = []
        for mine in self.phases:
            for theirs in (phase for phase in other.phases if phase.name == mine.name):
                a, b = mine.peak_allocated_bytes, theirs.peak_allocated_bytes
                rows.append((mine.name, a, b, a - b, (a - b) / b * 100 if b else float("nan")))
        columns = ["phase", self.origin, other.origin, "difference", "difference_percent"]
        return pd.DataFrame(rows, columns=columns)

    def table(self):
        """Peak of each phase, broken down into weights, KV and activations, in MiB. A DataFrame."""
        import pandas as pd

        rows = [
            {
                "phase": p.name,
                **{key: p.breakdown.get(key, 0) / 2**20 for key in CATEGORIES},
                "peak allocated": p.peak_allocated_bytes / 2**20,
                "peak reserved": p.peak_reserved_bytes / 2**20,
            }
            for p in self.phases
        ]
        return pd.DataFrame(rows).round(1)

    def summary(self) -> str:
        """One line: fits or not, peak against budget, and the first failure."""
        peak, held = format_bytes(self.peak_allocated_bytes), format_bytes(self.peak_reserved_bytes)
        line = f"{self.model}: peak {peak} in {self.peak.name}, {held} reserved"
        if self.budget:
            context = f" + {format_bytes(self.overhead_bytes)} CUDA context" if self.overhead_bytes else ""
            verdict = "fits" if self.fits else "does not fit"
            beyond = "" if self.fits or self.origin == "measured" else " without a limit"
            line += f"{context}{beyond}: {verdict} in {format_bytes(self.budget.total_bytes)}"
        if self.first_oom:
            line += f" (first out of memory in {self.first_oom.phase}, at {self.first_oom.module})"
        return line

    def to_dict(self) -> dict:
        """Plain data for ``--json``; the keys every profile has."""
        oom = self.first_oom
        return {
            "model": self.model,
            "origin": self.origin,
            "gpu": self.gpu,
            "engine": self.engine,
            "fits": self.fits,
            "budget_bytes": self.budget.total_bytes if self.budget else None,
            "weights_bytes": self.weights_bytes,
            "cpu_weights_bytes": self.cpu_weights_bytes,
            "disk_weights_bytes": self.disk_weights_bytes,
            "remembered_bytes": self.remembered_bytes,
            "kv_bytes": self.kv_bytes,
            "activation_bytes": self.activation_bytes,
            "overhead_bytes": self.overhead_bytes,
            "load_peak_bytes": self.phase("load").peak_allocated_bytes,
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "device_peak_bytes": self.device_peak_bytes,
            "breakdown": self.breakdown,
            "phases": {p.name: {k: v for k, v in asdict(p).items() if k != "name"} for p in self.phases},
            "workload": asdict(self.workload),
            "first_oom": oom and {"phase": oom.phase, "module": oom.module, "bytes": oom.requested_bytes},
            "suggestions": list(self.suggestions),
        }

    def _repr_html_(self) -> str:
        return f"<b>{self.origin}</b>, {self.gpu}<br>{self.summary()}" + self.table().to_html(index=False)


@dataclass(frozen=True)
class SpeedProfile:
    """How fast a plan runs: forecast, or measured with no meter beside it.

    Attributes:
        where: What ran it, in words; for the stand-in that it is this machine's CPU.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens decoded.
        ttft_s: Seconds from prompt to first token.
        decode_tokens_per_s: Tokens a second after the first.
        origin: ``"forecast"``, ``"measured"``, or ``"assumed"``: forecast for a machine that nobody measured.
        parts: Seconds per decoded token, keyed by operation (forecasts only).
        engine: The decoder that runs it, in words.
        rates: How old and how steady the rates of a forecast are, in words.
    """

    where: str
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_tokens_per_s: float
    origin: str = "measured"
    parts: dict[str, float] = field(default_factory=dict)
    engine: str = ""
    rates: str = ""

    def compare(self, other: "SpeedProfile"):
        """This profile beside another of the same workload, and the difference in per cent. A DataFrame."""
        import pandas as pd

        rows = [(name, getattr(self, name), getattr(other, name)) for name in ("ttft_s", "decode_tokens_per_s")]
        table = pd.DataFrame(rows, columns=["", self.origin, other.origin])
        return table.assign(difference_percent=(table.iloc[:, 1] / table.iloc[:, 2] - 1) * 100)

    def summary(self) -> str:
        """One line."""
        rate = f"{self.decode_tokens_per_s:{'.1f' if self.decode_tokens_per_s >= 1 else '.2g'}}"
        return (
            f"{rate} tokens/s, first token after {self.ttft_s:.2f} s for a prompt of "
            f"{self.prompt_tokens} tokens ({self.origin}, {self.where}{self._by()})"
        )

    def _by(self) -> str:
        engine = f", by {self.engine}" if self.engine else ""
        return engine + (f"; rates {self.rates}" if "disturbed" in self.rates else "")

    def to_dict(self) -> dict:
        """Plain data."""
        return asdict(self)

    def _repr_html_(self) -> str:
        return f"<b>Speed</b> {self.summary()}"
