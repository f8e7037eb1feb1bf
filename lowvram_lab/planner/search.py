"""The largest number that still fits a card (context, layers on the GPU), found by bisection over forecasts.

A forecast costs about half a second for a 4 B model, and several where prompts are read in pieces. So a cheap bound
that can only be too low rules plans out first, a sketch of the last pieces then, and only what is found is forecast.

Derived in: notebooks/01_analyze_the_oom.ipynb
"""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace

from lowvram_lab.errors import BudgetError, PlanError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.forecast import forecast, forecast_if_fits, in_full, sketch
from lowvram_lab.planner.profile import MemoryProfile, Workload
from lowvram_lab.units import format_bytes

CONTEXT_STEP = 16
"""Contexts are told apart to so many tokens: KV memory grows in blocks, and nobody plans for 4093."""


@dataclass(frozen=True)
class Largest:
    """The largest number that fits, and the forecast that says so.

    Attributes:
        value: Tokens or layers.
        forecast: Of that number.
        limited_by: ``"memory"``, or ``"model"`` where the model's own limit came first.
    """

    value: int
    forecast: MemoryProfile
    limited_by: str

    def __int__(self) -> int:
        return self.value


def max_context(plan: Plan, gpu: str | int | GpuBudget | Gpu) -> Largest:
    """The longest context a plan's weights leave room for, to 16 tokens.

    Args:
        plan: The plan; its own context does not matter.
        gpu: See ``forecast``.

    Raises:
        BudgetError: Not even 16 tokens fit.
    """
    steps = plan.spec.longest_context // CONTEXT_STEP

    def at(step: int) -> tuple[Plan, Workload]:
        context = step * CONTEXT_STEP
        return replace(plan, context=context), Workload.full_context(context)

    found = _largest(at, 1, steps, gpu, "16 tokens of context")
    return replace(found, value=found.value * CONTEXT_STEP)


def max_layers_on_gpu(plan: Plan, gpu: str | int | GpuBudget | Gpu) -> Largest:
    """The most decoder layers that fit on the GPU, the others computing on the CPU. Arguments as ``max_context``."""
    total, workload = plan.spec.num_hidden_layers, Workload.full_context(plan.context)
    return _largest(lambda count: (plan.with_gpu_layers(count), workload), 0, total, gpu, "the embeddings alone")


def _largest(
    at: Callable[[int], tuple[Plan, Workload]], low: int, high: int, gpu: str | int | GpuBudget | Gpu, least: str
) -> Largest:
    budget = budget_of(gpu)
    found = largest_fitting(at, low, high, budget)
    if found is None:
        plan, workload = at(low)
        needed = forecast(plan, budget, workload=workload).device_peak_bytes
        raise BudgetError(
            f"{least} of {plan.model} in this plan needs {format_bytes(needed)}, the GPU has "
            f"{format_bytes(budget.total_bytes)}; use a smaller format or more CPU layers"
        )
    return Largest(found.number, found.forecast, "model" if found.number == high else "memory")


GUIDED_PROBES = 4
"""So many forecasts are placed by what the last one took; after them plain bisection, which cannot crawl."""


@dataclass(frozen=True)
class Fitting:
    """A number that fits, with its plan and forecast."""

    number: int
    plan: Plan
    forecast: MemoryProfile


def budget_of(gpu: str | int | GpuBudget | Gpu) -> GpuBudget:
    """The budget of what a user calls a GPU.

    Raises:
        BudgetError: An opened GPU without a limit.
    """
    if not isinstance(gpu, Gpu):
        return GpuBudget.parse(gpu)
    if gpu.budget is None:
        raise BudgetError("a search needs a GPU with a budget, found one without a limit; open it with a size")
    return gpu.budget


def least_bytes(plan: Plan, workload: Workload | None = None) -> int:
    """A lower bound of what a plan takes on the GPU: exact weights and full KV cache, no activations, no rounding."""
    rows = workload.batch_size if workload else 1
    return plan.weight_bytes("gpu") + rows * plan.kv_bytes(plan.context - 1, "gpu")


def forecast_if_possible(plan: Plan, budget: GpuBudget) -> MemoryProfile | None:
    """The forecast of a plan that fits, else ``None``; skips the replay where the bound already says so."""
    if least_bytes(plan) > budget.usable_bytes:
        return None
    try:
        return forecast_if_fits(plan, budget)
    except PlanError:  # a place or a length that this architecture does not bear
        return None


def largest_fitting(
    at: Callable[[int], tuple[Plan, Workload]], low: int, high: int, budget: GpuBudget
) -> Fitting | None:
    """The largest number in ``low … high`` whose plan fits, by bisection.

    What a forecast takes above the lower bound changes little from one number to the next, so the first forecasts say
    where to look next; that halves the number of replays.

    Args:
        at: Number → plan and workload; a larger number must not take less memory.
        low: Smallest number to consider.
        high: Largest.
        budget: The card.

    Returns:
        The number with its plan and forecast, or ``None`` where not even ``low`` fits.
    """
    return _in_full(largest_sketched(at, low, high, budget), at, low, budget)


def most_layers(plan: Plan, most: int, budget: GpuBudget) -> Fitting | None:
    """The plan with as many layers on the GPU as fit, at most so many."""
    workload = Workload.full_context(plan.context)
    return largest_fitting(lambda count: (plan.with_gpu_layers(count), workload), 0, most, budget)


def largest_sketched(
    at: Callable[[int], tuple[Plan, Workload | None]], low: int, high: int, budget: GpuBudget, sketch: Callable = sketch
) -> Fitting | None:
    """See ``largest_fitting``; of plans that read prompts in pieces the forecast is a sketch."""
    best = refused = None
    factor = 1.0
    probes = 0

    def may_fit(number: int) -> bool:
        return least_bytes(*at(number)) * factor <= budget.usable_bytes

    high = last_that_holds(may_fit, low, high)
    while low <= high:
        guess = last_that_holds(may_fit, low, high) if probes < GUIDED_PROBES else (low + high + 1) // 2
        guess = max(guess, low)
        plan, workload = at(guess)
        try:
            profile = sketch(plan, budget, workload)
        except PlanError as error:  # a place that this architecture does not bear
            refused, high = error, guess - 1
            continue
        refused = None
        factor, probes = profile.peak_reserved_bytes / max(least_bytes(plan, workload), 1), probes + 1
        if profile.fits:
            best, low = Fitting(guess, plan, profile), guess + 1
        else:
            high = guess - 1
    if refused and best is None:
        raise refused
    return best


def _in_full(
    found: Fitting | None, at: Callable[[int], tuple[Plan, Workload]], low: int, budget: GpuBudget
) -> Fitting | None:
    """What a search over sketches found, with its forecast; the next smaller number where that does not fit."""
    while found is not None:
        if profile := in_full(found.plan, found.forecast):
            return replace(found, forecast=profile)
        found = largest_sketched(at, low, found.number - 1, budget)
    return None


def last_that_holds(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The last number in ``low … high`` for which a monotone condition holds, or ``low - 1``."""
    return low - 1 + bisect.bisect(range(low, high + 1), False, key=lambda number: not holds(number))
