"""Element-wise functions as compiled kernels, and as they are where tensors are small or a compiler is missing."""

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
"""Elements of the first argument from which a kernel is worth its compilation (seconds, once for each kind)."""

torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
"""Kinds of one function (neurons, dtypes, `T`) in a process; beyond torch's 8 it would go on uncompiled, silently."""

WIDTH = 16
"""Elements that a GPU's kernels may count on to lie together and aligned: 32 bytes of bfloat16."""

compiler_failed = False
"""Whether an attempt to compile has failed in this process, so that there is no other."""


@cache
def has_triton() -> bool:
    """Whether `systems.ops.kernels` can be imported; PyTorch brings Triton along where it has kernels for GPUs."""
    return importlib.util.find_spec("triton") is not None


def compiled(function: Function, sooner: int = 1) -> Function:
    """Compiles a function for all sizes of its tensors, the first time that they are large.

    Args:
        function: Takes a tensor and whatever else; in-place changes of what it is given are not for it.
        sooner: By how much it is compiled for smaller tensors than others, because it is of many operations.

    Returns:
        The same function, up to rounding.
    """
    kernel = torch.compile(function, dynamic=True)

    @wraps(function)
    def run(x: Tensor, *args: Any) -> Any:
        global compiler_failed
        small = sooner * x.numel() < COMPILE_FROM
        # under a dispatch mode, a counter of operations say, torch gives up on the function for good
        if small or compiler_failed or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return function(x, *args)
        try:
            return kernel(x, *args)
        except torch._dynamo.exc.TorchDynamoException as error:
            compiler_failed = True
            message = f"layers run uncompiled, about 3 times slower: no working compiler ({error})"
            warnings.warn(message, stacklevel=2)
            return function(x, *args)

    return cast(Function, run)


def dense(x: Tensor) -> Tensor:
    """Returns `x` itself if its memory has no gaps and its first axis outermost, else a contiguous copy.

    Channels-last images `(B, C, H, W)`, and features `(T, B, C, H, W)` made of such, have no gaps.
    """
    images = x.flatten(0, 1) if x.dim() == 5 else x
    channels_last = images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)
    return x if channels_last and x.stride(0) == x[0].numel() else x.contiguous()


def laid_out_as(x: Tensor, grad: Tensor) -> Tensor:
    """Returns the gradient of a dense `x` in the order of its memory."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)


def memory(x: Tensor, *shape: int) -> Tensor:
    """Returns the memory of a dense `x` as a contiguous tensor of another shape, a number of which may be -1.

    The last axis comes as two, of which the compiler knows the second. On GPUs that is `WIDTH` where it divides the
    axis, so that their kernels read and write many elements at once; elsewhere 1, so that one kernel fits all sizes.

    It is no view of `x`: the compiler would make a kernel for each shape of what a view is of.
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
