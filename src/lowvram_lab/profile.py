"""One workload, run over a model that is real or on meta, and the one dataclass that holds what it took.

``dry_run.py`` runs it dry, ``measure`` runs it for real; both return a ``MemoryProfile``, so the two subtract.
"""

import time
from dataclasses import asdict, dataclass, field

import torch

from lowvram_lab.engine.decode import MeteredCache, Sampling, choose, decode_one_token, prefill
from lowvram_lab.memory.device import Gpu, GpuBudget
from lowvram_lab.memory.meter import OomEvent, PhaseMemory
from lowvram_lab.units import format_bytes


@dataclass(frozen=True)
class Workload:
    """What is run: one prompt, then an answer.

    Attributes:
        prompt_tokens: Tokens prefilled at once.
        new_tokens: Tokens decoded after them.
    """

    prompt_tokens: int
    new_tokens: int = 2

    @classmethod
    def full_context(cls, context: int) -> "Workload":
        """The worst case of a context: all of it prefilled but for the last tokens, which are decoded."""
        new_tokens = min(2, context - 1)
        return cls(context - new_tokens, new_tokens)


@dataclass(frozen=True)
class MemoryProfile:
    """GPU memory of a plan, phase by phase: forecast or measured.

    Attributes:
        model: Model name.
        origin: ``"forecast"`` or ``"measured"``.
        gpu: On what, in words; says *simulated* where it is.
        budget: The card, or ``None`` for no limit.
        weights_bytes: Exact bytes of the weights on the GPU, without the allocator's rounding.
        cpu_weights_bytes: The same on the CPU.
        kv_bytes: KV cache on the GPU at the end of the run, in the allocator's blocks.
        phases: load, prefill, decode.
        workload: What was run.
        first_oom: The first allocation that did not fit, or ``None``.
        transferred_bytes: Bytes that crossed between GPU and CPU in prefill and decode.
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
    suggestions: tuple[str, ...] = field(default=())

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
                **{key: p.breakdown.get(key, 0) / 2**20 for key in ("weights", "kv", "activations")},
                "peak allocated": p.peak_allocated_bytes / 2**20,
                "peak reserved": p.peak_reserved_bytes / 2**20,
            }
            for p in self.phases
        ]
        return pd.DataFrame(rows).round(1)

    def summary(self) -> str:
        """One line: fits or not, peak against budget, and the first failure."""
        line = f"{self.model}: peak {format_bytes(self.peak_allocated_bytes)} in {self.peak.name}"
        if self.budget:
            verdict = "fits" if self.fits else "does not fit"
            line += (
                f" + context {format_bytes(self.overhead_bytes)}: {verdict} in {format_bytes(self.budget.total_bytes)}"
            )
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
            "fits": self.fits,
            "budget_bytes": self.budget.total_bytes if self.budget else None,
            "weights_bytes": self.weights_bytes,
            "cpu_weights_bytes": self.cpu_weights_bytes,
            "kv_bytes": self.kv_bytes,
            "activation_bytes": self.activation_bytes,
            "overhead_bytes": self.overhead_bytes,
            "load_peak_bytes": self.phase("load").peak_allocated_bytes,
            "peak_allocated_bytes": self.peak_allocated_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "phases": {p.name: {k: v for k, v in asdict(p).items() if k != "name"} for p in self.phases},
            "workload": asdict(self.workload),
            "first_oom": oom and {"phase": oom.phase, "module": oom.module, "bytes": oom.requested_bytes},
            "suggestions": list(self.suggestions),
        }

    def _repr_html_(self) -> str:
        return f"<b>{self.origin}</b>, {self.gpu}<br>{self.summary()}" + self.table().to_html(index=False)


@torch.no_grad()
def run_workload(model, workload: Workload) -> MemoryProfile:
    """Prefills a prompt of arbitrary tokens and decodes greedily, recording each phase.

    Args:
        model: From ``load``, real or on meta.
        workload: How many tokens.

    Returns:
        The profile; its ``load`` phase is the one that loading the model recorded.
    """
    gpu: Gpu = model.gpu
    load_phase = next(phase for phase in gpu.phases if phase.name == "load")
    before = sum(gpu.transfers.values())
    ids = torch.ones(1, workload.prompt_tokens, dtype=torch.long, device="meta" if gpu.meta else "cpu")
    cache = MeteredCache(gpu)
    with gpu.phase("prefill") as prefilled:
        token = choose(prefill(model, ids, cache), Sampling())
    with gpu.phase("decode") as decoded:
        for _ in range(workload.new_tokens):
            token = choose(decode_one_token(model, token, cache), Sampling())
    return MemoryProfile(
        model=model.plan.model,
        origin="forecast" if gpu.meta else "measured",
        gpu=gpu.name,
        budget=gpu.budget,
        weights_bytes=model.plan.weight_bytes(model.spec, "gpu"),
        cpu_weights_bytes=model.plan.weight_bytes(model.spec, "cpu"),
        kv_bytes=decoded.breakdown.get("kv", 0) if not gpu.simulated else gpu.meter.category_bytes("kv"),
        phases=(load_phase, prefilled, decoded),
        workload=workload,
        first_oom=gpu.meter.first_oom,
        transferred_bytes=sum(gpu.transfers.values()) - before,
    )


@dataclass(frozen=True)
class SpeedProfile:
    """How fast a loaded model ran, with no meter beside it.

    Attributes:
        where: What ran it, in words; for the stand-in that it is this machine's CPU.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens decoded.
        ttft_s: Seconds from prompt to first token.
        decode_tokens_per_s: Tokens a second after the first.
    """

    where: str
    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    decode_tokens_per_s: float

    def to_dict(self) -> dict:
        """Plain data."""
        return asdict(self)


@torch.no_grad()
def run_speed(model, workload: Workload) -> SpeedProfile:
    """Times one prompt and greedy decoding, once, without metering. Timings on a shared machine vary: repeat them.

    Args:
        model: From ``load``, not a dry run.
        workload: How many tokens.
    """
    gpu: Gpu = model.gpu
    ids = torch.ones(1, workload.prompt_tokens, dtype=torch.long)
    with gpu.unmetered():
        cache = MeteredCache(gpu)
        started = time.perf_counter()
        token = choose(prefill(model, ids, cache), Sampling())
        int(token)  # waits for the device
        first = time.perf_counter()
        for _ in range(workload.new_tokens):
            token = choose(decode_one_token(model, token, cache), Sampling())
            int(token)
        ended = time.perf_counter()
    where = "this CPU, standing in for a GPU" if gpu.simulated else gpu.name
    return SpeedProfile(
        where, workload.prompt_tokens, workload.new_tokens, first - started, workload.new_tokens / (ended - first)
    )
