"""Forecast against measured GPU memory, case by case, for random weights in the shapes of real models.

On CUDA the measured side is PyTorch's own counters (``max_memory_allocated``, ``max_memory_reserved``), capped to the
case's budget for real; on the fake CUDA runtime (``make fake-cuda``) as well, and the results name it. Without CUDA the
same cases run small on the simulated stand-in: that checks that replay and run agree, not that CUDA would; the results
say so.

    python benchmarks/forecast_accuracy.py [--small] [--only PATTERN] [--deadline SECONDS] [--output FILE]
"""

import argparse
import fnmatch
import functools
import gc
import json
import os
import platform
import sys
import time
import traceback
import zlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig

from lowvram_lab.engine.load import load
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.gpu import StandInGpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import MemoryProfile, Workload
from lowvram_lab.units import GiB, format_bytes

RESULTS = Path(__file__).parent / "results"
DEADLINE_S = 540  # cases not begun by then are reported as not run: the whole stays below ten minutes
SMALL_LAYERS, SMALL_VOCABULARY, SMALL_CONTEXT = 4, 8192, 16
PACKAGES = ("lowvram-lab", "torch", "transformers", "accelerate", "bitsandbytes", "safetensors")


@dataclass(frozen=True)
class Case:
    """One plan and workload.

    Attributes:
        model: Name of a packaged config.
        recipe: Format of the weights.
        context: Tokens, all prefilled but for the last two.
        batch_size: Prompts at once.
        cpu_share: Share of the decoder layers on the CPU.
        budget_gib: The card, or ``None`` for all of it.
    """

    model: str
    recipe: str
    context: int
    batch_size: int = 1
    cpu_share: float = 0.0
    budget_gib: int | None = None

    @property
    def name(self) -> str:
        """The case in one word."""
        split = f"-split{self.cpu_share:.0%}" if self.cpu_share else ""
        cap = f"-{self.budget_gib}GiB" if self.budget_gib else ""
        return f"{self.model}-{self.recipe}-{self.context}x{self.batch_size}{split}{cap}"


CASES = (
    Case("smollm2-135m", "fp16", 8192, 4),
    Case("smollm2-135m", "int8", 2048, 4, 0.5),
    Case("smollm2-135m", "int4", 2048, 4, budget_gib=4),
    Case("qwen1.5-0.5b", "fp16", 512),
    Case("qwen1.5-0.5b", "fp16", 2048, 4, budget_gib=4),
    Case("qwen1.5-0.5b", "int8", 4096, budget_gib=4),
    Case("qwen1.5-0.5b", "nf4", 8192, budget_gib=4),
    Case("smollm2-1.7b", "int8", 2048, budget_gib=4),
    Case("smollm2-1.7b", "int4", 8192, 1),
    Case("qwen2.5-3b", "fp16", 512, budget_gib=4),  # out of memory while loading
    Case("qwen2.5-3b", "int4", 4096, budget_gib=4),
    Case("qwen2.5-3b", "nf4", 2048, 1, 0.25, budget_gib=4),
    Case("qwen1.5-4b", "fp16", 1024, 1, 0.25),
    Case("qwen1.5-4b", "int4", 1024, budget_gib=4),
    Case("qwen1.5-4b", "int4", 2048, 1, 0.2, budget_gib=4),
    Case("qwen1.5-4b", "int4", 4096, budget_gib=4),  # out of memory in prefill: the KV cache
)


class RandomCheckpoint:
    """Seeded random weights in a model's shapes, each made when it is read and gone with it.

    One block of random numbers is repeated from a place that depends on the name: drawing billions would take minutes.
    """

    BLOCK = 1 << 22

    def __init__(self, spec: ModelSpec):
        self._shapes = {f"{m.name}.{key}": tuple(shape) for m in spec.modules for key, shape in m.parameters.items()}
        self._twice = _random_block(self.BLOCK).repeat(2)

    def __contains__(self, name):
        return name in self._shapes

    def shape(self, name):
        return self._shapes[name]

    def read(self, name):
        shape = self._shapes[name]
        noise, start = torch.empty(shape, dtype=torch.bfloat16), zlib.crc32(name.encode()) % self.BLOCK
        for piece in noise.view(-1).split(self.BLOCK):
            piece.copy_(self._twice[start : start + piece.numel()])
        return noise.add_(1) if "norm" in name else noise


@functools.cache
def _random_block(count: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)


def small_spec(spec: ModelSpec, layers: int = SMALL_LAYERS) -> ModelSpec:
    """The same widths (hidden, heads, feed-forward) with few layers and a small vocabulary."""
    values = {key: value for key, value in spec.config.items() if key not in ("layer_types", "transformers_version")}
    values |= {"num_hidden_layers": layers, "vocab_size": SMALL_VOCABULARY}
    values |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return ModelSpec.from_config(AutoConfig.for_model(values.pop("model_type"), **values), f"small-{spec.name}")


