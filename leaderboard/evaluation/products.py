"""Products of matrices outside convolution and linear layers, found by a dispatch mode while a network runs.

Every operator that torch dispatches is seen, whichever way it was called: `F.linear`, `@`, `einsum`, attention,
recurrent cells. Products with a formula are counted; other operators that multiply matrices, and operators that are not
torch's own, are reported by name. Element-wise operations are not products. Kernels that bypass the dispatcher, such as
Triton kernels launched directly, are invisible.

The formulas are those of `torch.utils.flop_counter`, halved: it counts a multiply-accumulate as two operations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten: Any = torch.ops.aten
_PRODUCT = re.compile(
    r"mm($|_)|matmul|conv(?!ert)|linear($|_)|attention|multi_head|transformer_encoder|_mm|rnn|lstm|gru|einsum|bilinear"
    r"|cdist|(^|_)v?dot($|_)|addmv|(^|_)mv($|_)|fft_|linalg_(?!vector_norm|norm)|embedding_bag|cosine_similarity|tensordot"
)
"""Names of torch's operators that multiply matrices."""
_NO_PRODUCT = re.compile(r"backward|^_?upsample|^_?(un)?fold|fft_(freq|shift)|linspace")
_NAMESPACES = ("aten", "prim", "prims", "profiler", "_c10d_functional", "c10d", "inductor", "debugprims", "rngprims")
"""Namespaces of torch's own operators, whose names say whether they are products."""


class Product(NamedTuple):
    """A call of an operator that multiplies matrices.

    Args:
        operator: Name of the operator, such as `aten.bmm`.
        macs: Multiply-accumulates if all operands are dense; None if it cannot be counted.
        operands: The factors of a plain product, either of which may be spikes; empty for others (attention).
        biases: Elements of the output that receive a bias.
        outputs: Elements of the output.
        settings: Further arguments of a convolution: stride, padding, dilation, whether it is transposed, output
            padding, groups.
    """

    operator: str
    macs: int | None
    operands: tuple[Tensor, ...] = ()
    biases: int = 0
    outputs: int = 0
    settings: tuple[Any, ...] = ()

    def effective(self) -> Tensor | None:
        """Returns the multiplications without a zero factor or padding, as a scalar; None if the operands are unknown.

        Of matrices they are the sum over the inner index `k` of the nonzero elements of column `k` of the first and of
        row `k` of the second. A convolution is computed again, with 1 for each operand that is not 0.
        """
        if not self.operands:
            return None
        first, second = ((x != 0).double() for x in self.operands)
        if self.settings:
            ones: Tensor = _aten.convolution(first, second, None, *self.settings)
            return ones.sum()
        if "conv" in self.operator:
            return None
        columns = first.sum(-2) if first.dim() > 1 else first
        rows = second.sum(-1) if second.dim() > 1 else second
        return (columns * rows).sum()


class ProductMode(TorchDispatchMode):
    """Reports every product, and every operator, inside its `with` block.

    Args:
        on_product: Called after each product.
        on_operator: Called after each of torch's operators with the operator, its arguments and its output, if given.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        on_product: Callable[[Product], None],
        on_operator: Callable[[Any, Sequence[Any], Mapping[str, Any], Any], None] | None = None,
    ) -> None:
        super().__init__()
        self._on_product = on_product
        self._on_operator = on_operator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operator, in parts if it consists of others, and reports it."""
        kwargs = dict(kwargs or {})
        if not isinstance(func, torch._ops.OpOverload):  # flex_attention and control flow
            out = func(*args, **kwargs)
            self._on_product(Product(str(func), None))
            return out
        kind = _kind_of(func)
        if kind == "composite":
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if self._on_operator is not None:
            self._on_operator(func, args, kwargs, out)
        if kind == "product":
            self._on_product(_product(func, args, kwargs, out))
        elif kind == "unknown":
            self._on_product(Product(str(func._overloadpacket), None))
        return out


