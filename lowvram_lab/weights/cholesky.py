"""Cholesky factors in the place of what they are of: a wide layer's moments are hundreds of MiB.

torch copies a matrix whose rows follow one another before LAPACK sees it. Of a symmetric one that is not needed: its
transpose, whose columns follow one another, is the same matrix.
"""

import torch


def factor_(symmetric: torch.Tensor) -> torch.Tensor | None:
    """The lower Cholesky factor of a matrix ``(n, n)``, which is gone afterwards.

    Returns:
        ``(n, n)``, in the matrix's own storage; ``None`` where it has no factor (rounded, it is not positive definite).
    """
    factor, failed = symmetric.mT, symmetric.new_empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    return None if failed else factor


def solved(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``x`` ``(n, k)`` of ``factor factor^T x = right``; ``torch.cholesky_solve`` would copy the factor."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)
