"""The WKV operation of RWKV-4 as a parallel scan: linear in the number of tokens, for all sequences at once.

B. Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023, https://arxiv.org/abs/2305.13048, equation 16.
For each channel, with decay `w > 0` per token and bonus `u` of the present token,

    wkv[n] = (sum_{i<n} e^(k[i] - (n-1-i)w) v[i] + e^(u + k[n]) v[n]) / (the same without v)

Sums are kept as a weighted mean `y` of values and the logarithm `s` of its weight. Merging a mean with one `d` decays
later is an interpolation, and stable: no weight overflows or vanishes before it is divided by, without the running
maximum of the published kernels.

    x = s1 - d - s2,   s = s2 + log(1 + e^x),   y = y2 + sigmoid(x) (y1 - y2)

Merging is associative, so a scan over pairs of tokens takes `2N` of them in `2 log2(N)` vectorised steps. The backward
pass is written by hand: a linear recurrence from the last token to the first, whose factors are weights of the forward
pass in [0, 1]. No level of a scan is kept, and memory is linear in `N`.

Compared with what installs from the registry, and not used:

- `fla-core` 0.6 (flash-linear-attention, MIT): a Triton kernel of this very operation, token after token for a block of
  channels of one sequence. Needs a GPU; its state is in float32, so that nothing can be checked against float64.
- `accelerated-scan` 0.3: CUDA and Triton kernels of `h[n] = g[n] h[n-1] + x[n]`, numbers of tokens that
  are powers of two. Needs a GPU, and the logarithms `s` from elsewhere.
- `torch._higher_order_ops.associative_scan`: a private prototype. The same merge under it agrees, takes 1 to 5 times as
  long on a CPU and keeps every level of the scan for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


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
    """Keeps its inputs and the running means `(s, y)`, all `(M, N, D)`."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        ctx.dtypes = k.dtype, v.dtype, w.dtype, u.dtype
        dtype = torch.promote_types(torch.promote_types(k.dtype, v.dtype), torch.float32)
        k, v, w, u = (x.to(dtype) for x in (k, v, w, u))
        s, y = _mean_scan(k, v, w)
        ctx.save_for_backward(k, v, w, u, s, y)
        out = v.clone()  # the first token sees itself alone
        out[:, 1:].lerp_(y[:, :-1], torch.sigmoid(s[:, :-1] - (u + k[:, 1:])))
        return out.to(ctx.dtypes[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of `s` and `y` of token `n` flow back to `n-1` by the same factor, the share of the past `g[n]`.

        `y` and `s` are functions of the sums `a = y e^s` and `b = e^s`, each a linear recurrence of its own. `dy[n]` is
        `b dL/da` and `dz[n]` is `b dL/db = dL/ds - y dL/dy`, which stay of the size of the gradients.
        """
        k, v, w, u, s, y = ctx.saved_tensors
        grad = grad.to(k.dtype)
        past, mean = s[:, :-1], y[:, :-1]
        share = torch.sigmoid(past - (u + k[:, 1:]))  # of the past in the output
        ds = grad[:, 1:] * (mean - v[:, 1:]) * share * (1 - share)
        dy = grad[:, 1:] * share
        last = torch.zeros_like(grad[:, :1])
        direct = torch.stack([torch.cat([dy, last], 1), torch.cat([ds - dy * mean, last], 1)])  # (2, M, N, D)

        g = torch.sigmoid(past - w - k[:, 1:])  # of the past in the running mean
        dy, dz = _linear_scan(torch.cat([last, g.flip(1)], 1), direct.flip(2)).flip(2)
        new = torch.cat([torch.ones_like(last), 1 - g], 1)
        grad_v = new * dy
        grad_v[:, 0] += grad[:, 0]
        grad_v[:, 1:] += grad[:, 1:] * (1 - share)
        grad_k = new * (dy * v + dz)
        grad_k[:, 1:] -= ds
        grad_w = -(g * (dy[:, 1:] * mean + dz[:, 1:])).sum((0, 1))
        grads = grad_k, grad_v, grad_w, -ds.sum((0, 1))
        return tuple(x.to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True))


def _mean_scan(s: Tensor, y: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Running means `(..., N, D)` up to each token: those of pairs first, then the ones that end within a pair."""
    if s.shape[-2] == 1:
        return s, y
    (s_first, s_second, s_later), (y_first, y_second, y_later) = _pairs(s), _pairs(y)
    s_odd, y_odd = _mean_scan(*_merge(s_first, y_first, s_second, y_second, decay), 2 * decay)
    later = s_later.shape[-2]
    s_even, y_even = _merge(s_odd[..., :later, :], y_odd[..., :later, :], s_later, y_later, decay)
    return _interleave(s, s_odd, s_even), _interleave(y, y_odd, y_even)


def _merge(s1: Tensor, y1: Tensor, s2: Tensor, y2: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    x = s1 - decay - s2
    return s2 + F.softplus(x, threshold=40), torch.lerp(y2, y1, torch.sigmoid(x))  # 40: exact in float64 too


def _linear_scan(g: Tensor, x: Tensor) -> Tensor:
    """Returns `h[n] = g[n] h[n-1] + x[n]` from `h[-1] = 0`, `(..., N, D)`."""
    if x.shape[-2] == 1:
        return x
    (g_first, g_second, g_later), (x_first, x_second, x_later) = _pairs(g), _pairs(x)
    odd = _linear_scan(g_first * g_second, g_second * x_first + x_second)
    return _interleave(x, odd, g_later * odd[..., : x_later.shape[-2], :] + x_later)


def _pairs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and second tokens of the pairs, and the first ones again without that of the first pair."""
    return x[..., 0 : x.shape[-2] - 1 : 2, :], x[..., 1::2, :], x[..., 2::2, :]  # an odd N leaves one for the last


def _interleave(x: Tensor, odd: Tensor, even: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., 0, :], out[..., 1::2, :], out[..., 2::2, :] = x[..., 0, :], odd, even
    return out
