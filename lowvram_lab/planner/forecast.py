"""Forecast what a plan will take: load, prefill and decode replayed on meta tensors. No GPU, no weights.

The replay is the real loader and the real decode loop over tensors without data, counted by the real meter, through a
model of CUDA's allocator. Nothing here is a formula, so what the code does is what is forecast.

Derived in: notebooks/01_analyze_the_oom.ipynb
"""

from lowvram_lab.engine.load import load
from lowvram_lab.errors import PlanError, first_line
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.dry_run import DryRunGpu, ImitateAttention
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.checkpoint import ShapesOnly
from lowvram_lab.model.geometry import unpadded
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import MemoryProfile, Workload


def forecast(
    plan: Plan,
    gpu: str | int | GpuBudget | Gpu | None = None,
    *,
    workload: Workload | None = None,
    timeline: bool = False,
    expandable_segments: bool = False,
) -> MemoryProfile:
    """Forecasts the GPU memory of a plan.

    Args:
        plan: The plan.
        gpu: A budget such as ``"4GiB"`` (of a CUDA card), or an opened GPU, whose budget and kernels are then taken;
            ``None`` for a CUDA card without a limit.
        workload: What to run; by default the plan's whole context.
        timeline: Keep every allocation, with the path of its module, in ``MemoryProfile.timeline``.
        expandable_segments: Forecast ``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``.

    Returns:
        A profile with origin ``"forecast"``. ``first_oom`` is the first allocation that would fail; the figures go on
        as if the card had no limit.

    Raises:
        PlanError: The plan does not fit the model, the workload is longer than the plan's context, or an operator of
            the model needs data to run; it and its module are named.
        UnitError, BudgetError: The budget cannot be read or used.
    """
    spec = plan.spec
    workload = workload or Workload.full_context(plan.context)
    if workload.tokens > plan.context:
        raise PlanError(f"the workload has {workload.tokens} tokens, the plan a context of {plan.context}")
    if isinstance(gpu, Gpu):
        dry = DryRunGpu(gpu.budget, gpu.kernels, expandable_segments)
    else:
        dry = DryRunGpu(None if gpu is None else GpuBudget.parse(gpu), expandable_segments=expandable_segments)
    try:
        with ImitateAttention(dry), unpadded():
            model = load(plan, dry, checkpoint=ShapesOnly(spec), progress=False, timeline=timeline)
            return run_workload(model, workload)
    except RuntimeError as error:  # tensors on two devices, an operator that wants data: the model's code, not ours
        raise PlanError(f"{spec.name}: this plan cannot be replayed: {first_line(error)}") from error
