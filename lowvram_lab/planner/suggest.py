"""What would make a plan fit: levers, gentlest first, each combination verified by a forecast before it is named.

Derived in: notebooks/01_analyze_the_oom.ipynb
"""

from dataclasses import dataclass, replace

from lowvram_lab.errors import PlanError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.moves import Move, chunk_sizes, cost, head_to_cpu, in_pieces, moves
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
            "prefill_chunk": self.plan.prefill_chunk,
            "environment": self.environment,
        }


def suggest(plan: Plan, gpu: str | int | GpuBudget | Gpu) -> list[Suggestion]:
    """Finds changes after which the plan fits.

    Args:
        plan: A plan that does not fit.
        gpu: See ``forecast``.

    Returns:
        At most one suggestion of each sort, gentlest first: the allocator's other mode, moves that leave layers and
        formats as they are (see ``moves``), fewer tokens, a lower format, layers or the head to the CPU. Empty if
        nothing helps, or if the plan fits as it is.
    """
    budget = budget_of(gpu)
    if forecast_if_possible(plan, budget):
        return []
    found = [*_expandable(plan, budget)]
    spared, made, fitting = _moved_cheaply(plan, [], budget)
    found += fitting
    solved = bool(fitting)
    found += _fewer_tokens(*((plan, []) if solved else (spared, made)), budget)
    last = None
    bases = [] if solved else [(spared, made)]
    for recipe in _lower_recipes(plan) if not plan.spec.stored else ():
        fitting, last = _in_recipe(plan, recipe, budget)
        found += fitting
        if fitting:
            break
    else:  # no format is small enough, not even with all cheap moves
        bases = [last, *bases] if bases and last else bases
    for base, moves_made in bases:
        found += _computed_by_both(base, moves_made, budget)
    return found


def _in_recipe(plan: Plan, recipe: str, budget: GpuBudget) -> tuple[list[Suggestion], tuple[Plan, list[str]]]:
    """The plan in a lower format, with cheap moves where those are needed; and what all of them make of it."""
    smaller, made = _with_recipe(plan, recipe), [f"{recipe} weights"]
    if profile := forecast_if_possible(smaller, budget):
        return [Suggestion(made[0], smaller, profile)], (smaller, made)
    smaller, made, fitting = _moved_cheaply(smaller, made, budget)
    return fitting, (smaller, made)


def _expandable(plan: Plan, budget: GpuBudget) -> list[Suggestion]:
    """The caching allocator's other mode wastes less; it exists on CUDA only, and changes nothing in the plan."""
    if budget.kernels != "cuda" or least_bytes(plan) > budget.usable_bytes:
        return []
    profile = forecast(plan, budget, expandable_segments=True)
    return [Suggestion(f"set {EXPANDABLE}", plan, profile, EXPANDABLE)] if profile.fits else []


def _moved_cheaply(plan: Plan, made: list[str], budget: GpuBudget) -> tuple[Plan, list[str], list[Suggestion]]:
    """The plan with one cheap move after the other until it fits, all moves made, and the suggestion where it does.

    Of the suggestion's moves those are left out that are not needed beside the last, and pieces are as large as fit.
    """
    start, taken = plan, []
    for move in _cheap_moves(plan):
        plan, taken = move.change(plan), [*taken, move]
        if forecast_if_possible(plan, budget):
            return plan, [*made, *_words(taken)], [_with_fewest(start, made, taken, budget)]
    return plan, [*made, *_words(taken)], []


def _with_fewest(start: Plan, made: list[str], taken: list[Move], budget: GpuBudget) -> Suggestion:
    for needless in reversed(taken[:-1]):  # what costs most first
        fewer = [move for move in taken if move is not needless]
        if forecast_if_possible(_after(start, fewer), budget):
            taken = fewer
    plan, profile = _after(start, taken), None
    sizes = [size for size in chunk_sizes(start.context) if size]
    for tokens in (size for size in sizes if size < (start.prefill_chunk or start.context)):
        larger = [in_pieces(tokens) if move.words == in_pieces(sizes[-1]).words else move for move in taken]
        if larger != taken and (profile := forecast_if_possible(_after(start, larger), budget)):
            plan, taken = _after(start, larger), larger
            break
    return Suggestion(" + ".join([*made, *_words(taken)]), plan, profile or forecast(plan, budget))


