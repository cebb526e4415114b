"""Surrogate gradients of the spike function."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from snntorch import surrogate
from torch import Tensor

SpikeGrad = Callable[[Tensor], Tensor]


def triangle(width: float = 0.5) -> SpikeGrad:
    """Triangular surrogate of FSDDIM (arXiv 2312.01742).

    Its derivative is `max(0, 1 - |u| / width) / (2 * width)`, where `u` is the potential minus the threshold.
    """
    return surrogate.custom_surrogate(lambda u, grad, spikes: grad * (1 - u.abs() / width).clamp(min=0) / (2 * width))


def rectangle(width: float = 0.5) -> SpikeGrad:
    """Rectangular surrogate of the SDDPM paper, with derivative `[|u| < width] / (2 * width)` (Wu et al., 2018)."""
    return surrogate.custom_surrogate(lambda u, grad, spikes: grad * (u.abs() < width) / (2 * width))


@lru_cache
def get_surrogate(name: str) -> SpikeGrad:
    """Returns a surrogate with its default width: `triangle`, `rectangle`, or any of `snntorch.surrogate`.

    The same name returns the same object, so that all neurons of a network share one compiled kernel.

    Raises:
        ValueError: If no surrogate has that name.
    """
    own = {"triangle": triangle, "rectangle": rectangle}
    theirs = {
        key: value
        for key, value in vars(surrogate).items()
        if callable(value) and value.__module__ == surrogate.__name__ and not isinstance(value, type)
    }
    theirs.pop("custom_surrogate")  # takes a function, not a number
    known = theirs | own
    if name not in known:
        raise ValueError(f"spike_grad={name!r} is not a surrogate gradient; choose one of: {', '.join(sorted(known))}")
    return known[name]()
