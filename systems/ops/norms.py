"""Batch norm fused into the following neuron or residual sum, so that its output is never stored."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from systems.ops.compiled import dense, has_triton, laid_out_as, memory

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d

Affine = tuple[Tensor, Tensor]
"""Scale and shift of a norm, `(C,)` each: `y = scale * x + shift`."""


class BatchStatistics(NamedTuple):
    """Per-channel statistics and affine map `y = scale * x + shift` of a batch norm, `(C,)` each."""

    mean: Tensor
    inv_std: Tensor
    """`1 / sqrt(var + eps)`."""
    scale: Tensor
    """`weight * inv_std`."""
    shift: Tensor
    """`bias - mean * scale`."""


def fuses(norm: nn.Module, x: Tensor) -> TypeGuard[BatchNorm]:
    """Whether a norm is a plain batch norm, which `batch_statistics` can replace; a synchronised one is not.

    False also for a single value per channel in training, which has no variance: the norm itself raises the error.
    """
    if x.device.type not in ("cpu", "cuda") or type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d):
        return False
    single = norm.training and x.numel() == norm.num_features
    return bool(norm.affine and norm.track_running_stats and norm.momentum is not None and not single)


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Applies a norm to features `(T, B, C, H, W)` or tokens `(T, ..., C)`."""
    y: Tensor = norm(_images(x))
    return y.view(x.shape)


def batch_statistics(norm: BatchNorm, x: Tensor, weight: Tensor, bias: Tensor) -> BatchStatistics:
    """Returns the statistics of dense features for a norm in training mode, else its running statistics.

    Args:
        norm: The norm, whose running statistics are updated in training mode.
        x: Features `(T, B, C, H, W)` or tokens `(T, ..., C)`.
        weight: Weight of the norm, `(C,)`.
        bias: Bias of the norm, `(C,)`.
    """
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    assert norm.momentum is not None
    if norm.training:
        norm.get_buffer("num_batches_tracked").add_(1)
        mean, var = torch.batch_norm_update_stats(_images(x), mean, var, norm.momentum)
    if x.is_cuda and has_triton():
        from systems.ops.kernels import norms as kernels

        return BatchStatistics(mean, *kernels.affine(mean, var, weight, bias, norm.eps))
    inv_std = (var.double() + norm.eps).rsqrt().to(var.dtype)
    scale = weight * inv_std
    return BatchStatistics(mean, inv_std, scale, torch.addcmul(bias, mean, scale, value=-1))


def batch_norm_backward(
    norm: BatchNorm, training: bool, x: Tensor, grad: Tensor, weight: Tensor, statistics: BatchStatistics
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of features, weight and bias.

    Args:
        norm: The norm.
        training: Whether it was in training mode in the forward pass.
        x: Features `(T, B, C, H, W)` or tokens `(T, ..., C)`.
        grad: Gradients of the normed features, in the memory layout of `x`.
        weight: Weight of the norm, `(C,)`.
        statistics: Output of `batch_statistics` in the forward pass.
    """
    grads = torch.ops.aten.native_batch_norm_backward(
        _images(grad),
        _images(x),
        weight,
        norm.running_mean,
        norm.running_var,
        statistics.mean,
        statistics.inv_std,
        training,
        norm.eps,
        [True, True, True],
    )
    return grads[0].view(x.shape), grads[1], grads[2]


def _images(x: Tensor) -> Tensor:
    """Returns `(T, B, C, H, W)` as `(T*B, C, H, W)`, and tokens `(T, ..., C)` as `(M, C)`."""
    return x.flatten(0, 1 if x.dim() == 5 else -2)


def by_channel(x: Tensor, like: Tensor) -> Tensor:
    """Returns the `memory` of `x` in a shape with an axis of channels; `like` are features in the same layout.

        contiguous features         [c0 c0 c0 ... c1 c1 c1 ... ]   (T, B, C, H*W)
        channels-last features      [c0 c1 c2 ... c0 c1 c2 ... ]   (T, B*H*W, C)
        tokens (T, ..., C)          [c0 c1 c2 ... c0 c1 c2 ... ]   (T, M, C)

    `memory` splits the last axis in two.
    """
    channels = like.shape[2] if like.dim() == 5 else like.shape[-1]
    stride = channel_stride(like)
    return memory(x, len(like), -1, channels, *([stride] if stride > 1 else []))


def for_channels(affine: Affine, like: Tensor) -> Affine:
    """Returns scale and shift in a shape that broadcasts with `by_channel` of features `like`."""
    last = [1] if channel_stride(like) > 1 else []
    return memory(affine[0], -1, *last), memory(affine[1], -1, *last)


def channel_stride(x: Tensor) -> int:
    """Stride of the channels in memory: `H*W` in contiguous features, 1 in channels-last features or tokens."""
    return x.shape[3] * x.shape[4] if x.dim() == 5 and x.is_contiguous() else 1


class _AddNormed(torch.autograd.Function):
    """`scale * x + shift + residual` on GPUs; saves only the features for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm: BatchNorm) -> Tensor:
        from systems.ops.kernels import norms as kernels

        x = dense(x)
        statistics = batch_statistics(norm, x, weight, bias)
        ctx.save_for_backward(x, weight, *statistics)
        ctx.norm, ctx.training, ctx.dtype = norm, norm.training, residual.dtype
        residual = laid_out_as(x, residual.to(torch.promote_types(x.dtype, residual.dtype)))
        return kernels.normed_sum(x, residual, statistics.scale, statistics.shift, channel_stride(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *statistics = ctx.saved_tensors
        grad = laid_out_as(x, grad)  # the gradient of a concatenation is a slice, and slow in the norm's kernels
        grads = batch_norm_backward(ctx.norm, ctx.training, x, grad.to(x.dtype), weight, BatchStatistics(*statistics))
        return *grads, grad.to(ctx.dtype), None


def add_normed(norm: nn.Module, x: Tensor, residual: Tensor, gain: float = 1.0) -> Tensor:
    """Returns `scaled(norm(x), gain) + residual`.

    Args:
        norm: Norm by channel.
        x: Features `(T, B, C, H, W)`.
        residual: Residual `(T, B, C, H, W)`.
        gain: Factor on the normalised features, but not on the bias of the norm.
    """
    if not (x.is_cuda and has_triton() and fuses(norm, x)):
        return scaled(norm, normalise(norm, x), gain) + residual
    return _AddNormed.apply(x, norm.weight * gain if gain != 1 else norm.weight, norm.bias, residual, norm)


def scaled(norm: nn.Module, y: Tensor, gain: float) -> Tensor:
    """Scales the normalised features `(..., C, H, W)` by `gain`, leaving the norm's bias unscaled.

    The gain is not folded into the norm, where a conversion to synchronised batch norm would lose it.
    """
    if gain == 1:
        return y
    assert isinstance(norm.bias, Tensor)
    bias = norm.bias.view(-1, 1, 1)
    return bias + gain * (y - bias)
