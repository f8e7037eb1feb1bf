"""Fill one module of a model with its weights, in the plan's format and at its place."""

import torch

from lowvram_lab.engine.layers import quantized_embedding, quantized_linear
from lowvram_lab.errors import CheckpointError
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.formats import DTYPES, get_format
from lowvram_lab.model.plan import Plan, compute_place
from lowvram_lab.model.spec import ModelSpec, ModuleSpec
from lowvram_lab.weights.solvers import is_finite
from lowvram_lab.weights.stored import stored_tensors


def fill_module(model, module: ModuleSpec, plan: Plan, spec: ModelSpec, checkpoint, gpu: Gpu) -> None:
    """Reads a module's weights and puts them into the model, whole and tied as the plan says."""
    assignment, dtype = plan.modules[module.name], DTYPES[plan.dtype]
    fmt, place = get_format(assignment.format), compute_place(assignment.device)
    target = model.get_submodule(module.name)

    def move(tensor):
        return gpu.move(tensor, place)

    def read(key):
        name = f"{module.name}.{key}"
        tensor = checkpoint.read(name)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise CheckpointError(f"{name}: expected a 16- or 32-bit float weight, found {tensor.dtype}")
        if not tensor.is_meta and not is_finite(tensor):
            raise CheckpointError(f"{name}: expected finite weights, found NaN or infinite values; fetch it anew")
        return tensor

    if fmt.kind == "float":
        for key in module.parameters:
            if key == "weight" and module.tied_to:
                value = model.get_submodule(module.tied_to).weight
            else:
                converted = read(key).to(dtype)
                if not converted.is_meta and not is_finite(converted):
                    raise CheckpointError(
                        f"{module.name}.{key}: a weight is too large for {plan.dtype}; plan with bf16"
                    )
                value = torch.nn.Parameter(move(converted), requires_grad=False)
            setattr(target, key, value)
        return
    rows, columns = module.weight_shape
    if module.kind == "embedding":
        layer = quantized_embedding(rows, columns, fmt, dtype)
    else:
        kernels = gpu.kernels_of(place)
        layer = quantized_linear(columns, rows, fmt, kernels, shared=module.tied_to is not None)
    if module.tied_to:
        for key, buffer in model.get_submodule(module.tied_to).named_buffers(recurse=False):
            layer.register_buffer(key, buffer)
    else:
        if module.name in spec.stored and not gpu.meta:
            layer.fill(stored_tensors(module.name, fmt, checkpoint), move)
        else:
            layer.store(read("weight"), move)
    if "bias" in module.parameters:
        layer.bias = torch.nn.Parameter(move(read("bias").to(dtype)), requires_grad=False)
    parent, _, child = module.name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.eval())


def must_be_mapped(module: ModuleSpec, plan: Plan, checkpoint) -> bool:
    """Whether a module on disk has to be written: not where the checkpoint's own file holds it as it is to be."""
    assignment, dtype = plan.modules[module.name], DTYPES[plan.dtype]
    if assignment.device != "disk" or module.tied_to:
        return False
    as_it_is = get_format(assignment.format).kind == "float" and isinstance(checkpoint, Checkpoint)
    return not as_it_is or any(checkpoint.dtype(f"{module.name}.{key}") != dtype for key in module.parameters)


def place_buffers(model, devices: dict[str, str], gpu: Gpu) -> None:
    """Rotary frequencies and the like: made by the constructor on the CPU, wanted where their block computes."""
    for path, module in model.named_modules():
        if path in devices and not dict(module.named_parameters(recurse=False)):
            for key, buffer in list(module.named_buffers(recurse=False)):
                if not buffer.is_meta:
                    with gpu.meter.scope(owner=path):
                        module._buffers[key] = gpu.move(gpu.own(buffer), compute_place(devices[path]))
