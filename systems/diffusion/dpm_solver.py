"""Single-step DPM-Solver, as published, as a diffusers scheduler.

C. Lu, Y. Zhou, F. Bao, J. Chen, C. Li, J. Zhu, "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model
Sampling in Around 10 Steps", NeurIPS 2022, https://arxiv.org/abs/2206.00927; SDM (arXiv 2408.16467) samples with its
"default setting" and released no code for it. We take this to mean order 3, steps uniform in the logarithm of the
signal-to-noise ratio, and no clamping.

With `lambda = ln(a / sigma)` and `h = lambda_t - lambda_s`, a step from `s` to `t` of order 1 is DDIM,

    x_t = (a_t / a_s) x_s - sigma_t (e^h - 1) eps_s

and higher orders evaluate the network at further times within the step. Time `tau` from 1 down to `1/N` corresponds to
step `N tau - 1` of the `N` training steps; between integer steps `ln a` is interpolated linearly, and the network
receives the real-valued step.

DPMSolverSinglestepScheduler of diffusers rounds its times to integer steps and repeats the orders 1, 2, 3;
DPMSolverMultistepScheduler is the multistep variant.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from systems.diffusion._released import ReleasedScheduler
from systems.diffusion.prediction import to_noise, to_x0


class Point(NamedTuple):
    """A time of the chain: signal scale `a`, noise scale `sigma`, `ln(a / sigma)`, real-valued diffusion step."""

    a: float
    sigma: float
    log_ratio: float
    timestep: float


class DPMSolverScheduler(ReleasedScheduler):
    """Single-step DPM-Solver; noise schedule and forward process are DDPM's.

    Args:
        solver_order: Order of a step, which is also its number of network evaluations. The last steps have lower orders
            when num_inference_steps is not a multiple of the order (DPM-Solver-fast).
        spacing: Steps uniform in `lambda` or in time.
        **kwargs: Arguments of `ReleasedScheduler`.

    Raises:
        ValueError: If order or spacing is unknown.
    """

    fixed = ("clip_sample",)

    @register_to_config
    def __init__(
        self,
        solver_order: Literal[1, 2, 3] = 3,
        spacing: Literal["lambda", "time"] = "lambda",
        **kwargs: Any,
    ) -> None:
        if solver_order not in (1, 2, 3) or spacing not in ("lambda", "time"):
            raise ValueError(
                f"solver_order={solver_order}, spacing={spacing!r}; give 1, 2 or 3, and 'lambda' or 'time'"
            )
        super().__init__(clip_sample=False, **kwargs)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Sets the steps and the times of all network evaluations.

        Args:
            num_inference_steps: Network evaluations.
            device: Device of `timesteps`.
        """
        power = self.alphas_cumprod.double().numpy()
        self._log_signal = np.log(power) / 2
        ends = [self._at(step) for step in (self.config.num_train_timesteps - 1.0, 0.0)]
        orders = fast_orders(num_inference_steps, self.config.solver_order)
        if self.config.spacing == "lambda":
            ratios = np.linspace(ends[0].log_ratio, ends[1].log_ratio, len(orders) + 1)
            inner = [self._at_log_ratio(ratio) for ratio in ratios[1:-1]]
        else:
            times = np.linspace(ends[0].timestep, ends[1].timestep, num_inference_steps + 1)
            inner = [self._at(times[k]) for k in np.cumsum(orders)[:-1]]
        points = [ends[0], *inner, ends[1]]
        self._path = []
        for order, start, end in zip(orders, points, points[1:], strict=False):
            growth = end.log_ratio - start.log_ratio
            within = [self._at_log_ratio(start.log_ratio + growth * k / order) for k in range(1, order)]
            self._path.append([start, *within, end])
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor([point.timestep for step in self._path for point in step[:-1]], device=device)
        self._step = self._stage = 0

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Computes `x` at the next time at which the network is evaluated.

        Args:
            model_output: Prediction of the network `(B, C, H, W)`.
            timestep: Ignored: successive calls step through `timesteps`.
            sample: `x` at that time `(B, C, H, W)`.
            return_dict: Whether to return a `DDPMSchedulerOutput` instead of `(x, x_0)`.
        """
        path = self._path[self._step]
        stage, order = self._stage, len(path) - 1
        start, current, target = path[0], path[stage], path[stage + 1]
        noise = to_noise(model_output, sample, current.a, current.sigma, self.config.prediction_type)
        x_0 = to_x0(noise, sample, current.a, current.sigma, "epsilon")
        if stage == 0:
            self._start = sample, noise
        x_s, noise_s = self._start
        growth = target.log_ratio - start.log_ratio
        previous = target.a / start.a * x_s - target.sigma * math.expm1(growth) * noise_s
        if stage > 0:
            higher = (stage + 1) / stage * (math.expm1(growth) / growth - 1)
            previous = previous - target.sigma * (higher if order == 3 else math.expm1(growth)) * (noise - noise_s)
        self._step, self._stage = (self._step, stage + 1) if stage + 1 < order else (self._step + 1, 0)
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x_0) if return_dict else (previous, x_0)

    def _at(self, timestep: float) -> Point:
        """Returns the point at a real-valued diffusion step."""
        log_signal = float(np.interp(timestep, np.arange(len(self._log_signal)), self._log_signal))
        sigma = math.sqrt(-math.expm1(2 * log_signal))
        return Point(math.exp(log_signal), sigma, log_signal - math.log(sigma), timestep)

    def _at_log_ratio(self, log_ratio: float) -> Point:
        """Returns the point at which `ln(a / sigma)` equals `log_ratio`."""
        log_signal = -np.logaddexp(0, -2 * log_ratio) / 2
        steps = np.arange(len(self._log_signal))
        return self._at(float(np.interp(log_signal, self._log_signal[::-1], steps[::-1])))


def fast_orders(evaluations: int, order: int) -> list[int]:
    """Returns the orders of the steps, which sum to `evaluations`, most of them `order` (DPM-Solver-fast).

    For order 3 they end in 2, 1 if 3 divides `evaluations`, otherwise in 1 or 2.
    """
    if order == 3 and evaluations % 3 == 0:
        return [3] * (evaluations // 3 - 1) + [2, 1]
    return [order] * (evaluations // order) + [evaluations % order] * (evaluations % order > 0)
