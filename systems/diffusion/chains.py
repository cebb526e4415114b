"""Chains of a diffusers scheduler: its time steps, checked before sampling, and steps that follow them.

Several schedulers compute the next time step `s` of a chain as `t - N // n`, for `N` training steps and `n` steps of
the sampler, whatever their own list of time steps contains. The two agree only if the list has this constant stride,
which `trailing` has if `n` divides `N`, and `linspace` only if `n = N`. `take_step` makes them follow the list.
"""

from __future__ import annotations

import copy
import inspect
from fractions import Fraction
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from systems.diffusion._released import ReleasedScheduler
from systems.diffusion.analytic_dpm import AnalyticDPMScheduler

CONSTANT_STRIDE = (
    DDIMScheduler,
    DDIMParallelScheduler,
    CogVideoXDDIMScheduler,
    DDPMScheduler,  # follows its list only in recent versions of diffusers
    DDPMParallelScheduler,
)
"""Schedulers that compute the next time step from `num_inference_steps`."""

MAX_SIGNAL = 0.01
"""Largest signal power at which a chain may start from pure noise, unless it starts within one stride of the end."""

OTHERS = "choose DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler or another solver"


def double_tables(scheduler: SchedulerMixin) -> SchedulerMixin:
    """Recomputes a scheduler's noise tables in float64 from its float32 betas, as in the published codes.

    diffusers multiplies the 1000 factors of `alphas_cumprod` in float32; a chain of 1000 steps amplifies the error
    beyond 1e-5. The tables are used one number at a time, so that the dtype of images does not change. Tables that are
    not the product of `1 - betas` (zero terminal SNR, shifted SNR) are not changed.
    """
    power = (1 - scheduler.betas.double()).cumprod(0)
    plain = not scheduler.config.get("rescale_betas_zero_snr", False)
    if plain and torch.allclose(power, scheduler.alphas_cumprod.double(), rtol=1e-3, atol=0):
        first_is_final = getattr(scheduler, "final_alpha_cumprod", None) == scheduler.alphas_cumprod[0]
        scheduler.betas = scheduler.betas.double()
        scheduler.alphas = 1 - scheduler.betas
        scheduler.alphas_cumprod = power
        if first_is_final:
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def check_schedule(scheduler: SchedulerMixin) -> None:
    """Checks the noise schedule itself, which needs one signal power per training step.

    Raises:
        ValueError: If it is not such a schedule, or the network cannot be sampled at its end.
    """
    config, name = scheduler.config, type(scheduler).__name__
    power, steps = scheduler.alphas_cumprod.double(), config.num_train_timesteps
    if len(power) != steps:
        raise ValueError(
            f"{name}: trained_betas has {len(power)} values, but num_train_timesteps={steps}; give one per step"
        )
    betas = scheduler.betas
    if not (betas.isfinite() & (betas >= 0) & (betas <= 1)).all():
        low, high = float(betas.min()), float(betas.max())
        raise ValueError(f"{name}: the betas of the noise schedule go from {low:g} to {high:g}; give values in [0, 1]")
    zero = config.get("rescale_betas_zero_snr", False) or power[-1] == 0
    if zero and config.prediction_type == "epsilon":
        raise ValueError(
            f"{name}: the noise schedule ends at zero signal (rescale_betas_zero_snr or a last beta of 1), where x_0 "
            "cannot be computed from prediction_type='epsilon': samples would be infinite; train with prediction_type "
            "v_prediction or sample, or without zero terminal SNR"
        )
    if config.get("use_flow_sigmas", False):
        raise ValueError(f"{name}: use_flow_sigmas is a schedule of flow matching, not of training; leave it off")
    if config.get("interpolation_type", "linear") != "linear":
        raise ValueError(
            f"{name}: interpolation_type={config.interpolation_type} sets noise levels that do not belong to its time "
            "steps; leave it at linear"
        )
    if isinstance(scheduler, LCMScheduler):
        raise ValueError(f"{name} samples consistency models, not diffusion models; {OTHERS}")


def start_chain(scheduler: SchedulerMixin, num_inference_steps: int) -> SchedulerMixin:
    """Returns a copy of a scheduler, which keeps the history of one chain, with its time steps set.

    Raises:
        ValueError: If its time steps do not lead from noise to images; names what to use instead.
    """
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    _check_timesteps(scheduler, num_inference_steps)
    return scheduler


