"""Realise a plan: a plain transformers ``PreTrainedModel`` whose weights have the plan's formats and places.

Weights are read, converted, quantised and moved one module at a time, so peak RAM stays near the final size. The dry
run of a forecast goes through the very same code with tensors on meta.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from lowvram_lab.engine.fill import Filler, must_be_mapped, place_buffers
from lowvram_lab.engine.fuse import separate
from lowvram_lab.engine.layers import import_kernels
from lowvram_lab.engine.loaded import Loaded, Weights, loaded
from lowvram_lab.engine.nested import Planes
from lowvram_lab.engine.placement import Placement, block_devices
from lowvram_lab.engine.prompt_kernels import use_our_kernels
from lowvram_lab.engine.room import check_room_in_ram, check_room_on_disk
from lowvram_lab.errors import LowvramError, PlanError
from lowvram_lab.machine import cpu_threads
from lowvram_lab.memory.cuda import open_gpu
from lowvram_lab.memory.disk import WeightsOnDisk
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.memory.host import give_back_heap
from lowvram_lab.memory.recording import Recording
from lowvram_lab.memory.timeline import Timeline
from lowvram_lab.model.checkpoint import ShapesOnly, check_tensor
from lowvram_lab.model.formats import DTYPES, get_format
from lowvram_lab.model.geometry import keep_frequencies
from lowvram_lab.model.plan import Plan
from lowvram_lab.model.rules import Assignment
from lowvram_lab.model.source import find_source
from lowvram_lab.model.spec import ModuleSpec, build_on_meta
from lowvram_lab.model.tensor_names import refuse_differing_ties
from lowvram_lab.quiet import quiet_transformers
from lowvram_lab.units import MiB
from lowvram_lab.weights.stored import check_low_plane, check_stored

logger = logging.getLogger(__name__)

TRIMMED_BYTES = 4 * MiB
"""Of weights that are filled before the heap is given back."""


def load(
    plan: Plan,
    gpu: Gpu | None = None,
    *,
    checkpoint: Weights | None = None,
    progress: bool = True,
    timeline: bool = False,
) -> PreTrainedModel:
    """Loads the plan's model onto a GPU, real or simulated, within its budget.

    Args:
        plan: What goes where, in which format.
        gpu: From ``open_gpu``; by default this machine's GPU without a limit.
        checkpoint: Anything with ``read(name)``, ``shape(name)`` and ``in``; by default the plan's source is fetched.
        progress: Show a progress bar.
        timeline: Record every allocation from here to the end of the next ``run_workload``, whose profile then has it.

    Returns:
        A ``PreTrainedModel`` in eval mode: ``generate``, streamers and chat templates work. ``model.hf_device_map``
        tells the placement, ``model.lowvram.plan`` the plan, ``model.lowvram.gpu`` the GPU.

    Raises:
        PlanError: The plan does not fit the model, or has more threads than the machine.
        BudgetError: RAM is too small for the CPU's part, or another process holds the GPU's memory.
        CheckpointError: A weight is missing, has the wrong shape, or is not finite.
        torch.OutOfMemoryError: The budget is too small; nothing of the model stays on the GPU.
    """
    spec = plan.spec
    gpu = gpu or open_gpu()
    if checkpoint is None:
        checkpoint = find_source(plan.model).checkpoint(progress)
    _check_names_and_shapes(plan, checkpoint)
    if not gpu.meta:
        _check_machine(plan, spec.modules, checkpoint, gpu)
    config = spec.pretrained_config()
    config.dtype = DTYPES[plan.dtype]
    model = _empty(config)
    if gpu.meta:
        keep_frequencies(model)
    import_kernels({assignment.format for assignment in plan.modules.values()}, dry=gpu.meta)
    gpu.recording = recording = Recording()
    if timeline:
        gpu.meter.timeline = recording.timeline = Timeline()
    with (
        cpu_threads(plan.threads),
        gpu.phase("load"),
        gpu.meter.scope(category="weights"),
        torch.no_grad(),
    ):
        model.lowvram = Loaded(plan, gpu, checkpoint, recording, planes=Planes(plan.decodes_by != "fast"))
        _fill(model, spec.modules, plan, progress)
    _read_generation_config(model, getattr(checkpoint, "directory", None))
    return model.eval()


def replan(model: PreTrainedModel, plan: Plan, *, progress: bool = True) -> None:
    """Makes a loaded model realise another plan: only modules whose format, device or solver changes are loaded again.

    Decoders and KV caches made before are of the old plan; make new ones.

    Args:
        model: From ``load``.
        plan: Another plan of the same model and dtype.
        progress: Show a progress bar.

    Raises:
        PlanError: The plan does not fit the model or the machine, or has another dtype.
        BudgetError: See ``load``.
        torch.OutOfMemoryError: No room on the GPU for what is to come. After this, as after any error or interrupt,
            the model is as it was before.
    """
    state = loaded(model)
    old = state.plan
    plan = plan.made_for(old.spec)
    if plan.dtype != old.dtype:
        raise PlanError(f"this model computes in {old.dtype}, found a plan in {plan.dtype}; load it anew")
    if plan == old:
        return
    changed = [module for module in plan.spec.modules if _is_changed(module, old, plan)]
    if low_planes_alone(old, plan):
        _move_low_planes(model, changed, plan)
        return
    _check_machine(plan, changed, state.weights, state.gpu, old)
    for decoder in list(state.decoders):  # they hold weights, and a KV cache, of the old plan
        decoder.release()
    try:
        _realise(model, changed, plan, progress)
    except BaseException:  # Ctrl-C too
        _realise(model, changed, old, progress)
        raise
    if plan.decodes_by != old.decodes_by:
        state.planes.both = plan.decodes_by != "fast"


def _is_changed(module: ModuleSpec, before: Plan, after: Plan) -> bool:
    """Whether a module is to be loaded again: for another format, another place, or codes of another solver."""
    if before.modules[module.name] != after.modules[module.name]:
        return True
    quantised = get_format(after.modules[module.name].format).kind != "float"
    return before.solver != after.solver and quantised and module.name not in after.spec.stored


def low_planes_alone(before: Plan, after: Plan) -> bool:
    """Whether plans differ in the places of low planes alone, which a file holds: all else stays, a KV cache too."""
    if before == after or after.stream_from is not None or replace(after, modules=before.modules) != before:
        return False
    pairs = ((name, before.modules[name], new) for name, new in after.modules.items())
    moved = [(name, old, new) for name, old, new in pairs if old != new]
    return all(new.low and replace(new, low=old.low) == old and name in after.spec.stored for name, old, new in moved)


def _move_low_planes(model: PreTrainedModel, changed: list[ModuleSpec], plan: Plan) -> None:
    """Realises a plan whose low planes alone lie elsewhere; after an error they are where they were."""
    state = loaded(model)
    before = state.plan
    for decoder in list(state.decoders):
        decoder.release()
    with state.gpu.active(), state.gpu.meter.scope(category="weights"), torch.no_grad():
        try:
            _put_low_planes(model, changed, plan)
        except BaseException:  # Ctrl-C too
            _put_low_planes(model, changed, before)
            raise


def _put_low_planes(model: PreTrainedModel, modules: list[ModuleSpec], plan: Plan) -> None:
    state = loaded(model)
    filler = Filler(model, plan, state.weights, state.gpu, state.planes)
    disk = None
    for module in modules:
        model.get_submodule(module.name).low = None  # what leaves makes room for what comes
    for module in modules:
        with state.gpu.meter.scope(owner=module.name):
            filler.fill_low_plane(module)
        if plan.modules[module.name].low == "disk" and not state.gpu.meta:
            disk = disk or WeightsOnDisk()
            disk.map(model.get_submodule(module.name).low)
    if disk is not None:
        state.mapped.append(disk)
    state.plan = plan


def _empty(config: PretrainedConfig) -> PreTrainedModel:
    model = build_on_meta(config)
    use_our_kernels(model)
    return model


def _realise(model: PreTrainedModel, changed: list[ModuleSpec], plan: Plan, progress: bool) -> None:
    state = loaded(model)
    if state.placement is not None:
        state.placement.remove()
    import_kernels({assignment.format for assignment in plan.modules.values()}, dry=state.gpu.meta)
    state.gpu.recording.first_oom = None  # of the plan before
    with (
        cpu_threads(plan.threads),
        state.gpu.active(),
        state.gpu.meter.scope(category="weights"),
        torch.no_grad(),
    ):
        _put_back(model, [m.name for m in changed])
        # the owner of a shared weight before who shares it; what leaves the GPU makes room for what comes
        ordered = sorted(changed, key=lambda m: (m.tied_to is not None, plan.modules[m.name].device == "gpu"))
        _fill(model, ordered, plan, progress)


def _check_machine(
    plan: Plan, modules: Sequence[ModuleSpec], weights: Weights, gpu: Gpu, before: Plan | None = None
) -> None:
    """Refuses, before any of these modules is loaded, what this machine has not got (any more)."""
    cores = os.cpu_count() or 1
    if plan.threads and plan.threads > cores:
        raise PlanError(f"expected 1 to {cores} threads on this machine, found a plan with {plan.threads}")
    check_room_in_ram(plan, gpu, modules, before)
    check_room_on_disk(sum(plan.module_bytes(m, "disk") for m in modules if must_be_mapped(m, plan, weights)))
    freed = before.weight_bytes("gpu") if before else 0
    gpu.check_room(plan.weight_bytes("gpu") - freed)


def _put_back(model: PreTrainedModel, names: list[str]) -> None:
    """Puts the class's own modules, empty, where others with weights are: their memory is free for what comes."""
    if not names:
        return
    separate(model, set(names))
    fresh = _empty(model.config)
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, fresh.get_submodule(name))


