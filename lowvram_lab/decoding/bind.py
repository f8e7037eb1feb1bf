"""The layers and the head of a loaded model as ``llama_layer.py`` wants them: what is constant, and the tensors.

Derived in: notebooks/06_the_engine.ipynb
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import nn

from lowvram_lab.decoding.llama_layer import HeadShape, LayerShape, Product
from lowvram_lab.engine.cache_layers import FixedLayer
from lowvram_lab.engine.fuse import fuse
from lowvram_lab.engine.layers import Int4Linear, Int8Linear, QuantizedLinear
from lowvram_lab.engine.loaded import Loaded, loaded
from lowvram_lab.engine.nested import NestedLinear
from lowvram_lab.kernels.library import there
from lowvram_lab.kernels.product import format_as_tensor
from lowvram_lab.model.formats import get_format
from lowvram_lab.model.plan import Plan, compute_place

SHORT_HEAD = 8192
"""Tokens of the vocabulary that a draft chooses among, where the head would be much of what it reads."""

HEAD_BOUND = 0.2
"""Of the layers' bytes, from which on a head is that."""

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Of a layer; those in one bracket have a common input."""


def bind_layer(model: nn.Module, block: nn.Module, held: FixedLayer, both: bool = False) -> tuple[LayerShape, list]:
    """A layer's shape, and its tensors as ``llama_layer`` wants them.

    Args:
        model: From ``load``, of a family that the lean decoder knows.
        block: One of its decoder layers.
        held: The layer's keys and values.
        both: Of weights in two planes take both; else the high ones alone.
    """
    attention, config, state = block.self_attn, model.config, loaded(model)
    first, products, weights = f"model.layers.{attention.layer_idx}.self_attn.q_proj", [], []
    for group in PROJECTIONS:
        part = "self_attn" if hasattr(attention, group[0]) else "mlp"
        projections = [getattr(getattr(block, part), name) for name in group]
        places = state.plan.modules[f"model.layers.{attention.layer_idx}.{part}.{group[0]}"].places
        common = [
            _fused(of_one, state, place) for of_one, place in zip(_by_plane(projections, both), places, strict=False)
        ]
        fused = all(common)
        of_each = projections[:1] if fused else projections
        features = sum(projection.out_features for projection in projections) if fused else None
        products.append(tuple(product_of(projection, features, both) for projection in of_each))
        for projection in of_each:
            weights += tensors_of(projection, model.dtype, common if fused else None, both)
    normed, cached = hasattr(attention, "q_norm"), held.tensors()
    shape = LayerShape(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=state.plan.spec.head_dim,
        scaling=attention.scaling,
        eps=config.rms_norm_eps,
        products=tuple(products),
        normed_heads=normed,
        cache=tuple(cached),
        our_attention=state.gpu.kernels_of(compute_place(state.plan.modules[first].device)) == "cpu" and there(),
        dtype=model.dtype,
    )
    norms = [block.input_layernorm.weight, block.post_attention_layernorm.weight]
    if normed:
        norms += [attention.q_norm.weight, attention.k_norm.weight]
    return shape, [*(norm.detach() for norm in norms), *weights, *cached.values()]


def bind_head(model: nn.Module) -> tuple[HeadShape, list[torch.Tensor]] | None:
    """The head's shape, and its tensors as ``head`` wants them; nothing where it is left to its module."""
    last, norm = model.lm_head, model.model.norm
    product, state = product_of(last), loaded(model)
    place = compute_place(state.plan.modules[state.plan.spec.head].device)
    if product is None or state.gpu.kernels_of(place) == "cuda":  # the layers are in RAM, the head is on a card
        return None
    return HeadShape(product, norm.variance_epsilon), [norm.weight.detach(), *tensors_of(last, model.dtype)]


def bind_short_head(model: nn.Module) -> tuple[HeadShape, list[torch.Tensor]] | None:
    """A head of the first ``SHORT_HEAD`` tokens of the vocabulary only, on the same tensors; for drafts.

    Vocabularies made by merging pairs are in the order of the merges, so these are the commonest. Nothing where the
    head is a small part of what a draft reads.
    """
    bound = bind_head(model)
    if bound is None or bound[0].product.kernel != "ours" or not short_head_pays(loaded(model).plan):
        return None
    (shape, (norm, codes, scales, form, *bias)) = bound
    scales = scales[:, :SHORT_HEAD] if scales.dim() == 3 else scales[:SHORT_HEAD]
    product = replace(shape.product, features=SHORT_HEAD)
    return replace(shape, product=product), [norm, codes[:SHORT_HEAD], scales, form, *(b[:SHORT_HEAD] for b in bias)]


