"""One weight, quantised as well as it can be: candidates of several solvers, the one whose output moves least."""

import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.model.formats import Format
from lowvram_lab.weights.codes import IntegerWeight, joined, rows_of
from lowvram_lab.weights.gptq import gptq, output_error
from lowvram_lab.weights.solvers import round_to_nearest, search_clip, search_range

SOLVERS = ("gptq", "clip", "rtn")

WORST_OUTPUT_ERROR = 1.0
"""Of the output's own mean square: a weight quantised worse than that would better be left out, so it is refused."""

SOLVE_ROWS = 1024
"""Rows solved at once; a search holds eight temporaries of them."""


def solve(
    weight: torch.Tensor,
    fmt: Format,
    moments: torch.Tensor | None,
    solver: str,
    name: str,
    *,
    symmetric: bool = True,
) -> tuple[IntegerWeight, str, float]:
    """Quantises a weight.

    Args:
        weight: ``(out, in)``.
        fmt: An integer format.
        moments: ``(in, in)`` second moments of its inputs; without them GPTQ is left out.
        solver: Of ``SOLVERS``, the most that is tried.
        name: For messages.
        symmetric: Scales alone; else, of int4, scales and zero points.

    Returns:
        The best solution, which solver found it, and its ``relative_error``.

    Raises:
        CheckpointError: Even that is useless.
    """
    best = None
    for kind in _kinds(fmt, moments, solver):  # a table's solution is hundreds of MiB: two are there at a time
        found = _solved(weight, fmt, moments, kind, symmetric)
        error = relative_error(weight, found, moments)
        if best is None or error < best[2]:
            best = found, kind, error
    if not best[2] <= WORST_OUTPUT_ERROR:  # NaN too
        raise CheckpointError(f"{name}: in {fmt.name} its output is off by {best[2]:.0%} of itself; give it more bits")
    return best


def _kinds(fmt: Format, moments: torch.Tensor | None, solver: str) -> list[str]:
    """Solvers that are tried."""
    kinds = ["gptq"] if solver == "gptq" and moments is not None else []
    kinds += ["clip"] if solver != "rtn" else []
    return [*kinds, "rtn"] if solver == "rtn" or fmt.kind == "int8" else kinds


def _solved(
    weight: torch.Tensor, fmt: Format, moments: torch.Tensor | None, kind: str, symmetric: bool
) -> IntegerWeight:
    if kind == "gptq":
        return gptq(weight, fmt, moments, symmetric=symmetric)
    pieces = weight.split(SOLVE_ROWS)
    if kind == "rtn":
        return joined([round_to_nearest(rows, fmt, symmetric=symmetric) for rows in pieces])
    importance = moments.diagonal() if moments is not None else None
    search = search_clip if symmetric else search_range
    return joined([search(rows, fmt, importance) for rows in pieces])


def relative_error(weight: torch.Tensor, solution: IntegerWeight, moments: torch.Tensor | None) -> float:
    """Mean square of the output's change over that of the output; of the weight's own without moments."""
    changed, whole = 0.0, 0.0
    for start in range(0, len(weight), SOLVE_ROWS):
        rows = weight[start : start + SOLVE_ROWS].float()
        change = rows_of(solution, slice(start, start + SOLVE_ROWS)).dequantize() - rows
        for_ = (lambda m: output_error(m, moments)) if moments is not None else (lambda m: m.square())
        changed, whole = changed + for_(change).sum().item(), whole + for_(rows).sum().item()
    return changed / whole if whole > 0 else 0.0
