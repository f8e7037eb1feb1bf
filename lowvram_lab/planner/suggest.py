"""What would make a plan fit: levers, gentlest first, each combination verified by a forecast before it is named.

Derived in: notebooks/01_analyze_the_oom.ipynb
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.profile import MemoryProfile, Workload
from lowvram_lab.planner.search import budget_of, forecast_if_possible, largest_fitting, least_bytes
from lowvram_lab.units import format_bytes

SHORTEST_CONTEXT = 256
"""A chat with less room than this is none; shorter contexts are not suggested."""

EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


@dataclass(frozen=True)
class Suggestion:
    """A change that makes a plan fit, and the forecast that says so.

    Attributes:
        text: The change in words.
        plan: The changed plan.
        forecast: Of the changed plan, on the same card.
        environment: An environment variable to set before Python starts, or ``""``.
    """

    text: str
    plan: Plan
    forecast: MemoryProfile
    environment: str = ""

    def __str__(self) -> str:
        return f"{self.text}: peak {format_bytes(self.forecast.peak_allocated_bytes)}, fits"

    def to_dict(self) -> dict:
        """The change and the bytes of its verified forecast."""
        return {
            "change": self.text,
            "peak_allocated_bytes": self.forecast.peak_allocated_bytes,
            "peak_reserved_bytes": self.forecast.peak_reserved_bytes,
            "context": self.plan.context,
            "kv_format": self.plan.kv_format,
            "environment": self.environment,
        }


def suggest(plan: Plan, gpu: str | int | GpuBudget | Gpu) -> list[Suggestion]:
    """Finds changes after which the plan fits.

    Args:
        plan: A plan that does not fit.
        gpu: See ``forecast``.

    Returns:
        At most one suggestion of each sort, gentlest first: the allocator's other mode, moves that cost next to
        nothing, fewer tokens, a lower format, layers to the CPU. Empty if nothing helps, or if the plan fits as it is.
    """
    budget = budget_of(gpu)
    if forecast_if_possible(plan, budget):
        return []
    found = [*_expandable(plan, budget)]
    spared, moves, fitting = _moved_cheaply(plan, [], budget)
    found += fitting
    solved = bool(found) and found[-1].plan is spared
    found += _fewer_tokens(*((plan, []) if solved else (spared, moves)), budget)
    smaller, small_moves = None, []
    for recipe in _lower_recipes(plan) if not plan.spec.stored else ():
        smaller, small_moves = _with_recipe(plan, recipe), [f"{recipe} weights"]
        if profile := forecast_if_possible(smaller, budget):
            found.append(Suggestion(small_moves[0], smaller, profile))
            smaller = None
            break
    if smaller is not None:  # no format is small enough by itself: join it with the cheap moves
        smaller, small_moves, fitting = _moved_cheaply(smaller, small_moves, budget)
        found += fitting
        smaller = None if fitting else smaller
    if not solved:
        bases = [(smaller, small_moves)] if smaller is not None else []
        for base, made in [*bases, (spared, moves)]:
            found += _fewer_layers(base, made, budget)
    return found


def _expandable(plan: Plan, budget: GpuBudget) -> list[Suggestion]:
    """The caching allocator's other mode wastes less; it exists on CUDA only, and changes nothing in the plan."""
    if budget.kernels != "cuda" or least_bytes(plan) > budget.usable_bytes:
        return []
    profile = forecast(plan, budget, expandable_segments=True)
    return [Suggestion(f"set {EXPANDABLE}", plan, profile, EXPANDABLE)] if profile.fits else []


def _moved_cheaply(plan: Plan, moves: list[str], budget: GpuBudget) -> tuple[Plan, list[str], list[Suggestion]]:
    """The plan with one cheap move after the other until it fits, all moves made, and the suggestion where it does."""
    for text, change in _cheap_moves(plan):
        plan, moves = change(plan), [*moves, text]
        if profile := forecast_if_possible(plan, budget):
            return plan, moves, [Suggestion(" + ".join(moves), plan, profile)]
    return plan, moves, []


def _cheap_moves(plan: Plan) -> list[tuple[str, Callable[[Plan], Plan]]]:
    """Moves that cost next to nothing: a lookup on the CPU, a head in int8, a KV cache in int8."""
    spec = plan.spec
    moves = []
    if not spec.tied and plan.modules[spec.embedding].device == "gpu":
        moves.append(("embedding to the CPU", lambda p: p.with_modules(spec.embedding, device="cpu")))
    body = {plan.modules[m.name].format for m in spec.modules if m.layer is not None and m.kind == "linear"}
    if plan.modules[spec.head].format == plan.dtype and plan.dtype not in body and not spec.stored:
        names = [spec.head] + ([spec.embedding] if spec.tied else [])
        moves.append((f"{' and '.join(names)} in int8", lambda p: p.with_modules(*names, format="int8")))
    if plan.kv_format != "int8":
        moves.append(("KV cache in int8", lambda p: replace(p, kv_format="int8")))
    return moves


def _with_recipe(plan: Plan, recipe: str) -> Plan:
    """The recipe's formats on the plan's own devices; 16-bit activations stay what they are."""
    dtype = plan.dtype if plan.dtype != "fp32" else "bf16"
    fresh = Plan.uniform(plan.spec, recipe, context=plan.context, dtype=dtype)
    modules = {name: replace(new, device=plan.modules[name].device) for name, new in fresh.modules.items()}
    kv_format = plan.kv_format if plan.kv_format == "int8" else dtype
    return replace(plan, modules=modules, dtype=dtype, kv_format=kv_format)


def _lower_recipes(plan: Plan) -> tuple[str, ...]:
    formats = {assignment.format for assignment in plan.modules.values()}
    if formats == {plan.dtype}:
        return ("int8", "int4")
    return ("int4",) if formats <= {plan.dtype, "int8"} else ()


def _fewer_tokens(plan: Plan, moves: list[str], budget: GpuBudget) -> list[Suggestion]:
    def at(sixteenths: int) -> tuple[Plan, Workload]:
        context = plan.context * sixteenths // 16
        return replace(plan, context=context), Workload.full_context(context)

    least = -(-16 * SHORTEST_CONTEXT // plan.context)
    best = largest_fitting(at, least, 15, budget)
    if best is None:
        return []
    return [Suggestion(" + ".join([*moves, f"context {best.plan.context}"]), best.plan, best.forecast)]


def _fewer_layers(plan: Plan, moves: list[str], budget: GpuBudget) -> list[Suggestion]:
    total, workload = plan.spec.num_hidden_layers, Workload.full_context(plan.context)
    on_gpu = plan.layer_devices().count("gpu")
    best = largest_fitting(lambda n: (plan.with_gpu_layers(n), workload), 0, on_gpu - 1, budget)
    if best is None:
        return []
    text = " + ".join([*moves, f"{total - best.number} of {total} layers to the CPU"])
    return [Suggestion(text, best.plan, best.forecast)]
