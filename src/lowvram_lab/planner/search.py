"""Search over forecasts: which plans can fit at all, and the largest number that still does.

A forecast costs about a second for a 4 B model, so a cheap bound that can only be too low rules plans out first.
"""

from collections.abc import Callable

from lowvram_lab.dry_run import forecast
from lowvram_lab.memory.device import GpuBudget
from lowvram_lab.plan import Plan
from lowvram_lab.profile import MemoryProfile
from lowvram_lab.spec import ModelSpec


def least_bytes(plan: Plan, spec: ModelSpec) -> int:
    """A lower bound of what a plan takes on the GPU: exact weights and full KV cache, no activations, no rounding."""
    return plan.weight_bytes(spec, "gpu") + plan.kv_bytes(spec, plan.context - 1, "gpu")


def forecast_if_possible(plan: Plan, spec: ModelSpec, budget: GpuBudget, kernels: str) -> MemoryProfile | None:
    """The forecast of a plan that fits, else ``None``; skips the replay where the bound already says so."""
    if least_bytes(plan, spec) > budget.usable_bytes:
        return None
    profile = forecast(plan, spec, budget, kernels=kernels)
    return profile if profile.fits else None


def largest_fitting(
    make_plan: Callable[[int], Plan], low: int, high: int, spec: ModelSpec, budget: GpuBudget, kernels: str
) -> tuple[int, Plan, MemoryProfile] | None:
    """The largest number in ``low … high`` whose plan fits, by bisection.

    What a forecast takes above the lower bound changes little from one number to the next, so each forecast says where
    to look next; that halves the number of replays.

    Args:
        make_plan: Number → plan; a larger number must not take less memory.
        low: Smallest number to consider.
        high: Largest.
        spec: The model.
        budget: The card.
        kernels: See ``forecast``.

    Returns:
        Number, plan and forecast, or ``None`` where not even ``low`` fits.
    """
    best, above_bound = None, 0
    while low <= high:
        while high >= low and least_bytes(make_plan(high), spec) > budget.usable_bytes:
            high -= 1
        guess = high
        while guess > low and least_bytes(make_plan(guess), spec) + above_bound > budget.usable_bytes:
            guess -= 1
        if guess < low:
            break
        plan = make_plan(guess)
        profile = forecast(plan, spec, budget, kernels=kernels)
        above_bound = max(profile.peak_reserved_bytes - least_bytes(plan, spec), 0)
        if profile.fits:
            best, low = (guess, plan, profile), guess + 1
        else:
            high = guess - 1
    return best
