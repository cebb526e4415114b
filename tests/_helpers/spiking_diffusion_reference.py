"""The recorded networks of Spiking-Diffusion as a pair of official files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from systems.spiking_diffusion import SpikingDiffusion, read_official

ROUNDING = 1e-5
"""Norm below which a recorded gradient is the rounding error of an exact zero: of a bias before a norm."""
FILES = ("vqsvae_small.safetensors", "sdid_small.safetensors")


def official(recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released state dict of one network."""
    return {key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}


def load(reference: Callable[[str], dict[str, Tensor]]) -> SpikingDiffusion:
    """The system with the recorded weights."""
    state, arguments = read_official(*(official(reference(name)) for name in FILES))
    system = SpikingDiffusion(**arguments)
    system.network.load_state_dict(state)
    return system


def check_gradients(ours: dict[str, Tensor | None], theirs: dict[str, Tensor], floor: float) -> None:
    """Compares gradients by name, with an error relative to their norm, or to `floor` if the norm is smaller."""
    assert theirs
    for name, gradient in theirs.items():
        found = ours[name]
        assert found is not None, name
        if gradient.norm() < ROUNDING:
            assert found.norm() < 10 * ROUNDING, name  # depends on the processor
            continue
        assert (found - gradient).norm() < 1e-4 * gradient.norm().clamp(min=floor), name


def check_statistics(network: torch.nn.Module, theirs: dict[str, Tensor]) -> None:
    """Compares the running statistics of the norms after one training pass."""
    assert theirs
    for name, value in theirs.items():
        torch.testing.assert_close(network.get_buffer(name), value, rtol=1e-5, atol=1e-6, msg=name)
