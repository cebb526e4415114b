"""Every solver and spacing samples Gaussian data, whose optimal prediction and resulting chain are known exactly.

The suite's own sampling loop runs with the optimal predictor of `N(MEAN, std^2)`. Every step is then affine, so that
the mean and deviation of the samples follow from the signal powers at the solver's own time steps.
"""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, TCDScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from systems.diffusion.analytic_dpm import AnalyticDPMScheduler
from systems.diffusion.chains import start_chain
from systems.diffusion.dpm_solver import DPMSolverScheduler
from systems.diffusion.gaussian import GaussianDiffusion
from systems.diffusion.strided import StridedDDIMScheduler, StridedDDPMScheduler

MEAN, STD = 0.1, 0.15
"""Of the data; the samples are then within [-1, 1], so that solvers which clamp the last images do not change them."""

SPACINGS = ("leading", "linspace", "trailing")
ANCESTRAL = {"DDPM": 1.0, "DDPMParallel": 1.0, "UnCLIP": 1.0, "EulerAncestralDiscrete": 1.0}
"""Solvers of the chain with `eta` = 1."""


class Optimal(nn.Module):
    """Optimal predictor of `N(MEAN, STD^2)`; counts its evaluations."""

    def __init__(self, prediction_type: str) -> None:
        super().__init__()
        self.prediction_type = prediction_type
        self.log_signal = torch.zeros(0)
        self.evaluations = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.evaluations += 1
        below, above, part = t.floor().long(), t.ceil().long(), t.double().frac()
        a = torch.lerp(self.log_signal[below], self.log_signal[above], part).exp().view(-1, 1, 1, 1)
        sigma = (1 - a**2).sqrt()
        noise = sigma * (x - a * MEAN) / (a**2 * STD**2 + sigma**2)
        image = (x - sigma * noise) / a
        return {"epsilon": noise, "sample": image, "v_prediction": a * noise - sigma * image}[self.prediction_type]


def build(scheduler: SchedulerMixin, steps: int, eta: float = 0.0) -> GaussianDiffusion:
    network = Optimal(scheduler.config.prediction_type)
    system = GaussianDiffusion(network, scheduler, steps, eta, torch.optim.Adam, None).double()
    power = system.scheduler.alphas_cumprod.double()
    network.log_signal = power.log() / 2
    if isinstance(system.scheduler, AnalyticDPMScheduler):
        system.scheduler.gamma = (1 - power) / (power * STD**2 + 1 - power)
    return system


def measure(system: GaussianDiffusion, side: int) -> tuple[float, float]:
    """Samples images; returns their mean and deviation, without the part that is due to the drawn `x_T`."""
    network = system.network
    network.evaluations = 0
    states = list(system.trajectory(torch.tensor([3]), (1, side, side)))
    assert network.evaluations == system.nfe == len(states) - 1
    chain = start_chain(system.scheduler, system.num_inference_steps)
    start, end = states[0] / chain.init_noise_sigma, states[-1]
    slope = float(((start - start.mean()) * (end - end.mean())).mean() / start.var(unbiased=False))
    noise = float((end - end.mean() - slope * (start - start.mean())).std())
    return float(end.mean() - slope * start.mean()), math.hypot(slope, noise)


def closed_form(scheduler: SchedulerMixin, steps: int, eta: float) -> tuple[float, float]:
    """Mean and deviation at the end of the chain over the scheduler's own time steps, with DDIM's noise `eta`."""
    times = start_chain(scheduler, steps).timesteps.double().tolist()
    table = scheduler.alphas_cumprod.double()
    power = [float(torch.lerp(table[int(t)].log(), table[math.ceil(t)].log(), t % 1).exp()) for t in times] + [1.0]
    if isinstance(scheduler, (StridedDDIMScheduler, TCDScheduler)):
        power[-1] = float(table[0])  # they end at step 0, not without noise
    offset, variance = -math.sqrt(power[0]) * MEAN, 1.0  # of x_t - a_t MEAN
    for t, s in pairwise(power):
        noise = eta**2 * (1 - s) / (1 - t) * (1 - t / s)
        kept = t * STD**2 / (t * STD**2 + 1 - t)
        slope = math.sqrt(s / t) * kept + math.sqrt((1 - s - noise) / (1 - t)) * (1 - kept)
        offset, variance = slope * offset, slope**2 * variance + noise
    return math.sqrt(power[-1]) * MEAN + offset, math.sqrt(variance)


