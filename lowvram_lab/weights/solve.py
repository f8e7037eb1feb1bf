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
    solutions, pieces = {}, weight.split(SOLVE_ROWS)
    if solver == "gptq" and moments is not None:
        solutions["gptq"] = gptq(weight, fmt, moments, symmetric=symmetric)
    if solver != "rtn":
        importance = moments.diagonal() if moments is not None else None
        search = search_clip if symmetric else search_range
        solutions["clip"] = joined([search(rows, fmt, importance) for rows in pieces])
    if solver == "rtn" or fmt.kind == "int8":
        solutions["rtn"] = joined([round_to_nearest(rows, fmt, symmetric=symmetric) for rows in pieces])
    errors = {kind: relative_error(weight, solution, moments) for kind, solution in solutions.items()}
    best = min(errors, key=errors.get)
    if not errors[best] <= WORST_OUTPUT_ERROR:  # NaN too
        raise CheckpointError(
            f"{name}: in {fmt.name} its output is off by {errors[best]:.0%} of itself; give it more bits"
        )
    return solutions[best], best, errors[best]


def relative_error(weight: torch.Tensor, solution: IntegerWeight, moments: torch.Tensor | None) -> float:
    """Mean square of the output's change over that of the output; of the weight's own without moments."""
    changed, whole = 0.0, 0.0
    for start in range(0, len(weight), SOLVE_ROWS):
        rows = weight[start : start + SOLVE_ROWS].float()
        change = rows_of(solution, slice(start, start + SOLVE_ROWS)).dequantize() - rows
        for_ = (lambda m: output_error(m, moments)) if moments is not None else (lambda m: m.square())
        changed, whole = changed + for_(change).sum().item(), whole + for_(rows).sum().item()
    return changed / whole if whole > 0 else 0.0
