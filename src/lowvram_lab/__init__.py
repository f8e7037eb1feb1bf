"""lowvram_lab: run a language model that does not fit your GPU, and see why it then does.

Public names are loaded when first used: ``import lowvram_lab`` imports neither torch nor transformers.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Plan": "plan",
    "ModelSpec": "spec",
    "find_source": "source",
    "open_gpu": "memory.device",
    "GpuBudget": "memory.budget",
    "forecast": "dry_run",
    "load": "loader",
    "replan": "loader",
    "Workload": "profile",
    "MemoryProfile": "profile",
    "run_workload": "profile",
    "run_speed": "profile",
    "auto_plan": "planner.auto",
    "forecast_speed": "planner.cost",
    "stream_threshold": "planner.cost",
    "tune": "tune",
    "bench": "bench",
    "effects": "effects",
    "export_gguf": "gguf_export",
    "decoder_for": "engine.lean",
    "PreallocatedCache": "engine.preallocated",
    "suggest": "planner.suggest",
    "estimate_sensitivity": "weights.sensitivity",
    "measure_sensitivity": "weights.measured",
    "recipe": "planner.recipe",
    "convert": "convert",
    "max_context": "planner.limits",
    "max_layers_on_gpu": "planner.limits",
    "max_batch": "planner.limits",
    "explain_oom": "explain",
    "watch": "memory.watch",
    "watch_host": "memory.host",
    "LayerSplitPanel": "widgets",
    "ChatSession": "chat",
    "Sampling": "engine.decode",
    "LeanDecoder": "engine.lean",
    "fidelity": "evaluate",
    "load_reference": "evaluate",
    "sample_text": "evaluate",
    "weight_statistics": "weights.distribution",
    "error_curve": "weights.distribution",
    "validate": "report",
    "Limits": "report",
    "LowvramError": "errors",
    "format_bytes": "units",
    "parse_bytes": "units",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
