"""Exact quantize/dequantize pairs: which codes and scales stand for a float weight.

Scales are rounded to their stored dtype before codes are chosen, so a code is the nearest one under the scale that will
really be used. A symmetric solution has no zero points and may have *negative* scales: the range of signed codes
reaches one step further down than up (-8 … 7), and the sign lets the group's largest value have that step.

Derived in: notebooks/04_compress.ipynb
Source: negative scales, llama.cpp ``ggml-quants.c`` (q4_0); clip search by weighted error, Lin et al. 2023,
arXiv:2306.00978; half-quadratic, Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/. GPTQ is in ``gptq.py``.
"""

from collections.abc import Callable

import torch

from lowvram_lab.errors import CheckpointError, PlanError
from lowvram_lab.layouts.packing import unpack
from lowvram_lab.model.formats import SCALE_DTYPE, Format, check_solver
from lowvram_lab.units import MiB
from lowvram_lab.weights.codes import INT4_OFFSET, IntegerWeight

CHUNK_BYTES = MiB
"""Rows are quantised in chunks of this many float32 bytes: the temporaries of an embedding table would not be small,
and those of a few rows lie in the processor's cache, which halves a search's time.

A chunk has a multiple of 64 rows, so that no group of 64 weights, as nf4 counts them, straddles two chunks.
"""

TINY = torch.finfo(SCALE_DTYPE).tiny

CLIP_STEPS = {2: 25, 3: 24, 4: 24, 5: 12, 6: 10, 8: 6}
"""Scales tried on either side of zero, each 2.5 % smaller than the last: fewer bits gain from more clipping."""

RANGE_STEPS = 21
"""Ranges tried with zero points, down to half of the values' own."""

ITERATIONS = 10
"""Of ``half_quadratic`` while a model is loaded: 20 take twice the time for 1 % of the KL (int4, SmolLM2-135M)."""


def quantize(weight: torch.Tensor, fmt: Format, *, solver: str = "rtn") -> dict[str, torch.Tensor]:
    """Quantises a weight without any data: what ``load`` does where nothing better was prepared.

    int4 has zero points (they cost nothing in torch's layout), and so has what is called ``-asym``; int8 and the other
    formats are symmetric. In int8 and nf4 nothing is gained by searching, and nothing is searched.

    Args:
        weight: ``(out_features, in_features)`` or ``(num_embeddings, embedding_dim)``, any float dtype, finite.
        fmt: Any format but a float one.
        solver: ``"rtn"`` (round to nearest) or ``"search"``: ``half_quadratic`` with zero points, else
            ``search_clip``.

    Returns:
        See ``IntegerWeight.tensors``; nf4: ``packed`` and ``absmax`` as bitsandbytes makes them.

    Raises:
        CheckpointError: The weight has NaN or infinite values.
    """
    if fmt.planes > 1:
        raise PlanError(f"{fmt.name} is two weights: quantise to {fmt.plane.name}, then see low_plane")
    if not is_finite(weight):
        raise CheckpointError(f"cannot quantise to {fmt.name}: the weight has NaN or infinite values")
    if fmt.kind == "nf4":
        return by_rows(weight.shape, lambda rows: _nf4(weight[rows], fmt))
    solve = _solver(fmt, solver)
    return by_rows(weight.shape, lambda rows: solve(weight[rows]).tensors(fmt))


def _solver(fmt: Format, solver: str) -> Callable[[torch.Tensor], IntegerWeight]:
    check_solver(solver)
    symmetric = not fmt.has_zeros
    if solver == "rtn" or fmt.kind == "int8":
        return lambda rows: round_to_nearest(rows, fmt, symmetric=symmetric)
    if symmetric:
        stride = 4 if fmt.bits <= 3 else 1  # few bits have many scales to try, which are near one another
        return lambda rows: search_clip(rows, fmt, stride=stride)
    return lambda rows: half_quadratic(rows, fmt, iterations=ITERATIONS)


def low_plane(weight: torch.Tensor, high: dict[str, torch.Tensor], fmt: Format) -> dict[str, torch.Tensor]:
    """Quantises what a weight's high plane is off by, round to nearest; as ``quantize``, chunk by chunk.

    Args:
        weight: As of ``quantize``.
        high: What ``quantize`` made of it.
        fmt: A format of two planes.
    """

    def solve(rows: slice) -> dict[str, torch.Tensor]:
        part = {"codes": high["codes"][rows], "scale_and_zero": high["scale_and_zero"][:, rows]}
        return quantize(weight[rows].float() - dequantize(part, fmt.plane), fmt.low_plane)

    return by_rows(weight.shape, solve)


