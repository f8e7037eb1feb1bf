"""One decoder layer of the Llama family for one token of each sequence, as a plain function of tensors.

It knows nothing about models, caches or compilers. Everything between two matrix products is float32: a small cost for
one token, and closer to full precision than 16 bits.

Derived in: notebooks/06_the_engine.ipynb
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from lowvram_lab.engine.cache_layers import quantize_states
from lowvram_lab.kernels.product import format_of, quantized_products
from lowvram_lab.kernels.token_attention import CACHED, token_attention

LONGEST_LOOP = 4096
"""Inputs of a weight. Compiled, a product of one row with 16-bit weights is a loop that reads at 1.3 times the rate of
torch's kernel (25 GB/s, one thread). Beyond this many inputs the compiler sums in another way, slower than it is."""


@dataclass(frozen=True)
class Product:
    """How a weight is multiplied.

    Attributes:
        kernel: ``"ours"``; ``"int4"``, ``"int8"`` or ``"int4 on CUDA"`` by torch's kernels; ``"float"``; or
            ``"module"`` for a layer that multiplies by itself.
        features: Rows of a weight that our kernel multiplies. Its format is among its tensors: a layer is compiled once
            for all of them.
        bias: Whether a bias is added.
        planes: Weights of one shape whose products are summed: 2 where a low plane corrects a high one.
    """

    kernel: str
    features: int = 0
    bias: bool = False
    planes: int = 1

    @property
    def of_a_plane(self) -> int:
        """How many a plane takes of a layer's list: weight or function; or codes and scales, and for ours a format."""
        return {"float": 1, "module": 1, "ours": 3}.get(self.kernel, 2)

    @property
    def tensors(self) -> int:
        """How many it takes of a layer's list: those of its planes, and a bias."""
        return self.planes * self.of_a_plane + self.bias


@dataclass(frozen=True)
class LayerShape:
    """What the function of a layer is specialised for; layers of one shape share it.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Features of a head.
        scaling: Of attention scores.
        eps: Of the norms.
        products: For q/k/v, o, gate/up and down, how each weight is multiplied; one where they lie side by side.
        normed_heads: Whether queries and keys are normed, head by head.
        cache: What of keys and values follows the weights: names of a cache layer's tensors.
        our_attention: Whether our kernel attends, and writes into the cache; it alone reads one of 4 bits.
        dtype: The model's.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    eps: float
    products: tuple[tuple[Product, ...], ...]
    normed_heads: bool
    cache: tuple[str, ...]
    our_attention: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class HeadShape:
    """What the function of a head is specialised for.

    Attributes:
        product: How its weight is multiplied.
        eps: Of the norm.
    """

    product: Product
    eps: float


class Masked(NamedTuple):
    """A cache looked at beyond its newest token, as a graph of a fixed shape must.

    Attributes:
        at: Which place is this token's, ``(1,)`` int64.
        mask: ``(tokens,)`` float32 to add to the scores: 0, or -inf for places that hold nothing yet.
    """

    at: Tensor
    mask: Tensor


_Cached = tuple[Tensor, Tensor | None]  # keys or values, and their scales if they are int8


def llama_layer(
    shape: LayerShape,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    tensors: Sequence,
    tokens: int,
    masked: Masked | None = None,
    loops: list[Tensor] | None = None,
) -> Tensor:
    """One decoder layer.

    Args:
        shape: What is constant.
        hidden: ``(batch, hidden)`` float32.
        cos: ``(head_dim,)`` float32, for this position.
        sin: The same; its first half negative.
        tensors: Of the layer: weights of its norms, and of queries and keys where they are normed; for each of
            ``shape.products`` what its kernel wants, and the bias if there is one; those that ``shape.cache`` names.
        tokens: How many places of the cache are looked at, this token's among them.
        masked: Where some of them hold nothing yet; by default this token's is the last.
        loops: If given, products of one row may be written as loops, and their inputs are appended here. Loops are
            quick only where this function is compiled, and returns these inputs too: what it does not return is
            computed anew for every row of the weight.

    Returns:
        ``(batch, hidden)`` float32.
    """
    norms, weights, cache = _sorted(shape, tensors)
    batch, features = hidden.shape[0], shape.kv_heads * shape.head_dim
    compiled = loops is not None
    x = _rms_norm(hidden, norms[0], shape.eps, compiled)
    qkv = _multiply(x, shape.products[0], weights[0], loops)
    q, k, v = qkv.split([shape.heads * shape.head_dim, features, features], -1)
    q = q.view(batch, shape.heads, shape.head_dim)
    k, v = (states.view(batch, shape.kv_heads, shape.head_dim) for states in (k, v))
    if shape.normed_heads:
        q, k = _rms_norm(q, norms[2], shape.eps, compiled), _rms_norm(k, norms[3], shape.eps, compiled)
    half = shape.head_dim // 2
    q, k = (states * cos + torch.roll(states, half, -1) * sin for states in (q, k))
    mixed = _attend(shape, (q, k, v), cache, tokens, masked)
    hidden = hidden + _multiply(mixed.reshape(batch, -1), shape.products[1], weights[1], loops)
    x = _rms_norm(hidden, norms[1], shape.eps, compiled)
    gate, up = _multiply(x, shape.products[2], weights[2], loops).chunk(2, -1)
    return hidden + _multiply(F.silu(gate) * up, shape.products[3], weights[3], loops)


def head(shape: HeadShape, hidden: Tensor, tensors: Sequence, loops: list[Tensor] | None = None) -> Tensor:
    """The last norm and the product with the head.

    Args:
        shape: What is constant.
        hidden: ``(batch, hidden)`` float32.
        tensors: Weight of the norm, and what the product wants.
        loops: See ``llama_layer``.

    Returns:
        Logits ``(batch, vocab)`` float32.
    """
    normed = _rms_norm(hidden, tensors[0], shape.eps, loops is not None)
    return _multiply(normed, (shape.product,), (tensors[1:],), loops)


def _sorted(shape: LayerShape, tensors: Sequence) -> tuple[list[Tensor], list[list[list]], dict[str, Tensor]]:
    """The flat list of a layer's tensors as norms, weights by product, and cache by name."""
    rest = iter(tensors)
    norms = [next(rest) for _ in range(4 if shape.normed_heads else 2)]
    weights = [[[next(rest) for _ in range(product.tensors)] for product in group] for group in shape.products]
    return norms, weights, dict(zip(shape.cache, rest, strict=True))


