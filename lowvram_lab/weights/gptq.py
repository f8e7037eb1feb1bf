"""GPTQ: rounds a weight column by column, and lets the columns still to come make up for each rounding error.

The error that counts is that of the layer's *output* over calibration inputs, ``tr(D A D^T)`` with ``D`` the change of
the weight and ``A`` the inputs' second moments. Groups keep fixed scales, chosen beforehand, so columns may be taken in
any order (largest moment first) and a group's columns still lie together in the result.

Derived in: notebooks/04_compress.ipynb
Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; static groups with act-order, AutoGPTQ's ``static_groups``.
"""

from collections.abc import Callable

import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.machine import one_thread
from lowvram_lab.model.formats import Format
from lowvram_lab.units import MiB
from lowvram_lab.weights.cholesky import factor_
from lowvram_lab.weights.codes import IntegerWeight, joined
from lowvram_lab.weights.solvers import search_clip, search_range

BLOCK = 128
"""Columns whose errors are spread at once to all later ones: one large product instead of 128 small ones."""

ROW_BYTES = 4 * MiB
"""Rows do not depend on each other; a table of embeddings is rounded in so many float32 bytes at a time."""

DAMPINGS = (0.05, 0.2, 1.0)
"""Tried in turn, as fractions of the mean diagonal: a singular matrix of moments (few tokens) needs more. The paper's
0.01 fits 1536 inputs to 16 thousand tokens too closely: 0.05 left less KL on other text."""


def gptq(
    weight: torch.Tensor, fmt: Format, moments: torch.Tensor, *, act_order: bool = True, symmetric: bool = True
) -> IntegerWeight:
    """Quantises a weight so that its outputs over the calibration inputs change least.

    Args:
        weight: ``(out, in)``, any float dtype.
        fmt: See ``gptq_of``, as the rest and the errors.
        moments: See there.
        act_order: See there.
        symmetric: See there.
    """
    return gptq_of(fmt, moments, act_order=act_order, symmetric=symmetric)(weight)


def gptq_of(
    fmt: Format, moments: torch.Tensor, *, act_order: bool = True, symmetric: bool = True
) -> Callable[[torch.Tensor], IntegerWeight]:
    """What quantises weights, or some rows of one, whose inputs have these moments.

    Args:
        fmt: An integer format.
        moments: ``(in, in)`` float32, second moments of the layer's inputs, ``E[x x^T]``.
        act_order: Take columns by falling moment; else from left to right.
        symmetric: Scales alone; else scales and zero points.

    Raises:
        CheckpointError: The moments have NaN or infinite values.
    """
    importance = moments.diagonal()
    order = importance.argsort(descending=True, stable=True) if act_order else torch.arange(len(moments))
    spread = error_spread(moments, order)
    search = search_clip if symmetric else search_range
    step = max(64, ROW_BYTES // (4 * len(moments)))

    def quantise(weight: torch.Tensor) -> IntegerWeight:
        pieces = []
        for rows in weight.split(step):
            rows = rows.float()
            pieces.append(_gptq_rows(rows, fmt, search(rows, fmt, importance), spread, order))
        return joined(pieces)

    return quantise


def error_spread(moments: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """How a column's rounding error is best passed on: the upper Cholesky factor of the inverse moments.

    It is ``(in, in)`` in the ``order`` ``(in,)`` in which columns are rounded.

    Raises:
        CheckpointError: Not finite.
    """
    if not bool(torch.isfinite(moments).all()):
        raise CheckpointError("expected finite calibration moments, found NaN or infinite values")
    mean = moments.diagonal().mean().clamp(min=1e-30)
    for damping in DAMPINGS:
        damped = moments[order.unsqueeze(1), order]
        damped.diagonal().add_(damping * mean)
        factor = factor_(damped)
        if factor is None:
            continue
        inverse = torch.cholesky_inverse(factor, out=factor).mT
        spread = factor_(inverse)
        if spread is not None and bool(torch.isfinite(spread).all()):
            return spread.mT
    # beyond repair by damping: rounding each column for itself is what remains
    return torch.eye(len(moments))


def output_error(change: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Mean squared change of each output feature, ``(out,)``, for a weight changed by ``change`` ``(out, in)``."""
    return torch.linalg.vecdot(change @ moments, change)


def _gptq_rows(
    weight: torch.Tensor, fmt: Format, start: IntegerWeight, spread: torch.Tensor, order: torch.Tensor
) -> IntegerWeight:
    """Rounds some rows to the scales and zeros of ``start``."""
    size = fmt.group_size or weight.shape[1]
    if start.zero is not None:
        weight = weight - start.zero.float().repeat_interleave(size, 1)
    top = (1 << (fmt.bits - 1)) - 1
    low = -top if fmt.kind == "int8" else -top - 1
    scales = start.scale.float()
    weight = weight[:, order]  # indexing copies
    codes = torch.empty(len(order), weight.shape[0])  # a row a column: written one at a time
    for begin in range(0, len(order), BLOCK):
        end = min(begin + BLOCK, len(order))
        block, local = weight[:, begin:end].T.contiguous(), spread[begin:end, begin:end]
        errors = torch.empty_like(block)
        with one_thread():
            for i, column in enumerate(order[begin:end].tolist()):
                scale = scales[:, column // size]
                code = (block[i] / scale).round_().clamp_(low, top)
                codes[begin + i] = code
                errors[i] = (block[i] - code * scale) / local[i, i]
                if i + 1 < end - begin:
                    block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        weight[:, end:] -= errors.T @ spread[begin:end, end:]
    result = torch.empty_like(codes, dtype=torch.int8)
    result[order] = codes.to(torch.int8)
    return IntegerWeight(result.T.contiguous(), start.scale, start.zero)