@cache
def _kind_of(func: Any) -> Literal["product", "composite", "unknown", "other"]:
    """Returns whether an operator is a product with a formula, consists of others, or may be an unknown product."""
    if func._overloadpacket in _MACS:
        return "product"
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    in_parts = composite in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite)
    if in_parts and func is not torch.ops.prim.device.default:
        return "composite"
    return "unknown" if is_unknown_product(func.namespace, func._overloadpacket.__name__) else "other"


def is_unknown_product(namespace: str, name: str) -> bool:
    """Whether an operator without a formula may multiply matrices: by its name, or because it is not torch's own."""
    if namespace not in _NAMESPACES:
        return True
    return bool(_PRODUCT.search(name)) and not _NO_PRODUCT.search(name)


def _product(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Product:
    packet = func._overloadpacket
    operands = tuple(args[i] for i in _OPERANDS.get(packet, ()) if i < len(args))
    has_bias = packet in _BIASED or (packet in _CONVOLUTIONS and len(args) > 2 and args[2] is not None)
    outputs = next(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
    biases = outputs if has_bias else 0
    settings = tuple(args[3:9]) if packet in _existing("convolution", "convolution_overrideable") else ()
    return Product(str(packet), _MACS[packet](*args, **kwargs, out_val=out), operands, biases, outputs, settings)


def _halved(flops: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, **kwargs: flops(*args, **kwargs) // 2


def _vector_macs(*args: Any, out_val: Any, **kwargs: Any) -> int:
    """MACs of a product with a vector, whose other factor is the largest argument."""
    return max(x.numel() for x in args if isinstance(x, Tensor))


def _addbmm_macs(bias: Any, a: Tensor, b: Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    return a.numel() * b.shape[-1]


def _attention_macs(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    """MACs of `softmax(Q K^T) V`, both products in full, also where a mask is applied."""
    return query.numel() * key.shape[-2] + math.prod(query.shape[:-1]) * key.shape[-2] * value.shape[-1]


def _recurrent_macs(input: Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    """MACs of recurrent layers `(T, B, F)`: each matrix once per step and sequence."""
    weights = [x for x in tree_leaves(args[: 4 if isinstance(args[0], Tensor) else 1]) if isinstance(x, Tensor)]
    return input.shape[0] * input.shape[1] * sum(w.numel() for w in weights if w.dim() == 2)


def _existing(*names: str) -> list[Any]:
    """Returns the operators of these names that this version of torch has."""
    return [getattr(_aten, name) for name in names if hasattr(_aten, name)]


_CONVOLUTIONS = _existing("convolution", "_convolution", "cudnn_convolution", "convolution_overrideable")
_BIASED = _existing("addmm", "baddbmm", "addmv", "addbmm")
_VECTOR = _existing("mv", "addmv", "dot", "vdot")
_ATTENTION = _existing(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
_OPERANDS: dict[Any, tuple[int, int]] = {
    **dict.fromkeys(_existing("mm", "bmm", "mv", "dot", "vdot", "cudnn_convolution"), (0, 1)),
    **dict.fromkeys(_CONVOLUTIONS, (0, 1)),
    **dict.fromkeys(_BIASED, (1, 2)),
}
"""Positions of the two factors of plain products."""
_MACS: dict[Any, Callable[..., int]] = {
    **{op: _halved(flops) for op, flops in flop_registry.items() if isinstance(op, torch._ops.OpOverloadPacket)},
    **dict.fromkeys(_VECTOR, _vector_macs),
    **dict.fromkeys(_existing("addbmm"), _addbmm_macs),
    **dict.fromkeys(_ATTENTION, _attention_macs),
    **dict.fromkeys(_existing("_cudnn_rnn", "miopen_rnn"), _recurrent_macs),
    **dict.fromkeys(_existing("mkldnn_rnn_layer"), _recurrent_macs),
}
"""MACs of a call by operator, from its arguments and its output `out_val`."""