def _fill(model: PreTrainedModel, modules: Sequence[ModuleSpec], plan: Plan, progress: bool) -> None:
    """Fills some modules, puts buffers where their blocks compute, and lets each block compute at its place."""
    state = loaded(model)
    gpu = state.gpu
    filler = Filler(model, plan, state.weights, gpu, state.planes)
    to_disk = [] if gpu.meta else [m for m in modules if must_be_mapped(m, plan, state.weights)]
    disk, filled = WeightsOnDisk() if to_disk else None, 0
    with gpu.noting_oom(state):
        for module in tqdm(modules, desc="load", unit="module", disable=not progress or gpu.meta, leave=False):
            with gpu.meter.scope(owner=module.name):
                filler.fill(module)
                if module in to_disk:
                    _map(model.get_submodule(module.name), plan.modules[module.name], disk)
            filled += 0 if gpu.meta else plan.module_bytes(module)
            if filled >= TRIMMED_BYTES:  # temporaries leave gaps between the weights, in sum as large as these
                give_back_heap()
                filled = 0
        if disk is not None:
            state.mapped.append(disk)
        devices = block_devices(model, plan)
        place_buffers(model, devices, gpu)
        state.placement = Placement(model, devices, plan, gpu)
    state.plan = plan
    vars(model).pop("save_pretrained", None)
    if any(get_format(assignment.format).kind != "float" for assignment in plan.modules.values()):
        model.save_pretrained = _refuse_to_save
    model.hf_device_map = {path: _device_name(device, gpu) for path, device in devices.items()}


