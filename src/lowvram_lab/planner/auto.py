"""auto_plan: the highest-precision uniform recipe whose forecast fits, then layers to the CPU.

Derived in: notebooks/09_validated_chat.ipynb
"""

from dataclasses import dataclass, replace

from lowvram_lab.errors import BudgetError, PlanError
from lowvram_lab.memory.device import Gpu, GpuBudget
from lowvram_lab.plan import Plan
from lowvram_lab.planner.search import forecast_if_possible, largest_fitting, least_bytes, resolve
from lowvram_lab.planner.suggest import SHORTEST_CONTEXT, suggest
from lowvram_lab.profile import MemoryProfile, Workload
from lowvram_lab.spec import ModelSpec
from lowvram_lab.units import format_bytes

RECIPES = ("bf16", "int8", "int4")
"""From the most precise. nf4 runs well on CUDA only, and leaves both ends in 16 bits: ask for it by name."""


@dataclass(frozen=True)
class PlanChoice:
    """A plan, the forecast that says it fits, and the reasons in a few lines."""

    plan: Plan
    forecast: MemoryProfile
    why: tuple[str, ...]
    recipe: str = ""

    def _repr_html_(self) -> str:
        return self.plan._repr_html_() + "<br>".join(self.why) + self.forecast._repr_html_()


def auto_plan(
    spec: ModelSpec,
    gpu: str | int | GpuBudget | Gpu,
    context: int = 2048,
    *,
    recipes: tuple[str, ...] | None = None,
    kernels: str | None = None,
    threads: int | None = None,
) -> PlanChoice:
    """Chooses a plan that fits.

    Args:
        spec: The model.
        gpu: A budget such as ``"4GiB"``, or an opened GPU.
        context: Tokens to plan for.
        recipes: Recipes to try, the most precise first; by default ``RECIPES``, or what a converted model holds. The
            last is the one split between GPU and CPU if none fits whole.
        kernels: See ``forecast``.
        threads: CPU threads for the plan.

    Returns:
        The plan, its forecast, and why it was chosen.

    Raises:
        BudgetError: No plan fits; the message says what is short and what would help.
        PlanError: The context is beyond the model's, or a recipe is unknown.
    """
    budget, kernels = resolve(gpu, kernels)
    if recipes is None:
        recipes = ("stored",) if spec.stored else RECIPES
    if not recipes:
        raise PlanError("expected one recipe or more to choose from, found none")
    why, plan = [], None
    for recipe in recipes:
        plan = replace(Plan.uniform(spec, recipe, context=context), threads=threads)
        plan.validate(spec)
        tries = [("", plan)]
        if not spec.tied:
            tries.append((" with the embedding on the CPU", plan.with_modules(spec.embedding, device="cpu")))
        for where, plan in tries:
            if profile := forecast_if_possible(plan, spec, budget, kernels):
                why.append(f"{recipe}{where} fits: {_margin(profile)}")
                return PlanChoice(plan, profile, tuple(why), recipe)
            why.append(f"{recipe}{where} does not fit: {_shortage(plan, spec, budget)}")
    total = spec.num_hidden_layers
    workload = Workload.full_context(context)
    split = largest_fitting(lambda n: (plan.with_gpu_layers(spec, n), workload), 1, total - 1, spec, budget, kernels)
    if split is None:
        raise _refusal(plan.with_gpu_layers(spec, 1), spec, budget, kernels)
    why.append(f"{recipes[-1]} with {split.number} of {total} layers on the GPU fits: {_margin(split.forecast)}")
    return PlanChoice(split.plan, split.forecast, tuple(why), recipes[-1])


def _margin(profile: MemoryProfile) -> str:
    free = profile.budget.usable_bytes - profile.peak_reserved_bytes
    return f"peak {format_bytes(profile.peak_allocated_bytes)}, {format_bytes(free)} to spare"


def _shortage(plan: Plan, spec: ModelSpec, budget: GpuBudget) -> str:
    weights, least = plan.weight_bytes(spec, "gpu"), least_bytes(plan, spec)
    beyond = least - budget.usable_bytes
    tail = f", {format_bytes(beyond)} too much" if beyond > 0 else " before activations and fragmentation"
    return f"{format_bytes(weights)} of weights + {format_bytes(least - weights)} of KV{tail}"


def _refusal(plan: Plan, spec: ModelSpec, budget: GpuBudget, kernels: str) -> BudgetError:
    needed = least_bytes(plan, spec) + budget.context_bytes
    message = (
        f"no plan for {spec.name} at context {plan.context} fits a {format_bytes(budget.total_bytes)} GPU: even "
        f"{plan.summary(spec)}, needs more than {format_bytes(needed)}"
    )
    helps = suggest(plan, spec, budget, kernels)
    if helps:
        return BudgetError(f"{message}; what would help: {helps[0].text}")
    return BudgetError(
        f"{message}; not even a context of {SHORTEST_CONTEXT} helps: give it a larger GPU or a smaller model"
    )