def create(name: str, spacing: str | None = None, **options: Any) -> SchedulerMixin:
    solver = getattr(diffusers, f"{name}Scheduler")
    wanted = {"timestep_spacing": spacing, "beta_start": 0.0001, "beta_end": 0.02}
    wanted |= {"clip_sample": False, "original_inference_steps": 1000}
    accepted = inspect.signature(solver.__init__).parameters
    return solver(**{key: value for key, value in wanted.items() if key in accepted} | options)


@pytest.mark.parametrize("steps", [10, 30, 300])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "name",
    ["DDIM", "DDIMParallel", "CogVideoXDDIM", "EulerDiscrete", "TCD", "DDPM", "DDPMParallel", "EulerAncestralDiscrete"],
)
def test_first_order_solvers_follow_their_own_time_steps(name: str, spacing: str, steps: int) -> None:
    eta = ANCESTRAL.get(name, 0.0)
    system = build(create(name, spacing), steps)
    mean, std = measure(system, side=100 if eta else 8)
    exact = closed_form(system.scheduler, steps, eta)
    rounding = 1e-9 if name.startswith("DDIM") else 1e-3 * STD  # others have tables in float32
    tolerance = 4 * STD / math.sqrt(2 * 100**2) if eta else rounding
    assert std == pytest.approx(exact[1], abs=tolerance)
    assert mean == pytest.approx(exact[0], abs=2 * tolerance)


