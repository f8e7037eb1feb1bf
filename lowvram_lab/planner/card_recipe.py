"""recipe_for_card: the mixed-precision plan with the least estimated loss that fits a GPU together with its context.

Derived in: notebooks/04_compress.ipynb
"""

from dataclasses import dataclass, replace

from lowvram_lab.errors import BudgetError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.profile import MemoryProfile
from lowvram_lab.planner.search import budget_of
from lowvram_lab.units import format_bytes
from lowvram_lab.weights.recipe import Choices, Recipe, choices_for
from lowvram_lab.weights.sensitivity import Sensitivity

ATTEMPTS = 8
"""Forecasts in search of the bytes that weights may take beside KV cache and workspace; three are usual."""

SPARE = 0.002
"""Of the budget, below which more weights are not worth another forecast."""


@dataclass(frozen=True)
class CardBudget:
    """Makes the best recipe for a card that weights, KV cache and workspace are to share: a ``RecipeMaker``.

    Attributes:
        gpu: A budget such as ``"4GiB"``, or an opened GPU; kept as its budget.
        context: Tokens to plan for; by default 2048, or what the model has.
        formats: See ``recipe``.
        stock: See ``recipe``.
        kv_format: See ``Plan``; by default 16 bits.
    """

    gpu: str | int | GpuBudget | Gpu
    context: int | None = None
    formats: tuple[str, ...] | None = None
    stock: bool = True
    kv_format: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "gpu", budget_of(self.gpu))  # so that the repr says what the choice depends on

    def recipe(self, spec: ModelSpec, sensitivity: Sensitivity) -> Recipe:
        """See ``RecipeMaker``."""
        found, _ = recipe_for_card(
            spec,
            sensitivity,
            self.gpu,
            context=self.context,
            formats=self.formats,
            stock=self.stock,
            kv_format=self.kv_format,
        )
        return found


def recipe_for_card(
    spec: ModelSpec,
    sensitivity: Sensitivity,
    gpu: str | int | GpuBudget | Gpu,
    *,
    context: int | None = None,
    formats: tuple[str, ...] | None = None,
    stock: bool = True,
    kv_format: str | None = None,
) -> tuple[Recipe, MemoryProfile]:
    """Chooses a format for every module so that the whole model fits a card; an untied embedding goes to the CPU.

    Args:
        spec: The model.
        sensitivity: From ``estimate_sensitivity``.
        gpu: The card that weights, KV cache of ``context`` tokens and workspace are to share.
        context: Tokens to plan for; by default 2048, or what the model has.
        formats: See ``recipe``.
        stock: See ``recipe``.
        kv_format: See ``Plan``; by default 16 bits.

    Returns:
        The recipe, and the forecast that says it fits.

    Raises:
        BudgetError: Even the smallest formats do not fit; it says what takes the room, and what to do.
        PlanError: A sensitivity of another model, or a plan that this model cannot have.
    """
    choices = choices_for(spec, sensitivity, context=context, formats=formats, stock=stock, kv_format=kv_format)
    if not spec.tied:
        choices = replace(choices, base=choices.base.with_modules(spec.embedding, device="cpu"))
    return _beside_the_cache(choices, budget_of(gpu))


def _beside_the_cache(choices: Choices, budget: GpuBudget) -> tuple[Recipe, MemoryProfile]:
    """Finds how many bytes of weights the forecast leaves room for."""
    spec, base = choices.spec, choices.base
    least = choices.least_bytes("gpu")
    cache = base.kv_bytes(base.context - 1, "gpu")
    best = None
    weights = budget.usable_bytes - cache
    low = least - 1
    high = max(least, weights) + 1
    for attempt in range(ATTEMPTS):
        weights = min(max(weights, low + 1), high - 1)
        found = choices.within(weights, "gpu")
        profile = forecast(found.plan, budget)
        taken = found.plan.weight_bytes("gpu")
        if profile.fits:
            best = found, profile
            low = max(weights, taken)
        else:
            high = min(weights, taken)  # any budget that gives this plan, or a larger one, fails as well
        if high - low <= max(1, SPARE * budget.usable_bytes):
            break
        # what a plan takes beside its weights hardly depends on them, so this lands close; if not, the middle
        weights = taken + budget.usable_bytes - profile.peak_reserved_bytes
        if not low < weights < high or attempt > 1:
            weights = (low + high) // 2
    best = best or _smallest(choices, budget)
    if best is None:
        raise BudgetError(
            f"no recipe for {spec.name} at context {base.context} fits a {format_bytes(budget.total_bytes)} GPU whole: "
            f"its weights take {format_bytes(least)} at the least, its KV cache {format_bytes(cache)}; shorten the "
            "context, put layers on the CPU (lowvram plan) or allow an embedding below 8 bits (stock=False)"
        )
    return best


def _smallest(choices: Choices, budget: GpuBudget) -> tuple[Recipe, MemoryProfile] | None:
    """The smallest recipe and its forecast, if it fits."""
    found = choices.within(choices.least_bytes("gpu"), "gpu")
    profile = forecast(found.plan, budget)
    return (found, profile) if profile.fits else None
