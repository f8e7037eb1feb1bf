"""Forecast what a plan will take: load, prefill and decode replayed on meta tensors. No GPU, no weights.

The replay is the real loader and the real decode loop over tensors without data, counted by the real meter, through a
model of CUDA's allocator. Nothing here is a formula, so what the code does is what is forecast.

Derived in: notebooks/01_analyze_the_oom.ipynb
"""

import torch

from lowvram_lab.engine.load import load
from lowvram_lab.errors import PlanError, first_line
from lowvram_lab.memory.attention import ImitateAttention
from lowvram_lab.memory.budget import GpuBudget
from lowvram_lab.memory.dry_run import DryRunGpu
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.checkpoint import ShapesOnly
from lowvram_lab.model.geometry import unpadded
from lowvram_lab.model.plan import Plan
from lowvram_lab.planner.measure import run_workload
from lowvram_lab.planner.profile import MemoryProfile, Workload

LAST_PIECES = 2
"""Pieces of a prompt that a sketch reads: the last whole one, which is where the peak is, and the rest."""


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
    workload = workload or Workload.full_context(plan.context)
    if workload.tokens > plan.context:
        raise PlanError(f"the workload has {workload.tokens} tokens, the plan a context of {plan.context}")
    opened = gpu if isinstance(gpu, Gpu) else None
    budget = opened.budget if opened else None if gpu is None else GpuBudget.parse(gpu)
    of_card = opened.card_bytes if opened else None
    dry = DryRunGpu(budget, opened.kernels if opened else None, expandable_segments, card_bytes=of_card)
    return _replay(plan, dry, workload, timeline=timeline)


def sketch(plan: Plan, budget: GpuBudget, workload: Workload | None = None) -> MemoryProfile:
    """A forecast for searches, in a fraction of the time where prompts are read in many pieces: only the last are.

    Those see the most tokens, so the allocated peak is the forecast's; what the allocator keeps of all the pieces
    before, and has to give back, is not in it. A plan that is chosen is forecast in full.
    """
    workload = workload or Workload.full_context(plan.context)
    return _replay(plan, DryRunGpu(budget), workload, last_pieces=LAST_PIECES)


def forecast_if_fits(plan: Plan, budget: GpuBudget, workload: Workload | None = None) -> MemoryProfile | None:
    """The forecast of a plan that fits; ends where it does not, which is sooner than to go on to the whole peak."""
    sketched = sketch_if_fits(plan, budget, workload)
    return sketched and in_full(plan, sketched)


def in_full(plan: Plan, sketched: MemoryProfile) -> MemoryProfile | None:
    """The forecast of a plan whose sketch fits, ``None`` where not all pieces of its prompt do."""
    if is_whole(plan, sketched.workload):
        return sketched
    return _until_it_fails(plan, sketched.budget, sketched.workload, None)


def sketch_if_fits(plan: Plan, budget: GpuBudget, workload: Workload | None = None) -> MemoryProfile | None:
    """The sketch of a plan that fits by it, else ``None``."""
    return _until_it_fails(plan, budget, workload or Workload.full_context(plan.context), LAST_PIECES)


def _until_it_fails(plan: Plan, budget: GpuBudget, workload: Workload, last_pieces: int | None) -> MemoryProfile | None:
    try:
        return _replay(plan, DryRunGpu(budget, goes_on=False), workload, last_pieces=last_pieces)
    except torch.OutOfMemoryError:
        return None


def is_whole(plan: Plan, workload: Workload) -> bool:
    """Whether a sketch reads the whole prompt, and so is the forecast."""
    return plan.piece_tokens is None or workload.prompt_tokens <= LAST_PIECES * plan.piece_tokens


def _replay(
    plan: Plan, dry: DryRunGpu, workload: Workload, *, timeline: bool = False, last_pieces: int | None = None
) -> MemoryProfile:
    spec = plan.spec
    try:
        with ImitateAttention(dry), unpadded():
            model = load(plan, dry, checkpoint=ShapesOnly(spec), progress=False, timeline=timeline)
            return run_workload(model, workload, last_pieces)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # tensors on two devices, an operator that wants data: the model's code, not ours
        raise PlanError(f"{spec.name}: this plan cannot be replayed: {first_line(error)}") from error
