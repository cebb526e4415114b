from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from formula import Formula
from torch import Tensor, nn

from systems import SDDPM
from systems.diffusion.chains import double_tables
from systems.diffusion.dpm_solver import DPMSolverScheduler, fast_orders


def solve(network: nn.Module, x: Tensor, steps: int, **options: object) -> Tensor:
    scheduler = double_tables(DPMSolverScheduler(**options))  # type: ignore[arg-type]
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(len(x))), t, x, return_dict=False)[0]
    return x


def noise_like() -> Tensor:
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()


def test_orders_use_all_evaluations() -> None:
    assert [fast_orders(n, 3) for n in (1, 2, 3, 4, 10, 11, 12)] == [
        [1],
        [2],
        [2, 1],
        [3, 1],
        [3, 3, 3, 1],
        [3, 3, 3, 2],
        [3, 3, 3, 2, 1],
    ]
    assert fast_orders(5, 2) == [2, 2, 1]
    assert fast_orders(3, 1) == [1, 1, 1]


@pytest.mark.parametrize(("evaluations", "orders"), [(4, [3, 1]), (5, [3, 2]), (6, [3, 2, 1])])
def test_equals_the_printed_formulas(evaluations: int, orders: list[int]) -> None:
    """The steps of orders 1, 2 and 3 as printed, each written out, between times found by bisection."""
    log_signal = np.log(double_tables(DPMSolverScheduler()).alphas_cumprod.numpy()) / 2

    def at(lam: float) -> tuple[float, float, float]:
        low, high = 1 / 1000, 1.0  # tau
        for _ in range(60):
            tau = (low + high) / 2
            ln_a = float(np.interp(1000 * tau - 1, np.arange(1000), log_signal))
            low, high = (tau, high) if ln_a - 0.5 * math.log(1 - math.exp(2 * ln_a)) > lam else (low, tau)
        return math.exp(ln_a), math.sqrt(1 - math.exp(2 * ln_a)), 1000 * (tau - 1 / 1000)

    def predict(x: Tensor, index: float) -> Tensor:
        return Formula()(x, torch.full((len(x),), index, dtype=torch.float64))

    first, last = (0.5 * math.log(math.exp(2 * a) / (1 - math.exp(2 * a))) for a in (log_signal[-1], log_signal[0]))
    x = noise_like()
    for order, (lam_s, lam_t) in zip(orders, pairwise(np.linspace(first, last, len(orders) + 1)), strict=True):
        h = lam_t - lam_s
        (a_s, _, n_s), (a_t, sig_t, _) = at(lam_s), at(lam_t)
        e_s = predict(x, n_s)
        if order == 1:
            x = (a_t / a_s) * x - sig_t * math.expm1(h) * e_s
        elif order == 2:
            a_m, sig_m, n_m = at(lam_s + h / 2)
            u = (a_m / a_s) * x - sig_m * math.expm1(h / 2) * e_s
            x = (a_t / a_s) * x - sig_t * math.expm1(h) * (e_s + predict(u, n_m) - e_s)
        else:
            (a_1, sig_1, n_1), (a_2, sig_2, n_2) = at(lam_s + h / 3), at(lam_s + 2 * h / 3)
            d1 = predict((a_1 / a_s) * x - sig_1 * math.expm1(h / 3) * e_s, n_1) - e_s
            u2 = (a_2 / a_s) * x - sig_2 * math.expm1(2 * h / 3) * e_s
            u2 = u2 - sig_2 * 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * d1
            d2 = predict(u2, n_2) - e_s
            x = (a_t / a_s) * x - sig_t * math.expm1(h) * e_s - 1.5 * sig_t * (math.expm1(h) / h - 1) * d2
    torch.testing.assert_close(solve(Formula(), noise_like(), evaluations), x, rtol=0, atol=1e-5)


class OptimumOfGaussianData(nn.Module):
    """The optimal noise predictor for data of standard deviation 0.5, at real-valued steps."""

    def __init__(self) -> None:
        super().__init__()
        self.log_signal = torch.log(double_tables(DPMSolverScheduler()).alphas_cumprod).numpy() / 2

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        power = math.exp(2 * np.interp(float(t[0]), np.arange(1000), self.log_signal))
        return math.sqrt(1 - power) / (power * 0.5**2 + 1 - power) * x


def exact() -> Tensor:
    """The flow's solution for such data: each value keeps its quantile."""
    power = double_tables(DPMSolverScheduler()).alphas_cumprod
    before, after = (math.sqrt(float(p) * 0.5**2 + 1 - float(p)) for p in (power[-1], power[0]))
    return noise_like() * after / before


@pytest.mark.parametrize("spacing", ["lambda", "time"])
def test_converges_to_the_exact_solution(spacing: str) -> None:
    far, near = (
        (solve(OptimumOfGaussianData(), noise_like(), n, spacing=spacing) - exact()).abs().max() for n in (12, 96)
    )
    assert near < 2e-3
    assert near < far / 8


@pytest.mark.parametrize("order", [1, 2, 3])
def test_error_falls_with_the_order(order: int) -> None:
    errors = [
        float((solve(OptimumOfGaussianData(), noise_like(), n, solver_order=order) - exact()).abs().max())
        for n in (48, 96)
    ]
    assert errors[0] > 0.95 * 2**order * errors[1]


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_prediction_types_agree(prediction_type: str) -> None:
    scheduler = double_tables(DPMSolverScheduler(prediction_type=prediction_type))
    scheduler.set_timesteps(7)
    x = noise_like()
    for t in scheduler.timesteps:
        point = scheduler._at(float(t))
        noise = Formula()(x, t.expand(len(x)))
        image = (x - point.sigma * noise) / point.a
        prediction = image if prediction_type == "sample" else point.a * noise - point.sigma * image
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, solve(Formula(), noise_like(), 7), rtol=1e-4, atol=1e-4)


def test_samples_an_sddpm_with_real_valued_steps() -> None:
    torch.manual_seed(0)
    sizes = dict(in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_steps=2)
    system = SDDPM(scheduler=DPMSolverScheduler(), num_inference_steps=5, **sizes).eval()  # type: ignore[arg-type]
    assert (system.solver, system.nfe) == ("DPMSolver(3, lambda)", 5)
    steps: list[float] = []
    system.network.register_forward_pre_hook(lambda _, args: steps.append(float(args[1][0])))
    together = system.sample(torch.arange(3), (1, 8, 8))
    assert len(steps) == 5
    assert steps[0] == 999
    assert any(step != round(step) for step in steps)
    torch.testing.assert_close(system.sample(torch.arange(3), (1, 8, 8)), together, rtol=0, atol=0)


def test_unknown_options_are_refused() -> None:
    for options in ({"solver_order": 4}, {"spacing": "karras"}):
        with pytest.raises(ValueError, match="give 1, 2 or 3, and 'lambda' or 'time'"):
            DPMSolverScheduler(**options)  # type: ignore[arg-type]
