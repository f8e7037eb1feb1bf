"""Fill a model's modules with their weights, one at a time, in the plan's formats and at its places."""

from dataclasses import dataclass

import torch

from lowvram_lab.engine.layers import Move, Quantized, quantized_embedding, quantized_linear
from lowvram_lab.engine.loaded import Weights
from lowvram_lab.engine.nested import Elsewhere, NestedLinear, Planes
from lowvram_lab.errors import CheckpointError
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.checkpoint import Checkpoint
from lowvram_lab.model.formats import DTYPES, Format, get_format
from lowvram_lab.model.plan import Plan, compute_place
from lowvram_lab.model.spec import ModuleSpec
from lowvram_lab.weights.solvers import is_finite
from lowvram_lab.weights.stored import kept_tensors, stored_low_plane, stored_tensors


@dataclass(frozen=True)
class Filler:
    """What filling any module of one model needs.

    Attributes:
        model: Its modules are empty, or filled by an earlier plan.
        plan: Formats and places.
        weights: Where weights come from.
        gpu: Where those of the GPU go.
        planes: Of weights in two, which are multiplied by.
    """

    model: torch.nn.Module
    plan: Plan
    weights: Weights
    gpu: Gpu
    planes: Planes

    def fill(self, module: ModuleSpec) -> None:
        """Gives a module its weights; a quantised one is replaced by a layer of its format."""
        if get_format(self.plan.modules[module.name].format).kind == "float":
            target = self.model.get_submodule(module.name)
            for key in module.parameters:
                setattr(target, key, self._parameter(module, key))
            return
        parent, _, child = module.name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, self._quantised(module).eval())

    def _quantised(self, module: ModuleSpec) -> Quantized:
        """A layer of the module's format, with its codes: shared, as they are stored, or made now."""
        fmt = get_format(self.plan.modules[module.name].format)
        layer = self._empty_layer(module)
        if module.tied_to:
            for key, buffer in self.model.get_submodule(module.tied_to).named_buffers(recurse=False):
                layer.register_buffer(key, buffer)
        elif module.name in self.plan.spec.stored and not self.gpu.meta:
            with self.gpu.unmetered():  # read and unpacked in RAM: of that no meter need see every step
                stored = stored_tensors(module.name, fmt, self.weights)
            layer.fill(stored, self._mover(module))
            if isinstance(layer, NestedLinear):
                self._fill_low(module, layer)
        elif (kept := self._kept(module, fmt)) is not None:
            layer.fill(kept, self._mover(module))
        else:
            weight = self._read(module, "weight")
            weight = weight.T.contiguous() if module.transposed else weight
            if isinstance(layer, NestedLinear):
                layer.store(weight, self._mover(module), self.plan.solver, self._mover(module, low=True))
            else:
                layer.store(weight, self._mover(module), self.plan.solver)
        if "bias" in module.parameters:
            layer.bias = self._parameter(module, "bias")
        return layer

    def _kept(self, module: ModuleSpec, fmt: Format) -> dict[str, torch.Tensor] | None:
        """See ``kept_tensors``."""
        if self.gpu.meta or fmt.planes > 1:
            return None
        with self.gpu.unmetered():
            return kept_tensors(module.name, fmt, self.weights)

    def fill_low_plane(self, module: ModuleSpec) -> None:
        """Gives a module that is there the low plane of the plan, as it is stored."""
        layer = self.model.get_submodule(module.name)
        empty = self._empty_layer(module)
        layer.low, layer.elsewhere = empty.low.eval(), empty.elsewhere
        self._fill_low(module, layer)

    def _fill_low(self, module: ModuleSpec, layer: NestedLinear) -> None:
        mover = self._mover(module, low=True)
        if self.gpu.meta:
            layer.low.store(torch.empty(module.weight_shape, device="meta"), mover)
        else:
            fmt = get_format(self.plan.modules[module.name].format)
            with self.gpu.unmetered():
                stored = stored_low_plane(module.name, fmt, self.weights)
            layer.low.fill(stored, mover)

    def _empty_layer(self, module: ModuleSpec) -> Quantized:
        assignment = self.plan.modules[module.name]
        fmt = get_format(assignment.format)
        rows, columns = module.weight_shape
        if module.kind == "embedding":
            return quantized_embedding(rows, columns, fmt, DTYPES[self.plan.dtype], module.scale)
        place = compute_place(assignment.device)
        kernels, card = self.gpu.kernels_of(place), self.gpu.card
        if fmt.planes == 1:
            return quantized_linear(columns, rows, fmt, kernels, shared=module.tied_to is not None, card=card)
        low_place = compute_place(assignment.low)
        low = quantized_linear(columns, rows, fmt.low_plane, self.gpu.kernels_of(low_place), card=card)
        elsewhere = None if low_place == place else Elsewhere(self.gpu, low_place, place)
        return NestedLinear(columns, rows, fmt, kernels, low, self.planes, elsewhere, card)

    def _parameter(self, module: ModuleSpec, key: str) -> torch.nn.Parameter:
        """A parameter in the plan's dtype at its place, or the one that it shares."""
        if key not in module.own:
            return self.model.get_parameter(module.shared.get(key, f"{module.tied_to}.weight"))
        converted = self._read(module, key).to(DTYPES[self.plan.dtype])
        if not converted.is_meta and not is_finite(converted):
            raise CheckpointError(f"{module.name}.{key}: a weight is too large for {self.plan.dtype}; plan with bf16")
        return torch.nn.Parameter(self._mover(module)(converted), requires_grad=False)

    def _read(self, module: ModuleSpec, key: str) -> torch.Tensor:
        name = f"{module.name}.{key}"
        tensor = self.weights.read(name)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise CheckpointError(f"{name}: expected a 16- or 32-bit float weight, found {tensor.dtype}")
        if not tensor.is_meta and not is_finite(tensor):
            raise CheckpointError(f"{name}: expected finite weights, found NaN or infinite values; fetch it anew")
        return tensor

    def _mover(self, module: ModuleSpec, low: bool = False) -> Move:
        assignment = self.plan.modules[module.name]
        place = compute_place(assignment.low if low else assignment.device)
        return lambda tensor: self.gpu.move(tensor, place)


def must_be_mapped(module: ModuleSpec, plan: Plan, weights: Weights) -> bool:
    """Whether a module on disk has to be written: not where the checkpoint's own file holds it as it is to be."""
    assignment, dtype = plan.modules[module.name], DTYPES[plan.dtype]
    if "disk" not in (assignment.device, assignment.low) or module.tied_to:
        return False
    as_it_is = get_format(assignment.format).kind == "float" and isinstance(weights, Checkpoint)
    return not as_it_is or any(weights.dtype(f"{module.name}.{key}") != dtype for key in module.parameters)


def place_buffers(model: torch.nn.Module, devices: dict[str, str], gpu: Gpu) -> None:
    """Rotary frequencies, masks and the like: made by a constructor on the CPU, wanted where their block computes."""
    for path, module in model.named_modules():
        if isinstance(module, Quantized):  # its codes were put at their places, a low plane's perhaps at another
            continue
        blocks = [block for block in devices if block in ("", path) or path.startswith(f"{block}.")]
        for key, tensor in module._buffers.items() if blocks else ():
            if tensor is not None and not tensor.is_meta:
                with gpu.meter.scope(owner=path):
                    place = compute_place(devices[max(blocks, key=len)])
                    module._buffers[key] = gpu.move(gpu.own(tensor), place)
