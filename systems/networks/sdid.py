"""SDID, the denoiser of Spiking-Diffusion: a spiking network that predicts the masked codes of a grid.

M. Liu et al., "Spiking-Diffusion", https://arxiv.org/abs/2308.10187; authors' code
https://github.com/Arktis2022/Spiking-Diffusion. As released, code indices and diffusion step enter as plain numbers,
without embedding or scaling, so that the input of the first convolution is not spikes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from systems.networks.checks import check_range
from systems.networks.vq_svae import SpikingConv
from systems.spiking.neurons import NeuronFactory, leaky_integrate_and_fire
from systems.spiking.steps import concatenate, fold, unfold

WIDTHS = (1, 2, 4, 8, 4)
"""Channels of the spiking layers, as multiples of the first."""


class SDID(nn.Module):
    """Denoiser of code grids: five spiking convolutions, then a convolution of the outputs of the fifth and the first.

    Args:
        num_codes: Size of the codebook.
        base_channels: Channels of the first layer.
        num_steps: SNN time steps `T`.
        neuron: Creates the neurons of one layer.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        num_codes: int = 128,
        base_channels: int = 64,
        num_steps: int = 16,
        neuron: NeuronFactory = leaky_integrate_and_fire,
    ) -> None:
        super().__init__()
        check_range("num_steps", num_steps, 1)
        check_range("base_channels", base_channels, 1)
        self.num_steps = num_steps
        channels = [2, *(multiple * base_channels for multiple in WIDTHS)]
        self.layers = nn.ModuleList(
            SpikingConv(nn.Conv2d(n, m, 3, padding=1), num_steps, neuron) for n, m in pairwise(channels)
        )
        self.head = nn.Conv2d(channels[-1] + channels[1], num_codes, 3, padding=1)

    def forward(self, tokens: Tensor, t: Tensor) -> Tensor:
        """Returns the logits of the codes, `(B, num_codes, h, w)`.

        Args:
            tokens: Code indices `(B, h, w)`, `mask_id` where masked.
            t: Diffusion steps `(B,)`, from 1.
        """
        x = tokens.to(self.head.weight.dtype)
        h = torch.stack([x, t.to(x.dtype).view(-1, 1, 1).expand_as(x)], dim=1)  # (B, 2, h, w), equal in all SNN steps
        outputs = []
        for layer in self.layers:
            h = layer(h)  # (T, B, C, h, w)
            outputs.append(h)
        h = concatenate(outputs[-1], outputs[0])
        return unfold(self.head(fold(h)), self.num_steps).mean(0)
