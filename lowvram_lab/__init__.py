"""lowvram_lab: run a language model that does not fit your GPU, and see why it then does.

Public names are loaded when first used: ``import lowvram_lab`` imports neither torch nor transformers.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Plan": "model.plan",
    "ModelSpec": "model.spec",
    "find_source": "model.source",
    "open_gpu": "memory.cuda",
    "GpuBudget": "memory.budget",
    "forecast": "planner.forecast",
    "load": "engine.load",
    "replan": "engine.load",
    "Workload": "planner.profile",
    "MemoryProfile": "planner.profile",
    "run_workload": "planner.measure",
    "run_speed": "planner.measure",
    "auto_plan": "planner.auto",
    "forecast_speed": "planner.speed",
    "stream_threshold": "planner.speed",
    "tune": "planner.tune",
    "bench": "peers.bench",
    "effects": "chat.effects",
    "export_gguf": "weights.gguf_export",
    "decoder_for": "engine.lean",
    "PreallocatedCache": "engine.caches",
    "suggest": "planner.suggest",
    "estimate_sensitivity": "weights.sensitivity",
    "measure_sensitivity": "weights.measured",
    "recipe": "weights.recipe",
    "WeightBudget": "weights.recipe",
    "recipe_for_card": "planner.card_recipe",
    "CardBudget": "planner.card_recipe",
    "convert": "weights.convert",
    "max_context": "planner.search",
    "max_layers_on_gpu": "planner.search",
    "max_batch": "planner.search",
    "explain_oom": "planner.explain",
    "watch": "memory.watch",
    "watch_host": "memory.host",
    "LayerSplitPanel": "faces.panel",
    "ChatSession": "chat.session",
    "Sampling": "engine.sampling",
    "LeanDecoder": "engine.lean",
    "fidelity": "chat.fidelity",
    "load_reference": "chat.fidelity",
    "sample_text": "packaged",
    "weight_statistics": "weights.distribution",
    "error_curve": "weights.distribution",
    "validate": "chat.validation",
    "Limits": "chat.validation",
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
