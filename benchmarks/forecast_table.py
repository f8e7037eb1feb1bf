"""The table: forecast against PyTorch's own counters, 120 rows for one card, each in another setting.

Ten models x four formats x three placements; segments, cap and workload change from row to row so that any two settings
meet. Every row is forecast and then run: loaded, prompted, decoded by the chat's decoder (the lean one, as CUDA
graphs), asked again. Widths are kept, but for the layers and the vocabulary; a cap is as tight
for the small model as the stated one is for the real one.

    python benchmarks/forecast_table.py [--only PATTERN] [--output FILE]

Wants CUDA: a card, or the fake CUDA runtime (tests/fakecuda; ``make forecast-table``). The rows of each capability are
kept side by side in one file, which comes with the package: notebook 02 draws it.
"""

import argparse
import fnmatch
import json
import os
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from forecast_accuracy import NOTES, machine, runtime, side_by_side, small_spec
from tqdm import tqdm
from transformers import LlamaConfig, MistralConfig

from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.profile import MemoryProfile, Workload
from lowvram_lab.units import GiB

KEPT = Path(__file__).parents[1] / "data" / "forecast_table.json"
LAYERS = 3
FORMATS = ("fp16", "int8", "int4", "nf4")
PLACEMENTS = ("whole", "split", "travelling")
SEGMENTS = ("default", "expandable")
CAPS_GIB = (2, 4, 6, 8)
STREAM_FROM = 256
PEAKS = (
    "forecast_allocated_bytes",
    "measured_allocated_bytes",
    "forecast_reserved_bytes",
    "measured_reserved_bytes",
)

OTHER_MODELS = {
    # sizes of meta-llama/Llama-3.2-1B and mistralai/Mistral-7B-v0.3, as their config.json on the hub has them
    "llama-3.2-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "mistral-7b-v0.3": MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32768,
        max_position_embeddings=32768,
        sliding_window=None,
    ),
}
MODELS = (
    "smollm2-135m",
    "smollm2-1.7b",
    "qwen1.5-0.5b",
    "qwen1.5-1.8b",
    "qwen1.5-4b",
    "qwen1.5-7b",
    "qwen2.5-3b",
    "qwen3-4b",
    *OTHER_MODELS,
)

WORKLOADS = {
    # a chat grows past several of its decoder's graphs; where layers compute on the CPU, prompts are short, for time
    "whole": {
        "chat": Workload(100, 500, follow_up_tokens=40),
        "document": Workload(3000, 3, follow_up_tokens=200),
        "batch": Workload(700, 4, follow_up_tokens=30, batch_size=4),
    },
    "split": {
        "chat": Workload(60, 5, follow_up_tokens=20),
        "document": Workload(150, 2, follow_up_tokens=20),
        "batch": Workload(40, 2, follow_up_tokens=20, batch_size=3),
    },
    "travelling": {
        "chat": Workload(300, 3, follow_up_tokens=30),
        "document": Workload(3000, 2, follow_up_tokens=260),
        "batch": Workload(400, 2, follow_up_tokens=30, batch_size=2),
    },
}


@dataclass(frozen=True)
class Row:
    """One setting of each kind.

    Attributes:
        model: Name of a packaged config, or of ``OTHER_MODELS``.
        format: Of the weights.
        placement: Of ``PLACEMENTS``.
        segments: Of ``SEGMENTS``.
        cap_gib: What the real model would be capped to.
        workload: A key of ``WORKLOADS``.
    """

    model: str
    format: str
    placement: str
    segments: str
    cap_gib: int
    workload: str

    @property
    def name(self) -> str:
        """The row in one word."""
        return "-".join((*list(asdict(self).values())[:4], f"{self.cap_gib}GiB", self.workload))


def settings(row: dict) -> Row:
    """Which row a result is of."""
    return Row(*(row[key] for key in Row.__dataclass_fields__))


