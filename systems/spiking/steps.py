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
    """Concatenates `(T, B, C1, H, W)`, `(T, B, C2, H, W)`, ... along `C`, preserving channels-last memory."""
    return unfold(torch.cat([fold(x) for x in parts], dim=1), len(parts[0]))


def to_channels_last_on_gpu(x: Tensor) -> Tensor:
    """Returns the features of a stem `(N, C, H, W)` in channels-last layout on GPUs, unchanged on CPUs.

    cuDNN's half-precision kernels prefer this layout, and all later features inherit it. On CPUs it is not faster.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x
