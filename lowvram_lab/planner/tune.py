"""tune: measures a few splits and thread counts of one loaded model, beside their forecasts.

Derived in: notebooks/05_split_the_layers.ipynb
"""

import os
from dataclasses import replace

import pandas as pd
from tqdm.auto import tqdm

from lowvram_lab.engine.load import load, replan
from lowvram_lab.engine.loaded import Weights
from lowvram_lab.errors import PlanError
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.measure import run_speed
from lowvram_lab.planner.profile import Workload
from lowvram_lab.planner.speed import forecast_speed
from lowvram_lab.rates.machine import Machine

WORKLOAD = Workload(prompt_tokens=64, new_tokens=24)


def tune(
    plan: Plan,
    gpu: Gpu,
    *,
    gpu_layers: list[int] | None = None,
    threads: list[int] | None = None,
    workload: Workload = WORKLOAD,
    checkpoint: Weights | None = None,
    machine: Machine | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Measures how fast a plan runs with other splits and thread counts.

    The model is loaded once; from split to split only the layers that move are loaded again.

    Args:
        plan: Its formats, KV format and context are kept.
        gpu: Where to load it; splits whose forecast does not fit are left out.
        gpu_layers: Numbers of layers on the GPU; by default none, half, and as many as the plan has.
        threads: Thread counts; by default one and as many as there are cores.
        workload: Prompt and answer of one timing.
        checkpoint: See ``load``.
        machine: See ``forecast_speed``; by default this machine, its rates measured anew.
        progress: Show a progress bar.

    Returns:
        ``gpu_layers``, ``threads``, ``peak_gpu_bytes`` (forecast, reserved), ``ttft_s``, ``tokens_per_s`` (measured),
        ``forecast_tokens_per_s``, ``frontier`` (no other row is faster with as little memory). A DataFrame.

    Raises:
        PlanError: None of the splits fits.
    """
    most = plan.layer_devices().count("gpu")
    splits = sorted(set(gpu_layers if gpu_layers is not None else (0, most // 2, most)))
    counts = sorted(set(threads or (1, os.cpu_count() or 1)))
    fitting = {}
    for count in splits:
        profile = forecast(plan.with_gpu_layers(count), gpu)
        if profile.fits:
            fitting[count] = profile.peak_reserved_bytes
    if not fitting:
        raise PlanError(f"none of {splits} layers on the GPU fits; give a smaller format or fewer layers")
    machine, rows, model = machine or Machine(anew=True), [], None
    plans = [
        replace(plan.with_gpu_layers(layers), threads=count, context=max(plan.context, workload.tokens))
        for layers in fitting
        for count in counts
    ]
    # before loading: rates are measured in memory that the plan may need
    foretold = [forecast_speed(tried, workload, machine).decode_tokens_per_s for tried in plans]
    for tried, expected in tqdm([*zip(plans, foretold, strict=True)], "tune", disable=not progress, leave=False):
        if model is None:
            model = load(tried, gpu, checkpoint=checkpoint, progress=False)
        else:
            replan(model, tried, progress=False)
        run_speed(model, Workload(8, 1))  # the first forward warms up what is made once
        speed = run_speed(model, workload)
        layers = tried.layer_devices().count("gpu")
        rows.append(
            {
                "gpu_layers": layers,
                "threads": tried.threads,
                "peak_gpu_bytes": fitting[layers],
                "ttft_s": speed.ttft_s,
                "tokens_per_s": speed.decode_tokens_per_s,
                "forecast_tokens_per_s": expected,
            }
        )
    table = pd.DataFrame(rows)
    beaten = [
        any(o.tokens_per_s > row.tokens_per_s and o.peak_gpu_bytes <= row.peak_gpu_bytes for o in table.itertuples())
        for row in table.itertuples()
    ]
    return table.assign(frontier=[not b for b in beaten])