def _words(taken: list[Move]) -> list[str]:
    """What was done; of two formats of the KV cache the one it has."""
    words = [move.words for move in taken]
    return [text for text in words if text != "KV cache in int8" or "KV cache in int4" not in words]


def _after(plan: Plan, taken: list[Move]) -> Plan:
    for move in taken:
        plan = move.change(plan)
    return plan


def _cheap_moves(plan: Plan) -> list[Move]:
    """The moves of the one table, and a head in int8, which costs less than a KV cache in it."""
    spec, found = plan.spec, moves(plan)
    body = {plan.modules[m.name].format for m in spec.modules if m.layer is not None and m.kind == "linear"}
    if plan.modules[spec.head].format == plan.dtype and plan.dtype not in body and not spec.stored:
        names = [spec.embedding, spec.head] if spec.tied else [spec.head]
        words = f"{' and '.join(reversed(names))} in int8"
        before = sum(not move.words.startswith("KV cache") for move in found)
        found.insert(before, Move(words, lambda p: p.with_modules(*names, format="int8")))
    return found


def _with_recipe(plan: Plan, recipe: str) -> Plan:
    """The recipe's formats on the plan's own devices; 16-bit activations stay what they are."""
    dtype = plan.dtype if plan.dtype != "fp32" else "bf16"
    fresh = Plan.uniform(plan.spec, recipe, context=plan.context, dtype=dtype)
    modules = {name: replace(new, device=plan.modules[name].device) for name, new in fresh.modules.items()}
    kv_format = dtype if plan.kv_format == plan.dtype else plan.kv_format
    return replace(plan, modules=modules, dtype=dtype, kv_format=kv_format, asked=recipe)


def _lower_recipes(plan: Plan) -> tuple[str, ...]:
    formats = {assignment.format for assignment in plan.modules.values()}
    if formats == {plan.dtype}:
        return ("int8", "int4")
    return ("int4",) if formats <= {plan.dtype, "int8"} else ()


def _fewer_tokens(plan: Plan, made: list[str], budget: GpuBudget) -> list[Suggestion]:
    def at(sixteenths: int) -> tuple[Plan, Workload]:
        context = plan.context * sixteenths // 16
        return replace(plan, context=context), Workload.full_context(context)

    least = -(-16 * SHORTEST_CONTEXT // plan.context)
    best = largest_fitting(at, least, 15, budget)
    if best is None:
        return []
    return [Suggestion(" + ".join([*made, f"context {best.plan.context}"]), best.plan, best.forecast)]


def _computed_by_both(plan: Plan, made: list[str], budget: GpuBudget) -> list[Suggestion]:
    """Layers or the head to the CPU, whichever costs less; both where neither alone is enough."""
    head = head_to_cpu(plan)
    found = _fewer_layers(plan, made, budget)
    if head:
        base, words = head.change(plan), [*made, head.words]
        whole = forecast_if_possible(base, budget)
        other = [Suggestion(" + ".join(words), base, whole)] if whole else []
        if not found:
            other = other or _fewer_layers(base, words, budget)
        found += other
    return sorted(found, key=lambda suggestion: cost(suggestion.plan))[:1]


def _fewer_layers(plan: Plan, made: list[str], budget: GpuBudget) -> list[Suggestion]:
    total, workload = plan.spec.num_hidden_layers, Workload.full_context(plan.context)
    on_gpu = plan.layer_devices().count("gpu")
    try:
        best = largest_fitting(lambda n: (plan.with_gpu_layers(n), workload), 0, on_gpu - 1, budget)
    except PlanError:  # an architecture that bears no split
        return []
    if best is None:
        return []
    text = " + ".join([*made, f"{total - best.number} of {total} layers to the CPU"])
    return [Suggestion(text, best.plan, best.forecast)]
