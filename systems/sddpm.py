"""SDDPM: a denoising diffusion model whose noise predictor is a spiking U-Net.

J. Cao, Z. Wang, H. Guo, H. Cheng, Q. Zhang, R. Xu, "Spiking Denoising Diffusion Probabilistic Models", WACV 2024,
https://arxiv.org/abs/2306.17046; authors' code https://github.com/AndyCao1125/SDDPM.

Loss and sampler: `GaussianDiffusion.loss`, `.trajectory`.

Official weights: the README of the authors' repository links weights for CIFAR-10 on Google Drive. `read_official`
reads their format and is tested with a small state dict in that format; it has not been tested with the linked file.

Departures: neurons start from zero in every network call (the released sampler carries the potentials of the last call
for one batch over to the next batch), and the seed option takes effect. The recipe combines the released learning rate
with the paper's batch size; `configs/presets/` contains both original recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torch.optim import Adam

from systems.base import LRSchedulerFactory, OptimizerFactory
from systems.checkpoints import check_state, rename
from systems.diffusion.gaussian import GaussianDiffusion
from systems.networks.spiking_unet import SpikingUNet
from systems.networks.unet import read_size
from systems.ops.quantise import PLAIN_BITS
from systems.spiking.adapter import apply_options
from systems.spiking.neurons import NeuronFactory, integrate_and_fire, leaky_integrate_and_fire
from systems.spiking.relu import ReLULayer
from systems.spiking.surrogates import get_surrogate
from systems.twins import check_not_quantised, check_twin, twin_name


class SDDPM(GaussianDiffusion):
    """Spiking DDPM of Cao et al.

    Args:
        neuron: Integrate-and-fire (`if`, published), leaky with tau = 2 (`lif`), or a class of other neurons with its
            options: of snnTorch, such as snntorch.Leaky, or systems.spiking.neurons.SpikingNeuron; `threshold` then
            scales their thresholds. `relu` makes the ReLU twin (`systems.twins`) and needs `num_steps` 1.
        threshold: Firing threshold of every neuron; values near 1 at test time are threshold guidance.
        spike_grad: Surrogate gradient: a name of snntorch.surrogate, triangle or rectangle.
        activation_bits: Bits of the activations of a ReLU twin, 1 to 8; 32 is a plain ReLU. `ceil(log2(T + 1))` bits, 3
            for T = 4, have at least as many levels as neurons have spike counts in `T` steps.
        scheduler: Noise schedule and sampler, a scheduler of diffusers.
        num_inference_steps: Diffusion steps of the sampler.
        eta: Noise of DDIM, from 0 to 1.
        optimizer: Optimiser; by default the released Adam with lr 2e-4.
        lr_scheduler: Learning-rate schedule per step, e.g. LinearLR for a warm-up.
        final_clip: Whether the final images of the sampler are clamped to [-1, 1].
        **kwargs: Arguments of `SpikingUNet`.
    """

    method = "sddpm"
    temporal_scaling = False

    def __init__(
        self,
        neuron: Literal["if", "lif", "relu"] | NeuronFactory = "if",
        threshold: float = 1.0,
        spike_grad: str = "atan",
        activation_bits: int = PLAIN_BITS,
        scheduler: SchedulerMixin | None = None,
        num_inference_steps: int = 1000,
        eta: float = 0.0,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: LRSchedulerFactory | None = None,
        final_clip: bool = False,
        **kwargs: Any,
    ) -> None:
        scheduler = scheduler or DDPMScheduler(variance_type="fixed_large")
        make: NeuronFactory
        if neuron == "relu":
            make = partial(ReLULayer, activation_bits)
        elif isinstance(neuron, str):
            published = integrate_and_fire if neuron == "if" else leaky_integrate_and_fire
            make = partial(published, threshold=threshold, spike_grad=get_surrogate(spike_grad))
        else:
            make = neuron
        network = SpikingUNet(
            num_train_timesteps=scheduler.config.num_train_timesteps,
            neuron=make,
            temporal_scaling=self.temporal_scaling,
            **kwargs,
        )
        is_twin = neuron == "relu"
        if is_twin:
            check_twin(SDDPM, network.num_steps, threshold=threshold, spike_grad=spike_grad)
        else:
            check_not_quantised(SDDPM, activation_bits)
        if not isinstance(neuron, str):
            apply_options(network, SDDPM, threshold, spike_grad=spike_grad)
        optimizer = optimizer or partial(Adam, lr=2e-4, fused=True)
        super().__init__(network, scheduler, num_inference_steps, eta, optimizer, lr_scheduler, final_clip)
        self.num_steps = network.num_steps
        self.threshold = None if is_twin else threshold
        self.twin_bits = activation_bits if is_twin else None
        self.method = twin_name(self.method, self.twin_bits)


def read_official(state: Mapping[str, Tensor], suffix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Renames the tensors of a released checkpoint to the names in `SpikingUNet`.

    Args:
        state: Released state dict (`net_model`); a `module.` prefix and the last axis (of size 1) of a 3-D kernel are
            removed.
        suffix: Name of a convolution within its layer: `.tsmconv` for SDM.

    Returns:
        The network's state dict, and its size as arguments of the system. They include `num_steps` only for SDM: an
        SDDPM works with any number.

    Raises:
        KeyError: If it is not the state dict of such a network; names the first missing tensor.
        CheckpointMismatchError: If tensors are unexpected, missing or of another shape; lists them.
    """
    renamed = rename(state, lambda key: key.removeprefix("module."))
    kernel = renamed["T_output_layer.weight"]
    if kernel.dim() == 5:
        renamed["T_output_layer.weight"] = kernel.squeeze(-1)
    arguments = read_size(renamed, stem=f"conv{suffix}.weight", width=f"conv1{suffix}.bias")
    if suffix:
        arguments["num_steps"] = len(renamed["conv.tsmp"])
    num_train_timesteps = len(renamed["time_embedding.timembedding.0.weight"])
    with torch.device("meta"):
        network = SpikingUNet(**arguments, num_train_timesteps=num_train_timesteps, temporal_scaling=bool(suffix))
    check_state(renamed, network, "the official checkpoint")
    return renamed, arguments
