"""RWKV's token shift as one autograd function; the token before the first is zero."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from systems.ops.compiled import compiled, has_triton, memory


def _previous(x: Tensor) -> Tensor:
    """Returns `x[n-1]` for each token `n` of `(M, N, D / width, width)`, zero before the first."""
    return F.pad(x[:, :-1], (0, 0, 0, 0, 1, 0))


@compiled
def _shift(x: Tensor, mixes: Sequence[Tensor]) -> list[Tensor]:
    before, tokens = _previous(x).to(mixes[0].dtype), x.to(mixes[0].dtype)
    return [torch.lerp(before, tokens, mix).to(x.dtype) for mix in mixes]


@compiled
def _shift_backward(x: Tensor, grads: Sequence[Tensor], mixes: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    change = x - _previous(x)
    grads_x, grad_mixes = [], []
    for grad, mix in zip(grads, mixes, strict=True):
        grad = grad.to(mix.dtype)
        following = F.pad(grad[:, 1:], (0, 0, 0, 0, 0, 1))
        grads_x.append(torch.lerp(following, grad, mix))
        grad_mixes.append((grad * change).sum((0, 1)))
    return reduce(torch.add, grads_x).to(x.dtype), grad_mixes


class TokenShift(torch.autograd.Function):
    """`mix * x[n] + (1 - mix) * x[n-1]` of tokens `(..., N, D)` for each `mix` `(D,)`, up to three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
        """Returns the shifted tokens `(..., N, D)` of each mix."""
        x = x.contiguous()
        ctx.save_for_backward(x, *mixes)
        if x.is_cuda and has_triton():
            from systems.ops.kernels import token_shift as kernels

            return kernels.shift(x, mixes)
        shifted = _shift(memory(x, -1, *x.shape[-2:]), [memory(mix, -1) for mix in mixes])
        return tuple(y.view(x.shape) for y in shifted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Returns the gradients of the tokens and of each mix."""
        x, *mixes = ctx.saved_tensors
        dense = [grad.contiguous() for grad in grads]
        if x.is_cuda and has_triton():
            from systems.ops.kernels import token_shift as kernels

            return kernels.shift_gradients(x, dense, mixes)
        shape = (-1, *x.shape[-2:])
        grad_x, grad_mixes = _shift_backward(
            memory(x, *shape), [memory(grad, *shape) for grad in dense], [memory(mix, -1) for mix in mixes]
        )
        return grad_x.view(x.shape), *(grad.flatten() for grad in grad_mixes)
