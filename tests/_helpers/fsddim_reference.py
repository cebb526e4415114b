"""The recorded FSDDIM network, and helpers of its tests."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from systems import FSDDIM
from systems.fsddim import read_official

PREFIXES = {"tdbn": "", "plain": "plain_bn."}


def state_of(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}


def recorded_system(recorded: dict[str, Tensor], norm: str, num_steps_of_chain: int = 1000, **options: Any) -> FSDDIM:
    """The recorded network in a system; its time table has 1000 rows for any length of the chain."""
    tensors, arguments = read_official(state_of(recorded))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments |= {"num_train_timesteps": num_steps_of_chain, "num_inference_steps": num_steps_of_chain}
        system = FSDDIM(**arguments, num_steps=4, norm=norm, **options)
    system.network.load_state_dict(tensors)
    return system.eval()


def tiny(**options: Any) -> FSDDIM:
    """A small random system with non-trivial norm statistics and biases."""
    torch.manual_seed(0)
    sizes = dict(in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        system = FSDDIM(**(sizes | {"num_inference_steps": 4} | options))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in system.network.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return system.eval()
