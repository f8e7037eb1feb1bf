"""The largest that still fits: context, GPU layers, batch. Found by bisection over forecasts.

Derived in: notebooks/01_analyze_the_oom.ipynb
"""

from dataclasses import dataclass, replace

from lowvram_lab.errors import BudgetError
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.spec import ModelSpec
from lowvram_lab.planner.forecast import forecast
from lowvram_lab.planner.profile import MemoryProfile, Workload
from lowvram_lab.planner.search import largest_fitting, resolve
from lowvram_lab.units import format_bytes

CONTEXT_STEP = 16
"""Contexts are told apart to so many tokens: KV memory grows in blocks, and nobody plans for 4093."""

LARGEST_BATCH = 1024


@dataclass(frozen=True)
class Largest:
    """The largest number that fits, and the forecast that says so.

    Attributes:
        value: Tokens, layers or prompts.
        forecast: Of that number.
        limited_by: ``"memory"``, or ``"model"`` where the model's own limit came first.
    """

    value: int
    forecast: MemoryProfile
    limited_by: str

    def __int__(self) -> int:
        return self.value


def max_context(
    plan: Plan, spec: ModelSpec, gpu: str | int | GpuBudget | Gpu, *, kernels: str | None = None
) -> Largest:
    """The longest context a plan's weights leave room for, to 16 tokens.

    Args:
        plan: The plan; its own context does not matter.
        spec: The model.
        gpu: A budget such as ``"4GiB"``, or an opened GPU.
        kernels: See ``forecast``.

    Raises:
        BudgetError: Not even 16 tokens fit.
    """
    steps = spec.longest_context // CONTEXT_STEP

    def at(step: int) -> tuple[Plan, Workload]:
        context = step * CONTEXT_STEP
        return replace(plan, context=context), Workload.full_context(context)

    found = _largest(at, 1, steps, spec, gpu, kernels, "16 tokens of context")
    return replace(found, value=found.value * CONTEXT_STEP)


def max_layers_on_gpu(
    plan: Plan, spec: ModelSpec, gpu: str | int | GpuBudget | Gpu, *, kernels: str | None = None
) -> Largest:
    """The most decoder layers that fit on the GPU, the others computing on the CPU. Arguments as ``max_context``."""

    def at(layers: int) -> tuple[Plan, Workload]:
        return plan.with_gpu_layers(spec, layers), Workload.full_context(plan.context)

    return _largest(at, 0, spec.num_hidden_layers, spec, gpu, kernels, "the embeddings alone")


def max_batch(plan: Plan, spec: ModelSpec, gpu: str | int | GpuBudget | Gpu, *, kernels: str | None = None) -> Largest:
    """The most prompts at once, each of the plan's whole context (at most 1024). Arguments as ``max_context``."""

    def at(batch: int) -> tuple[Plan, Workload]:
        return plan, Workload.full_context(plan.context, batch_size=batch)

    return _largest(at, 1, LARGEST_BATCH, spec, gpu, kernels, "one prompt")


def _largest(at, low: int, high: int, spec, gpu, kernels, least: str) -> Largest:
    budget, kernels = resolve(gpu, kernels)
    found = largest_fitting(at, low, high, spec, budget, kernels)
    if found is None:
        plan, workload = at(low)
        needed = forecast(plan, spec, budget, workload=workload, kernels=kernels).device_peak_bytes
        raise BudgetError(
            f"{least} of {spec.name} in this plan needs {format_bytes(needed)}, the GPU has "
            f"{format_bytes(budget.total_bytes)}; use a smaller format or more CPU layers"
        )
    return Largest(found.number, found.forecast, "model" if found.number == high else "memory")
