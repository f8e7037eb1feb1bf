"""lowvram_lab: run a language model that does not fit your GPU, and see why it then does.

Public names are loaded when first used: ``import lowvram_lab`` imports neither torch nor transformers.
"""

import importlib

__version__ = "0.1.0"

# A name must not be that of a folder or file beside this one: whoever imports the module would put it in the name's
# place. Grouped by the notebook that is about them.
_PUBLIC = {
    # everywhere
    "LowvramError": "errors",
    "format_bytes": "units",
    "parse_bytes": "units",
    "check": "faces.exercises",
    # 01 analyze the OOM: the model on paper, the forecast
    "find_source": "model.source",
    "read_marker": "files",
    "ModelSpec": "model.spec",
    "Plan": "model.plan",
    "get_format": "model.formats",
    "GROUP_SIZES": "model.formats",
    "GpuBudget": "memory.budget",
    "Workload": "planner.profile",
    "MemoryProfile": "planner.profile",
    "forecast": "planner.forecast",
    "explain_oom": "planner.explain",
    "suggest": "planner.suggest",
    "max_context": "planner.search",
    "max_layers_on_gpu": "planner.search",
    "plot_weight_bytes": "faces.plot_memory",
    "plot_kv": "faces.plot_memory",
    "plot_profiles": "faces.plot_memory",
    "plot_breakdown": "faces.plot_memory",
    "plot_timeline": "faces.plot_memory",
    "plot_phases": "faces.plot_memory",
    "plot_comparison": "faces.plot_memory",
    # 02 watch memory
    "open_gpu": "memory.cuda",
    "watch": "memory.watch",
    "measure_overhead": "memory.watch",
    "watch_host": "memory.host",
    "Timeline": "memory.timeline",
    "CachingAllocator": "memory.allocator",
    "ExpandableAllocator": "memory.expandable",
    "OutOfCapacity": "memory.allocator",
    "forecast_table": "packaged",
    "forecast_load_bytes": "model.host_bytes",
    "run_workload": "planner.measure",
    # 03 know your weights
    "weight_statistics": "weights.distribution",
    "error_curve": "weights.distribution",
    "round_to_nearest": "weights.solvers",
    "search_clip": "weights.solvers",
    "plot_histograms": "faces.plot_weights",
    "plot_outliers": "faces.plot_weights",
    "plot_error_curves": "faces.plot_weights",
    "pooled_errors": "faces.plot_weights",
    # 04 compress
    "calibration_text": "packaged",
    "calibration_windows": "weights.calibration",
    "LayerByLayer": "weights.layerwise",
    "captured_inputs": "weights.moments",
    "half_quadratic": "weights.solvers",
    "gptq": "weights.gptq",
    "estimate_sensitivity": "weights.sensitivity",
    "measure_sensitivity": "weights.measured",
    "Option": "weights.allocate",
    "lower_hull": "weights.allocate",
    "recipe": "weights.recipe",
    "recipe_for_card": "planner.card_recipe",
    "WeightBudget": "weights.recipe",
    "CardBudget": "planner.card_recipe",
    "convert": "conversion.convert",
    "export_gguf": "conversion.gguf_export",
    "slim_vocabulary": "slimming.slim",
    "Slimmed": "slimming.slim",
    "slim_layers": "slimming.slim_layers",
    "SlimmedLayers": "slimming.slim_layers",
    "choose_layers": "slimming.choice",
    "LayerChoice": "slimming.choice",
    "layer_influence": "slimming.influence",
    "Influence": "slimming.influence",
    "frontier": "evaluation.frontier",
    "plot_frontier": "faces.plot_chat",
    # 05 split the layers
    "auto_plan": "planner.auto",
    "load": "engine.load",
    "replan": "engine.load",
    "tune": "planner.tune",
    "run_speed": "planner.measure",
    "forecast_speed": "planner.speed",
    "stream_threshold": "planner.speed",
    "Machine": "rates.machine",
    "KernelRates": "rates.figures",
    "ProductRates": "rates.figures",
    "PromptRates": "rates.figures",
    "RowsRates": "rates.figures",
    "TokenRates": "rates.figures",
    "AttentionRates": "rates.figures",
    "LinkRates": "rates.figures",
    "LayerSplitPanel": "faces.panel",
    "trials_table": "faces.split",
    # 06 the engine
    "decoder_for": "decoding.lean",
    "LeanDecoder": "decoding.lean",
    "ModuleDecoder": "decoding.decode",
    "PreallocatedCache": "engine.kv_cache",
    "prefill": "decoding.decode",
    "generate": "decoding.decode",
    "llama_layer": "decoding.llama_layer",
    "bind_layer": "decoding.bind",
    "fuse": "engine.fuse",
    "compiler": "kernels.compiler",
    "open_libraries": "decoding.compiled",
    "Library": "decoding.compiling",
    # 07 measure everything
    "bench": "peers.bench",
    "BenchSettings": "peers.bench",
    "ENGINES": "peers.others",
    "Task": "peers.engines",
    "Question": "peers.engines",
    "gguf_file": "peers.gguf_file",
    "effects": "evaluation.effects",
    "Effect": "evaluation.effect_report",
    "CLAIMS": "evaluation.effect_report",
    "VERDICTS": "evaluation.effect_report",
    # 08 precision on demand
    "NestedLinear": "engine.nested",
    "speculate": "decoding.speculate",
    "Drafting": "decoding.speculate",
    "Pace": "decoding.speculate",
    "expected_tokens": "decoding.speculate",
    "escalate": "decoding.escalate",
    "Margins": "decoding.escalate",
    "margins_of": "chat.margins",
    "tasks": "chat.tasks",
    "task_table": "chat.tasks",
    "forecast_speculation": "planner.speculation",
    "plane_bytes": "planner.planes",
    "Decision": "decoding.decision",
    "token_html": "chat.provenance",
    "PrecisionPanel": "faces.precision_panel",
    "plot_margins": "faces.plot_planes",
    "plot_speculation": "faces.plot_planes",
    "plot_planes": "faces.plot_planes",
    # 09 validated chat
    "ChatSession": "chat.session",
    "CompletionSession": "chat.completion",
    "Sampling": "sampling",
    "fidelity": "evaluation.fidelity",
    "load_reference": "evaluation.fidelity",
    "repetition": "evaluation.fidelity",
    "battery": "evaluation.battery",
    "battery_items": "evaluation.battery",
    "Battery": "evaluation.battery_report",
    "Item": "evaluation.battery_report",
    "sample_text": "packaged",
    "validate": "evaluation.validation",
    "Limits": "evaluation.validation",
    "plot_turns": "faces.plot_chat",
    "plot_fidelity": "faces.plot_chat",
    # 10 remember
    "Remember": "prefixes.store",
    "Remembered": "prefixes.store",
    "warm": "chat.dialogues",
    "read_dialogues": "chat.dialogues",
    "root_of": "prefixes.keys",
    "chain": "prefixes.keys",
    "find_drift": "chat.drift",
    "Seen": "chat.drift",
    "first_token_table": "chat.first_token",
    "break_even": "chat.first_token",
    "plot_first_token": "faces.plot_prefixes",
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
