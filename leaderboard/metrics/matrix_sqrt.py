"""Trace of the matrix square root `tr sqrt(A B)` of two covariances, the term of the Fréchet distance.

Implementations of FID differ in this term. `exact` is the definition (D. Dowson, B. Landau, 1982,
https://doi.org/10.1016/0047-259X(82)90077-X), `newton_schulz` the approximation of SDDPM's released code, `svd` the
formula of Spiking-Diffusion's released code.

Each function accepts the covariance `A` `(D, D)` and returns a function of `B` `(D, D)`, so that work that depends only
on `A` is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from systems.ops.precision import full_precision

Trace = Callable[[Tensor], Tensor]

ITERATIONS = 50
"""Newton-Schulz iterations in SDDPM's released code."""


def exact(first: Tensor) -> Trace:
    """Exact root: `A B` and the symmetric `F' B F`, with `A = F F'`, have the same nonzero eigenvalues."""
    values, vectors = _eigen(first)
    factor = vectors * values.sqrt()
    return lambda second: torch.linalg.eigvalsh(factor.T @ second @ factor).clamp(min=0).sqrt().sum()


def newton_schulz(first: Tensor) -> Trace:
    """Root of `A B` by 50 Newton-Schulz iterations in float32; not finite if they diverge."""

    def trace(second: Tensor) -> Tensor:
        product = (first @ second).float()
        norm = product.square().sum().sqrt()
        eye = torch.eye(len(product), device=product.device)
        y, z = product / norm, eye
        with full_precision(product.device.type):  # TF32 would diverge
            for _ in range(ITERATIONS):
                step = (3 * eye - z @ y) / 2
                y, z = y @ step, step @ z
        return (y.trace() * norm.sqrt()).double()

    return trace


def svd(first: Tensor) -> Trace:
    """`U sqrt(D) V'` with the singular value decomposition `A B = U D V'`; in general not a root of `A B`."""
    values, vectors = _eigen(first)

    def trace(second: Tensor) -> Tensor:
        u, d, vh = torch.linalg.svd(values[:, None] * (vectors.T @ second), full_matrices=False)
        return ((vectors @ u * d.sqrt()) * vh.T).sum()  # the trace of U sqrt(D) V'

    return trace


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the nonzero eigenvalues `(R,)`, fewer than the number of images, and their eigenvectors `(D, R)`."""
    values, vectors = torch.linalg.eigh(covariance)
    rank = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return values[rank], vectors[:, rank]


ROOTS: Mapping[str, Callable[[Tensor], Trace]] = MappingProxyType(
    {"exact": exact, "newton_schulz": newton_schulz, "svd": svd}
)
"""Matrix square roots by name."""
