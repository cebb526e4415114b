"""A new network on the suite's Gaussian diffusion: a spiking MLP."""

from typing import Any

import snntorch as snn
import torch
from diffusers import DDPMScheduler
from torch import nn

from benchmark import GaussianDiffusion, multistep


class SpikingMLP(nn.Module):
    """Maps noisy images `(B, C, H, W)` and steps `t` `(B,)` to a prediction `(B, C, H, W)`."""

    def __init__(self, num_pixels: int, hidden: int, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.stem = nn.Linear(num_pixels + 1, hidden)
        self.neuron1 = multistep(snn.Leaky(beta=0.9))
        self.middle = nn.Linear(hidden, hidden)
        self.neuron2 = multistep(snn.Leaky(beta=0.9))
        self.head = nn.Linear(hidden, num_pixels)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        currents = self.stem(torch.cat([x.flatten(1), t[:, None] / 1000], dim=1))  # (B, hidden)
        spikes = self.neuron1(currents.expand(self.num_steps, -1, -1))  # (T, B, hidden)
        spikes = self.neuron2(self.middle(spikes))
        return self.head(spikes).mean(0).view_as(x)


class MLPDiffusion(GaussianDiffusion):
    """DDPM with a spiking MLP."""

    method = "spiking-mlp"

    def __init__(
        self, image_size: int = 8, hidden: int = 128, num_steps: int = 4, num_inference_steps: int = 50, **kwargs: Any
    ) -> None:
        network = SpikingMLP(image_size**2, hidden, num_steps)
        super().__init__(network, DDPMScheduler(), num_inference_steps, **kwargs)
        self.num_steps = num_steps
