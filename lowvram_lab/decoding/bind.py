"""The layers and the head of a loaded model as ``llama_layer.py`` wants them: what is constant, and the tensors.

Derived in: notebooks/06_the_engine.ipynb
"""

from __future__ import annotations

import torch
from torch import nn

from lowvram_lab.decoding.llama_layer import HeadShape, LayerShape, Product
from lowvram_lab.engine.cache_layers import FixedLayer
from lowvram_lab.engine.fuse import fuse
from lowvram_lab.engine.layers import Int4Linear, Int8Linear, QuantizedLinear
from lowvram_lab.engine.loaded import Loaded, loaded
from lowvram_lab.kernels.library import there
from lowvram_lab.kernels.product import format_as_tensor
from lowvram_lab.model.plan import compute_place

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Of a layer; those in one bracket have a common input."""


def bind_layer(model: nn.Module, block: nn.Module, held: FixedLayer) -> tuple[LayerShape, list]:
    """A layer's shape, and its tensors as ``llama_layer`` wants them.

    Args:
        model: From ``load``, of a family that the lean decoder knows.
        block: One of its decoder layers.
        held: The layer's keys and values.
    """
    attention, config, state = block.self_attn, model.config, loaded(model)
    first, products, weights = f"model.layers.{attention.layer_idx}.self_attn.q_proj", [], []
    for group in PROJECTIONS:
        projections = [getattr(attention if hasattr(attention, name) else block.mlp, name) for name in group]
        common = _fused(projections, state, first)
        of_each = projections[:1] if common else projections
        features = sum(projection.out_features for projection in projections) if common else None
        products.append(tuple(product_of(projection, features) for projection in of_each))
        for projection in of_each:
            weights += tensors_of(projection, model.dtype, common)
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


def product_of(projection: nn.Module, features: int | None = None) -> Product | None:
    """How a linear layer is multiplied in ``llama_layer``, or ``None`` where that is not known.

    ``features``: rows of the common weight that it is part of; by default its own.
    """
    bias = projection.bias is not None
    if not isinstance(projection, QuantizedLinear):
        return Product("float", bias=bias)
    if projection.has_our_kernel():
        return Product("ours", features=features or projection.out_features, bias=bias)
    if isinstance(projection, Int4Linear) and projection.layout == projection.kernels:
        kernel = "int4" if projection.layout == "cpu" else "int4 on CUDA"
        return Product(kernel, projection.format.group_size, bias=bias)
    if projection.kernels == "cuda":
        return Product("module", bias=bias)
    return Product("int8", bias=bias) if isinstance(projection, Int8Linear) and projection.by_torch() else None


def tensors_of(projection: nn.Module, dtype: torch.dtype, common: dict | None = None) -> list:
    """The weight as ``llama_layer`` wants it: its own, or the common one it is part of; then the bias."""
    kernel = product_of(projection).kernel
    if kernel == "module":
        bias = [] if projection.bias is None else [projection.bias.detach()]
        return [lambda x: projection.multiply(x.to(dtype)), *bias]
    wanted = projection.held if isinstance(projection, QuantizedLinear) else ("weight",)
    held = [(common[name] if common else getattr(projection, name)).detach() for name in wanted]
    if kernel == "ours":
        held.append(format_as_tensor(projection.kernel_format))
    bias = common["bias"] if common else projection.bias
    return held if bias is None else [*held, bias.detach()]


def _fused(projections: list[nn.Module], state: Loaded, name: str) -> dict | None:
    """Lays weights side by side where they are in RAM.

    Within a card's budget they stay as they were loaded: moving them would leave holes that no forecast has seen.
    So do those mapped from disk.
    """
    device, gpu = state.plan.modules[name].device, state.gpu
    if state.plan.stream_from is not None:  # they lie side by side already, in the order in which they travel
        return None
    # unmetered, the stand-in would not know the common weight for one of its own
    in_ram = device == "cpu" or (device == "gpu" and gpu.kernels == "cpu" and gpu.budget is None and gpu.moves)
    if not in_ram:
        return None
    with gpu.meter.scope(owner="fused weights", category="weights"):
        return fuse(projections)