def prepare(case: Case, small: bool) -> tuple[ModelSpec, Plan, Workload, GpuBudget | None]:
    """What a case runs. Small, its cap is as tight for its peak as the real one is for the real model's."""
    spec = find_source(case.model).spec()
    budget = GpuBudget.parse(case.budget_gib * GiB) if case.budget_gib else None
    plan, workload = _plan(case, spec, case.context)
    if not small:
        return spec, plan, workload, budget
    little = small_spec(spec)
    small_plan, small_workload = _plan(case, little, max(case.context // SMALL_CONTEXT, 16))
    if budget:
        peak = forecast(plan, StandInGpu(None), workload=workload).peak_reserved_bytes
        small_peak = forecast(small_plan, StandInGpu(None), workload=small_workload).peak_reserved_bytes
        budget = GpuBudget(budget.usable_bytes * small_peak // peak)
    return little, small_plan, small_workload, budget


def _plan(case: Case, spec: ModelSpec, context: int) -> tuple[Plan, Workload]:
    on_cpu = max(1, round(spec.num_hidden_layers * case.cpu_share)) if case.cpu_share else 0
    # The CPU has no fast fp16 product: where layers compute there, 16 bits are bf16 (the same bytes).
    recipe = "bf16" if case.recipe == "fp16" and (on_cpu or not torch.cuda.is_available()) else case.recipe
    plan = Plan.uniform(spec, recipe, context=context).with_gpu_layers(spec.num_hidden_layers - on_cpu)
    return plan, Workload.full_context(context, batch_size=case.batch_size)


def run_case(case: Case, small: bool) -> dict:
    """Forecasts a case, runs it, and puts the two side by side."""
    spec, plan, workload, budget = prepare(case, small)
    started = time.perf_counter()
    found = side_by_side(spec, plan, workload, budget)
    return {
        "name": case.name,
        "case": asdict(case),
        "run": plan.summary(),
        "workload": asdict(workload),
        "budget_bytes": budget.total_bytes if budget else None,
        **found,
        "worst_allocated_percent": worst(found["phases"], "allocated_percent"),
        "worst_reserved_percent": worst(found["phases"], "reserved_percent"),
        "seconds": round(time.perf_counter() - started, 1),
    }


def side_by_side(
    spec: ModelSpec, plan: Plan, workload: Workload, budget: GpuBudget | None, dry: MemoryProfile | None = None
) -> dict:
    """A plan's forecast and its run: the peaks of each phase that ended, where memory ran out, and who decoded.

    ``dry`` is the forecast, where it was made before.
    """
    clean()
    gpu = open_gpu(budget)
    dry = dry or forecast(plan, gpu, workload=workload)
    oom, decoder = None, None
    try:
        profile = run_workload(load(plan, gpu, checkpoint=RandomCheckpoint(spec), progress=False), workload)
        measured, decoder = profile.phases, profile.engine
    except torch.OutOfMemoryError as error:
        event = error.lowvram.event if hasattr(error, "lowvram") else None
        oom = {"phase": event.phase, "module": event.module} if event else {"phase": None, "module": None}
        measured = [phase for phase in gpu.recording.phases if phase.name != oom["phase"]]
    expected = dry.first_oom and {"phase": dry.first_oom.phase, "module": dry.first_oom.module}
    return {
        "decoder": decoder or dry.engine,
        "phases": {phase.name: _errors(dry.phase(phase.name), phase) for phase in measured},
        "forecast_oom": expected,
        "measured_oom": oom,
        "oom_agrees": expected == oom,
    }


def _errors(mine, theirs) -> dict:
    a, b = mine.peak_allocated_bytes, theirs.peak_allocated_bytes
    c, d = mine.peak_reserved_bytes, theirs.peak_reserved_bytes
    return {
        "forecast_allocated_bytes": a,
        "measured_allocated_bytes": b,
        "allocated_percent": round((a - b) / b * 100, 3) if b else 0.0,
        "forecast_reserved_bytes": c,
        "measured_reserved_bytes": d,
        "reserved_percent": round((c - d) / d * 100, 3) if d else 0.0,
    }


def phase_bytes(phase) -> dict[str, int]:
    """Peaks and end of a phase."""
    names = ("peak_allocated_bytes", "end_allocated_bytes", "peak_reserved_bytes")
    return {name: getattr(phase, name) for name in names}


def worst(phases: dict, key: str) -> float | None:
    """The largest error of any phase, with its sign."""
    return max((phase[key] for phase in phases.values()), key=abs, default=None)


def clean() -> None:
    """Frees the last case, cuBLAS' workspace included: the forecast begins before the first product."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_all(cases, small: bool, deadline_s: float = DEADLINE_S) -> list[dict]:
    """Every case; one that fails is a row that says so."""
    started, rows = time.perf_counter(), []
    for case in cases:
        if time.perf_counter() - started > deadline_s:
            rows.append({"name": case.name, "case": asdict(case), "failed": "not run: out of time"})
        else:
            try:
                rows.append(run_case(case, small))
            except Exception as error:  # whatever it is, the other cases still tell something
                traceback.print_exc(file=sys.stderr)
                rows.append({"name": case.name, "case": asdict(case), "failed": f"{type(error).__name__}: {error}"})
        print(row_text(rows[-1]), flush=True)
    return rows


def row_text(row: dict) -> str:
    """A line of the table."""
    if "failed" in row:
        return f"{row['name']:42} FAILED {row['failed'].splitlines()[0][:70]}"
    peak = max((phase["measured_allocated_bytes"] for phase in row["phases"].values()), default=None)
    if row["forecast_oom"] or row["measured_oom"]:
        where = [(row[key] or {}).get("phase", "none") for key in ("forecast_oom", "measured_oom")]
        verdict = f"OOM forecast in {where[0]}, met in {where[1]}"
    else:
        verdict = "fits in both"
    errors = [row["worst_allocated_percent"], row["worst_reserved_percent"]]
    shown = " ".join(f"{error:+9.2f} %" if error is not None else f"{'–':>11}" for error in errors)
    return f"{row['name']:42} {format_bytes(peak) if peak else '–':>11} {shown}  {verdict} ({row['seconds']} s)"


def runtime() -> str:
    """Where the measured side runs: a card, the fake CUDA runtime of ``tests/fakecuda``, or the stand-in."""
    if not torch.cuda.is_available():
        return "stand-in (simulated)"
    return "fake CUDA" if torch.cuda.get_device_name().startswith("fake CUDA") else "cuda"


NOTES = {
    "cuda": "Measured with CUDA's own counters.",
    "fake CUDA": "No card: measured with the counters of PyTorch's real CUDA build on the fake CUDA runtime of "
    "tests/fakecuda, which runs no kernels. What NVIDIA's libraries allocate by themselves is not in it.",
    "stand-in (simulated)": "CUDA was not measured: this machine has none. Both sides are this library's: the forecast "
    "on meta, and a real run in RAM metered by the same rules; fp16 cases ran in bf16. Equal figures show that the "
    "replay is faithful, not what CUDA's kernels and allocator add.",
}


def report(rows: list[dict], small: bool) -> dict:
    """The results with all that is needed to read them later."""
    scaled = (
        f"Cases are scaled down: widths kept, {SMALL_LAYERS} layers, a vocabulary of {SMALL_VOCABULARY}, context "
        f"divided by {SMALL_CONTEXT}, the cap as tight for the small peak as 4 GiB is for the real one. "
    )
    done = [row for row in rows if "failed" not in row]
    return {
        "benchmark": "forecast_accuracy",
        "mode": runtime(),
        "small": small,
        "note": (scaled if small else "") + NOTES[runtime()],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "summary": {
            "cases": len(rows),
            "failed": len(rows) - len(done),
            "oom_disagrees": sum(not row["oom_agrees"] for row in done),
            "worst_allocated_percent": max((abs(row["worst_allocated_percent"] or 0) for row in done), default=None),
            "worst_reserved_percent": max((abs(row["worst_reserved_percent"] or 0) for row in done), default=None),
        },
        "cases": rows,
    }


def machine() -> dict:
    """What it ran on."""
    facts = {
        "system": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        "gpu": None,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        facts |= {"gpu": torch.cuda.get_device_name(), "gpu_bytes": total, "gpu_free_bytes": free}
        facts |= {"compute_capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda}
    return facts


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def main(arguments: list[str] | None = None) -> int:
    """Runs the cases, prints the table, writes the JSON; exit status 1 if a case failed or an OOM was misplaced."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="few layers and short contexts; implied without CUDA")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only cases whose name matches")
    parser.add_argument("--output", type=Path, help="where the JSON goes; by default under benchmarks/results/")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds after which no case is begun")
    options = parser.parse_args(arguments)
    small = options.small or not torch.cuda.is_available()
    cases = [case for case in CASES if fnmatch.fnmatch(case.name, options.only)]
    print(f"{'case':42} {'peak':>11} {'allocated':>11} {'reserved':>11}  (forecast - measured, worst phase)")
    results = report(run_all(cases, small, options.deadline), small)
    kind = {"cuda": "cuda", "fake CUDA": "fake_cuda"}.get(results["mode"], "cpu")
    path = options.output or RESULTS / f"forecast_accuracy_{kind}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    summary = results["summary"]
    print(f"{results['mode']}: {summary}\n{results['note']}\nwritten to {path}")
    return 1 if summary["failed"] or summary["oom_disagrees"] else 0


if __name__ == "__main__":
    sys.exit(main())
