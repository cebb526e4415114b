"""Checks and dtypes that all Triton kernels share."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor


def _countable(n: int) -> int:
    """Returns a number of elements that 32 bits can count.

    Raises:
        ValueError: If they cannot.
    """
    if n >= 2**31:
        raise ValueError(f"{n} features at once are more than the GPU's kernels count; give a smaller batch")
    return n


def _wide(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32
