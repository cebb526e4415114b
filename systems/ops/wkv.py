"""The WKV operation of RWKV-4, linear in the number of tokens, for all sequences at once.

B. Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023, https://arxiv.org/abs/2305.13048, equation 16.
For each channel, with decay `w > 0` per token and bonus `u` of the present token,

    wkv[n] = (sum_{i<n} e^(k[i] - (n-1-i)w) v[i] + e^(u + k[n]) v[n]) / (the same without v)

Sums are kept as a weighted mean `y` of values and the logarithm `s` of its weight. A token joins them by

    x = s - w - k[n],   s' = k[n] + log(1 + e^x),   y' = v[n] + sigmoid(x) (y - v[n])

an interpolation, and stable: no weight overflows or vanishes before it is divided by, without the running maximum of
the published kernels. The backward pass is written by hand, a recurrence from the last token to the first whose factors
are weights of the forward pass in [0, 1].

All sequences and channels go at once, token after token; `CHUNK` tokens are one compiled kernel, in which `s` and `y`
stay in registers. For 197 tokens of SDiT's size that takes a third of the time of a parallel scan (pairs of tokens,
then pairs of pairs), which computes each token twice and writes every level to memory. On GPUs all tokens are one
kernel each way (`systems.ops.kernels.neurons`).

Compared with what installs from the registry, and not used:

- `fla-core` 0.6 (flash-linear-attention, MIT): a Triton kernel of this very operation, token after token for a block of
  channels of one sequence. Needs a GPU; its state is in float32, so that nothing can be checked against float64.
- `accelerated-scan` 0.3: CUDA and Triton kernels of `h[n] = g[n] h[n-1] + x[n]`, numbers of tokens that
  are powers of two. Needs a GPU, and the logarithms `s` from elsewhere.
- `torch._higher_order_ops.associative_scan`: a private prototype, which takes 1 to 5 times as long on a CPU as such a
  scan written by hand, and keeps every level of it for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from systems.ops.compiled import compiled, has_triton, memory

CHUNK = 7
"""Tokens of a kernel: what divides the patches of 28x28 images, whatever their size."""

NO_WEIGHT = -1e30
"""Logarithm of the weight of no token; finite, so that differences are."""

Step = Callable[..., Any]


def wkv(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Returns the decayed mean of the values up to each token, weighted by their keys.

    Args:
        k: Keys, logarithms of weights, `(M, N, D)`: any number of sequences of `N` tokens, as `T*B`.
        v: Values `(M, N, D)`.
        w: Decay of each channel per token, positive, `(D,)`.
        u: Bonus on the key of the present token, `(D,)`.

    Returns:
        `(M, N, D)` in the dtype of `v`; a token sees itself and those before it.

    Raises:
        ValueError: If shapes do not fit.
    """
    if k.dim() != 3 or k.shape != v.shape or not w.shape == u.shape == k.shape[-1:] or k.shape[1] < 1:
        raise ValueError(
            f"keys {tuple(k.shape)}, values {tuple(v.shape)}, decay {tuple(w.shape)}, bonus {tuple(u.shape)}; "
            "wkv takes (M, N, D) twice, with one token or more, and (D,) twice"
        )
    return _WKV.apply(k, v, w, u)


