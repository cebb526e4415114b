"""The WKV operation of RWKV-4, in time linear in the number of tokens.

B. Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023, https://arxiv.org/abs/2305.13048, equation 16.
For each channel, with decay `w > 0` per token and bonus `u` for the current token,

    wkv[n] = (sum_{i<n} e^(k[i] - (n-1-i)w) v[i] + e^(u + k[n]) v[n]) / (the same without v)

The sums are kept as a weighted mean `y` of the values and the logarithm `s` of its weight, which token `n` updates:

    x = s - w - k[n],   s' = k[n] + log(1 + e^x),   y' = v[n] + sigmoid(x) (y - v[n])

This interpolation is stable without the running maximum of the published kernels, since no weight overflows or vanishes
before the division. The backward pass is a hand-written recurrence from the last token to the first, whose factors are
forward weights in [0, 1].

All sequences and channels advance together, token by token; `CHUNK` tokens form one compiled kernel, in which `s` and
`y` stay in registers. For 197 tokens of SDiT's size this takes a third of the time of a parallel scan (pairs of tokens,
then pairs of pairs), which computes each token twice and writes every level to memory. On GPUs, forward and backward
are one Triton kernel each (`systems.ops.kernels.wkv`).

Packages considered, and not used:

- `fla-core` 0.6 (flash-linear-attention, MIT): a Triton kernel of the same operation, token by token for a block of
  channels of one sequence. Needs a GPU; its state is float32, so that it cannot be checked in float64.
- `accelerated-scan` 0.3: CUDA and Triton kernels for `h[n] = g[n] h[n-1] + x[n]` with a power of two of tokens. Needs a
  GPU, and does not compute the logarithms `s`.
- `torch._higher_order_ops.associative_scan`: a private prototype, 1 to 5 times slower on a CPU than the same scan
  written by hand; saves every level of it for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from systems.ops.compiled import compiled, has_triton, memory

CHUNK = 7
"""Tokens per compiled kernel; divides the number of patches of 28x28 images for every patch size."""

NO_WEIGHT = -1e30
"""Log-weight before the first token; finite, so that differences of log-weights are finite."""

Chunk = Callable[..., Any]


def wkv(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Returns for each token the decayed mean of the values up to it, weighted by `e^key`.

    Args:
        k: Keys, logarithms of weights, `(M, N, D)`: `M` sequences of `N` tokens, such as `M = T*B`.
        v: Values `(M, N, D)`.
        w: Decay of each channel per token, positive, `(D,)`.
        u: Bonus on the key of the current token, `(D,)`.

    Returns:
        `(M, N, D)` in the dtype of `v`, causal: a token sees itself and earlier tokens.

    Raises:
        ValueError: If the shapes do not match or there is no token.
    """
    if k.dim() != 3 or k.shape != v.shape or not w.shape == u.shape == k.shape[-1:] or k.shape[1] < 1:
        raise ValueError(
            f"keys {tuple(k.shape)}, values {tuple(v.shape)}, decay {tuple(w.shape)}, bonus {tuple(u.shape)}; "
            "wkv takes (M, N, D) for keys and values, with N >= 1, and (D,) for decay and bonus"
        )
    return _WKV.apply(k, v, w, u)


