"""Batch norms whose result goes right into what follows, a neuron or a sum, and takes no memory of its own."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from systems.ops.compiled import dense, has_triton, laid_out_as, memory

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


class BatchStatistics(NamedTuple):
    """What a batch norm makes of the features of each channel, `(C,)` each."""

    mean: Tensor
    inverse_deviation: Tensor
    factor: Tensor
    """Product of weight and inverse deviation."""
    summand: Tensor
    """What is added to the product of feature and factor."""


def fuses(norm: nn.Module, x: Tensor) -> TypeGuard[BatchNorm]:
    """Whether a norm is what `batch_statistics` measures, and not one over several devices, say.

    A single value per channel has no variance: that is left to the norm, which refuses it.
    """
    if x.device.type not in ("cpu", "cuda") or type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d):
        return False
    alone = norm.training and x.numel() == norm.num_features
    return bool(norm.affine and norm.track_running_stats and norm.momentum is not None and not alone)


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Applies a norm to each channel of features `(T, B, C, H, W)`, or of tokens `(T, ..., C)`."""
    y: Tensor = norm(_images(x))
    return y.view(x.shape)


def batch_statistics(norm: BatchNorm, x: Tensor, weight: Tensor, bias: Tensor) -> BatchStatistics:
    """Measures dense features as a norm in training does, or takes its running statistics.

    Args:
        norm: The norm, whose running statistics follow.
        x: Features `(T, B, C, H, W)` or tokens `(T, ..., C)`.
        weight: Weight of the norm.
        bias: Bias of the norm.
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
    inverse_deviation = (var.double() + norm.eps).rsqrt().to(var.dtype)
    factor = weight * inverse_deviation
    return BatchStatistics(mean, inverse_deviation, factor, torch.addcmul(bias, mean, factor, value=-1))


def batch_norm_backward(
    norm: BatchNorm, training: bool, x: Tensor, grad: Tensor, weight: Tensor, statistics: BatchStatistics
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of features, weight and bias.

    Args:
        norm: The norm.
        training: Whether it was in training when it measured the features.
        x: The features.
        grad: Gradients of the normed features, laid out like the features.
        weight: Weight of the norm.
        statistics: What was measured.
    """
    grads = torch.ops.aten.native_batch_norm_backward(
        _images(grad),
        _images(x),
        weight,
        norm.running_mean,
        norm.running_var,
        statistics.mean,
        statistics.inverse_deviation,
        training,
        norm.eps,
        [True, True, True],
    )
    return grads[0].view(x.shape), grads[1], grads[2]


def _images(x: Tensor) -> Tensor:
    """Returns `(T, B, C, H, W)` as `(T*B, C, H, W)`, and tokens `(T, ..., C)` as `(M, C)`."""
    return x.flatten(0, 1 if x.dim() == 5 else -2)


def by_channel(x: Tensor, like: Tensor) -> Tensor:
    """Returns the `memory` of `x`, laid out as features `like`: `(T, M, C, P)` or, with channels last, `(T, M, C)`."""
    channels = like.shape[2] if like.dim() == 5 else like.shape[-1]
    side_by_side = pixels(like)
    return memory(x, len(like), -1, channels, *([side_by_side] if side_by_side > 1 else []))


def for_channels(affine: tuple[Tensor, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a factor and a summand `(C,)` in a shape that broadcasts with `by_channel` of features `like`."""
    last = [1] if pixels(like) > 1 else []
    return memory(affine[0], -1, *last), memory(affine[1], -1, *last)


def pixels(x: Tensor) -> int:
    """Elements of a channel that lie side by side in dense features, or tokens `(T, ..., C)`; 1 with channels last."""
    return x.shape[3] * x.shape[4] if x.dim() == 5 and x.is_contiguous() else 1


class _AddNormed(torch.autograd.Function):
    """Sum of a batch norm of features and a residual, for GPUs; keeps the features alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm: BatchNorm) -> Tensor:
        from systems.ops.kernels import norms as kernels

        x = dense(x)
        statistics = batch_statistics(norm, x, weight, bias)
        ctx.save_for_backward(x, weight, *statistics)
        ctx.norm, ctx.training, ctx.dtype = norm, norm.training, residual.dtype
        residual = laid_out_as(x, residual.to(torch.promote_types(x.dtype, residual.dtype)))
        return kernels.normed_sum(x, residual, statistics.factor, statistics.summand, pixels(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *statistics = ctx.saved_tensors
        grad = laid_out_as(x, grad)  # a slice of what was concatenated has gaps, which the norm's kernels are slow with
        measured = BatchStatistics(*statistics)
        grads = batch_norm_backward(ctx.norm, ctx.training, x, grad.to(x.dtype), weight, measured)
        return *grads, grad.to(ctx.dtype), None


def add_normed(norm: nn.Module, x: Tensor, residual: Tensor, gain: float = 1.0) -> Tensor:
    """Returns the norm of features plus a residual, `(T, B, C, H, W)` each.

    Args:
        norm: By channel.
        x: Features.
        residual: What is added.
        gain: Scales the normalised features, not the bias of the norm.
    """
    if not (x.is_cuda and has_triton() and fuses(norm, x)):
        return scaled(norm, normalise(norm, x), gain) + residual
    return _AddNormed.apply(x, norm.weight * gain if gain != 1 else norm.weight, norm.bias, residual, norm)


def scaled(norm: nn.Module, y: Tensor, gain: float) -> Tensor:
    """Scales what a norm has made of features `(..., C, H, W)` by a gain, but its bias.

    The factor stays outside the norm, where a conversion to synchronised batch norm cannot lose it.
    """
    if gain == 1:
        return y
    assert isinstance(norm.bias, Tensor)
    bias = norm.bias.view(-1, 1, 1)
    return bias + gain * (y - bias)