def _attend(
    shape: LayerShape,
    states: tuple[Tensor, Tensor, Tensor],
    cache: dict[str, Tensor],
    tokens: int,
    masked: Masked | None,
) -> Tensor:
    """Writes a token's key and value, ``(batch, kv_heads, head_dim)``, and attends to all: float32, as its queries."""
    q, k, v = states
    if shape.our_attention:
        held = [cache.get(name) for name in CACHED]
        return token_attention(q, k, v, *held, tokens, shape.scaling)
    seen = {name: tensor[:, :, :tokens] for name, tensor in cache.items()}
    held = [(seen["keys"], seen.get("key_scale")), (seen["values"], seen.get("value_scale"))]
    for (cached, scales), state in zip(held, (k, v), strict=True):
        _append(cached, scales, state[:, :, None], masked)
    return _attend_masked(shape, q, held, masked.mask) if masked else _attend_plain(shape, q, held)


def _attend_plain(shape: LayerShape, q: Tensor, held: list[_Cached]) -> Tensor:
    """In float32, by what torch has on any device."""
    rows = (q * shape.scaling).view(-1, shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
    (keys, key_scales), (values, value_scales) = held
    scores = rows @ keys.float().transpose(2, 3)
    if key_scales is not None:
        scores = scores * key_scales[:, :, None, :, 0].float()
    weights = torch.softmax(scores, -1)
    if value_scales is not None:
        weights = weights * value_scales[:, :, None, :, 0].float()
    return weights @ values.float()


def _attend_masked(shape: LayerShape, q: Tensor, held: list[_Cached], mask: Tensor) -> Tensor:
    """By torch's fused attention, over a fixed number of places of which some hold nothing yet."""
    dtype = shape.dtype
    keys, values = (cached if scales is None else cached.to(dtype) * scales.to(dtype) for cached, scales in held)
    # heads that share keys are rows of one head: for a single query that is the same, and no keys are repeated
    rows = q.view(-1, shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim).to(dtype)
    mask = mask.to(dtype)[None, None, None].expand(-1, -1, rows.shape[2], -1)
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=shape.scaling).float()


