"""Traces of the root of a product of two covariances, the part of the Fréchet distance that programs do differently.

Each function takes the first covariance `(D, D)` and returns a function of the second, so that what depends on the
first alone is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from systems.ops.precision import full_precision

Trace = Callable[[Tensor], Tensor]

ITERATIONS = 50
"""Newton-Schulz iterations of the program released with SDDPM."""


def exact(first: Tensor) -> Trace:
    """The root itself, by the eigenvalues of the symmetric `F' B F` with `A = F F'`: those of `A B` but for zeros."""
    values, vectors = _eigen(first)
    factor = vectors * values.sqrt()
    return lambda second: torch.linalg.eigvalsh(factor.T @ second @ factor).clamp(min=0).sqrt().sum()


def newton_schulz(first: Tensor) -> Trace:
    """The root of `A B` by 50 Newton-Schulz iterations in float32; not finite where they diverge."""

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
    """`U sqrt(D) V'` of `A B = U D V'` (singular values), as released with Spiking-Diffusion: no root of `A B`."""
    values, vectors = _eigen(first)

    def trace(second: Tensor) -> Tensor:
        u, d, vh = torch.linalg.svd(values[:, None] * (vectors.T @ second), full_matrices=False)
        return ((vectors @ u * d.sqrt()) * vh.T).sum()  # the trace of U sqrt(D) V'

    return trace


def _eigen(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the eigenvalues `(R,)` that are not zero, few where the images are few, and their vectors `(D, R)`."""
    values, vectors = torch.linalg.eigh(covariance)
    rank = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return values[rank], vectors[:, rank]


ROOTS: Mapping[str, Callable[[Tensor], Trace]] = MappingProxyType(
    {"exact": exact, "newton_schulz": newton_schulz, "svd": svd}
)
"""By name."""