def short_head_pays(plan: Plan) -> bool:
    """Whether the head is so much of what a draft reads that one of the commonest tokens is worth its guesses."""
    spec = plan.spec
    sizes = {m.name: get_format(plan.modules[m.name].format).bytes_by_plane(m.weight_shape)[0] for m in spec.modules}
    layers = sum(sizes[module.name] for module in spec.modules if module.layer is not None)
    return sizes[spec.head] >= HEAD_BOUND * layers and spec.vocab_size >= 2 * SHORT_HEAD


def why_not_several(model: nn.Module) -> str:
    """Why several tokens cannot be read in one pass with the results of one after the other, in words, or nothing.

    Only our kernel's sums do not depend on how many rows there are.
    """
    for block in model.model.layers:
        for name in itertools.chain(*PROJECTIONS):
            projection = getattr(block.self_attn if hasattr(block.self_attn, name) else block.mlp, name)
            product = product_of(projection)
            if product is None or product.kernel != "ours":
                return f"{name} is multiplied by another kernel than ours"
    head = bind_head(model)
    return "" if head and head[0].product.kernel == "ours" else "the head is multiplied by another kernel than ours"


def product_of(projection: nn.Module, features: int | None = None, both: bool = False) -> Product | None:
    """How a linear layer is multiplied in ``llama_layer``, or ``None`` where that is not known.

    ``features``: rows of the common weight that it is part of; by default its own. ``both``: see ``bind_layer``.
    """
    bias = projection.bias is not None
    planes = len(_planes(projection, both))
    if not isinstance(projection, QuantizedLinear):
        return Product("float", bias=bias)
    if projection.has_our_kernel():
        return Product("ours", features=features or projection.out_features, bias=bias, planes=planes)
    if isinstance(projection, Int4Linear) and projection.layout == projection.kernels:
        kernel = "int4" if projection.layout == "cpu" else "int4 on CUDA"
        return Product(kernel, bias=bias, planes=planes)
    if projection.kernels == "cuda":
        return Product("module", bias=bias)
    return Product("int8", bias=bias) if isinstance(projection, Int8Linear) and projection.by_torch() else None


def tensors_of(projection: nn.Module, dtype: torch.dtype, common: list[dict] | None = None, both: bool = False) -> list:
    """The weight as ``llama_layer`` wants it, plane by plane: its own, or the common one it is in; then the bias."""
    kernel = product_of(projection, both=both).kernel
    bias = common[0]["bias"] if common else projection.bias
    end = [] if bias is None else [bias.detach()]
    if kernel == "module":
        multiply = projection.multiply
        if isinstance(projection, NestedLinear):
            multiply = projection.by_both if both else projection.by_high
        return [lambda x: multiply(x.to(dtype)), *end]
    found = []
    for at, plane in enumerate(_planes(projection, both)):
        wanted = plane.held if isinstance(plane, QuantizedLinear) else ("weight",)
        found += [(common[at][name] if common else getattr(plane, name)).detach() for name in wanted]
        if kernel == "ours":
            found.append(format_as_tensor(plane.kernel_format))
    return [*found, *end]


def _planes(projection: nn.Module, both: bool) -> list[nn.Module]:
    """The layers whose products are summed: itself, and the low plane's where that is asked for and there."""
    return [projection, projection.low] if both and isinstance(projection, NestedLinear) else [projection]


def _by_plane(projections: list[nn.Module], both: bool) -> list[list[nn.Module]]:
    """Layers with a common input, plane by plane; one list where they have not equally many."""
    planes = [_planes(projection, both) for projection in projections]
    return [list(of_one) for of_one in zip(*planes, strict=False)]


def _fused(projections: list[nn.Module], state: Loaded, device: str) -> dict | None:
    """Lays weights side by side where they are in RAM.

    Within a card's budget they stay as they were loaded: moving them would leave holes that no forecast has seen.
    So do those mapped from disk.
    """
    gpu = state.gpu
    if state.plan.stream_from is not None:  # they lie side by side already, in the order in which they travel
        return None
    # unmetered, the stand-in would not know the common weight for one of its own
    in_ram = device == "cpu" or (device == "gpu" and gpu.kernels == "cpu" and gpu.budget is None and gpu.moves)
    if not in_ram:
        return None
    with gpu.meter.scope(owner="fused weights", category="weights"):
        return fuse(projections)