def take_step(scheduler: SchedulerMixin, index: int, prediction: Tensor, x: Tensor, **options: Any) -> Tensor:
    """Takes one step of a chain, to the next time step in the scheduler's own list.

    Args:
        scheduler: Result of `start_chain`.
        index: Index of the step.
        prediction: Output of the network at `timesteps[index]`, `(B, C, H, W)`.
        x: State of the chain, `(B, C, H, W)`.
        **options: Further arguments of the scheduler's `step`.
    """
    t = scheduler.timesteps[index]
    following = scheduler.timesteps[index + 1 : index + 2].tolist()
    if isinstance(scheduler, CONSTANT_STRIDE) and not isinstance(scheduler, ReleasedScheduler):
        stride = int(t) - (following[0] if following else -1)
        scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, stride)  # N // (N / stride)
    if "prev_timestep" in inspect.signature(scheduler.step).parameters:  # by default t - 1, whatever the list
        options["prev_timestep"] = following[0] if following else -1
    state: Tensor = scheduler.step(prediction, t, x, return_dict=False, **options)[0]
    return state


def try_chain(scheduler: SchedulerMixin, num_inference_steps: int, outputs: int = 1) -> None:
    """Runs a whole chain on zeros, because schedulers check their options and their time steps only in `step`.

    Args:
        scheduler: The scheduler.
        num_inference_steps: Diffusion steps of the sampler.
        outputs: Channels of the prediction for each channel of the images: 2 with a predicted variance.

    Raises:
        ValueError: If the scheduler does not work with its options or this number of steps.
    """
    given = (
        f"{type(scheduler).__name__} does not work with prediction_type={scheduler.config.prediction_type!r} and "
        f"num_inference_steps={num_inference_steps}"
    )
    x = torch.zeros(1, 1, 2, 2)
    try:
        with torch.random.fork_rng(devices=[]):
            chain = start_chain(scheduler, num_inference_steps)
            if isinstance(chain, AnalyticDPMScheduler):
                chain.gamma = torch.ones(chain.config.num_train_timesteps)
            for index, t in enumerate(chain.timesteps):
                chain.scale_model_input(x, t)
                x = take_step(chain, index, x.new_zeros(1, outputs, 2, 2), x)
    except (ValueError, NotImplementedError, TypeError, LookupError, ArithmeticError, AssertionError) as error:
        if isinstance(error, ChainError):
            raise
        reason = str(error) or type(error).__name__
        raise ValueError(f"{given} ({reason}); choose another scheduler or other options") from error
    if not x.isfinite().all():
        raise ValueError(
            f"{given}{_spacing(scheduler)}: two of its time steps are equal, and a chain ends in values that are not "
            f"finite; {_advice(scheduler)}"
        )


class ChainError(ValueError):
    """The time steps of a scheduler do not lead from noise to images."""


def _check_timesteps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    given = f"{type(scheduler).__name__}, num_inference_steps={num_inference_steps}{_spacing(scheduler)}"
    times, last = scheduler.timesteps.double(), scheduler.config.num_train_timesteps - 1
    if len(times) > 1 and times[0] < times[-1]:
        raise ChainError(f"{type(scheduler).__name__} turns images into noise; {OTHERS}")
    if times.min() < 0 or times.max() > last:
        raise ChainError(
            f"{given}: its time steps go from {times[0]:g} to {times[-1]:g}, but training has the steps {last} to 0; "
            f"{_advice(scheduler)}"
        )
    strides = -torch.cat([times, times.new_tensor([-1])]).diff()
    signal = float(scheduler.alphas_cumprod[int(times[0])])
    if last - times[0] > strides.max() and signal > MAX_SIGNAL:
        raise ChainError(
            f"{given}: its time steps start at {times[0]:g} of {last}, where images still have {signal:.1%} of their "
            f"signal power, but the chain starts from pure noise; {_advice(scheduler)}"
        )
    if isinstance(scheduler, PNDMScheduler):
        stride = scheduler.config.num_train_timesteps // num_inference_steps
        steps = torch.as_tensor(scheduler._timesteps.copy()).diff().abs()
        if (steps != stride).any():
            raise ChainError(
                f"{given}: its formulas assume a stride of {stride}, but its list has strides of {int(steps.min())} to "
                f"{int(steps.max())}; give timestep_spacing=leading, or trailing with a number of steps that divides "
                f"{scheduler.config.num_train_timesteps}"
            )


def _spacing(scheduler: SchedulerMixin) -> str:
    spacing = scheduler.config.get("timestep_spacing")
    return "" if spacing is None else f", timestep_spacing={spacing}"


def _advice(scheduler: SchedulerMixin) -> str:
    trailing = "timestep_spacing" in scheduler.config and scheduler.config.timestep_spacing != "trailing"
    return "give timestep_spacing=trailing, or other steps" if trailing else "give other steps, or another scheduler"
