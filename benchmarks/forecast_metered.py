"""Forecast beside the metered run of the decoder that chats, in bytes: formats, splits and KV formats of two models.

Random weights in the widths of SmolLM2-135M (Llama) and Qwen1.5-0.5B (Qwen2), four layers each. The stand-in's meter
counts; nothing here is CUDA's. A row is a load, a prompt, decoded tokens and a second turn.

    python benchmarks/forecast_metered.py
"""

import itertools
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from transformers import LlamaConfig, Qwen2Config

import lowvram_lab as lab
from lowvram_lab.engine.random_weights import RandomWeights
from lowvram_lab.machine import facts

RESULTS = Path(__file__).parent / "results" / "forecast_metered.json"
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=4,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "qwen2": Qwen2Config(
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_hidden_layers=4,
        vocab_size=32000,
        tie_word_embeddings=False,
    ),
}
FORMATS = ("bf16", "fp32", "int8", "int4", "nf4")
KV_FORMATS = ("as the model", "int8", "int4")
LAYERS_ON_GPU = (4, 2)
WORKLOAD = lab.Workload(300, 8, follow_up_tokens=60)


def row(kind: str, fmt: str, kv_format: str, layers: int) -> dict:
    """One plan: forecast without weights, then loaded and run."""
    spec = lab.ModelSpec.from_config(CONFIGS[kind], kind)
    plan = lab.Plan.uniform(spec, fmt, context=512).with_gpu_layers(layers)
    if kv_format != "as the model":
        plan = replace(plan, kv_format=kv_format)
    gpu = lab.open_gpu("1GiB")
    forecast = lab.forecast(plan, gpu, workload=WORKLOAD)
    model = lab.load(plan, gpu, checkpoint=RandomWeights(spec), progress=False)
    measured = lab.run_workload(model, WORKLOAD)
    table = forecast.compare(measured).set_index("phase")
    assert forecast.engine == measured.engine
    return {
        "model": kind,
        "format": fmt,
        "kv_format": kv_format,
        "layers on the GPU": f"{layers} of 4",
        "engine": measured.engine.partition(" (")[0],
        "peak_bytes": measured.peak_allocated_bytes,
        **{f"{phase} difference": int(table["difference"][phase]) for phase in table.index},
        "crossing difference": forecast.transferred_bytes - measured.transferred_bytes,
    }


def main() -> None:
    """Prints the table and keeps it."""
    cases = itertools.product(CONFIGS, FORMATS, KV_FORMATS, LAYERS_ON_GPU)
    rows = pd.DataFrame([row(*case) for case in cases])
    print(rows.to_string(index=False))
    differences = rows[[name for name in rows.columns if name.endswith("difference")]]
    worst = int(differences.abs().to_numpy().max())
    print(f"{len(rows)} plans, largest difference of any phase: {worst} bytes (stand-in, simulated)")
    made = {"machine": facts(), "date": datetime.now(UTC).date().isoformat(), "rows": rows.to_dict("records")}
    RESULTS.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