def bidirectional_wkv(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Returns the sum of `wkv` over the sequence and over its reverse, so that a token sees all others."""
    backwards = wkv(k.flip(1), v.flip(1), w, u).flip(1)
    return wkv(k, v, w, u) + backwards


class _WKV(torch.autograd.Function):
    """Saves its inputs and the state before each chunk; the backward pass recomputes the states within a chunk.

    On GPUs it saves only its inputs.
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        shape = k.shape
        k, v, w, u = (x.contiguous() for x in (k, v, w, u))
        if k.is_cuda and has_triton():
            from systems.ops.kernels import wkv as kernels

            ctx.save_for_backward(k, v, w, u)
            return kernels.wkv(k, v, w, u)
        k, v = memory(k, *shape), memory(v, *shape)
        w, u = memory(w, -1), memory(u, -1)
        y = torch.zeros_like(k[:, 0], dtype=torch.promote_types(w.dtype, torch.float32))
        state = torch.full_like(y, NO_WEIGHT), torch.zeros_like(y), y
        outputs: list[Tensor] = []
        states: list[Tensor] = []
        for start, stop in _chunks(k):
            states += state
            output, state = _run_chunk(_forward_chunk, _forward_compiled, start, stop, (k, v), w, u, state)
            outputs.append(output)
        ctx.save_for_backward(k, v, w, u, *states)
        return torch.cat(outputs, 1).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, v, w, u, *states = ctx.saved_tensors
        if not states:
            from systems.ops.kernels import wkv as kernels

            return kernels.wkv_gradients(k, v, w, u, grad.contiguous())
        shape, grad = grad.shape, memory(grad.contiguous(), *grad.shape)
        sums = [torch.zeros_like(states[0]) for _ in range(4)]
        grads = []
        for start, stop in reversed(_chunks(k)):
            state, states = states[-3:], states[:-3]
            *grads_kv, sums = _run_chunk(
                _backward_chunk, _backward_compiled, start, stop, (k, v, grad), w, u, state, sums
            )
            grads.append(grads_kv)
        grad_k, grad_v = (torch.cat(chunks[::-1], 1) for chunks in zip(*grads, strict=True))
        grad_w, grad_u = (x.sum(0).flatten().to(w.dtype) for x in sums[2:])
        return grad_k.view(shape), grad_v.view(shape), grad_w, grad_u


def _chunks(x: Tensor) -> list[tuple[int, int]]:
    """Ranges `start, stop` of the tokens of each chunk of `(M, N, D)`; the last chunk may be shorter."""
    return [(start, min(start + CHUNK, x.shape[1])) for start in range(0, x.shape[1], CHUNK)]


def _run_chunk(eager: Chunk, kernel: Chunk, start: int, stop: int, tokens: Sequence[Tensor], *args: Any) -> Any:
    """Runs the kernel on a full chunk, else the eager function.

    The kernel receives all tokens and `stop`; with `start` instead, Dynamo would specialise on a start of 0.
    """
    if stop - start == CHUNK:
        return kernel(tokens[0], tokens, stop, *args)
    return eager([x[:, start:stop] for x in tokens], *args)


def _means(k: Tensor, v: Tensor, w: Tensor, state: Sequence[Tensor]) -> tuple[list[Any], Any]:
    """Computes the weighted means of the values, token by token.

    The rounding error of `s` is carried along (compensated summation); with small decays it would add up over tokens.

    Args:
        k: Keys `(M, L, D)`.
        v: Values `(M, L, D)`.
        w: Decay `(D,)`.
        state: `s`, its rounding error, and `y` before the first token, `(M, D)` each.

    Returns:
        `(k, v, s, y, kept)` of each token, with `s` and `y` before it and the share `kept` of `y` in the mean after it;
        and the state after the last token.
    """
    s, error, y = state
    tokens = []
    for k_n, v_n in zip(k.unbind(1), v.unbind(1), strict=True):
        k_n, v_n = k_n.to(s.dtype), v_n.to(s.dtype)
        past = s - w
        error = error + (s - past - w)
        x = past - k_n + error
        larger = torch.where(x > 0, past, k_n)
        ratio = torch.exp(-x.abs())  # smaller weight over larger weight
        rest = torch.log(1 + ratio) + torch.where(x > 0, error, 0)
        kept = torch.where(x > 0, 1, ratio) / (1 + ratio)
        tokens.append((k_n, v_n, s, y, kept))
        s = larger + rest
        error = rest - (s - larger)
        y = torch.lerp(v_n, y, kept)
    return tokens, (s, error, y)


def _forward_chunk(tokens: Sequence[Tensor], w: Tensor, u: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, Any]:
    """Continues the weighted means over keys and values `(M, L, D)`; returns outputs `(M, L, D)` and the last state."""
    k, v = tokens
    means, state = _means(k, v, w, state)
    out = [torch.lerp(v_n, y, torch.sigmoid(s - (u + k_n))).to(v.dtype) for k_n, v_n, s, y, _ in means]
    return torch.stack(out, 1), state


def _backward_chunk(
    tokens: Sequence[Tensor], w: Tensor, u: Tensor, state: Sequence[Tensor], sums: Sequence[Tensor]
) -> tuple[Any, ...]:
    """Backpropagates through a chunk, last token first.

    The gradients carried from token to token are those of `y` and `s`; with gradients of the sums `y e^s` and `e^s`,
    large terms would cancel.

    Args:
        tokens: Keys, values and gradients of the outputs, `(M, L, D)` each.
        w: Decay `(D,)`.
        u: Bonus `(D,)`.
        state: State before the first token, as for `_means`.
        sums: `dy` and `ds` after the last token, and the gradients of `w` and `u` summed so far, `(M, D)` each.

    Returns:
        Gradients of keys and values, `(M, L, D)` each, and `sums` before the first token.
    """
    keys, values, grads = tokens
    dy, ds, dw, du = sums
    grads_k, grads_v = [], []
    means, _ = _means(keys, values, w, state)
    for (k_n, v_n, s, y, kept), grad in zip(reversed(means), reversed(grads.unbind(1)), strict=True):
        grad = grad.to(s.dtype)
        seen = torch.sigmoid(s - (u + k_n))  # share of the past in the output
        grad_x = dy * (y - v_n) * kept * (1 - kept)
        grad_logit = grad * (y - v_n) * seen * (1 - seen)
        grads_v.append(((1 - kept) * dy + (1 - seen) * grad).to(values.dtype))
        grads_k.append(((1 - kept) * ds - grad_x - grad_logit).to(keys.dtype))
        grad_past = kept * ds + grad_x
        dw, du = dw - grad_past, du - grad_logit
        dy, ds = kept * dy + seen * grad, grad_past + grad_logit
    return torch.stack(grads_k[::-1], 1), torch.stack(grads_v[::-1], 1), [dy, ds, dw, du]


def _slice_forward(_: Tensor, tokens: Sequence[Tensor], stop: int, *args: Any) -> Any:
    return _forward_chunk([x.narrow(1, stop - CHUNK, CHUNK) for x in tokens], *args)


def _slice_backward(_: Tensor, tokens: Sequence[Tensor], stop: int, *args: Any) -> Any:
    return _backward_chunk([x.narrow(1, stop - CHUNK, CHUNK) for x in tokens], *args)


_forward_compiled = compiled(_slice_forward, work_per_element=4)
_backward_compiled = compiled(_slice_backward, work_per_element=4)
