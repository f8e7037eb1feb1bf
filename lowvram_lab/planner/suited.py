"""What suits a card: which recipes have kernels there, and which 16 bits take and cost less.

Before capability 8.0 (T4, RTX 20, GTX 16) there are no bf16 units, no fused attention for bf16, and no int4 kernel.
"""

from lowvram_lab.errors import PlanError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.moves import FORMAT_LOSS
from lowvram_lab.units import format_bytes

RECIPES = ("bf16", "int8", "int4")
"""From the most precise. nf4 runs well on CUDA only, and leaves both ends in 16 bits: ask for it by name."""

QUICK = ("int6", "int5", "int3")
"""Tried as well for ``prefer="speed"``. Not int2: SmolLM2-135M in it, rounded to nearest, has a KL of 7.4 nats, and all
tokens taken as equally likely have one of 8.1. Ask for it by name."""

PROMPT = 2048
"""Tokens that bf16 and fp16 are compared over, where no context is stated: longer ones differ more, not otherwise."""


def smaller_recipes(gpu: GpuBudget | Gpu) -> tuple[str, ...]:
    """``RECIPES`` below 16 bits; on a card without int4's kernel the smallest is nf4."""
    return ("int8", "int4" if _has_all(gpu) or gpu.card.multiplies_int4 else "nf4")


def quick_recipes(recipes: tuple[str, ...]) -> tuple[str, ...]:
    """Recipes with ``QUICK`` among them, the most precise first by ``moves.FORMAT_LOSS``."""
    return tuple(sorted((*recipes, *QUICK), key=lambda name: FORMAT_LOSS.get(name, 0.0)))


def not_above_held(spec: ModelSpec, recipes: tuple[str, ...], *, fidelity: bool = False) -> tuple[str, ...]:
    """Recipes for a model whose files hold codes: these as they are, then those that take fewer bytes.

    One of more bytes would hold the same values, or, where some codes have no home here and are rounded again, hardly
    others.

    Args:
        spec: The model.
        recipes: From the most precise.
        fidelity: Keep floats before the codes, where some of these are rounded again.
    """
    if not spec.held:
        return recipes
    held = Plan.uniform(spec, "stored", context=2).weight_bytes()
    floats = [name for name in recipes if fidelity and spec.rounded and get_format(name).kind == "float"]
    smaller = [name for name in recipes if Plan.uniform(spec, name, context=2).weight_bytes() < held]
    return (*floats, "stored", *smaller)


def names_its_dtype(recipe: str) -> bool:
    """Whether a recipe says itself in which dtype to compute, as a float format does."""
    return recipe != "stored" and get_format(recipe).kind == "float"


def sixteen_bits(spec: ModelSpec, gpu: GpuBudget | Gpu, context: int | None) -> str:
    """In which 16 bits to compute on a card: bf16, or where it has no units for that, what has the lower peak.

    Args:
        spec: The model.
        gpu: The card, also without a limit.
        context: Tokens to plan for, or ``None``.
    """
    return RECIPES[0] if _has_all(gpu) else _lower_peak(spec, gpu, context)[0]


def computes_in(recipe: str, spec: ModelSpec, gpu: GpuBudget | Gpu, context: int | None) -> str | None:
    """In which dtype a recipe computes on a card, see ``sixteen_bits``; ``None`` where it says so itself.

    Codes of a file in RAM without a limit, if no matrix is of floats, are multiplied in float32, which takes hardly
    longer: bf16 rounds further from the model than the codes are (``benchmarks/results/gguf_files_cpu.json``).
    """
    if names_its_dtype(recipe) or (recipe == "stored" and spec.stored):
        return None
    in_ram = isinstance(gpu, Gpu) and gpu.kernels == "cpu" and gpu.budget is None
    floats = [module for module in spec.modules if module.kind != "other" and module.name not in spec.held]
    return "fp32" if recipe == "stored" and in_ram and not floats else sixteen_bits(spec, gpu, context)


def suited(spec: ModelSpec, gpu: GpuBudget | Gpu, context: int | None) -> tuple[tuple[str, ...], str, str]:
    """Recipes for a card, the most precise first.

    Args:
        spec: The model.
        gpu: See ``sixteen_bits``.
        context: Tokens to plan for, or ``None``.

    Returns:
        The recipes, the activations' dtype, and a line that says what differs from ``RECIPES``, or nothing.
    """
    if _has_all(gpu):
        return RECIPES, RECIPES[0], ""
    dtype, compared = _lower_peak(spec, gpu, context)
    recipes = (dtype, *smaller_recipes(gpu))
    reasons = [f"fp16, not bf16, which has no units there ({compared})"] if dtype == "fp16" else []
    if recipes[-1] != RECIPES[-1]:
        reasons.append(f"{recipes[-1]}, not {RECIPES[-1]}, which has no kernel there")
    return recipes, dtype, f"the card has {gpu.card}: {'; '.join(reasons)}"


def _has_all(gpu: GpuBudget | Gpu) -> bool:
    return gpu.kernels != "cuda" or (gpu.card.fuses_bf16 and gpu.card.multiplies_int4)


def _lower_peak(spec: ModelSpec, gpu: GpuBudget | Gpu, context: int | None) -> tuple[str, str]:
    """The dtype of the lower forecast peak; where both take the same, fp16, for its speed. And the peaks in words."""
    context = min(context or PROMPT, spec.longest_context)
    try:
        peaks = {
            dtype: forecast(Plan.uniform(spec, "int8", context=context, dtype=dtype), gpu).peak_allocated_bytes
            for dtype in ("fp16", "bf16")
        }
    except PlanError as error:  # an architecture that no forecast can replay
        return "fp16", f"not compared: {error}"
    low, high = (format_bytes(peaks[dtype]) for dtype in ("fp16", "bf16"))
    words = "with int8 weights both peak at " + low if low == high else f"with int8 weights a peak of {low}, not {high}"
    return min(peaks, key=peaks.get), words
