"""Samplers of the released SDDPM code on a strided grid of diffusion steps."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from systems.diffusion.analytic_dpm import AnalyticDPMScheduler
from systems.diffusion.prediction import to_noise


class StridedDDPMScheduler(AnalyticDPMScheduler):
    """Ancestral sampler on the time grid of the released samplers.

    As released with SDDPM (`ddpm2`), its steps have the correct mean for their length but the variance of a single
    training step, so that short chains have too little variance; `strided_variance` corrects this.

    Args:
        variance_type: `fixed_large` (released default) or `fixed_small`.
        strided_variance: Whether to use the variance of the whole step, not of a single training step as released.
        **kwargs: Arguments of `ReleasedScheduler`.
    """

    fixed = ("form", "gamma")

    @register_to_config
    def __init__(
        self,
        variance_type: Literal["fixed_large", "fixed_small"] = "fixed_large",
        strided_variance: bool = False,
        **kwargs: Any,
    ) -> None:
        if variance_type not in ("fixed_large", "fixed_small"):
            raise ValueError(f"variance_type={variance_type!r} is unknown; choose 'fixed_large' or 'fixed_small'")
        super().__init__(form="ddpm", gamma=None, **kwargs)
        self.register_to_config(variance_type=variance_type)  # overrides the default of DDPMScheduler

    def _variance(self, t: int, s: int, posterior: float, weight: float) -> float:
        s = s if self.config.strided_variance else t - 1
        cumulative_t, cumulative_s = float(self.alphas_cumprod[t]), float(self.alphas_cumprod[s])
        beta = 1 - cumulative_t / cumulative_s if s < t - 1 else float(self.betas[t])
        if self.config.variance_type == "fixed_large":
            return beta
        return beta * (1 - cumulative_s) / (1 - cumulative_t)


class StridedDDIMScheduler(AnalyticDPMScheduler):
    """Deterministic DDIM on the time grid of the released samplers, as released with SDDPM.

    The grid ends at 0, whereas DDIMScheduler of diffusers ends one stride earlier. The image retains the noise of step
    0, of standard deviation 0.01, and may exceed [-1, 1]. The noise is the predicted one, even if the predicted `x_0`
    was clamped.

    Args:
        final_denoise: Whether one more network evaluation, at step 0, removes the remaining noise, as in the released
            noisy samplers.
        **kwargs: Arguments of `ReleasedScheduler`.
    """

    fixed = ("form", "gamma")

    @register_to_config
    def __init__(self, final_denoise: bool = False, **kwargs: Any) -> None:
        super().__init__(form="ddim", gamma=None, **kwargs)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets the time grid; step 0 is evaluated only with `final_denoise`."""
        super().set_timesteps(num_inference_steps, device)
        if not self.config.final_denoise and len(self.grid) > 1:
            self.timesteps = self.timesteps[:-1]

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Takes one step of the chain; see `AnalyticDPMScheduler.step`. `generator` is ignored."""
        t = int(timestep)
        s = self.previous_timestep(t)
        x_0 = self._predict_x0(model_output, t, sample)
        if s < 0:
            previous = x_0.clamp(-1, 1)
        else:
            a = float(self.alphas_cumprod[s].sqrt().float())  # rounded before it is squared, as released
            previous = a * x_0 + math.sqrt(1 - a**2) * self._predict_noise(model_output, t, sample)
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x_0) if return_dict else (previous, x_0)

    def _predict_noise(self, prediction: Tensor, t: int, x_t: Tensor) -> Tensor:
        cumulative = float(self.alphas_cumprod[t])
        return to_noise(prediction, x_t, math.sqrt(cumulative), math.sqrt(1 - cumulative), self.config.prediction_type)
