"""Base of the schedulers in this folder: a noise schedule with the options of the released samplers.

The module is private so that the command line does not list the base among the choices of `--model.scheduler`.
"""

from __future__ import annotations

import inspect

from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config


class ReleasedScheduler(DDPMScheduler):
    """DDPM's noise schedule and forward process; subclasses accept these arguments as `**kwargs`.

    Args:
        num_train_timesteps: Diffusion steps of training.
        beta_start: First value of the noise schedule.
        beta_end: Last value of the noise schedule.
        beta_schedule: Noise schedule, as in DDPMScheduler.
        prediction_type: Quantity that the network predicts: `epsilon`, `sample` or `v_prediction`.
        clip_sample: Whether the predicted x_0 is clamped to [-1, 1], as in the released SDDPM sampler.
    """

    fixed: tuple[str, ...] = ()
    """Arguments of its bases that a subclass sets itself."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        clip_sample: bool = True,
    ) -> None:
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            prediction_type=prediction_type,
            clip_sample=clip_sample,
        )

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Names of the arguments for `from_config`, which by itself does not look behind `**kwargs`."""
        classes = [c for c in input_class.__mro__ if issubclass(c, ReleasedScheduler)] or [input_class]
        names = {name for c in classes for name in inspect.signature(c.__init__).parameters}  # type: ignore[misc]
        return names - set(getattr(input_class, "fixed", ()))
