from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from systems.diffusion.learned_variance import (
    RespacedDDPMScheduler,
    posterior_tables,
    respaced,
    variational_bound,
)


@pytest.mark.parametrize("steps", [1000, 250, 5])
def test_schedules_are_the_recorded_ones(reference: Callable[[str], dict[str, Tensor]], steps: int) -> None:
    recorded = reference("sdit_released_small.safetensors")
    scheduler = RespacedDDPMScheduler()
    kept = torch.tensor(respaced(1000, steps))
    assert torch.equal(kept, recorded[f"schedule.{steps}.timestep_map"])
    scheduler.set_timesteps(steps)
    assert torch.equal(scheduler.timesteps, kept.flip(0))
    tables = posterior_tables(scheduler.alphas_cumprod[kept])
    assert {f"schedule.{steps}.{name}" for name in tables} | {f"schedule.{steps}.timestep_map"} == {
        key for key in recorded if key.startswith(f"schedule.{steps}.")
    }
    for name, table in tables.items():
        torch.testing.assert_close(table, recorded[f"schedule.{steps}.{name}"], rtol=1e-10, atol=0, msg=name)


def test_steps_are_rounded_to_even_and_end_at_both_ends() -> None:
    assert respaced(1000, 5) == [0, 250, 500, 749, 999]
    assert respaced(1000, 250)[:4] == [0, 4, 8, 12]
    assert respaced(1000, 250)[-2:] == [995, 999]
    assert respaced(1000, 1) == [999]
    for n in range(2, 1001, 37):
        steps = respaced(1000, n)
        assert len(set(steps)) == n
        assert (steps[0], steps[-1]) == (0, 999)


def rows(t: int) -> dict[str, Tensor]:
    tables = posterior_tables(RespacedDDPMScheduler().alphas_cumprod)
    return {name: table[t].view(1, 1, 1, 1) for name, table in tables.items()}


def test_the_bound_is_a_divergence_of_normal_distributions() -> None:
    torch.manual_seed(0)
    images, x_t, x_0, v = torch.randn(4, 1, 1, 2, 2, dtype=torch.float64)
    r = rows(400)
    found = variational_bound(images, x_t, x_0, v, torch.tensor([False]), r)
    c1, c2 = r["posterior_mean_coef1"], r["posterior_mean_coef2"]
    weight = (v + 1) / 2
    log_variance = weight * r["betas"].log() + (1 - weight) * r["posterior_log_variance_clipped"]
    q, p = (
        torch.distributions.Normal(c1 * x + c2 * x_t, (0.5 * lv).exp())
        for x, lv in ((images, r["posterior_log_variance_clipped"].expand_as(v)), (x_0, log_variance))
    )
    expected = torch.distributions.kl_divergence(q, p).mean() / math.log(2)
    torch.testing.assert_close(found[0], expected)


def test_the_first_step_is_the_likelihood_of_8_bit_values() -> None:
    """Probabilities of all 256 values add up to 1, and a certain prediction costs no bits."""
    r = rows(0)
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(-1, 1, 1, 1)
    x_0 = torch.full_like(values, 0.123)
    bits = variational_bound(values, x_0, x_0, torch.full_like(values, 3.0), torch.ones(256, dtype=torch.bool), r)
    assert float((-bits * math.log(2)).exp().sum()) == pytest.approx(1, abs=1e-6)
    exact = variational_bound(values, values, values, torch.full_like(values, -300.0), torch.ones(256).bool(), r)
    assert exact.abs().max() < 1e-6


def test_only_the_first_step_is_a_likelihood_and_gradients_stay_finite() -> None:
    images = torch.tensor([-1.0, 1.0, 0.5, 0.0]).view(1, 1, 2, 2).repeat(2, 1, 1, 1)
    v = torch.full_like(images, -40.0).requires_grad_()
    tables = posterior_tables(RespacedDDPMScheduler().alphas_cumprod)
    t = torch.tensor([0, 999])
    r = {name: table[t].float().view(-1, 1, 1, 1) for name, table in tables.items()}
    bound = variational_bound(images, images, images, v, t == 0, r)
    bound.sum().backward()
    assert bound.isfinite().all()
    assert v.grad is not None
    assert v.grad.isfinite().all()
