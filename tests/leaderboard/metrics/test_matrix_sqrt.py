from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from leaderboard.metrics.matrix_sqrt import exact, newton_schulz, svd


def covariance(width: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return (torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixed).T.cov()


def by_scipy(a: Tensor, b: Tensor) -> float:
    return float(np.trace(scipy.linalg.sqrtm((a @ b).numpy()).real))


def test_exact_root_is_scipys() -> None:
    a, b = covariance(20, 100, 0), covariance(20, 100, 1)
    assert float(exact(a)(b)) == pytest.approx(by_scipy(a, b), rel=1e-10)


def test_exact_root_of_singular_covariances() -> None:
    """Fewer images than features: the nonzero eigenvalues of the product are computed from the images themselves."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(12, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = x - x.mean(0), y - y.mean(0)
    a, b = x.T @ x, y.T @ y
    assert float(exact(a)(b)) == pytest.approx(float(torch.linalg.svdvals(x @ y.T).sum()), rel=1e-6)


def test_newton_schulz_comes_close_in_single_precision() -> None:
    a, b = covariance(20, 500, 0), covariance(20, 500, 1)
    assert float(newton_schulz(a)(b)) == pytest.approx(by_scipy(a, b), rel=1e-3)
    assert float(newton_schulz(a)(b)) != float(exact(a)(b))


def test_svd_is_the_released_formula_and_not_a_root() -> None:
    a, b = covariance(20, 100, 0), covariance(20, 100, 1)
    u, d, vh = np.linalg.svd((a @ b).numpy())
    released = u @ np.diag(np.sqrt(d)) @ vh
    assert float(svd(a)(b)) == pytest.approx(float(np.trace(released)), rel=1e-9)
    assert not np.allclose(released @ released, (a @ b).numpy())
    assert float(svd(a)(b)) < by_scipy(a, b)  # so that the distance comes out larger
    assert float(svd(a)(a)) == pytest.approx(float(a.trace()), rel=1e-9)  # a symmetric product has the right root


def test_svd_of_singular_covariances() -> None:
    a, b = covariance(20, 8, 0), covariance(20, 100, 1)
    u, d, vh = np.linalg.svd((a @ b).numpy())
    assert float(svd(a)(b)) == pytest.approx(float(np.trace(u @ np.diag(np.sqrt(d)) @ vh)), rel=1e-6)