def rows(turn: int = 0) -> list[Row]:
    """The covering design: every model, format and placement together, the other settings such that all pairs occur.

    Args:
        turn: Shifts the other settings, so that another card sees other triples.
    """
    found = []
    for m, model in enumerate(MODELS):
        for f, fmt in enumerate(FORMATS):
            for p, placement in enumerate(PLACEMENTS):
                segments = SEGMENTS[(m + f + p + turn) % 2]
                cap = CAPS_GIB[(m // 2 + f + p + turn) % 4]
                workload = list(WORKLOADS[placement])[(m + 2 * f + p + turn) % 3]
                found.append(Row(model, fmt, placement, segments, cap, workload))
    return found


def prepare(row: Row) -> tuple[ModelSpec, Plan, Workload, GpuBudget, MemoryProfile]:
    """What a row runs: a small model of the real one's widths, and a cap as tight for it; and its forecast.

    Activations do not grow with the number of layers: the real model's peak is its weights and KV cache, and the small
    one's activations.
    """
    other = OTHER_MODELS.get(row.model)
    spec = ModelSpec.from_config(other, row.model) if other else find_source(row.model).spec()
    small, workload = small_spec(spec, LAYERS), WORKLOADS[row.placement][row.workload]
    plan, expandable = _plan(row, small, workload), row.segments == "expandable"
    dry = forecast(plan, workload=workload, expandable_segments=expandable)
    peak, tokens = dry.peak_reserved_bytes, workload.tokens * workload.batch_size
    held, real = (p.weight_bytes("gpu") + p.kv_bytes(tokens, "gpu") for p in (plan, _plan(row, spec, workload)))
    usable = GpuBudget.parse(row.cap_gib * GiB).usable_bytes
    budget = GpuBudget(usable * peak // (peak - held + real))
    if budget.usable_bytes < peak:  # else a limit changes nothing
        dry = forecast(plan, open_gpu(budget), workload=workload, expandable_segments=expandable)
    return small, plan, workload, budget, dry


def _plan(row: Row, spec: ModelSpec, workload: Workload) -> Plan:
    plan = Plan.uniform(spec, row.format, context=workload.tokens)
    layers = spec.num_hidden_layers
    if row.placement == "split":
        return plan.with_gpu_layers((layers + 1) // 2)
    if row.placement == "travelling":
        return replace(plan.with_gpu_layers(layers // 3, disk=layers // 3), stream_from=STREAM_FROM)
    return plan


def run_row(row: Row) -> dict:
    """Forecasts a row, runs it, and puts the two side by side, in few words."""
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{row.segments == 'expandable'}")
    spec, plan, workload, budget, dry = prepare(row)
    found = side_by_side(spec, plan, workload, budget, dry)
    peaks = {name: [phase[key] for key in PEAKS] for name, phase in found["phases"].items()}
    return {
        **asdict(row),
        "cap_bytes": budget.total_bytes,
        "decoder": found["decoder"],
        "phases": peaks,
        "forecast_oom": found["forecast_oom"],
        "measured_oom": found["measured_oom"],
    }


def run_all(chosen: list[Row]) -> list[dict]:
    """Every row; one that fails says so."""
    done = []
    for row in (bar := tqdm(chosen, unit="row", smoothing=0)):
        bar.set_postfix_str(row.name)
        try:
            done.append(run_row(row))
        except Exception as error:  # whatever it is, the other rows still tell something
            traceback.print_exc(file=sys.stderr)
            done.append({**asdict(row), "failed": f"{type(error).__name__}: {error}"})
    return done


def errors(row: dict) -> list[dict]:
    """Of each phase that ended, the forecast's errors in bytes and per cent of what was measured."""
    found = []
    for phase, (dry, real, dry_held, held) in row.get("phases", {}).items():
        allocated, reserved = dry - real, dry_held - held
        found.append(
            {
                "phase": phase,
                "allocated_bytes": allocated,
                "allocated_percent": 100 * allocated / real if real else 0.0,
                "reserved_percent": 100 * reserved / held if held else 0.0,
            }
        )
    return found


def summary(done: list[dict]) -> dict:
    """Worst and median over all phases of all rows, and whether memory ran out where it was forecast to."""
    phases = [error for row in done for error in errors(row)]
    ran = [row for row in done if "failed" not in row]
    return {
        "rows": len(done),
        "failed": len(done) - len(ran),
        "phases": len(phases),
        "decoded_by_graphs": sum("graphs" in row["decoder"] and "decode" in row["phases"] for row in ran),
        "ran_out_of_memory": sum(row["measured_oom"] is not None for row in ran),
        "oom_disagrees": sum(row["forecast_oom"] != row["measured_oom"] for row in ran),
        "median_allocated_bytes": median(abs(error["allocated_bytes"]) for error in phases) if phases else None,
        "worst_allocated_percent": _worst(phases, "allocated_percent"),
        "worst_reserved_percent": _worst(phases, "reserved_percent"),
    }


def what_is_wrong(row: dict) -> str:
    """A line on a row that failed, whose memory ran out elsewhere, or that is a byte off; else nothing."""
    name = settings(row).name
    if "failed" in row:
        return f"{name}: {row['failed'].splitlines()[0]}"
    if row["forecast_oom"] != row["measured_oom"]:
        return f"{name}: out of memory forecast {row['forecast_oom']}, met {row['measured_oom']}"
    off = [error for error in errors(row) if error["allocated_bytes"] or error["reserved_percent"]]
    return f"{name}: {off}" if off else ""


def _worst(phases: list[dict], key: str) -> float | None:
    return round(max((error[key] for error in phases), key=abs), 4) if phases else None


def groups(done: list[dict]) -> list[dict]:
    """The summary of each placement and format."""
    found = {}
    for row in done:
        found.setdefault((row["placement"], row["format"]), []).append(row)
    return [{"placement": place, "format": fmt, **summary(rows)} for (place, fmt), rows in sorted(found.items())]


def keep(done: list[dict], path: Path) -> dict:
    """Writes one card's rows beside the others' in a file, in place of its earlier ones; returns the summary."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cards": {}}
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    earlier = kept["cards"].get(capability, {}).get("rows", [])
    done = list({settings(row): row for row in earlier + done}.values())
    found = summary(done)
    kept |= {
        "benchmark": "forecast_table",
        "scaled": f"Widths are kept; {LAYERS} layers and a small vocabulary. A cap is as tight for the small model's "
        "peak as cap_gib, less the CUDA context, is for the real one's.",
        "phases": PEAKS,
    }
    kept["cards"][capability] = {
        "mode": runtime(),
        "note": NOTES[runtime()],
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "machine": machine(),
        "summary": found,
        "groups": groups(done),
        "rows": done,
    }
    kept["cards"] = dict(sorted(kept["cards"].items(), key=lambda card: float(card[0])))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(one_line_a_row(kept), encoding="utf-8")
    os.replace(temporary, path)
    return found


def one_line_a_row(kept: dict) -> str:
    """JSON whose rows have a line each: two runs can be compared with diff."""
    text, lines = json.dumps({**kept, "cards": {}}, indent=1), []
    for capability, card in kept["cards"].items():
        head = json.dumps({key: value for key, value in card.items() if key != "rows"})
        inside = ",\n".join("  " + json.dumps(row) for row in card["rows"])
        lines.append(f'  {json.dumps(capability)}: {head[:-1]}, "rows": [\n{inside}\n  ]}}')
    joined = ",\n".join(lines)
    return text.replace('"cards": {}', f'"cards": {{\n{joined}\n }}') + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Runs the rows for the card at hand; exit status 1 if one failed or memory ran out elsewhere than forecast."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", metavar="PATTERN", help="only rows whose name matches")
    parser.add_argument("--output", type=Path, default=KEPT, help="where the JSON is kept")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("forecast_table.py: expected CUDA, found none; tests/fakecuda/README.md says how to do without a card")
        return 2
    major, minor = torch.cuda.get_device_capability()
    done = run_all([row for row in rows(10 * major + minor) if fnmatch.fnmatch(row.name, options.only)])
    print(pd.DataFrame(groups(done)).to_string(index=False))
    for row in done:
        if said := what_is_wrong(row):
            print(said)
    found = keep(done, options.output)
    print(f"{runtime()}, capability {major}.{minor}, {time.process_time():.0f} s of processor time: {found}")
    print(f"written to {options.output}")
    return int(bool(found["failed"] or found["oom_disagrees"]))


if __name__ == "__main__":
    sys.exit(main())
