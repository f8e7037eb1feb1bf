"""Peers that quantise one weight at a time without data: round to nearest, bitsandbytes' nf4, HQQ.

Each takes the original weights and returns what is left of them in float32, with the bytes they are stored in. Modules
that a peer leaves alone (norms; an embedding, where it says so) are rounded to float16 and count two bytes a weight.
"""

import importlib.util
from collections.abc import Callable

import torch

from lowvram_lab.model.formats import get_format
from lowvram_lab.weights.solvers import dequantize, quantize

Stored = tuple[torch.Tensor, int]
HQQ_SCALE_DTYPE = torch.float16
"""What an ``HQQLinear`` casts scales and zero points to, by its default compute dtype."""


def absent(package: str) -> str | None:
    """Why a peer cannot be had, or ``None``."""
    return None if importlib.util.find_spec(package) else f"{package} not installed"


def each(weights: dict[str, torch.Tensor], store: Callable[[torch.Tensor], Stored], keep: tuple[str, ...] = ()):
    """Stores every matrix but those in ``keep``.

    Returns:
        Module name → float32 weight, and the bytes of all of them.
    """
    result, total = {}, 0
    for name, weight in weights.items():
        chosen = in_float16 if weight.dim() < 2 or name in keep else store
        result[name], stored_bytes = chosen(weight)
        total += stored_bytes
    return result, total


def in_float16(weight: torch.Tensor) -> Stored:
    return weight.half().float(), 2 * weight.numel()


def rounded(fmt: str) -> Callable[[torch.Tensor], Stored]:
    """Our formats, rounded to nearest."""

    def store(weight: torch.Tensor) -> Stored:
        tensors = quantize(weight, get_format(fmt))
        return dequantize(tensors, get_format(fmt)), get_format(fmt).weight_bytes(tuple(weight.shape))

    return store


def nf4(double: bool = False) -> Callable[[torch.Tensor], Stored]:
    """bitsandbytes' nf4, blocks of 64; ``double``: their scales are quantised too."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def store(weight: torch.Tensor) -> Stored:
        # Flat, a block a row: on a CPU bitsandbytes 0.50.2 restores rows wrongly that are no multiple of its block,
        # such as 288. Its blocks run on from row to row in any case, so the codes are the same.
        flat = weight.reshape(-1, 64)
        codes, state = quantize_4bit(flat, blocksize=64, compress_statistics=double, quant_type="nf4")
        stored = codes.nbytes + state.absmax.nbytes
        if double:  # scales of the scales, and their mean; the two code books are counted once for all: not at all
            stored += state.state2.absmax.nbytes + 4
        return dequantize_4bit(codes, state).view(weight.shape).float(), stored

    return store


def hqq(bits: int, group_size: int) -> Callable[[torch.Tensor], Stored]:
    """HQQ with its default solver, groups along the inputs; three bits lie ten to a 32-bit word, as it packs them."""
    from hqq.core.quantize import Quantizer

    def store(weight: torch.Tensor) -> Stored:
        codes, meta = Quantizer.quantize(weight, nbits=bits, group_size=group_size, axis=1, device="cpu")
        for key in ("scale", "zero"):
            meta[key] = meta[key].to(HQQ_SCALE_DTYPE)
        stored = codes.nbytes + meta["scale"].nbytes + meta["zero"].nbytes
        meta |= {key: meta[key].float() for key in ("scale", "zero")} | {"compute_dtype": torch.float32}
        return Quantizer.dequantize(codes, meta), stored

    return store
