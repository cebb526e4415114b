from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from formula import Formula
from torch import Tensor, nn

from systems import SDDPM
from systems.base import NonFiniteSamplesError
from systems.checkpoints import CheckpointMismatchError
from systems.diffusion.analytic_dpm import AnalyticDPMScheduler
from systems.diffusion.chains import double_tables
from systems.diffusion.gaussian import GaussianDiffusion
from systems.diffusion.strided import StridedDDIMScheduler

Reference = Callable[[str], dict[str, Tensor]]


def replay(scheduler: object, recorded: dict[str, Tensor], steps: list[int], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Runs a solver on the recorded noise instead of seeds."""
    draws = iter(recorded["input.noise"])

    def recorded_noise(shape: tuple, **options: object) -> Tensor:
        return next(draws)

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", recorded_noise)
    x, network = recorded["input.x_T"], Formula()
    for t in steps:
        x = scheduler.step(network(x, torch.full((len(x),), t)), t, x, return_dict=False)[0]  # type: ignore[attr-defined]
    return x


@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_ddpm_reproduces_released_sampler(variance: str, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = reference("sampler_small.safetensors")
    key = next(k for k in recorded if k.startswith("output.ddpm.1000") and (variance in k))
    scheduler = double_tables(DDPMScheduler(variance_type=variance.replace("fixed", "fixed_")))
    scheduler.set_timesteps(1000)
    x = replay(scheduler, recorded, scheduler.timesteps.tolist(), monkeypatch)
    torch.testing.assert_close(x, recorded[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("steps", "tolerance"), [(10, 1e-5), (50, 1e-5), (1000, 1e-4)])
def test_ddim_reproduces_released_sampler(
    steps: int, tolerance: float, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = reference("sampler_small.safetensors")
    if f"output.ddim.{steps}" not in recorded:
        pytest.skip(f"no recorded DDIM run of {steps} steps")
    scheduler = double_tables(StridedDDIMScheduler())
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == min(steps, 999)
    x = replay(scheduler, recorded, scheduler.timesteps.tolist(), monkeypatch)
    torch.testing.assert_close(x, recorded[f"output.ddim.{steps}"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("steps", [7, 30, 300])
def test_strided_ddim_equals_the_printed_chain(steps: int) -> None:
    """For step counts that do not divide the training steps, where diffusers uses another stride."""
    scheduler = double_tables(StridedDDIMScheduler(final_denoise=True))
    scheduler.set_timesteps(steps)
    grid = [max(int(999 - 1000 / steps * j), 0) for j in range(steps)]
    grid = grid if grid[-1] == 0 else [*grid, 0]
    assert scheduler.timesteps.tolist() == grid
    x = ours = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    network, power = Formula(), scheduler.alphas_cumprod
    for t, s in zip(grid, [*grid[1:], None], strict=True):
        e = network(x, torch.full((2,), t))
        x_0 = ((x - (1 - power[t]).sqrt() * e) / power[t].sqrt()).clamp(-1, 1)
        x = x_0 if s is None else power[s].sqrt() * x_0 + (1 - power[s]).sqrt() * e
        ours = scheduler.step(network(ours, torch.full((2,), t)), t, ours, return_dict=False)[0]
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_strided_ddim_supports_every_prediction_type(prediction_type: str) -> None:
    results = []
    for kind in ("epsilon", prediction_type):
        scheduler = double_tables(StridedDDIMScheduler(prediction_type=kind, clip_sample=False))
        scheduler.set_timesteps(10)
        x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
        for t in scheduler.timesteps.tolist():
            power, e = scheduler.alphas_cumprod[t], Formula()(x, torch.full((2,), t))
            image = (x - (1 - power).sqrt() * e) / power.sqrt()
            v = power.sqrt() * e - (1 - power).sqrt() * image
            x = scheduler.step({"epsilon": e, "sample": image, "v_prediction": v}[kind], t, x, return_dict=False)[0]
        results.append(x)
    torch.testing.assert_close(*results)


def test_forward_process_matches_reference(reference: Reference) -> None:
    recorded = reference("sampler_small.safetensors")
    x_t, _ = tiny().diffuse(recorded["train.x_0"], recorded["train.noise"], recorded["train.t"])
    torch.testing.assert_close(x_t, recorded["train.x_t"], rtol=0, atol=1e-6)
    loss = nn.functional.mse_loss(0.1 * x_t, recorded["train.noise"])
    torch.testing.assert_close(loss, recorded["train.loss_mean"].to(loss).view(()), rtol=1e-5, atol=1e-6)


def tiny(**arguments: object) -> SDDPM:
    torch.manual_seed(0)
    defaults = dict(in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_steps=2)
    return SDDPM(**(defaults | {"num_inference_steps": 3} | arguments)).eval()


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(), DDIMScheduler(), DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")]
)
def test_image_depends_only_on_its_seed(scheduler: object) -> None:
    system = tiny(scheduler=scheduler, eta=1.0 if isinstance(scheduler, DDIMScheduler) else 0.0).double()
    seeds = torch.arange(5)
    together = system.sample(seeds, (1, 8, 8))
    apart = torch.cat([system.sample(seeds[:2], (1, 8, 8)), system.sample(seeds[2:], (1, 8, 8))])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-9)
    assert not torch.equal(together[0], together[1])
    torch.testing.assert_close(system.sample(seeds.flip(0), (1, 8, 8)).flip(0), together, rtol=0, atol=1e-9)


def test_trajectory_starts_from_noise_and_ends_in_the_sample() -> None:
    system = tiny()
    states = [x.detach() for x in system.trajectory(torch.arange(64), (1, 8, 8))]
    assert len(states) == 4
    assert abs(float(states[0].std()) - 1) < 0.05
    assert torch.equal(states[-1], system.sample(torch.arange(64), (1, 8, 8)))
    assert states[-1].abs().max() <= 1


def test_loss_is_near_one_before_training_and_repeatable() -> None:
    system = tiny().train()
    images = torch.rand(64, 1, 8, 8) * 2 - 1
    losses = [system.loss(images, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(losses[0], losses[1])
    assert abs(float(losses[0]) - 1) < 0.1


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "solver", [DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, StridedDDIMScheduler]
)
def test_loss_of_a_perfect_prediction_is_zero(solver: type, prediction_type: str) -> None:
    """Training adds noise as in DDPM, regardless of the scheduler."""
    images = torch.rand(4, 1, 4, 4)
    cumulative = (1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)).cumprod(0)

    class Oracle(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            a, sigma = (part[t].sqrt().view(-1, 1, 1, 1) for part in (cumulative, 1 - cumulative))
            noise = (x - a * images) / sigma
            targets = {"epsilon": noise, "sample": images, "v_prediction": a * noise - sigma * images}
            return targets[prediction_type].to(x.dtype)

    scheduler = solver(prediction_type=prediction_type)
    system = GaussianDiffusion(Oracle(), scheduler, 10, 0.0, torch.optim.Adam, None)
    assert system.loss(images, torch.Generator().manual_seed(0)) < 1e-10


def test_final_clip_applies_only_to_the_last_images() -> None:
    arguments = dict(scheduler=DDPMScheduler(clip_sample=False), num_inference_steps=5)
    open_ended, clipped = (tiny(final_clip=clip, **arguments) for clip in (False, True))
    ends = [list(system.trajectory(torch.arange(4), (1, 8, 8))) for system in (open_ended, clipped)]
    assert float(ends[0][-1].abs().max()) > 1
    assert torch.equal(ends[1][-1], ends[0][-1].clamp(-1, 1))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][:-1], ends[1][:-1], strict=True))


def test_solver_name_and_evaluations() -> None:
    assert (tiny().solver, tiny().nfe) == ("DDPM", 3)
    assert tiny(scheduler=DDIMScheduler()).solver == "DDIM"
    assert tiny(scheduler=DDIMScheduler(), eta=0.5).solver == "DDIM(eta=0.5)"
    assert tiny(scheduler=DPMSolverMultistepScheduler()).solver == "DPMSolverMultistep(dpmsolver++, 2)"
    assert tiny(scheduler=AnalyticDPMScheduler(form="ddim")).solver == "AnalyticDPM(ddim)"
    assert tiny(scheduler=AnalyticDPMScheduler()).nfe == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"eta": 0.5}, "option of DDIM"),
        ({"scheduler": PNDMScheduler(prediction_type="sample")}, "does not work with prediction_type='sample'"),
        ({"scheduler": DDPMScheduler(prediction_type="score")}, "give epsilon, sample or v_prediction"),
        ({"scheduler": FlowMatchEulerDiscreteScheduler()}, "has no discrete noise schedule"),
    ],
)
def test_invalid_options_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


LINEAR = torch.linspace(0.0001, 0.02, 1000).tolist()


def saved(**arguments: object) -> dict:
    """A checkpoint of a tiny system."""
    system = tiny(**arguments)
    checkpoint = {"state_dict": system.state_dict()}
    system.on_save_checkpoint(checkpoint)
    return checkpoint


@pytest.mark.parametrize(
    ("trained", "tested", "message"),
    [
        (DDPMScheduler(), DDIMScheduler(), None),
        (DDPMScheduler(), DPMSolverMultistepScheduler(trained_betas=LINEAR), None),
        (DDPMScheduler(trained_betas=LINEAR), DDIMScheduler(), None),
        (DDIMScheduler(beta_end=0.03, trained_betas=LINEAR), DDIMScheduler(), None),
        (DDPMScheduler(), DDIMScheduler(beta_end=0.03), "beta_end=0.02 but --model.scheduler has 0.03"),
        (DDPMScheduler(), DDIMScheduler(trained_betas=LINEAR[:500] + [0.02] * 500), "another noise schedule"),
        (DDPMScheduler(trained_betas=[0.01] * 1000), StridedDDIMScheduler(), "StridedDDIMScheduler, has"),
        (
            DDIMScheduler(prediction_type="v_prediction"),
            DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
            "another noise schedule .* for instance by rescale_betas_zero_snr or trained_betas",
        ),
        (
            DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
            StridedDDIMScheduler(prediction_type="v_prediction"),
            "another noise schedule",
        ),
        (
            DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
            EulerDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
            None,
        ),
        (DDPMScheduler(), DDPMScheduler(prediction_type="sample"), "prediction_type=epsilon but"),
    ],
)
def test_noise_schedules_are_compared_by_their_values(
    trained: SchedulerMixin, tested: SchedulerMixin, message: str | None
) -> None:
    checkpoint, system = saved(scheduler=trained), tiny(scheduler=tested)
    if message is None:
        system.on_load_checkpoint(checkpoint)
        return
    with pytest.raises(CheckpointMismatchError, match=message):
        system.on_load_checkpoint(checkpoint)


def test_a_checkpoint_without_the_table_is_compared_by_its_options(recwarn: pytest.WarningsRecorder) -> None:
    checkpoint = saved()
    del checkpoint["process"]["alphas_cumprod"]
    tiny().on_load_checkpoint(checkpoint)
    assert not [w for w in recwarn if "earlier version" in str(w.message)]
    with pytest.warns(UserWarning, match="of an earlier version, may have been trained with another noise schedule"):
        tiny(scheduler=DDIMScheduler(trained_betas=[0.01] * 1000)).on_load_checkpoint(checkpoint)
    with pytest.raises(CheckpointMismatchError, match=r"beta_end=0\.02 but"):
        tiny(scheduler=DDIMScheduler(beta_end=0.03)).on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_samples_that_are_not_finite_are_refused(value: float) -> None:
    system = tiny(scheduler=DDIMScheduler(clip_sample=False))
    system.network.forward = lambda x, t: torch.where(x == x[1:2], value, x)  # type: ignore[method-assign]
    message = r"1 of 3 generated images contain NaN or infinity \(seeds 8\); .* the sampler DDIM with 3 steps overflows"
    with pytest.raises(NonFiniteSamplesError, match=message):
        system.sample(torch.tensor([7, 8, 9]), (1, 8, 8))
    with torch.no_grad():
        next(system.network.parameters()).fill_(value)
    with pytest.raises(NonFiniteSamplesError, match="and so do the weights"):
        system.sample(torch.tensor([7, 8, 9]), (1, 8, 8))
