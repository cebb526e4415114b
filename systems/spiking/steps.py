"""The axis of SNN time steps: folded into the batch for weights and norms, unfolded for neurons."""

from __future__ import annotations

import torch
from torch import Tensor


def fold(x: Tensor) -> Tensor:
    """`(T, B, ...)` to `(T*B, ...)`."""
    return x.flatten(0, 1)


def unfold(x: Tensor, num_steps: int) -> Tensor:
    """`(T*B, ...)` to `(T, B, ...)`."""
    return x.unflatten(0, (num_steps, -1))


def concatenate(*parts: Tensor) -> Tensor:
    """Joins `(T, B, C1, H, W)`, `(T, B, C2, H, W)`, ... along `C`; folded, which keeps channels-last memory."""
    return unfold(torch.cat([fold(x) for x in parts], dim=1), len(parts[0]))


def lay_out(x: Tensor) -> Tensor:
    """Lays the features of a stem `(N, C, H, W)` out channels-last on GPUs, whose half-precision kernels want it.

    All later features follow. On CPUs it does not pay (`python -m benchmark speed` measures what does).
    """
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x
