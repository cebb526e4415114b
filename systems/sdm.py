"""SDM: SDDPM's spiking U-Net with a learned factor per SNN time step on every convolution, fine-tuned from an SDDPM.

J. Cao, H. Guo, Z. Wang, D. Zhou, H. Cheng, Q. Zhang, R. Xu, "Spiking Diffusion Models", IEEE TAI 2024,
https://arxiv.org/abs/2408.16467; authors' code https://github.com/AndyCao1125/SDM.

The temporal-wise spiking mechanism (TSM) scales the current of step `k` by `p[k]`, 1.0 before training, so that an SDM
starts out equal to its SDDPM. Weights and factors are trained jointly with a fresh optimiser for less than a tenth of
the SDDPM's steps. The other parts of the paper apply to several methods: threshold guidance is the option `threshold`,
the samplers are schedulers (`systems/diffusion/` and diffusers), and the conversion of an ANN is `systems/ann_snn.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from systems import sddpm
from systems.checkpoints import check_state, network_state, read_trained, training_data_of
from systems.figures import Figure, plot_factors
from systems.networks.spiking_unet import SpikingUNet, TemporalConv2d
from systems.sddpm import SDDPM
from systems.twins import twin_name


class SDM(SDDPM):
    """Spiking diffusion model with temporal-wise spiking of Cao et al.

    Args:
        init_from: SDDPM checkpoint of the same size to fine-tune, as published; None trains from scratch.
        **kwargs: Arguments of `SDDPM`; `num_steps` cannot change after training.
    """

    method = "sdm"
    temporal_scaling = True
    network: SpikingUNet

    def __init__(self, init_from: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.init_from = init_from
        self._loaded = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Records that training is resumed."""
        super().on_load_checkpoint(checkpoint)
        self._loaded = True

    def on_fit_start(self) -> None:
        """Loads the weights of the SDDPM when training starts, but not when it resumes.

        Raises:
            CheckpointMismatchError: If the checkpoint is of another method, size or diffusion process.
        """
        if self._loaded:
            return
        if self.init_from is None:
            warnings.warn(
                "SDM trains from scratch; to fine-tune as published, give --model.init_from SDDPM_CHECKPOINT",
                stacklevel=2,
            )
            return
        checkpoint = read_trained(self.init_from, twin_name(SDDPM.method, self.twin_bits))
        self.check_process(checkpoint, self.init_from)
        self.network.load_state_dict(from_sddpm(network_state(checkpoint), self.network, self.init_from))
        self.training_data = training_data_of(checkpoint)

    def figures(self) -> dict[str, Figure]:
        """Plots the learned factors by layer and SNN step."""
        return {"temporal_factors": plot_factors(temporal_factors(self.network))}


def read_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Renames the tensors of a released SDM checkpoint; see `systems.sddpm.read_official`."""
    return sddpm.read_official(state, suffix=".tsmconv")


def from_sddpm(state: Mapping[str, Tensor], network: SpikingUNet, source: str = "the SDDPM") -> dict[str, Tensor]:
    """Converts the state dict of an SDDPM's network to one of an SDM's network, with factors of 1.0.

    Raises:
        CheckpointMismatchError: If the networks differ in size.
    """
    state = dict(state)
    for name, module in network.named_modules():
        if isinstance(module, TemporalConv2d):
            for part in ("weight", "bias"):
                if f"{name}.{part}" in state:
                    state[f"{name}.tsmconv.{part}"] = state.pop(f"{name}.{part}")
            state[f"{name}.tsmp"] = torch.ones_like(module.tsmp)
    check_state(state, network, source)
    return state


def temporal_factors(network: nn.Module) -> dict[str, Tensor]:
    """Returns the factors `(T,)` of each convolution, in the order of the forward pass."""
    return {
        name: module.tsmp.detach().flatten().cpu()
        for name, module in network.named_modules()
        if isinstance(module, TemporalConv2d)
    }
