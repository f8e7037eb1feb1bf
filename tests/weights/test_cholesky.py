"""Factors in place are torch's own, and what they solve is solved."""

import pytest
import torch

from lowvram_lab.weights.cholesky import factor_, solved


@pytest.fixture
def moments() -> torch.Tensor:
    x = torch.randn(600, 300, generator=torch.Generator().manual_seed(0))
    return x.T @ x / 600 + 0.1 * torch.eye(300)


def test_factor_is_torchs_in_the_matrixs_own_storage(moments):
    expected, address = torch.linalg.cholesky(moments), moments.data_ptr()
    found = factor_(moments)
    torch.testing.assert_close(found, expected)
    assert found.data_ptr() == address
    assert bool((found.triu(1) == 0).all())


def test_inverse_in_place_is_the_inverse(moments):
    expected = torch.linalg.inv(moments.double()).float()
    factor = factor_(moments)
    found = torch.cholesky_inverse(factor, out=factor)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found.data_ptr() == moments.data_ptr()


def test_solved_is_the_solution(moments):
    right = torch.randn(300, 7)
    found = solved(factor_(moments.clone()), right)
    torch.testing.assert_close(moments @ found, right, atol=1e-3, rtol=1e-3)


def test_what_is_not_positive_definite_has_no_factor(moments):
    moments[5, 5] = -1
    assert factor_(moments) is None
