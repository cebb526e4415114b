"""DDPM: the ANN baseline, a U-Net without attention whose activations may be quantised for conversion to an SNN.

J. Ho, A. Jain, P. Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, https://arxiv.org/abs/2006.11239,
as trained in J. Cao et al., "Spiking Diffusion Models", IEEE TAI 2024, https://arxiv.org/abs/2408.16467; authors' code
https://github.com/AndyCao1125/SDM (its ANN2SNN part). With 2-bit activations the network can be converted
(`systems/ann_snn.py`); with 32 bits (plain ReLU) it is the reference for the energy of spiking networks.

Loss and sampler: `GaussianDiffusion.loss`, `.trajectory`. As released, the sampler does not clamp the predicted `x_0`
(`clip_sample=False`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torch.optim import Adam

from systems.base import LRSchedulerFactory, OptimizerFactory
from systems.checkpoints import CheckpointMismatchError, check_state, rename
from systems.diffusion.gaussian import GaussianDiffusion
from systems.networks.ann_unet import GROUPS, ANNUNet
from systems.networks.unet import read_size
from systems.ops.quantise import PLAIN_BITS, quantised_relu


class QuantisedDiffusion(GaussianDiffusion):
    """Gaussian diffusion whose checkpoints record the bits of the activations and the groups of the group norms."""

    network: ANNUNet
    activation_bits: int

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the bits and the groups, which cannot be read from the weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["activation_bits"] = self.activation_bits
        checkpoint["norm_groups"] = self.network.norm_groups

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rejects a checkpoint of another method, network, diffusion process, number of bits or of groups."""
        super().on_load_checkpoint(checkpoint)
        check_recorded(checkpoint, self.activation_bits, self.network.norm_groups, "the checkpoint")


class DDPM(QuantisedDiffusion):
    """ANN noise predictor of Cao et al., the network before conversion.

    Args:
        activation_bits: Bits of every activation, 1 to 8 (published: 2); 32 is a plain ReLU.
        scheduler: Noise schedule and sampler, a scheduler of diffusers.
        num_inference_steps: Diffusion steps of the sampler.
        eta: Noise of DDIM, from 0 to 1.
        optimizer: Optimiser; by default the released Adam with lr 2e-4.
        lr_scheduler: Learning-rate schedule per step; the configs have the released warm-up, averaging and clipping.
        final_clip: Whether the final images of the sampler are clamped to [-1, 1].
        **kwargs: Arguments of `ANNUNet`, such as `norm_groups` for widths that 32 groups do not divide.
    """

    method = "ddpm"
    num_steps = 1

    def __init__(
        self,
        activation_bits: int = 2,
        scheduler: SchedulerMixin | None = None,
        num_inference_steps: int = 1000,
        eta: float = 0.0,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: LRSchedulerFactory | None = None,
        final_clip: bool = True,
        **kwargs: Any,
    ) -> None:
        scheduler = scheduler or DDPMScheduler(variance_type="fixed_large", clip_sample=False)
        network = ANNUNet(
            num_train_timesteps=scheduler.config.num_train_timesteps,
            num_steps=1,
            activation=partial(quantised_relu, activation_bits),
            **kwargs,
        )
        optimizer = optimizer or partial(Adam, lr=2e-4, fused=True)
        super().__init__(network, scheduler, num_inference_steps, eta, optimizer, lr_scheduler, final_clip)
        self.activation_bits = activation_bits


def check_recorded(checkpoint: Mapping[str, Any], activation_bits: int, norm_groups: int, source: str) -> None:
    """Checks that a checkpoint was trained with the configured activations and group norms, if it records them.

    Checkpoints of the suite without a number of groups were imported, or written before it became an option: 32.

    Raises:
        CheckpointMismatchError: If it was not.
    """
    configured = {"activation_bits": activation_bits, "norm_groups": norm_groups}
    trained = {"norm_groups": GROUPS} if "method" in checkpoint else {}
    trained |= {name: checkpoint[name] for name in configured if name in checkpoint}
    for name, value in trained.items():
        if value != configured[name]:
            raise CheckpointMismatchError(
                f"{source} was trained with {name}={value}, but {name}={configured[name]} is configured; give "
                f"--model.{name} {value}"
            )


def read_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Renames the tensors of a released ANN checkpoint to the names in `ANNUNet`.

    Args:
        state: Released state dict (`ema_model`); a `module.` prefix is removed.

    Returns:
        The network's state dict, and its size as arguments of the system. They include `activation_bits` only for a
        plain ReLU: the bits of a quantised network cannot be read from its clip values.

    Raises:
        KeyError: If it is not the state dict of such a network; names the first missing tensor.
        CheckpointMismatchError: If tensors are unexpected, missing or of another shape (lists them), or if the released
            number of groups of the group norms does not divide the channels.
    """
    renamed = rename(state, lambda key: key.removeprefix("module."))
    arguments = read_size(renamed, stem="head.weight", width="block1.2.bias")
    bits = {} if "tail.1.act_alpha" in renamed else {"activation_bits": PLAIN_BITS}
    if arguments["base_channels"] % GROUPS:
        raise CheckpointMismatchError(
            f"the official checkpoint has base_channels={arguments['base_channels']}, but the released group norms "
            f"have {GROUPS} groups, which must divide it; a DDPM of the suite needs no import, give it as --ckpt_path"
        )
    num_train_timesteps = len(renamed["time_embedding.timembedding.0.weight"])
    with torch.device("meta"):
        network = ANNUNet(
            **arguments,
            num_train_timesteps=num_train_timesteps,
            activation=partial(quantised_relu, bits.get("activation_bits", 2)),
        )
    check_state(renamed, network, "the official checkpoint")
    return renamed, arguments | bits