def _map(module: torch.nn.Module, assignment: Assignment, disk: WeightsOnDisk) -> None:
    """Puts a module's weights on disk: all of them, or the low plane alone."""
    if assignment.device == "disk":
        disk.map(module)
    if assignment.low == "disk":
        disk.map(module.low)


def _refuse_to_save(*args, **kwargs):
    """Stands in for ``save_pretrained``, which would write codes that stock transformers reads as weights."""
    raise LowvramError(
        "this model holds quantised weights, and save_pretrained would write them in a form that stock transformers "
        "misreads; keep the original model and the plan (plan.to_json)"
    )


def _read_generation_config(model: PreTrainedModel, directory: Path | None) -> None:
    """The checkpoint's own generation settings (stop ids above all), where it has a file of them."""
    if directory is not None and (directory / "generation_config.json").is_file():
        try:
            with quiet_transformers():
                model.generation_config = GenerationConfig.from_pretrained(directory)
        except Exception as error:  # an odd file must not stop a model whose config names its stop ids as well
            logger.warning("ignoring %s: %s", directory / "generation_config.json", error)


def _check_names_and_shapes(plan: Plan, checkpoint: Weights) -> None:
    spec = plan.spec
    refuse_differing_ties(spec, checkpoint)
    for module in spec.modules:
        for key, shape in module.own.items():
            if key == "weight" and module.name in spec.stored and not isinstance(checkpoint, ShapesOnly):
                fmt = get_format(plan.modules[module.name].format)
                check_stored(module, fmt, checkpoint)
                if fmt.planes > 1:
                    check_low_plane(module, fmt, checkpoint)
            else:
                check_tensor(f"{module.name}.{key}", shape, checkpoint)


def _device_name(device: str, gpu: Gpu) -> str:
    return str(gpu.device) if device == "gpu" and gpu.kernels == "cuda" and not gpu.meta else device