def test_ddim_of_300_steps_on_data_of_deviation_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.STD", 0.5)
    found = [measure(build(create("DDIM", spacing), 300), side=8)[1] for spacing in SPACINGS]
    assert found == pytest.approx([0.496, 0.496, 0.496], abs=2e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_follows_its_time_steps_with_noise_and_any_prediction(eta: float, prediction_type: str) -> None:
    system = build(create("DDIM", "trailing", prediction_type=prediction_type), 30, eta)
    mean, std = measure(system, side=100)
    exact = closed_form(system.scheduler, 30, eta)
    tolerance = 1e-9 if eta == 0 else 4 * STD / math.sqrt(2 * 100**2)
    assert (mean, std) == pytest.approx(exact, abs=tolerance)


@pytest.mark.parametrize("steps", [2, 30, 300])
def test_unclip_follows_its_time_steps(steps: int) -> None:
    system = build(create("UnCLIP"), steps)
    assert measure(system, side=100)[1] == pytest.approx(closed_form(system.scheduler, steps, 1)[1], rel=0.03)


def check_limit(system: GaussianDiffusion, tolerance: float, side: int = 64) -> None:
    """Checks the deviation of samples, which for a finite number of steps is only nearly that of the data."""
    mean, std = measure(system, side)
    assert std == pytest.approx(STD, rel=tolerance + 3 / math.sqrt(2 * side**2))
    assert mean == pytest.approx(MEAN, abs=0.1 * STD)


HIGHER_ORDER = [
    *("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete"),
    *("DPMSolverMultistep", "DEISMultistep", "UniPCMultistep", "SASolver"),
]


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 30), ("linspace", 30), ("trailing", 30), ("trailing", 100)])
@pytest.mark.parametrize("name", HIGHER_ORDER)
def test_higher_order_solvers_converge(name: str, spacing: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.STD", 0.5)
    check_limit(build(create(name, spacing), steps), 1.8 / steps)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PNDM", {"timestep_spacing": "leading"}),
        ("PNDM", {"timestep_spacing": "leading", "skip_prk_steps": True}),
        ("PNDM", {}),  # 100 divides 1000
        ("DPMSolverSinglestep", {}),
        ("DPMSolverMultistep", {"use_karras_sigmas": True}),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistep", {"algorithm_type": "dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"}),
        ("UniPCMultistep", {"use_karras_sigmas": True, "solver_order": 3}),
        ("EulerDiscrete", {"use_karras_sigmas": True}),
        ("DDIM", {"steps_offset": 1, "timestep_spacing": "leading"}),
        ("DDIM", {"set_alpha_to_one": False, "timestep_spacing": "leading"}),
    ],
)
def test_options_of_solvers(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.STD", 0.5)
    spacing = options.get("timestep_spacing", "trailing")
    check_limit(build(create(name, spacing, **options), 100), 0.035)


@pytest.mark.parametrize(
    ("scheduler", "tolerance"),
    [
        (DPMSolverScheduler(), 0.005),
        (DPMSolverScheduler(solver_order=2, spacing="time"), 0.06),
        (StridedDDIMScheduler(clip_sample=False), 0.08),
        (StridedDDIMScheduler(clip_sample=False, final_denoise=True), 0.08),
        (StridedDDPMScheduler(strided_variance=True), 0.08),
        (AnalyticDPMScheduler(), 0.06),
        (AnalyticDPMScheduler(form="ddim"), 0.06),
    ],
)
def test_solvers_of_the_suite(scheduler: SchedulerMixin, tolerance: float) -> None:
    check_limit(build(scheduler, 100), tolerance)


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (DDIMScheduler(), 600, "start at 599 of 999, where images still have 2.6%.*give timestep_spacing=trailing"),
        (EulerDiscreteScheduler(timestep_spacing="linspace"), 1, "start at 0 of 999, where images still have 100.0%"),
        (create("PNDM", "linspace"), 30, r"assume a stride of 33, but its list has strides of 34 to 35; give timestep"),
        (create("PNDM", "trailing"), 300, "with a number of steps that divides 1000"),
        (create("DPMSolverMultistep", "linspace"), 1000, "not finite; give timestep_spacing=trailing"),
        (create("UniPCMultistep", "leading"), 1000, "start at 0 of 999"),
        (create("DDIM", "leading", steps_offset=1), 1000, "go from 1000 to 1, but training has the steps 999 to 0"),
        (
            create("EulerDiscrete", "linspace", timestep_type="continuous", prediction_type="v_prediction"),
            10,
            "training has the st",
        ),
        (create("DDIMInverse", "leading"), 10, "turns images into noise; choose DDPMScheduler"),
        (create("DPMSolverMultistepInverse", "trailing"), 10, "turns images into noise"),
        (create("LCM"), 10, "samples consistency models"),
        (create("UnCLIP"), 1, r"does not work with .* num_inference_steps=1 \("),
        (DDPMScheduler(variance_type="learned"), 10, "does not work with"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), 10, "use_flow_sigmas is a schedule of flow matching"),
        (DDIMScheduler(rescale_betas_zero_snr=True), 10, "ends at zero signal .* train with prediction_type v_predic"),
        (EulerDiscreteScheduler(rescale_betas_zero_snr=True), 10, "ends at zero signal"),
        (DDIMScheduler(trained_betas=[0.1] * 999 + [1.0]), 10, "ends at zero signal"),
        (DDIMScheduler(trained_betas=[0.01] * 50), 10, "trained_betas has 50 values, but num_train_timesteps=1000"),
        (DDIMScheduler(beta_end=1.5), 10, "betas of the noise schedule go from 0.0001 to 1.5"),
        (DDIMScheduler(beta_start=-0.1), 10, "betas of the noise schedule go from -0.1"),
        (EulerDiscreteScheduler(interpolation_type="log_linear"), 10, "noise levels that do not belong to its time st"),
    ],
)
def test_chains_that_cannot_work_are_refused(scheduler: SchedulerMixin, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(nn.Identity(), scheduler, steps, 0.0, torch.optim.Adam, None)


def test_zero_terminal_snr_works_with_the_prediction_of_v() -> None:
    scheduler = create("DDIM", "trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    system = GaussianDiffusion(nn.Module(), scheduler, 10, 0.0, torch.optim.Adam, None)
    system.network.forward = lambda x, t: -x  # type: ignore[method-assign]
    assert system.sample(torch.arange(2), (1, 4, 4)).isfinite().all()


def test_a_shifted_noise_schedule_is_not_replaced_by_the_product_of_its_betas() -> None:
    shifted = create("CogVideoXDDIM", "trailing", snr_shift_scale=3.0)
    power = shifted.alphas_cumprod.clone()
    assert torch.equal(build(shifted, 10).scheduler.alphas_cumprod, power)
