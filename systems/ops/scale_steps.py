"""A scalar factor for each SNN time step, with one pass over memory forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from systems.ops.compiled import compiled, dense, laid_out_as, memory


@compiled
def _scale(x: Tensor, factors: Tensor) -> Tensor:
    return (x * factors[:, None, None]).to(x.dtype)


@compiled
def _scale_backward(x: Tensor, grad: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    return (grad * factors[:, None, None]).to(x.dtype), (grad.to(factors.dtype) * x).sum((1, 2))


class ScaleSteps(torch.autograd.Function):
    """Multiplies each step of `(T, ...)` by its factor `(T,)`, in the precision of the factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        """Returns the product, in the dtype of `x`."""
        x = dense(x)
        ctx.save_for_backward(x, factors)
        return _scale(memory(x, len(x), -1), factors).as_strided(x.shape, x.stride())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of `x` and of the factors."""
        x, factors = ctx.saved_tensors
        grad = laid_out_as(x, grad)
        grad_x, grad_factors = _scale_backward(memory(x, len(x), -1), memory(grad, len(x), -1), factors)
        return grad_x.as_strided(x.shape, x.stride()), grad_factors