def _append(held: Tensor, scales: Tensor | None, states: Tensor, masked: Masked | None) -> None:
    if scales is not None:
        states, scale = quantize_states(states)
        _write(scales, scale, masked)
    _write(held, states.to(held.dtype), masked)


def _write(held: Tensor, states: Tensor, masked: Masked | None) -> None:
    if masked is None:
        held[:, :, -1:] = states
    else:
        held.index_copy_(2, masked.at, states)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, compiled: bool = False) -> Tensor:
    squares = x.pow(2)
    if compiled:
        # the compiler parts the sum of a single row among threads: its last bit would be another than with one thread,
        # or with several rows. Halves are never parted
        first, second = squares.unflatten(-1, (2, -1)).sum(-1, keepdim=True).unbind(-2)
        mean = (first + second) / x.shape[-1]
    else:
        mean = squares.mean(-1, keepdim=True)
    return x * torch.rsqrt(mean + eps) * weight.float()


def _multiply(x: Tensor, products: tuple[Product, ...], weights: Sequence[Sequence], loops: list | None) -> Tensor:
    """``(rows, in)`` float32 → ``(rows, out)`` float32: the products with each weight, side by side."""
    if all(product.kernel == "ours" for product in products) and len({product.planes for product in products}) == 1:
        return _products_of_ours(x, products, weights)
    found = [_product(x, product, tensors, loops) for product, tensors in zip(products, weights, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def _products_of_ours(x: Tensor, products: tuple[Product, ...], weights: Sequence[Sequence]) -> Tensor:
    planes = max(product.planes for product in products)
    codes, scales, features, formats = [], [], [], []
    for plane in range(planes):  # all high planes side by side, then all low ones
        for product, tensors in zip(products, weights, strict=True):
            its_codes, its_scales, its_format = tensors[plane * product.of_a_plane :][: product.of_a_plane]
            codes.append(its_codes)
            scales.append(its_scales)
            features.append(product.features)
            formats.append(format_of(its_format))
    found = quantized_products(x, codes, scales, features, formats)
    if planes > 1:
        high, low = found.chunk(2, -1)
        found = high + low
    if not any(product.bias for product in products):
        return found
    biases = [
        tensors[-1].float() if product.bias else x.new_zeros(product.features)
        for product, tensors in zip(products, weights, strict=True)
    ]
    return found + torch.cat(biases)


def _product(x: Tensor, product: Product, tensors: Sequence, loops: list | None) -> Tensor:
    kernel = product.kernel
    if kernel == "ours":
        return _products_of_ours(x, (product,), (tensors,))
    if loops is not None and kernel == "float" and x.shape[0] == 1 and x.shape[1] <= LONGEST_LOOP:
        loops.append(x)
        found = (tensors[0].float() * x).sum(-1)[None]
    elif kernel in ("int4", "int4 on CUDA"):
        found = _int4_by_torch(x.bfloat16(), product, tensors)
    elif kernel == "module":
        found = tensors[0](x)
    elif kernel == "int8":
        found = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), tensors[0], tensors[1])
    else:
        found = F.linear(x.to(tensors[0].dtype), tensors[0])
    return found.float() + tensors[-1].float() if product.bias else found.float()


def _int4_by_torch(x: Tensor, product: Product, tensors: Sequence) -> Tensor:
    """By the high plane, and where there is a low one, by that; bfloat16."""
    on_cuda = product.kernel == "int4 on CUDA"
    kernel = torch.ops.aten._weight_int4pack_mm if on_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
    planes = []
    for codes, scales in zip(tensors[: 2 * product.planes : 2], tensors[1 : 2 * product.planes : 2], strict=True):
        if on_cuda and x.is_meta:  # see Int4Linear.multiply
            planes.append(x.new_empty(x.shape[0], scales.shape[1]))
        else:
            planes.append(kernel(x, codes, x.shape[1] // scales.shape[0], scales.contiguous()))
    return planes[0] if product.planes == 1 else planes[0] + planes[1]
