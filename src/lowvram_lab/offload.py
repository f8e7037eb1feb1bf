"""Let a model's blocks compute where the plan puts them: hidden states travel, weights and KV cache stay.

``attach`` wraps the ``forward`` of the model and of every placed block; ``detach`` takes all of it back. A block on the
CPU computes on the CPU. (accelerate's offload hooks move its weights to the GPU for every call instead.)
"""

import functools
import inspect
import weakref

import torch

_WRAPPED = "_lowvram_wrapped"


def block_places(model, plan, spec) -> dict[str, str]:
    """The place of every block that computes: embedding, decoder layers, final norm, rotary embedding, head.

    Blocks without weights (rotary embedding) live where the first decoder layer does.

    Returns:
        Module path → ``"gpu"`` or ``"cpu"``.
    """
    layers = plan.layer_devices(spec)
    places = {f"{spec.layers_path}.{index}": place for index, place in enumerate(layers)}
    for module in spec.modules:
        if module.layer is None:
            places[module.name] = plan.modules[module.name].device
    for path, module in model.named_modules():
        inside = any(path == block or path.startswith(block + ".") for block in places)
        if not inside and dict(module.named_buffers(recurse=False)):
            places[path] = layers[0]
    return places


def attach(model, places: dict[str, str], spec, gpu) -> None:
    """Makes each block move its inputs to its place and charge its allocations there. Undone by ``detach``.

    Args:
        model: A model whose weights already are where the plan says.
        places: From ``block_places``.
        spec: The model's spec.
        gpu: The ``Gpu`` the model lives on.
    """
    first = places[f"{spec.layers_path}.0"]
    moved: dict[tuple[int, str], tuple] = {}
    embeddings = {module.name for module in spec.modules if module.kind == "embedding" and module.layer is None}
    blocks = {path: place for path, place in places.items() if not _contains_another(path, places)}
    for path, place in blocks.items():
        # masks and rotary tables are made once, where the first layer is: so embeddings (of tokens, in some models of
        # positions too) hand over there
        hand_over = first if path == spec.embedding or path in embeddings else None
        block = model.get_submodule(path)
        _wrap(block, functools.partial(_block_forward, path, place, hand_over, moved, gpu))
        if gpu.simulated:  # the meter is on anyway, so let it name the very module; on CUDA ``watch`` does when asked
            for name, inner in block.named_modules(prefix=path):
                if inner is not block:
                    _wrap(inner, functools.partial(_owned_forward, name, gpu))
    _wrap(model, functools.partial(_model_forward, first, moved, gpu))


def detach(model) -> None:
    """Removes what ``attach`` put on: every ``forward`` is the class's own again."""
    for module in model.modules():
        if _WRAPPED in vars(module):
            delattr(module, _WRAPPED)
            del module.forward


def _wrap(module, around) -> None:
    """Puts ``around`` before the module's own forward, without a reference cycle: a deleted model frees its memory."""
    forward = weakref.WeakMethod(module.forward)
    wrapped = functools.partial(around, lambda *args, **kwargs: forward()(*args, **kwargs))
    wrapped.__signature__ = inspect.signature(module.forward)  # generate asks for it
    setattr(module, _WRAPPED, True)
    module.forward = wrapped


def _model_forward(first, moved, gpu, original, *args, **kwargs):
    with gpu.lock, gpu.active(), gpu.meter.scope(owner="model", place=first):
        # the embedding fetches its ids itself; everything else (attention mask, positions) is used beside its output
        kwargs = {key: value if key == "input_ids" else _to_place(value, first, gpu) for key, value in kwargs.items()}
        try:
            return original(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            gpu.note_oom(error)
            raise
        finally:
            moved.clear()


def _contains_another(path: str, places) -> bool:
    """Whether a module (with a buffer of its own) holds other blocks: it runs no code that a place would matter to."""
    return any(other.startswith(path + ".") for other in places)


def _block_forward(path, place, hand_over, moved, gpu, original, *args, **kwargs):
    def here(value):
        return _to_place(value, place, gpu)

    args = tuple(here(value) for value in args)
    kwargs = {key: _shared(value, place, moved, here) for key, value in kwargs.items()}
    with gpu.meter.scope(owner=path, place=place):
        try:
            result = original(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            gpu.note_oom(error)  # here, where the block's name is still known
            raise
    return result if hand_over is None else _to_place(result, hand_over, gpu)


def _owned_forward(path, gpu, original, *args, **kwargs):
    with gpu.meter.scope(owner=path):
        return original(*args, **kwargs)


def _shared(value, place, moved, here):
    """Keyword inputs (mask, rotary tables) are the same for every layer: moved once a forward, not once a layer."""
    if not isinstance(value, torch.Tensor | tuple):
        return value
    key = (id(value), place)
    if key not in moved:
        moved[key] = (value, here(value))  # the original is kept too, so that its id stays its own
    return moved[key][1]


def _to_place(value, place, gpu):
    if isinstance(value, torch.Tensor):
        return gpu.move(value, place)
    if isinstance(value, tuple):
        return tuple(_to_place(item, place, gpu) for item in value)
    return value
