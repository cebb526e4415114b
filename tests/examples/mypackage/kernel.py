"""A callback that gives SDDPM of the track the last convolution that another seed would have drawn."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from systems.networks.spiking_unet import SpikingUNet


class Kernel(Callback):
    """Exchanges weight and bias of `T_output_layer` before the first step.

    Args:
        seed: Seed from which the exchanged layer is drawn, as `--seed_everything` would draw it.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the network again, with the size of the track's SDDPM, and copies this layer."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            drawn = SpikingUNet(in_channels=1, base_channels=8, channel_mult=[1, 2, 6], num_res_blocks=1)
        pl_module.network.T_output_layer.load_state_dict(drawn.T_output_layer.state_dict())
