"""What would make a plan fit: levers, gentlest first, each combination verified by a forecast before it is named.

Derived in: notebooks/01_analyze_the_oom.ipynb
"""

from dataclasses import dataclass, replace

from lowvram_lab.memory.device import GpuBudget
from lowvram_lab.plan import Plan
from lowvram_lab.planner.search import forecast_if_possible, largest_fitting
from lowvram_lab.profile import MemoryProfile
from lowvram_lab.spec import ModelSpec
from lowvram_lab.units import format_bytes

SHORTEST_CONTEXT = 256
"""A chat with less room than this is none; shorter contexts are not suggested."""


@dataclass(frozen=True)
class Suggestion:
    """A change that makes a plan fit, and the forecast that says so."""

    text: str
    plan: Plan
    forecast: MemoryProfile

    def __str__(self) -> str:
        return f"{self.text}: peak {format_bytes(self.forecast.peak_allocated_bytes)}, fits"

    def to_dict(self) -> dict:
        """Text and the bytes of the verified forecast."""
        return {
            "change": self.text,
            "peak_allocated_bytes": self.forecast.peak_allocated_bytes,
            "peak_reserved_bytes": self.forecast.peak_reserved_bytes,
            "context": self.plan.context,
        }


def suggest(plan: Plan, spec: ModelSpec, budget: GpuBudget, kernels: str = "cuda") -> list[Suggestion]:
    """Finds changes after which the plan fits.

    Args:
        plan: A plan that does not fit.
        spec: The model.
        budget: The card.
        kernels: See ``forecast``.

    Returns:
        At most one suggestion of each sort, gentlest first: cheap moves alone, lower formats, fewer GPU layers, a
        shorter context. Empty if nothing helps.
    """
    found: list[Suggestion] = []
    spared, moves = plan, []
    for text, change in _cheap_moves(plan, spec):
        spared, moves = change(spared), [*moves, text]
        if profile := forecast_if_possible(spared, spec, budget, kernels):
            found.append(Suggestion(" + ".join(moves), spared, profile))
            break
    smaller = None
    for recipe in _lower_recipes(plan):
        smaller = _keep_cpu_embedding(Plan.uniform(spec, recipe, context=plan.context), spared, spec)
        small_moves = [
            f"{recipe} weights",
            *(["embedding to the CPU"] if _moved_embedding(plan, smaller, spec) else []),
        ]
        if profile := forecast_if_possible(smaller, spec, budget, kernels):
            found.append(Suggestion(" + ".join(small_moves), smaller, profile))
            smaller = None
            break
    if found and found[0].plan is spared:
        return found
    splits = [(moves, spared)] if smaller is None else [(small_moves, smaller), (moves, spared)]
    total, on_gpu = spec.num_hidden_layers, plan.layer_devices(spec).count("gpu")
    for made, base in splits:
        layers = largest_fitting(
            lambda n, base=base: base.with_gpu_layers(spec, n), 0, on_gpu - 1, spec, budget, kernels
        )
        if layers:
            count, split, profile = layers
            text = " + ".join([*made, f"{total - count} of {total} layers to the CPU"])
            found.append(Suggestion(text, split, profile))
    context = plan.context // 2
    while context >= SHORTEST_CONTEXT:
        shorter = replace(spared, context=context)
        if profile := forecast_if_possible(shorter, spec, budget, kernels):
            found.append(Suggestion(" + ".join([*moves, f"context {context}"]), shorter, profile))
            break
        context //= 2
    return found


def _cheap_moves(plan: Plan, spec: ModelSpec):
    """Moves that cost next to nothing: a lookup on the CPU, a head in int8."""
    moves = []
    if not spec.tied and plan.modules[spec.embedding].device == "gpu":
        moves.append(("embedding to the CPU", lambda p: p.with_modules(spec.embedding, device="cpu")))
    if plan.modules[spec.head].format == plan.dtype and plan.dtype not in _formats_of_body(plan, spec):
        pattern = (spec.head, spec.embedding) if spec.tied else (spec.head,)

        def shrink(p: Plan) -> Plan:
            for name in pattern:
                p = p.with_modules(name, format="int8")
            return p

        moves.append((f"{spec.head} in int8", shrink))
    return moves


def _formats_of_body(plan: Plan, spec: ModelSpec) -> set[str]:
    return {plan.modules[m.name].format for m in spec.modules if m.layer is not None and m.kind == "linear"}


def _lower_recipes(plan: Plan) -> tuple[str, ...]:
    formats = {assignment.format for assignment in plan.modules.values()}
    if formats == {plan.dtype}:
        return ("int8", "int4")
    return ("int4",) if formats <= {plan.dtype, "int8"} else ()


def _moved_embedding(before: Plan, after: Plan, spec: ModelSpec) -> bool:
    return before.modules[spec.embedding].device != after.modules[spec.embedding].device


def _keep_cpu_embedding(plan: Plan, like: Plan, spec: ModelSpec) -> Plan:
    return plan if spec.tied else plan.with_modules(spec.embedding, device=like.modules[spec.embedding].device)