def by_rows(shape: tuple[int, int], solve: Callable[[slice], dict]) -> dict[str, torch.Tensor]:
    """Solves some rows of a weight of ``shape`` at a time and joins the tensors; see ``CHUNK_BYTES``."""
    rows, step = shape[0], max(64, CHUNK_BYTES // (4 * shape[1]) // 64 * 64)
    result: dict[str, torch.Tensor] = {}
    filled: dict[str, int] = {}
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        for name, piece in solve(slice(begin, end)).items():
            along = 1 if name == "scale_and_zero" else 0  # its first dimension is the group; others begin with the row
            size, start = piece.shape[along], filled.get(name, 0)
            if name not in result:
                whole = list(piece.shape)
                whole[along] = size * rows // (end - begin)
                result[name] = piece.new_empty(whole)
            result[name].narrow(along, start, size).copy_(piece)
            filled[name] = start + size
    return result


def is_finite(weight: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; makes no temporary of the weight's size."""
    return bool(torch.isfinite(torch.stack(weight.aminmax())).all())


def dequantize(tensors: dict[str, torch.Tensor], fmt: Format, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Restores the weight that ``quantize`` stored. Shape and meaning as there; exact in float32.

    Args:
        tensors: What ``quantize`` or ``IntegerWeight.tensors`` returned.
        fmt: The same format.
        dtype: Result dtype.
    """
    if fmt.kind == "int8":
        codes, scale = tensors["weight"], tensors["scale"]
        return IntegerWeight(codes, scale.view(codes.shape[0], -1)).dequantize(dtype)
    if fmt.kind in ("int4", "packed"):
        scale, zero = tensors.get("scale"), None
        if fmt.has_zeros:
            scale, zero = tensors["scale_and_zero"].transpose(0, 1).unbind(-1)  # each (out, groups)
        nibbles = fmt.kind == "int4"
        codes = tensors["codes"].to(torch.int8) - INT4_OFFSET if nibbles else unpack(tensors["packed"], fmt.bits)
        return IntegerWeight(codes, scale, zero).dequantize(dtype)
    raise NotImplementedError(f"{fmt.name} is dequantised by bitsandbytes, inside its layer")


def round_to_nearest(weight: torch.Tensor, fmt: Format, *, symmetric: bool = True) -> IntegerWeight:
    """The nearest code under the scale that gives each group's largest value the outermost code.

    Symmetric, a value as large on the other side is clipped by a step: there is one code less.

    Args:
        weight: ``(out, in)``, any float dtype.
        fmt: An integer format.
        symmetric: Scale alone; else scale and zero point.
    """
    groups = _grouped(weight, fmt)
    if not symmetric:
        return _asymmetric(groups, fmt, weight.shape)
    return assign_codes(groups, _fitting_scale(groups, fmt), fmt)


def search_clip(
    weight: torch.Tensor, fmt: Format, importance: torch.Tensor | None = None, *, stride: int = 1
) -> IntegerWeight:
    """The nearest code under the scale with the least weighted squared error; may clip outliers to serve the rest.

    Args:
        weight: ``(out, in)``.
        fmt: An integer format.
        importance: ``(in,)``, weight of each input channel's error, such as its mean squared activation; by default all
            alike.
        stride: Try every ``stride``-th scale only, for an estimate.

    Source: Lin et al. 2023, arXiv:2306.00978 (the search; here per group, and on both signs of the scale).
    """
    groups = _grouped(weight, fmt)
    by_channel = _grouped(importance.unsqueeze(0), fmt) if importance is not None else None
    widest = _fitting_scale(groups, fmt).float()
    best = widest.to(SCALE_DTYPE)
    least = torch.full_like(widest, torch.inf)
    top = (1 << (fmt.bits - 1)) - 1
    for sign in (1.0, -(top + 1) / top):  # turned round, the largest value has one code less
        for step in range(0, CLIP_STEPS[fmt.bits], stride):
            scale = (widest * sign * (1 - 0.025 * step)).to(SCALE_DTYPE)
            error = _codes(groups, scale, fmt).mul_(scale.float()).sub_(groups).square_()
            error = (error * by_channel if by_channel is not None else error).sum(dim=-1, keepdim=True)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return assign_codes(groups, best, fmt)


def search_range(weight: torch.Tensor, fmt: Format, importance: torch.Tensor | None = None) -> IntegerWeight:
    """``search_clip`` with zero points: the range of a group's values, shrunk about its middle by what serves most.

    Args:
        weight: ``(out, in)``.
        fmt: A format with zeros.
        importance: See ``search_clip``.
    """
    groups, offset = _grouped(weight, fmt), 1 << (fmt.bits - 1)
    by_channel = _grouped(importance.unsqueeze(0), fmt) if importance is not None else None
    low, high = groups.aminmax(dim=-1, keepdim=True)
    least = torch.full_like(low, torch.inf)
    best = [least.to(SCALE_DTYPE), least.to(SCALE_DTYPE)]
    for step in range(RANGE_STEPS):
        width = (high - low) * (1 - 0.025 * step)
        scale = (width / ((1 << fmt.bits) - 1)).clamp_(min=TINY).to(SCALE_DTYPE)
        # codes reach one step further down than up
        zero = ((low + high + scale.float()) / 2).to(SCALE_DTYPE)
        codes = ((groups - zero.float()) / scale.float()).round_().clamp_(-offset, offset - 1)
        error = codes.mul_(scale.float()).add_(zero.float()).sub_(groups).square_()
        error = (error * by_channel if by_channel is not None else error).sum(dim=-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = [torch.where(better, new, old) for new, old in zip((scale, zero), best, strict=True)]
    scale, zero = best
    codes = ((groups - zero.float()) / scale.float()).round_().clamp_(-offset, offset - 1).to(torch.int8)
    return IntegerWeight(codes.view(weight.shape), scale.squeeze(-1), zero.squeeze(-1))


def half_quadratic(weight: torch.Tensor, fmt: Format, *, iterations: int = 20) -> IntegerWeight:
    """HQQ: keeps the scale and moves the zero point, under a norm that forgives a few large errors. No data needed.

    Alternates a shrinkage of the error (p = 0.7) with a closed-form zero point, a growing penalty pulling the two
    together.

    Args:
        weight: ``(out, in)``.
        fmt: An integer format.
        iterations: So many. Of all zero points that a group had, the one with the least error stays.

    Source: Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/, equations 4 to 8.
    """
    groups, offset = _grouped(weight, fmt), 1 << (fmt.bits - 1)
    power = 0.7
    penalty = 10.0
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / ((1 << fmt.bits) - 1)).clamp_(min=TINY).to(SCALE_DTYPE).float()
    steps = (groups - low).div_(scale)  # in steps, or the penalty would mean nothing for small weights
    zero = torch.full_like(low, offset)  # above the smallest
    best, least = zero, torch.full_like(zero, torch.inf)
    for _ in range(iterations):
        error = steps - zero
        error.sub_(error.round().clamp_(-offset, offset - 1))
        size = error.abs()
        mean = size.mean(dim=-1, keepdim=True)
        better = mean < least
        best, least = torch.where(better, zero, best), torch.where(better, mean, least)
        # the shrunk error is size - size ** (power - 1) / penalty, or 0; the zero point moves by what that leaves
        pull = size.clamp(min=1e-8).log_().mul_(power - 1).exp_().div_(penalty)
        zero = zero + torch.minimum(size, pull).copysign_(error).mean(dim=-1, keepdim=True)
        penalty *= 1.01
    zero = (low + best * scale).to(SCALE_DTYPE)
    codes = _codes(groups - zero.float(), scale, fmt).to(torch.int8).view(weight.shape)
    return IntegerWeight(codes, scale.to(SCALE_DTYPE).squeeze(-1), zero.squeeze(-1))


def assign_codes(groups: torch.Tensor, scale: torch.Tensor, fmt: Format) -> IntegerWeight:
    """The nearest codes of ``groups`` ``(out, groups, group_size)`` under ``scale`` ``(out, groups, 1)``."""
    codes = _codes(groups, scale, fmt).to(torch.int8).view(groups.shape[0], -1)
    return IntegerWeight(codes, scale.to(SCALE_DTYPE).squeeze(-1))


def _grouped(weight: torch.Tensor, fmt: Format) -> torch.Tensor:
    return weight.float().view(weight.shape[0], -1, fmt.group_size or weight.shape[1])


def _codes(groups: torch.Tensor, scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    top = (1 << (fmt.bits - 1)) - 1
    low = -top if fmt.kind == "int8" else -top - 1  # torch's int8 kernel is quickest without -128
    return (groups / scale.float()).round_().clamp_(low, top)


def _fitting_scale(groups: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The scale under which the largest value of a group has the outermost code, ``(out, groups, 1)``."""
    if fmt.kind == "int8":
        return (groups.abs().amax(dim=-1, keepdim=True) / 127).clamp_(min=TINY).to(SCALE_DTYPE)
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    scale = (largest / -(1 << (fmt.bits - 1))).to(SCALE_DTYPE)
    return torch.where(scale.abs() < TINY, TINY, scale)


def _asymmetric(groups: torch.Tensor, fmt: Format, shape: torch.Size) -> IntegerWeight:
    offset = 1 << (fmt.bits - 1)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / ((1 << fmt.bits) - 1)).clamp_(min=TINY).to(SCALE_DTYPE)
    zero = (low + offset * scale.float()).to(SCALE_DTYPE)
    codes = ((groups - zero.float()) / scale.float()).round_().clamp_(-offset, offset - 1).to(torch.int8)
    return IntegerWeight(codes.view(shape), scale.squeeze(-1), zero.squeeze(-1))


def _nf4(weight: torch.Tensor, fmt: Format) -> dict[str, torch.Tensor]:
    import bitsandbytes  # noqa: F401  (registers torch.ops.bitsandbytes)

    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
        weight.contiguous(), fmt.group_size, "nf4", torch.uint8
    )
    return {"packed": packed, "absmax": absmax}
