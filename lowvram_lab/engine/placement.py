"""Let a model's blocks compute where the plan puts them: hidden states travel, weights and KV cache stay.

``Placement`` wraps the ``forward`` of the model and of every placed block; ``remove`` takes all of it back. A block on
the CPU computes on the CPU. (accelerate's offload hooks move its weights to the GPU for every call instead.) The
exception is a long prompt, for which a plan may say that weights travel after all: see ``travel.py``.
"""

import functools
import inspect
import weakref
from collections import UserDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from transformers import Cache

from lowvram_lab.engine.travel import TravellingWeights, cache_can_visit
from lowvram_lab.machine import cpu_threads
from lowvram_lab.memory.gpu import Gpu
from lowvram_lab.model.plan import Plan, compute_place


@dataclass
class _Route:
    """What the blocks of one model share: where the first layer computes, what has moved, the weights that travel."""

    home: str
    head: str
    embedding: str
    threads: int | None
    gpu: Gpu
    weights: TravellingWeights
    model: weakref.ref
    first: str  # masks and rotary tables are made once, where the first layer computes in this pass
    ids_stay: bool  # whether the embedding alone reads the token ids, and fetches them itself
    before_layers: bool | None = None  # in this pass, so far; outside of one, neither
    moved: dict[tuple[int, str], tuple] = field(default_factory=dict)

    def noting_oom(self, block: str = "") -> AbstractContextManager[None]:
        """Says on an out-of-memory error whose it is, while the block's name is still known."""
        return self.gpu.noting_oom(getattr(self.model(), "lowvram", None), block)


def block_devices(model: torch.nn.Module, plan: Plan) -> dict[str, str]:
    """Path of every block that computes (embedding, decoder layers, final norm, head) → its device in the plan.

    Blocks without weights (rotary embedding) live where the first decoder layer computes.
    """
    layers = plan.layer_devices()
    devices = {f"{plan.spec.layers_path}.{index}": device for index, device in enumerate(layers)}
    for module in plan.spec.modules:
        if module.layer is None:
            devices[module.name] = plan.modules[module.name].device
    for path, module in model.named_modules():
        inside = any(path == block or path.startswith(block + ".") for block in devices)
        if not inside and dict(module.named_buffers(recurse=False)):
            devices[path] = compute_place(layers[0])
    return devices


class Placement:
    """Makes each block of a model move its inputs to its place and charge its allocations there, until ``remove``.

    Args:
        model: A model whose weights already are where the plan says.
        devices: From ``block_devices``.
        plan: The plan.
        gpu: The ``Gpu`` the model lives on.
    """

    def __init__(self, model: torch.nn.Module, devices: dict[str, str], plan: Plan, gpu: Gpu):
        spec = plan.spec
        self._wrapped: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self._weights = TravellingWeights(model, devices, plan, gpu)
        home = compute_place(devices[f"{spec.layers_path}.0"])
        ids_stay = not any(spec.embedding.startswith(f"{path}.") for path in devices)
        route = _Route(
            home, spec.head, spec.embedding, plan.threads, gpu, self._weights, weakref.ref(model), home, ids_stay
        )
        outside = {m.name for m in spec.modules if m.kind == "linear" and m.layer is None and m.name != spec.head}
        try:
            for path, device in devices.items():
                if any(other.startswith(path + ".") for other in devices):
                    continue  # it holds other blocks, and runs no code that a place would matter to
                block, is_layer = model.get_submodule(path), path.startswith(f"{spec.layers_path}.")
                behind = plan.layer_places()[-1] if path in outside else None
                around = functools.partial(_block_forward, path, compute_place(device), is_layer, behind, route)
                self._wrap(block, around)
                if gpu.simulated:  # the meter is on anyway: let it name the very module; on CUDA ``watch`` does
                    for name, inner in block.named_modules(prefix=path):
                        if inner is not block:
                            self._wrap(inner, functools.partial(_owned_forward, name, gpu))
            self._wrap(model, functools.partial(_model_forward, route))
        except BaseException:
            self.remove()
            raise

    def _wrap(self, module: torch.nn.Module, around: Callable) -> None:
        """Puts ``around`` before a module's own forward, without a cycle: a deleted model frees its memory."""
        forward = weakref.WeakMethod(module.forward)
        wrapped = functools.partial(around, lambda *args, **kwargs: forward()(*args, **kwargs))
        wrapped.__signature__ = inspect.signature(module.forward)  # generate asks for it
        self._wrapped.add(module)
        module.forward = wrapped

    def remove(self) -> None:
        """Gives every module its class's own ``forward`` back, and unlocks the memory of weights that travel."""
        self._weights.close()
        for module in list(self._wrapped):
            vars(module).pop("forward", None)
        self._wrapped.clear()


