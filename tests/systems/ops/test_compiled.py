from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from systems.networks.spiking_transformer import _gated_sum, receptance_gate
from systems.ops import compiled
from systems.ops.quantise import Quantise
from systems.ops.scale_steps import ScaleSteps
from systems.ops.token_shift import TokenShift

pytestmark = pytest.mark.slow  # compiles


def test_works_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*args: object) -> Tensor:
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(compiled, "COMPILE_FROM", 0)
    monkeypatch.setattr(compiled, "compiler_failed", False)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: no_compiler)
    double = compiled.compiled(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="no working compiler"):
        assert double(torch.ones(2)).tolist() == [2, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is tried, and warns, only once
        assert double(torch.ones(2)).tolist() == [2, 2]


def test_memory_preserves_the_order_of_any_layout() -> None:
    last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for x in (last, last.unflatten(0, (2, 1)), torch.randn(2, 3, 4)):
        assert compiled.dense(x) is x
        assert compiled.memory(x, 2, -1).data_ptr() == x.data_ptr()
        assert torch.equal(compiled.memory(x, 2, -1)[1].flatten().sort().values, x[1].flatten().sort().values)
    gap = torch.randn(2, 3, 8)[..., ::2]
    assert torch.equal(compiled.dense(gap), gap)
    assert compiled.dense(gap).is_contiguous()


def quantised(x: Tensor, scale: Tensor) -> Tensor:
    return Quantise.apply(x, scale.abs().sum(), 3)


def scaled(x: Tensor, factors: Tensor) -> Tensor:
    return ScaleSteps.apply(x, factors)


def shifted(x: Tensor, mix: Tensor) -> Tensor:
    first, second, third = TokenShift.apply(x, mix, mix**2, 1 - mix)
    return first - 2 * second + third


def gated(x: Tensor, weight: Tensor) -> Tensor:
    return receptance_gate(x, x * weight.to(x.dtype))


def gated_sum(x: Tensor, factors: Tensor) -> Tensor:
    return _gated_sum(x, x.roll(1, -1), x.roll(1, 0), factors.view(-1, 1, 1).to(x.dtype))


def gated_sum_without_factors(x: Tensor, weight: Tensor) -> Tensor:
    return _gated_sum(x, x.roll(1, -1), x * weight.to(x.dtype), None)


@pytest.mark.parametrize(
    ("function", "shape", "size"),
    [
        (quantised, (2, 3, 4, 5), 1),
        (scaled, (3, 2, 4, 5), 3),
        (shifted, (2, 7, 5), 5),
        (gated, (3, 4, 5), 1),
        (gated_sum, (3, 4, 5), 3),
        (gated_sum_without_factors, (3, 4, 5), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_plain_functions(
    function: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...],
    size: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    parameter = (1 + torch.rand(size, generator=generator)).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(dtype)
    results = []
    for least in (2**62, 0):
        monkeypatch.setattr(compiled, "COMPILE_FROM", least)
        out = function(x, parameter)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out, (x, parameter), grad)))
    rounding = 4 * torch.finfo(dtype).eps
    for plain, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=rounding, atol=rounding)


def test_step_factors_and_token_shift_have_their_gradients() -> None:
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scaled, (x, torch.rand(3, dtype=torch.float64, requires_grad=True)))
    assert torch.autograd.gradcheck(shifted, (x, torch.rand(5, dtype=torch.float64, requires_grad=True)))
