"""`torch.compile` for element-wise functions, with eager execution for small tensors or without a compiler."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

COMPILE_FROM = 2**16
"""Elements of the first argument from which compilation pays (seconds, once per specialisation)."""

torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
"""Dynamo's limit on specialisations per function; beyond the default of 8 it silently falls back to eager."""

WIDTH = 16
"""Elements that GPU kernels may assume to be contiguous and aligned: 32 bytes of bfloat16."""

compiler_failed = False
"""Whether compilation has failed in this process; it is then not tried again."""


@cache
def _is_triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether to use `systems.ops.kernels`: PyTorch installs Triton on platforms with GPU kernels.

    Not under a dispatch mode, such as the one that counts operations, to which these kernels would be invisible.
    """
    return _is_triton_installed() and not torch._C._len_torch_dispatch_stack()


def compiled(function: Function, work_per_element: int = 1) -> Function:
    """Compiles a function for all sizes of its tensors, at the first call with large ones.

    Args:
        function: Pure function of a tensor and further arguments; must not modify its inputs.
        work_per_element: Relative amount of work; divides the size from which compilation pays.

    Returns:
        The same function, up to rounding.
    """

    @cache
    def kernel() -> Callable[..., Any]:
        return torch.compile(function, dynamic=True)  # imports the compiler, which takes most of a second

    @wraps(function)
    def run(x: Tensor, *args: Any) -> Any:
        global compiler_failed
        small = work_per_element * x.numel() < COMPILE_FROM
        # called under a dispatch mode (a FLOP counter, say), Dynamo would never compile this function again
        if small or compiler_failed or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return function(x, *args)
        try:
            return kernel()(x, *args)
        except torch._dynamo.exc.TorchDynamoException as error:
            compiler_failed = True
            message = f"layers run uncompiled, about 3 times slower: no working compiler ({error})"
            warnings.warn(message, stacklevel=2)
            return function(x, *args)

    return cast(Function, run)


def dense(x: Tensor) -> Tensor:
    """Returns `x` itself if its memory has no gaps and its first axis is the outermost, else a contiguous copy.

    Channels-last images `(B, C, H, W)` have no gaps, nor have features `(T, B, C, H, W)` unfolded from them.
    """
    images = x.flatten(0, 1) if x.dim() == 5 else x
    channels_last = images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)
    return x if channels_last and x.stride(0) == x[0].numel() else x.contiguous()


def laid_out_as(x: Tensor, grad: Tensor) -> Tensor:
    """Returns a gradient in the memory layout of a dense `x` of the same shape."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)


def memory(x: Tensor, *shape: int) -> Tensor:
    """Returns the memory of a dense `x` as a contiguous tensor of another shape, one size of which may be -1.

        x                 (T, B, C, H, W), contiguous or channels-last
        its memory        [ n elements of step 0 | n elements of step 1 | ... ]
        memory(x, T, -1)  (T, n / width, width)

    The last axis is split in two, of which only the second has a static size: `WIDTH` on GPUs if it divides the axis,
    so that kernels read and write vectors; else 1, so that one kernel fits all sizes.

    Not a view of `x`, because Dynamo specialises on the base tensor's shape.
    """
    known = math.prod(n for n in shape if n != -1)
    *outer, last = (x.numel() // known if n == -1 else n for n in shape)
    width = math.gcd(last, WIDTH) if x.is_cuda else 1
    sizes = [*outer, last // width, width]
    stride = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    if torch.compiler.is_compiling():
        return x.as_strided(sizes, stride)
    y = x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), sizes, stride)
    if width > 1:
        torch._dynamo.mark_static(y, len(sizes) - 1)
    return y
