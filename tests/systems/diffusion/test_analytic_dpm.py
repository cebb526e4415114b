from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from formula import Formula
from safetensors.torch import save_file
from torch import Tensor, nn

from systems.diffusion.analytic_dpm import LAST_VARIANCE, AnalyticDPMScheduler, estimate_gamma
from systems.diffusion.chains import double_tables
from systems.diffusion.strided import StridedDDPMScheduler

Reference = Callable[[str], dict[str, Tensor]]


def replay(scheduler: AnalyticDPMScheduler, steps: int, recorded: dict[str, Tensor], monkeypatch: object) -> Tensor:
    """Runs the sampler in float64 on the recorded noise; the network receives float32, as in the released code."""
    draws = iter(recorded["input.noise"].double())
    monkeypatch.setattr("systems.diffusion.analytic_dpm.randn_tensor", lambda *_, **__: next(draws))  # type: ignore[attr-defined]
    double_tables(scheduler).set_timesteps(steps)
    x, network = recorded["input.x_T"].double(), Formula()
    for t in scheduler.timesteps.tolist():
        prediction = network(x.float(), torch.full((len(x),), t)).double()
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_reproduces_recorded_analytic_sampler(
    steps: int, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = reference("sampler_small.safetensors")
    scheduler = AnalyticDPMScheduler()
    scheduler.set_gamma(recorded["input.ms_eps"])
    x = replay(scheduler, steps, recorded, monkeypatch)
    torch.testing.assert_close(x, recorded[f"output.analytic.{steps}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("steps", "variance_type"), [(50, "fixed_large"), (50, "fixed_small"), (1000, "fixed_large")])
def test_reproduces_released_strided_sampler(
    steps: int, variance_type: str, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = reference("sampler_small.safetensors")
    x = replay(StridedDDPMScheduler(variance_type=variance_type), steps, recorded, monkeypatch)
    expected = recorded[f"output.ddpm2.{steps}.{variance_type.replace('_', '')}"].double()
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def gaussian_gamma(scheduler: AnalyticDPMScheduler, spread: float) -> Tensor:
    """The statistic of the optimal network on data `N(0, spread^2)`, in closed form."""
    cumulative = scheduler.alphas_cumprod.double()
    return (1 - cumulative) / (cumulative * spread**2 + 1 - cumulative)


@pytest.mark.parametrize("spread", [0.3, 0.9])
@pytest.mark.parametrize(("t", "s"), [(999, 899), (500, 499), (300, 100), (60, 20)])
def test_variance_of_gaussian_data_is_exact(spread: float, t: int, s: int) -> None:
    scheduler = double_tables(AnalyticDPMScheduler(clip_sample=False))
    scheduler.set_gamma(gaussian_gamma(scheduler, spread))
    cumulative = scheduler.alphas_cumprod
    marginal = [float(cumulative[k] * spread**2 + 1 - cumulative[k]) for k in (t, s)]  # of x_t, x_s
    covariance = math.sqrt(float(cumulative[t] / cumulative[s])) * marginal[1]
    true_variance = marginal[1] - covariance**2 / marginal[0]
    assert scheduler.variance(t, s) == pytest.approx(true_variance, rel=1e-6)


@pytest.mark.parametrize("form", ["ddpm", "ddim"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_few_steps_keep_the_spread_of_gaussian_data(form: str, prediction_type: str) -> None:
    """With the optimal network, large steps yield the right distribution; the variance of the last one is bounded."""
    spread = 0.3
    scheduler = double_tables(AnalyticDPMScheduler(form=form, prediction_type=prediction_type, clip_sample=False))
    scheduler.set_gamma(gaussian_gamma(scheduler, spread))
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 200, 200, generator=generator, dtype=torch.float64)
    for t, s in pairwise(scheduler.timesteps.tolist()[:-1]):
        cumulative = float(scheduler.alphas_cumprod[t])
        marginal = cumulative * spread**2 + 1 - cumulative
        noise, image = math.sqrt(1 - cumulative) / marginal * x, math.sqrt(cumulative) * spread**2 / marginal * x
        velocity = math.sqrt(cumulative) * noise - math.sqrt(1 - cumulative) * image
        prediction = {"epsilon": noise, "sample": image, "v_prediction": velocity}[prediction_type]
        x = scheduler.step(prediction, t, x, generator=generator, return_dict=False)[0]
        expected = math.sqrt(float(scheduler.alphas_cumprod[s]) * (spread**2 - 1) + 1)
        assert float(x.std()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_estimate_agrees_with_theory_on_gaussian_data(prediction_type: str) -> None:
    spread = 0.4
    scheduler = double_tables(DDPMScheduler(100, prediction_type=prediction_type))
    cumulative = scheduler.alphas_cumprod

    class Optimum(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            share = cumulative[t].view(-1, 1, 1, 1)
            marginal = share * spread**2 + 1 - share
            noise, image = (1 - share).sqrt() / marginal * x, share.sqrt() * spread**2 / marginal * x
            velocity = share.sqrt() * noise - (1 - share).sqrt() * image
            return {"epsilon": noise, "sample": image, "v_prediction": velocity}[prediction_type]

    images = spread * torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    estimate = estimate_gamma(Optimum(), scheduler, images, batch_size=48)
    expected = (1 - cumulative) / (cumulative * spread**2 + 1 - cumulative)
    torch.testing.assert_close(estimate, expected, rtol=0.05, atol=0)  # standard error 1.1 %


def test_last_noisy_step_is_bounded() -> None:
    scheduler = double_tables(AnalyticDPMScheduler())
    scheduler.set_gamma(torch.zeros(1000))  # the largest covariance
    assert scheduler.variance(99, 0) == LAST_VARIANCE == pytest.approx(3.8651e-4, rel=1e-4)
    assert scheduler.variance(199, 99) > LAST_VARIANCE


def test_variance_for_known_noise_matches_ddim_and_ddpm() -> None:
    """With exactly known noise (Gamma = 1), DDIM is deterministic and DDPM has its posterior variance."""
    for form, own in (("ddim", 0.0), ("ddpm", None)):
        scheduler = double_tables(AnalyticDPMScheduler(form=form))
        scheduler.set_gamma(torch.ones(1000))
        posterior = float(
            scheduler.betas[500] * (1 - scheduler.alphas_cumprod[499]) / (1 - scheduler.alphas_cumprod[500])
        )
        assert scheduler.variance(500, 499) == pytest.approx(posterior if own is None else own, rel=1e-6)


def test_deterministic_form_equals_ddim() -> None:
    ours, theirs = double_tables(AnalyticDPMScheduler(form="ddim")), double_tables(DDIMScheduler())
    ours.set_gamma(torch.ones(1000))
    ours.set_timesteps(10)
    theirs.set_timesteps(10)
    x, prediction = torch.randn(2, 1, 4, 4).double(), 0.1 * torch.randn(2, 1, 4, 4).double()
    t = 899
    theirs.num_inference_steps = 10  # the previous step of diffusers is then 100 lower
    expected = theirs.step(prediction, t, x, use_clipped_model_output=True, return_dict=False)[0]
    torch.testing.assert_close(ours.step(prediction, t, x, return_dict=False)[0], expected)


def test_time_grid_matches_the_release() -> None:
    scheduler = AnalyticDPMScheduler()
    for steps, length, start in ((1000, 1000, [999, 998]), (50, 51, [999, 979]), (10, 11, [999, 899])):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == length
        assert scheduler.timesteps[:2].tolist() == start
        assert scheduler.timesteps[-1] == 0


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt"])
def test_statistic_is_read_from_files(suffix: str, tmp_path: Path) -> None:
    gamma, path = torch.linspace(0.1, 1, 1001), tmp_path / f"gamma{suffix}"
    if suffix == ".npy":
        np.save(path, gamma.numpy())
    elif suffix == ".safetensors":
        save_file({"gamma": gamma}, path)
    else:
        torch.save(gamma, path)
    scheduler = AnalyticDPMScheduler(gamma=str(path))
    torch.testing.assert_close(scheduler.gamma, gamma[1:].double())


def test_bad_statistics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected \(1000,\)"):
        AnalyticDPMScheduler().set_gamma(torch.ones(999))
    with pytest.raises(ValueError, match="negative or non-finite"):
        AnalyticDPMScheduler().set_gamma(torch.full((1000,), float("nan")))
    with pytest.raises(FileNotFoundError, match="is not a file"):
        AnalyticDPMScheduler(gamma=str(tmp_path / "nothing.npy"))
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match="must contain exactly one array"):
        AnalyticDPMScheduler(gamma=str(tmp_path / "text.npy"))
    scheduler = AnalyticDPMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="python -m benchmark estimate-gamma"):
        scheduler.step(torch.zeros(1, 1, 2, 2), 999, torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="choose 'ddpm' or 'ddim'"):
        AnalyticDPMScheduler(form="sde")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fixed_large"):
        StridedDDPMScheduler(variance_type="learned")  # type: ignore[arg-type]


def test_forward_process_matches_ddpm() -> None:
    images, noise, t = torch.rand(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0, 400, 999])
    expected = DDPMScheduler().add_noise(images, noise, t)
    torch.testing.assert_close(AnalyticDPMScheduler().add_noise(images, noise, t), expected)