def _model_forward(route: _Route, original: Callable, *args, **kwargs):
    gpu, stated = route.gpu, kwargs.get("use_cache")
    makes_a_cache = getattr(route.model().config, "use_cache", True) if stated is None else stated
    can_visit = cache_can_visit(_cache_among(args, kwargs), makes_a_cache)
    ids = args[0] if args else kwargs.get("input_ids")
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    with gpu.lock, cpu_threads(route.threads), gpu.active(), route.weights.opened_for(ids, can_visit) as travelling:
        route.first, route.before_layers = "gpu" if travelling else route.home, True
        # beside the embedding's output are used: attention mask, positions; in some models (RoBERTa) the ids as well
        args = args if route.ids_stay else _to_place(args, route.first, gpu)
        kwargs = {
            key: value if key == "input_ids" and route.ids_stay else _to_place(value, route.first, gpu)
            for key, value in kwargs.items()
        }
        try:
            with route.noting_oom(), gpu.meter.scope(owner="model", place=route.first):
                return original(*args, **kwargs)
        finally:
            route.before_layers = None
            route.moved.clear()


def _block_forward(
    path: str, place: str, is_layer: bool, behind: str | None, route: _Route, original: Callable, *args, **kwargs
):
    route.before_layers = route.before_layers and not is_layer
    if path in route.weights:
        with route.weights.visiting(path, _cache_among(args, kwargs)):
            return _compute(path, "gpu", route, original, args, kwargs)
    result = _compute(path, route.weights.place(path, place), route, original, args, kwargs)
    # what comes before the layers hands over where masks are made; products behind, where the last layer left its own
    by_itself = route.before_layers is None and path == route.embedding
    wanted = route.first if route.before_layers or by_itself else behind
    return result if wanted is None else _to_place(result, wanted, route.gpu)


def _compute(path: str, place: str, route: _Route, original: Callable, args: tuple, kwargs: dict):
    def here(value: object) -> object:
        return _to_place(value, place, route.gpu)

    args = tuple(here(value) for value in args)
    if path == route.head and len(args) == 1 and args[0].dim() == 3 and not kwargs:
        # over (batch, 1, hidden) cut out of a prompt, torch would copy all of a 16-bit head: it is given rows
        shape, args = args[0].shape, (args[0].reshape(-1, args[0].shape[-1]),)
        original, rows = (lambda x: rows(x).view(*shape[:-1], -1)), original
    kwargs = {key: _shared(value, place, route.moved, here) for key, value in kwargs.items()}
    with route.gpu.meter.scope(owner=path, place=place), route.noting_oom(path):
        return original(*args, **kwargs)


def _cache_among(args: tuple, kwargs: dict) -> Cache | None:
    """The KV cache that a layer is given: each architecture has its own name for it, or its own place."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def _owned_forward(path: str, gpu: Gpu, original: Callable, *args, **kwargs):
    with gpu.meter.scope(owner=path):
        return original(*args, **kwargs)


def _shared(value: object, place: str, moved: dict[tuple[int, str], tuple], here: Callable) -> object:
    """Keyword inputs (mask, rotary tables) are the same for every layer: moved once a forward, not once a layer."""
    if not isinstance(value, torch.Tensor | tuple):
        return here(value)
    key = (id(value), place)
    if key not in moved:
        moved[key] = (value, here(value))  # the original is kept too, so that its id stays its own
    return moved[key][1]


def _to_place(value: object, place: str, gpu: Gpu) -> object:
    if isinstance(value, torch.Tensor):
        return gpu.move(value, place)
    if isinstance(value, tuple):
        return tuple(_to_place(item, place, gpu) for item in value)
    if isinstance(value, UserDict):  # keys and values that layers read from one another: transformers' KVSharingDict
        value.update({key: _to_place(item, place, gpu) for key, item in value.items()})
    return value
