"""Forecast speed beside measured decoding, by the very decoder that chats: eight plans, several runs.

A run is a process of its own: it measures this machine's rates anew, forecasts eight plans (four formats, splits, two
KV formats, contexts 128 to 2048), then loads each and times its decoding. On a quiet machine:

    python benchmarks/speed_forecast.py --runs 5
    python benchmarks/speed_forecast.py --model qwen1.5-0.5b --random --runs 1    # a shape alone: nothing is fetched

Results go to results/speed_forecast_cpu.json (or _cuda), with the machine, the versions and how steady the rates were.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from forecast_accuracy import RandomCheckpoint

import lowvram_lab as lab
from lowvram_lab.decoding.lean import decoder_for
from lowvram_lab.machine import facts
from lowvram_lab.planner.measure import run_speed
from lowvram_lab.rates.machine import Machine

RESULTS = Path(__file__).parent / "results"
PLANS = (
    # format, layers on the GPU (None: all), KV format, context
    ("bf16", None, None, 128),
    ("int5", None, None, 256),
    ("int8", None, None, 512),
    ("int4", None, None, 1024),
    ("int4", None, "int8", 2048),
    ("int3", 15, None, 1024),
    ("int4", 10, "int4", 512),
    ("bf16", 20, "int8", 2048),
)
NEW_TOKENS = 32
ROUNDS = 3


def one_run(model: str, threads: int, random: bool) -> dict:
    """Forecasts and measures the plans, once."""
    source = lab.find_source(model)
    spec = source.spec()
    checkpoint = RandomCheckpoint(spec) if random else source.checkpoint()
    machine, rows = Machine(anew=True), []
    plans = [_plan(spec, threads, *each) for each in PLANS]
    workloads = [lab.Workload(plan.context // 2, min(NEW_TOKENS, plan.context // 2 - 1)) for plan in plans]
    # all forecasts first: rates are measured in a quiet moment, not between loads
    forecasts = [lab.forecast_speed(plan, each, machine) for plan, each in zip(plans, workloads, strict=True)]
    for plan, workload, forecast in zip(plans, workloads, forecasts, strict=True):
        gpu = lab.open_gpu("4GiB")
        loaded = lab.load(plan, gpu, checkpoint=checkpoint, progress=False)
        decoder = decoder_for(loaded, workload.tokens, progress=False)
        speeds = [run_speed(loaded, workload, decoder) for _ in range(ROUNDS + 1)][1:]
        rows.append(
            {
                "formats": plan.summary(),
                "context": plan.context,
                "engine": decoder.name,
                "forecast_tokens_per_s": forecast.decode_tokens_per_s,
                "measured_tokens_per_s": statistics.median(each.decode_tokens_per_s for each in speeds),
                "forecast_ttft_s": forecast.ttft_s,
                "measured_ttft_s": statistics.median(each.ttft_s for each in speeds),
                "parts_ms": {name: 1e3 * seconds for name, seconds in forecast.parts.items()},
            }
        )
        assert decoder.name == forecast.engine, (decoder.name, forecast.engine)
        del loaded, decoder
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {"rates": machine.circumstances().words(datetime.now(UTC).timestamp()), "rows": rows}


def _plan(spec, threads: int, fmt: str, layers: int | None, kv_format: str | None, context: int) -> lab.Plan:
    plan = lab.Plan.uniform(spec, fmt, context=context)
    plan = replace(plan, threads=threads, kv_format=kv_format or plan.kv_format)
    return plan if layers is None else plan.with_gpu_layers(layers)


def table(run: dict) -> pd.DataFrame:
    """Rows with the differences in per cent."""
    rows = pd.DataFrame(run["rows"])
    for name in ("tokens_per_s", "ttft_s"):
        rows[f"{name}_difference_percent"] = 100 * (rows[f"forecast_{name}"] / rows[f"measured_{name}"] - 1)
    return rows.drop(columns=["parts_ms"])


def main() -> None:
    """Runs each run in a process of its own, prints the tables, keeps the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--random", action="store_true", help="random weights of the model's shape")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where the JSON goes; by default under benchmarks/results/")
    parser.add_argument("--once", action="store_true", help="one run in this process; prints JSON")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(one_run(options.model, options.threads, options.random)))
        return
    command = [sys.executable, __file__, "--once", "--model", options.model, "--threads", str(options.threads)]
    command += ["--random"] if options.random else []
    runs = []
    for number in range(1, options.runs + 1):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        found = table(runs[-1])
        error = found["tokens_per_s_difference_percent"].abs()
        runs[-1]["median_error_percent"] = error.median()
        print(found.round(2).to_string(index=False))
        print(f"run {number}: median error {error.median():.1f} %, worst {error.max():.1f} %; {runs[-1]['rates']}\n")
    medians = [run["median_error_percent"] for run in runs]
    print(f"median error of each run, per cent: {', '.join(f'{value:.1f}' for value in medians)}")
    asked = {"model": options.model, "random_weights": options.random, "threads": options.threads}
    made = {"machine": facts(), "date": datetime.now(UTC).date().isoformat(), **asked, "runs": runs}
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    path = options.output or RESULTS / f"speed_forecast_{kind}.json"
    path.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
