"""Remember what operators return on meta, by the shapes they were given, so that a dry run pays for each only once.

A decoder's layers are alike: of some ten thousand operator calls in a forecast a few hundred differ. torch works each
of them out in Python (about 0.1 ms); a remembered one costs a fraction of that.
"""

import torch


class MetaResults:
    """Runs operators over meta tensors, answering repeated calls from memory.

    Only results with storage of their own are remembered. Views and in-place operators say so in their schema; one
    (``_unsafe_view``) does not, so the storages are compared too.
    """

    def __init__(self):
        self._layouts: dict[tuple, list[tuple] | tuple] = {}
        self._fresh: dict[object, bool] = {}

    def __call__(self, func, args: tuple, kwargs: dict):
        """The operator's result: equal in shape, strides and dtype to what ``func(*args, **kwargs)`` gives on meta."""
        fresh = self._fresh.get(func)
        if fresh is None:
            fresh = self._fresh[func] = _returns_fresh_tensors(func)
        key = (func, _signature(args), _signature(tuple(sorted(kwargs.items())))) if fresh else None
        layout = self._layouts.get(key) if key else None
        if layout is None:
            result = func(*args, **kwargs)
            if key and (layout := _layout(result)) is not None and not _shares_storage(result, args):
                self._layouts[key] = layout
            return result
        return _empty(layout) if isinstance(layout, tuple) else tuple(_empty(one) for one in layout)


def _returns_fresh_tensors(func) -> bool:
    schema = func._schema
    aliases = any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))
    return not aliases and all(str(r.type) == "Tensor" for r in schema.returns)


def _signature(value):
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device.type, value.shape, value.stride())
    if isinstance(value, list | tuple):
        return tuple(_signature(item) for item in value)
    return (type(value), value)  # 1 and 1.0 and True are equal as keys, and promote differently


def _layout(result):
    if isinstance(result, torch.Tensor):
        return (result.shape, result.stride(), result.dtype) if result.is_meta else None
    if isinstance(result, tuple) and all(isinstance(item, torch.Tensor) and item.is_meta for item in result):
        return [(item.shape, item.stride(), item.dtype) for item in result]
    return None


def _shares_storage(result, args: tuple) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
    return any(tensor.untyped_storage()._cdata in storages for tensor in _tensors((result,)))


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _empty(layout: tuple) -> torch.Tensor:
    shape, stride, dtype = layout
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
