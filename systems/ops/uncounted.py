"""Products of matrices that are not part of an image's cost, such as weights that are merged once before sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_reason: ContextVar[str | None] = ContextVar("uncounted", default=None)


@contextmanager
def uncounted(reason: str) -> Iterator[None]:
    """Marks the products inside the block, or inside a decorated function, as not part of an image's cost.

    Args:
        reason: Why they are not, for the reader: a neuron update, say, or constants that a trained network can store.
    """
    token = _reason.set(reason)
    try:
        yield
    finally:
        _reason.reset(token)


def is_uncounted() -> bool:
    """Whether products that run now are marked as not part of an image's cost."""
    return _reason.get() is not None
