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
from lowvram_lab.planner.search import budget_of, forecast_if_possible, largest_fitting, least_bytes, most_layers
from lowvram_lab.planner.suited import smaller_recipes
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
        spare = format_bytes(self.forecast.budget.usable_bytes - self.forecast.peak_reserved_bytes)
        return f"{self.text}: peak {format_bytes(self.forecast.peak_allocated_bytes)}, fits with {spare} to spare"

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
    as_it_is = Start(plan)
    cheaply = _moved_cheaply(as_it_is, budget)
    found += [cheaply] if cheaply else []
    found += _fewer_tokens(as_it_is, [] if cheaply else _cheap_moves(plan), budget)
    start, starts = as_it_is, [] if cheaply else [as_it_is]
    for recipe in _lower_recipes(plan, budget) if not plan.spec.stored else ():
        start = Start(_with_recipe(plan, recipe), f"{recipe} weights")
        if fitting := _moved_cheaply(start, budget):
            found.append(fitting)
            break
    else:  # no format is small enough, not even with all cheap moves
        starts = [start, *starts] if starts and start is not as_it_is else starts
    for start in starts:
        found += _computed_by_both(start, budget)
    return found


@dataclass(frozen=True)
class Start:
    """A plan that moves are made from, and the words for what was done to come to it."""

    plan: Plan
    words: str = ""

    def after(self, taken: list[Move]) -> Plan:
        """The plan after some moves."""
        plan = self.plan
        for move in taken:
            plan = move.change(plan)
        return plan

    def text(self, taken: list[Move]) -> str:
        """All that was done, in words; of two formats of the KV cache the one that it has."""
        words = [move.words for move in taken]
        made = [text for text in words if text != "KV cache in int8" or "KV cache in int4" not in words]
        return " + ".join([self.words, *made] if self.words else made)


def _expandable(plan: Plan, budget: GpuBudget) -> list[Suggestion]:
    """The caching allocator's other mode wastes less; it exists on CUDA only, and changes nothing in the plan."""
    if budget.kernels != "cuda" or least_bytes(plan) > budget.usable_bytes:
        return []
    profile = forecast(plan, budget, expandable_segments=True)
    return [Suggestion(f"set {EXPANDABLE}", plan, profile, EXPANDABLE)] if profile.fits else []


def _moved_cheaply(start: Start, budget: GpuBudget) -> Suggestion | None:
    """The plan with one cheap move after the other until it fits; in another format perhaps with none."""
    found = _cheap_moves(start.plan)
    for count in range(0 if start.words else 1, len(found) + 1):
        if forecast_if_possible(start.after(found[:count]), budget):
            return _with_fewest(start, found[:count], budget)
    return None


def _with_fewest(start: Start, taken: list[Move], budget: GpuBudget) -> Suggestion:
    """Moves after which a plan fits, without those that are not needed beside the last, in pieces as large as fit."""
    for needless in 2 * taken[-2::-1]:  # what costs most first; twice, as an allocator's gaps may want another gone
        fewer = [move for move in taken if move is not needless]
        other = start.after(fewer)  # the same where another move brings it along: then it stays, and is said
        if other != start.after(taken) and forecast_if_possible(other, budget):
            taken = fewer
    profile = None
    sizes = [size for size in chunk_sizes(start.plan.context) if size]
    for tokens in (size for size in sizes if size < (start.plan.prefill_chunk or start.plan.context)):
        larger = [in_pieces(tokens) if move.words == in_pieces(sizes[-1]).words else move for move in taken]
        if larger != taken and (profile := forecast_if_possible(start.after(larger), budget)):
            taken = larger
            break
    plan = start.after(taken)
    return Suggestion(start.text(taken), plan, profile or forecast(plan, budget))


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
    modules = {name: new.moved(plan.modules[name].device) for name, new in fresh.modules.items()}
    kv_format = dtype if plan.kv_format == plan.dtype else plan.kv_format
    return replace(plan, modules=modules, dtype=dtype, kv_format=kv_format, asked=recipe)


def _lower_recipes(plan: Plan, budget: GpuBudget) -> tuple[str, ...]:
    formats = {assignment.format for assignment in plan.modules.values()}
    smaller = smaller_recipes(budget)
    if formats == {plan.dtype}:
        return smaller
    return smaller[1:] if formats <= {plan.dtype, "int8"} else ()


def _fewer_tokens(start: Start, taken: list[Move], budget: GpuBudget) -> list[Suggestion]:
    plan = start.after(taken)

    def at(sixteenths: int) -> tuple[Plan, Workload]:
        context = plan.context * sixteenths // 16
        return replace(plan, context=context), Workload.full_context(context)

    least = -(-16 * SHORTEST_CONTEXT // plan.context)
    best = largest_fitting(at, least, 15, budget)
    if best is None:
        return []
    context = best.plan.context
    shorter = Move(f"context {context}", lambda p: replace(p, context=context))
    return [_with_fewest(start, [*taken, shorter], budget)]


def _computed_by_both(start: Start, budget: GpuBudget) -> list[Suggestion]:
    """Layers or the head to the CPU, whichever costs less; both where neither alone is enough."""
    taken = _cheap_moves(start.plan)
    plan = start.after(taken)
    ways = [[layers]] if (layers := _fewer_layers(plan, budget)) else []
    if head := head_to_cpu(plan):
        without = head.change(plan)
        if forecast_if_possible(without, budget):
            ways.append([head])
        elif not ways and (layers := _fewer_layers(without, budget)):
            ways.append([head, layers])
    if not ways:
        return []
    cheapest = min(ways, key=lambda way: cost(start.after([*taken, *way])))
    return [_with_fewest(start, [*taken, *cheapest], budget)]


def _fewer_layers(plan: Plan, budget: GpuBudget) -> Move | None:
    """The fewest layers to the CPU after which a plan fits."""
    try:
        best = most_layers(plan, plan.layer_devices().count("gpu") - 1, budget)
    except PlanError:  # an architecture that bears no split
        return None
    if best is None:
        return None
    number, total = best.number, plan.spec.num_hidden_layers
    return Move(f"{total - number} of {total} layers to the CPU", lambda p: p.with_gpu_layers(number))
