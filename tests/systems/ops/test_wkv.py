from __future__ import annotations

import pytest
import torch
from torch import Tensor

from systems.ops.wkv import bidirectional_wkv, wkv

pytestmark = pytest.mark.slow


def plain(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The recurrence as published, token by token, without protection against overflow."""
    a, b = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0])
    out = []
    for k_n, v_n in zip(k.unbind(1), v.unbind(1), strict=True):
        out.append((a + (u + k_n).exp() * v_n) / (b + (u + k_n).exp()))
        a = (-w).exp() * a + k_n.exp() * v_n
        b = (-w).exp() * b + k_n.exp()
    return torch.stack(out, 1)


def double_sum(k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The formula as published, over all pairs of tokens."""
    n = torch.arange(k.shape[1])
    distance = (n[:, None] - 1 - n[None, :])[..., None]
    logits = k[:, None] - distance * w  # (M, N, N, D)
    logits = torch.where(distance >= 0, logits, torch.where(distance == -1, (k + u)[:, None], -torch.inf))
    return (logits.softmax(2) * v[:, None]).sum(2)


def inputs(num_tokens: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    k, v = torch.randn(2, 3, num_tokens, 4, generator=generator, dtype=torch.float64)
    w = torch.tensor([0.001, 0.1, 1.0, 20.0], dtype=torch.float64)
    u = torch.randn(4, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (scale * k, v, w, u)]


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 7, 8, 17, 64, 197])
def test_equals_the_plain_recurrence_with_gradients(num_tokens: int) -> None:
    arguments = inputs(num_tokens)
    ours, theirs = wkv(*arguments), plain(*arguments)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours, double_sum(*arguments), rtol=0, atol=1e-9)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0), dtype=ours.dtype)
    gradients = [torch.autograd.grad(out, arguments, grad, materialize_grads=True) for out in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_gradients_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(wkv, inputs(6))
    assert torch.autograd.gradcheck(bidirectional_wkv, inputs(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_low_precision_is_stable(dtype: torch.dtype, scale: float) -> None:
    """Keys up to +-1000, whose exponentials overflow in float64; errors scale with the rounding of the keys."""
    low = inputs(257, scale, dtype)
    rounding = torch.finfo(torch.float32).eps * low[0].detach().abs().max().item()
    tolerance = 2 * rounding + 4 * torch.finfo(dtype).eps
    exact = [x.detach().double().requires_grad_() for x in low]
    ours, expected = wkv(*low), double_sum(*exact)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)
    for x in (ours.sum(), expected.sum()):
        x.backward()
    for a, b in zip(low, exact, strict=True):
        assert (a.grad.double() - b.grad).norm() <= 3 * tolerance * b.grad.norm() + tolerance


def test_mixed_precision_keeps_the_dtype_of_parameters() -> None:
    k, v, w, u = inputs(9, dtype=torch.float32)
    out = wkv(k.bfloat16(), v.bfloat16(), w, u)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert w.grad.dtype == torch.float32


@pytest.mark.parametrize("num_tokens", [16, 21])
def test_compiled_kernel_equals_plain(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(num_tokens, dtype=torch.float32)
    grad = torch.randn(3, num_tokens, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for least in (2**62, 0):
        monkeypatch.setattr("systems.ops.compiled.COMPILE_FROM", least)
        out = wkv(*arguments)
        results.append((out, *torch.autograd.grad(out, arguments, grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_causal_and_bidirectional() -> None:
    k, v, w, u = (x.detach() for x in inputs(6))
    changed = v.clone()
    changed[:, 3] += 1
    difference = (wkv(k, changed, w, u) - wkv(k, v, w, u)).abs().sum((0, 2))
    assert (difference[:3] == 0).all()
    assert (difference[3:] > 0).all()
    both = bidirectional_wkv(k, v, w, u)
    assert ((bidirectional_wkv(k, changed, w, u) - both).abs().sum((0, 2)) > 0).all()
    torch.testing.assert_close(both, plain(k, v, w, u) + plain(k.flip(1), v.flip(1), w, u).flip(1), rtol=0, atol=1e-9)


def test_saves_nothing_without_gradients() -> None:
    k, v, w, u = inputs(20)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        with_gradients = wkv(k, v, w, u)
        assert kept
        kept.clear()
        with torch.no_grad():
            assert torch.equal(wkv(k, v, w, u), with_gradients)
    assert not kept


def test_sequences_are_independent() -> None:
    k, v, w, u = (x.detach() for x in inputs(20))
    torch.testing.assert_close(wkv(k, v, w, u)[1:2], wkv(k[1:2], v[1:2], w, u), rtol=0, atol=1e-14)


def test_memory_is_linear() -> None:
    """The saved tensors grow linearly with N: keys, values and states before chunks, besides the parameters."""

    def kept(num_tokens: int) -> int:
        elements = []

        def pack(x: Tensor) -> Tensor:
            elements.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            wkv(*inputs(num_tokens))
        return sum(elements)

    assert kept(64) == 2 * 3 * 64 * 4 + 3 * 10 * 3 * 4 + 2 * 4
    assert kept(1024) == 2 * 3 * 1024 * 4 + 3 * 147 * 3 * 4 + 2 * 4


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 4), (2, 3, 5), (4,), (4,)),
        ((2, 3, 4), (2, 3, 4), (3,), (3,)),
        ((3, 4), (3, 4), (4,), (4,)),
        ((2, 0, 4), (2, 0, 4), (4,), (4,)),
    ],
)
def test_mismatched_shapes_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"wkv takes \(M, N, D\) for keys and values"):
        wkv(*map(torch.zeros, shapes))