def bidirectional_wkv(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Returns the sum of `wkv` and of `wkv` from the last token to the first; a token sees all others."""
    backwards = wkv(k.flip(1), v.flip(1), w, u).flip(1)
    return wkv(k, v, w, u) + backwards


class _WKV(torch.autograd.Function):
    """Keeps, for a backward pass, its inputs and the state before each chunk; what lies between is computed again.

    On GPUs it keeps its inputs alone.
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
        parts: list[Tensor] = []
        states: list[Tensor] = []
        for start, stop in _chunks(k):
            states += state
            part, state = _step(_join, _join_compiled, start, stop, (k, v), w, u, state)
            parts.append(part)
        ctx.save_for_backward(k, v, w, u, *states)
        return torch.cat(parts, 1).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        k, v, w, u, *states = ctx.saved_tensors
        if not states:
            from systems.ops.kernels import wkv as kernels

            return kernels.wkv_gradients(k, v, w, u, grad.contiguous())
        shape, grad = grad.shape, memory(grad.contiguous(), *grad.shape)
        sums = [torch.zeros_like(states[0]) for _ in range(4)]
        parts = []
        for start, stop in reversed(_chunks(k)):
            state, states = states[-3:], states[:-3]
            *part, sums = _step(_part, _part_compiled, start, stop, (k, v, grad), w, u, state, sums)
            parts.append(part)
        grad_k, grad_v = (torch.cat(part[::-1], 1) for part in zip(*parts, strict=True))
        grad_w, grad_u = (x.sum(0).flatten().to(w.dtype) for x in sums[2:])
        return grad_k.view(shape), grad_v.view(shape), grad_w, grad_u


def _chunks(x: Tensor) -> list[tuple[int, int]]:
    """First token, and the one after the last, of each chunk of `(M, N, D)`; the last chunk may be short."""
    return [(start, min(start + CHUNK, x.shape[1])) for start in range(0, x.shape[1], CHUNK)]


def _step(plain: Step, kernel: Step, start: int, stop: int, tokens: Sequence[Tensor], *args: Any) -> Any:
    """Computes a chunk: a whole one by the kernel, which takes all tokens and a number that is never 0."""
    if stop - start == CHUNK:
        return kernel(tokens[0], tokens, stop, *args)
    return plain([x[:, start:stop] for x in tokens], *args)


def _means(k: Tensor, v: Tensor, w: Tensor, state: Sequence[Tensor]) -> tuple[list[Any], Any]:
    """Follows the mean of the values, token after token.

    What the rounding of `s` loses is carried along, or it would add up over the tokens where decays are small.

    Args:
        k: Keys `(M, L, D)`.
        v: Values `(M, L, D)`.
        w: Decay `(D,)`.
        state: `s`, what its rounding has lost, and `y` before the first token, `(M, D)`.

    Returns:
        For each token `k`, `v`, `s` and `y` before it and the share of `y` in the mean after it, and the last state.
    """
    s, lost, y = state
    tokens = []
    for k_n, v_n in zip(k.unbind(1), v.unbind(1), strict=True):
        k_n, v_n = k_n.to(s.dtype), v_n.to(s.dtype)
        past = s - w
        lost = lost + (s - past - w)
        x = past - k_n + lost
        larger = torch.where(x > 0, past, k_n)
        ratio = torch.exp(-x.abs())  # of the smaller weight to the larger one
        rest = torch.log(1 + ratio) + torch.where(x > 0, lost, 0)
        kept = torch.where(x > 0, 1, ratio) / (1 + ratio)
        tokens.append((k_n, v_n, s, y, kept))
        s = larger + rest
        lost = rest - (s - larger)
        y = torch.lerp(v_n, y, kept)
    return tokens, (s, lost, y)


def _join(tokens: Sequence[Tensor], w: Tensor, u: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, Any]:
    """Joins keys and values `(M, L, D)` to the means before them; returns outputs `(M, L, D)` and the last state."""
    k, v = tokens
    means, state = _means(k, v, w, state)
    out = [torch.lerp(v_n, y, torch.sigmoid(s - (u + k_n))).to(v.dtype) for k_n, v_n, s, y, _ in means]
    return torch.stack(out, 1), state


def _part(
    tokens: Sequence[Tensor], w: Tensor, u: Tensor, state: Sequence[Tensor], sums: Sequence[Tensor]
) -> tuple[Any, ...]:
    """Parts gradients, from the last token to the first.

    What flows back are the gradients of `y` and `s` after a token; of those of the sums `y e^s` and `e^s`, large terms
    would cancel.

    Args:
        tokens: Keys, values and gradients of the outputs, `(M, L, D)`.
        w: Decay `(D,)`.
        u: Bonus `(D,)`.
        state: State before the first token, as `_means` takes it.
        sums: `dy` and `ds` after the last token, and sums of the gradients of `w` and `u` so far, `(M, D)`.

    Returns:
        Gradients of keys and of values `(M, L, D)`, and the sums before the first token.
    """
    keys, values, grads = tokens
    dy, ds, dw, du = sums
    grads_k, grads_v = [], []
    means, _ = _means(keys, values, w, state)
    for (k_n, v_n, s, y, kept), grad in zip(reversed(means), reversed(grads.unbind(1)), strict=True):
        grad = grad.to(s.dtype)
        seen = torch.sigmoid(s - (u + k_n))  # share of the past in the output
        shift = dy * (y - v_n) * kept * (1 - kept)
        bonus = grad * (y - v_n) * seen * (1 - seen)
        grads_v.append(((1 - kept) * dy + (1 - seen) * grad).to(values.dtype))
        grads_k.append(((1 - kept) * ds - shift - bonus).to(keys.dtype))
        past = kept * ds + shift
        dw, du = dw - past, du - bonus
        dy, ds = kept * dy + seen * grad, past + bonus
    return torch.stack(grads_k[::-1], 1), torch.stack(grads_v[::-1], 1), [dy, ds, dw, du]


def _join_chunk(_: Tensor, tokens: Sequence[Tensor], stop: int, *args: Any) -> Any:
    return _join([x.narrow(1, stop - CHUNK, CHUNK) for x in tokens], *args)


def _part_chunk(_: Tensor, tokens: Sequence[Tensor], stop: int, *args: Any) -> Any:
    return _part([x.narrow(1, stop - CHUNK, CHUNK) for x in tokens], *args)


_join_compiled, _part_compiled = (compiled(chunk, sooner=4) for chunk in (_join_chunk, _part_chunk))
