"""Gaussian diffusion whose network also predicts the variance of each step.

A. Nichol, P. Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021, https://arxiv.org/abs/2102.09672.

The posterior of one step is normal, with

    q(x_{t-1} | x_t, x_0):  mean c1 x_0 + c2 x_t,  log-variance lv~_t = ln beta~_t
    p(x_{t-1} | x_t):       mean c1 x_0^ + c2 x_t, log-variance lv = (v+1)/2 ln beta_t + (1 - (v+1)/2) lv~_t

where the network predicts `v` and the noise or image from which `x_0^` follows. Tables are float64.
"""

from __future__ import annotations

import math

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

SMALLEST = 1e-12
"""Lower limit of a probability before its logarithm is taken."""


class RespacedDDPMScheduler(DDPMScheduler):
    """Ancestral sampler with predicted variances on evenly spaced steps, from the last to the first, as in SDiT's code.

    `n` steps of a chain of 1000 are `round(k * 999 / (n - 1))`, `k < n`; betas and posterior are those of the
    shortened chain. The predicted `x_0` is not clamped.

    Args:
        num_train_timesteps: Diffusion steps of training.
        beta_start: First beta.
        beta_end: Last beta.
        beta_schedule: Schedule of the betas, as in DDPMScheduler; `linear` betas are float64.
        prediction_type: `epsilon` (released), `sample` or `v_prediction`.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
    ) -> None:
        super().__init__(
            num_train_timesteps,
            beta_start,
            beta_end,
            beta_schedule,
            variance_type="learned_range",
            clip_sample=False,
            prediction_type=prediction_type,
        )
        self.register_to_config(variance_type="learned_range", clip_sample=False)  # override DDPMScheduler's defaults
        if beta_schedule == "linear":
            self.betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
            self.alphas = 1 - self.betas
            self.alphas_cumprod = self.alphas.cumprod(0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Sets the steps of the shortened chain, or the given ones."""
        if num_inference_steps is not None and timesteps is None:
            timesteps = respaced(self.config.num_train_timesteps, num_inference_steps)[::-1]
        super().set_timesteps(device=device, timesteps=timesteps)


def respaced(num_train_timesteps: int, num_steps: int) -> list[int]:
    """Returns `num_steps` evenly spaced steps from 0 to the last; a half is rounded to the even number."""
    if num_steps == 1:
        return [num_train_timesteps - 1]
    stride, position, steps = (num_train_timesteps - 1) / (num_steps - 1), 0.0, []
    for _ in range(num_steps):
        steps.append(round(position))
        position += stride
    return steps


def posterior_tables(alphas_cumprod: Tensor) -> dict[str, Tensor]:
    """Returns the tables of a chain from its cumulative products `(n,)`, each `(n,)` in float64.

    `posterior_mean_coef1` and `posterior_mean_coef2` are `c1` and `c2`. `posterior_log_variance_clipped` is `lv~`; its
    first value, minus infinity, is replaced by the second.
    """
    power = alphas_cumprod.double()
    before = torch.cat([power.new_ones(1), power[:-1]])
    betas = 1 - power / before
    variance = betas * (1 - before) / (1 - power)
    return {
        "betas": betas,
        "alphas_cumprod": power,
        "sqrt_recip_alphas_cumprod": (1 / power).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / power - 1).sqrt(),
        "posterior_log_variance_clipped": torch.cat([variance[1:2], variance[1:]]).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - power),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - power),
    }


def variational_bound(
    images: Tensor, x_t: Tensor, x_0: Tensor, v: Tensor, first: Tensor, rows: dict[str, Tensor]
) -> Tensor:
    """Returns the term of the variational bound of each image in bits per dimension, `(B,)`.

    It is the divergence of `p` from `q`, and at the first step the negative log-likelihood of the 8-bit image.

    Args:
        images: `x_0` `(B, C, H, W)` in [-1, 1].
        x_t: Noisy images.
        x_0: Predicted images.
        v: Predicted variances, about -1 to 1.
        first: Whether an image is at the first step, boolean `(B,)`.
        rows: `posterior_tables` at the step of each image, `(B, 1, 1, 1)`.
    """
    c1, c2, least = (rows[f"posterior_{name}"] for name in ("mean_coef1", "mean_coef2", "log_variance_clipped"))
    weight = (v + 1) / 2
    log_variance = weight * rows["betas"].log() + (1 - weight) * least
    change = c1 * (images - x_0)  # of the mean
    divergence = 0.5 * (log_variance - least - 1 + (least - log_variance).exp() + change**2 * (-log_variance).exp())
    is_first = first.view(-1, 1, 1, 1)
    scale = torch.where(is_first, -0.5 * log_variance, 0).exp()  # elsewhere its gradient must be finite
    likelihood = _log_likelihood(images, c1 * x_0 + c2 * x_t, scale)
    return torch.where(is_first, -likelihood, divergence).mean((1, 2, 3)) / math.log(2)


def _log_likelihood(images: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Returns the log-probability of each 8-bit value under a normal distribution of standard deviation `1 / scale`."""
    centred = images - mean
    upper, lower = (_normal_cdf(scale * (centred + half)) for half in (1 / 255, -1 / 255))
    inside = torch.where(images > 0.999, 1 - lower, upper - lower)
    return torch.where(images < -0.999, upper, inside).clamp(min=SMALLEST).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """Approximates the cumulative distribution of the standard normal distribution."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
