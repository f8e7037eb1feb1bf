"""One weight, quantised as well as it can be: candidates of several solvers, the one whose output moves least.

Rows do not depend on each other, so they are read, solved and chosen some at a time: of a table of embeddings neither
the weight nor a second solution is ever there as a whole.
"""

from collections import Counter
from collections.abc import Callable

import torch

from lowvram_lab.errors import CheckpointError
from lowvram_lab.model.formats import Format
from lowvram_lab.weights.codes import IntegerWeight
from lowvram_lab.weights.gptq import gptq_of, output_error
from lowvram_lab.weights.solvers import round_to_nearest, search_clip, search_range

SOLVERS = ("gptq", "clip", "rtn")

WORST_OUTPUT_ERROR = 1.0
"""Of the output's own mean square: a weight quantised worse than that would better be left out, so it is refused."""

SOLVE_ROWS = 1024
"""Rows solved at once; a search holds eight temporaries of them."""

Solver = Callable[[torch.Tensor], IntegerWeight]
"""Some rows of a weight, ``(rows, in)`` → their codes and scales."""


def solve(
    rows: Callable[[slice], torch.Tensor],
    count: int,
    fmt: Format,
    moments: torch.Tensor | None,
    solver: str,
    name: str,
    *,
    symmetric: bool = True,
) -> tuple[IntegerWeight, str, float]:
    """Quantises a weight.

    Args:
        rows: Some rows of it ``(rows, in)``, from where to where.
        count: How many rows there are.
        fmt: An integer format.
        moments: ``(in, in)`` second moments of its inputs; without them GPTQ is left out.
        solver: Of ``SOLVERS``, the most that is tried.
        name: For messages.
        symmetric: Scales alone; else, of int4, scales and zero points.

    Returns:
        The best solution, which solver found most of it, and the mean square of the output's change over that of the
        output (of the weight's own without moments).

    Raises:
        CheckpointError: Even that is useless.
    """
    solvers = {kind: _solver(kind, fmt, moments, symmetric) for kind in _kinds(fmt, moments, solver)}
    squares = (lambda m: output_error(m, moments)) if moments is not None else (lambda m: m.square())
    whole, off, taken, chosen = None, 0.0, 0.0, Counter()
    for start in range(0, count, SOLVE_ROWS):
        here = slice(start, min(start + SOLVE_ROWS, count))
        piece = rows(here)
        best = None
        for kind, of in solvers.items():
            found = of(piece)
            error = squares(found.dequantize() - piece.float()).sum().item()
            if best is None or error < best[0]:
                best = error, kind, found
        error, kind, found = best
        whole = whole or _empty(found, count)
        _put(whole, here, found)
        off, taken = off + error, taken + squares(piece.float()).sum().item()
        chosen[kind] += len(piece)
    share = off / taken if taken > 0 else 0.0
    if not share <= WORST_OUTPUT_ERROR:  # NaN too
        raise CheckpointError(f"{name}: in {fmt.name} its output is off by {share:.0%} of itself; give it more bits")
    return whole, chosen.most_common(1)[0][0], share


def _kinds(fmt: Format, moments: torch.Tensor | None, solver: str) -> list[str]:
    """Solvers that are tried."""
    kinds = ["gptq"] if solver == "gptq" and moments is not None else []
    kinds += ["clip"] if solver != "rtn" else []
    return [*kinds, "rtn"] if solver == "rtn" or fmt.kind == "int8" else kinds


def _solver(kind: str, fmt: Format, moments: torch.Tensor | None, symmetric: bool) -> Solver:
    if kind == "gptq":
        return gptq_of(fmt, moments, symmetric=symmetric)
    if kind == "rtn":
        return lambda rows: round_to_nearest(rows, fmt, symmetric=symmetric)
    importance = moments.diagonal() if moments is not None else None
    search = search_clip if symmetric else search_range
    return lambda rows: search(rows, fmt, importance)


def _empty(like: IntegerWeight, count: int) -> IntegerWeight:
    """Room for ``count`` rows."""

    def room(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty((count, tensor.shape[1]))

    return IntegerWeight(room(like.codes), room(like.scale), None if like.zero is None else room(like.zero))


def _put(whole: IntegerWeight, rows: slice, part: IntegerWeight) -> None:
    for into, what in ((whole.codes, part.codes), (whole.scale, part.scale), (whole.zero, part.zero)):
        if into is not None:
            into[rows] = what
