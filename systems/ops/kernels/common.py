"""Checks and dtypes shared by the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor


def check_int32_range(n: int) -> int:
    """Returns `n`, the number of elements that a kernel indexes with 32 bits.

    Raises:
        ValueError: If it is 2**31 or more.
    """
    if n >= 2**31:
        raise ValueError(f"{n} elements exceed the 32-bit indices of the GPU kernels (2**31); use a smaller batch")
    return n


def accumulator_dtype(x: Tensor) -> Any:
    """Returns Triton's dtype of intermediate results for inputs `x`: float64 if `x` is, else float32."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32
