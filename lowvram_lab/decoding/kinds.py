"""Which decoder a plan has on this machine, and why not a faster one. Knows no loaded model: forecasts ask it too.

Derived in: notebooks/06_the_engine.ipynb
"""

from __future__ import annotations

from lowvram_lab.decoding.bind import product_of
from lowvram_lab.decoding.compiling import LEAST_ROOM
from lowvram_lab.decoding.decode import module_decoder_name
from lowvram_lab.engine.layers import quantized_linear
from lowvram_lab.kernels.library import there
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan, compute_place

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of configs whose layers are: norm, attention with rotary positions (q and k perhaps normed), norm,
gated SiLU. Smaller differences (biases, grouped heads, tied head) are read off the modules."""

MODULES, LEAN, COMPILED, GRAPHS = "modules", "lean", "compiled", "graphs"
"""Kinds of decoders, as forecasts and rates name them."""

NAMES = {
    LEAN: "the lean decoder",
    COMPILED: "the lean decoder, compiled",
    GRAPHS: "the lean decoder, as CUDA graphs",
}


def why_not(plan: Plan, kernels: str, max_tokens: int | None = None) -> str:
    """Why a plan cannot be decoded here, in words, or nothing if it can.

    ``kernels`` are those of GPU modules, ``"cuda"`` or ``"cpu"`` for the stand-in; ``max_tokens`` see ``decoder_for``.
    """
    if reason := other_than_llama(plan, max_tokens):
        return reason
    if kernels == "cuda" and not _side_by_side(plan):
        return "its layers on the card do not lie side by side, with the head behind them"
    if plan.kv_format == "int4" and kernels == "cuda" and "gpu" in plan.layer_places():
        return "its KV cache on the card is in int4, which the modules read"
    if plan.kv_format == "int4" and not there():
        return "its KV cache is in int4, which without compiled kernels the modules read"
    return _format_without_kernel(plan, kernels)


def other_than_llama(plan: Plan, max_tokens: int | None = None) -> str:
    """Why a plan cannot be decoded by the lean decoder on any machine, in words, or nothing; see ``why_not``."""
    config = plan.spec.config
    kind, window = config.get("model_type"), config.get("sliding_window")
    if kind not in FAMILIES:
        return f"{kind} is none of {', '.join(FAMILIES)}"
    if config.get("hidden_act") != "silu":
        return f"its activation is {config.get('hidden_act')}, not silu"
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if "dynamic" in rope or rope == "longrope":
        return f"its rotary positions ({rope}) depend on the length"
    slides = kind == "mistral" or "sliding_attention" in (config.get("layer_types") or ())
    if window and slides and (max_tokens or plan.context) > window:
        return f"its attention slides over {window} tokens"
    return ""


def _side_by_side(plan: Plan) -> bool:
    """Whether a card's layers are one graph: one after the other, the head only behind the last; or there are none."""
    places = [*plan.layer_places(), compute_place(plan.modules[plan.spec.head].device)]
    on_card = [index for index, place in enumerate(places) if place == "gpu"]
    return "gpu" not in places[:-1] or on_card[-1] - on_card[0] < len(on_card)


def _format_without_kernel(plan: Plan, kernels: str) -> str:
    cases = {}  # format, shape and kernels → the first module that has them
    for module in plan.spec.modules:
        if module.layer is not None and module.kind == "linear":
            assignment = plan.modules[module.name]
            its_kernels = kernels if compute_place(assignment.device) == "gpu" else "cpu"
            cases.setdefault((get_format(assignment.format), module.weight_shape, its_kernels), module.name)
    for (fmt, (rows, columns), its_kernels), name in cases.items():
        if fmt.kind != "float" and product_of(quantized_linear(columns, rows, fmt, its_kernels)) is None:
            return f"{name.rpartition('.')[2]} is in {fmt.name}, which has no kernel"
    return ""


def engine_of(plan: Plan, kernels: str) -> tuple[str, str]:
    """Which decoder a plan would have on this machine (see ``why_not``): its kind, and its ``Decoder.name``."""
    reason = why_not(plan, kernels)
    if reason:
        return MODULES, module_decoder_name(reason)
    kind = GRAPHS if kernels == "cuda" and "gpu" in plan.layer_places() else off_card(plan)
    return kind, NAMES[kind]


def off_card(plan: Plan) -> str:
    """The kind of lean decoder that runs layers which are not on a CUDA card."""
    return COMPILED if there() and plan.context >= LEAST_ROOM else LEAN
