"""SpikingRWKV: a fully spiking denoising diffusion model after SDiT, whose every block weight receives spikes.

A design of the suite's own, for the open question of S. Yang, H. Ma, C. Yu, A. Wang, E.-P. Li, "SDiT: Spiking Diffusion
Model with Transformer", 2024, https://arxiv.org/abs/2402.11588: a transformer with RWKV in place of attention that is
spiking throughout. It was made from the paper's text, which leaves sizes, neurons and equations open: the class lists
the published parts and the suite's choices. It is not the network of the paper's code, whose weights receive real
values; that network is `systems.sdit.SDiT`. Before the suite had that network, this design was called `SDiT`; its old
configs, checkpoints and records are read under the present name.

Loss and sampler: `GaussianDiffusion.loss`, `.trajectory`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR

from systems.base import LRSchedulerFactory, OptimizerFactory
from systems.diffusion.gaussian import GaussianDiffusion
from systems.networks.spiking_transformer import SpikingTransformer
from systems.spiking.adapter import apply_options
from systems.spiking.neurons import NeuronFactory, SpikingNeuron
from systems.spiking.surrogates import get_surrogate


class SpikingRWKV(GaussianDiffusion):
    """Fully spiking diffusion transformer after Yang et al.

    Published: noise prediction with a mean squared error, trained by AdamW; patches and their positions enter through
    an ANN layer, the diffusion step through a time embedding; spiking blocks with RWKV (linear in the number of tokens)
    in place of softmax attention; input blocks, a middle block and output blocks, with long skips from input block `i`
    to output block `depth - i`; a learned token that is processed alongside the features, models the dynamics of the
    neurons and multiplies the features (Reconstruction Module); a final linear layer, patches to image, and a 3x3
    convolution; T = 4.

    The suite's choice: all sizes and constants below; the diffusion step as an additional first token; the positions of
    neurons and norms (weights of a block receive spikes, residual sums are real-valued); the form of the skips
    (`x + W spikes([x, skip])`); the equations of the Reconstruction Module (`spiking_transformer.Reconstruction`); and
    averaged weights and clipped gradients, which are trainer options set in the configs. The defaults are for 28x28
    images; for 32x32 use embed_dim 512 and depth 13, for 64x64 also patch_size 4.

    Args:
        beta: Membrane decay of every neuron and of the Reconstruction Module, from 0 to 1.
        threshold: Firing threshold of every neuron.
        reset_mechanism: Reset of the potential to zero (hard), or subtract the threshold (soft).
        spike_grad: Surrogate gradient: a name of snntorch.surrogate, triangle or rectangle.
        neuron: Class of other neurons in place of the suite's, with its options: of snnTorch, such as
            snntorch.Leaky, or systems.spiking.neurons.SpikingNeuron; `threshold` then scales their thresholds.
        scheduler: Noise schedule and sampler, a scheduler of diffusers.
        num_inference_steps: Diffusion steps of the sampler.
        eta: Noise of DDIM, from 0 to 1.
        optimizer: Optimiser; by default the published AdamW with U-ViT's settings.
        lr_scheduler: Learning-rate schedule per step; by default U-ViT's warm-up of 2,500 steps.
        **kwargs: Arguments of `SpikingTransformer`.
    """

    method = "spiking-rwkv"

    def __init__(
        self,
        beta: float = 0.5,
        threshold: float = 1.0,
        reset_mechanism: Literal["zero", "subtract"] = "zero",
        spike_grad: str = "atan",
        neuron: NeuronFactory | None = None,
        scheduler: SchedulerMixin | None = None,
        num_inference_steps: int = 1000,
        eta: float = 0.0,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: LRSchedulerFactory | None = lambda o: LinearLR(o, start_factor=0.0004, total_iters=2500),
        **kwargs: Any,
    ) -> None:
        scheduler = scheduler or DDPMScheduler(variance_type="fixed_large")
        network = SpikingTransformer(
            num_train_timesteps=scheduler.config.num_train_timesteps,
            beta=beta,
            neuron=neuron
            or partial(
                SpikingNeuron,
                beta=beta,
                threshold=threshold,
                reset_mechanism=reset_mechanism,
                spike_grad=get_surrogate(spike_grad),
            ),
            **kwargs,
        )
        if neuron is not None:
            apply_options(network, SpikingRWKV, threshold, reset_mechanism=reset_mechanism, spike_grad=spike_grad)
        optimizer = optimizer or partial(AdamW, lr=2e-4, betas=(0.99, 0.999), weight_decay=0.03, fused=True)
        super().__init__(network, scheduler, num_inference_steps, eta, optimizer, lr_scheduler)
        self.num_steps = network.num_steps
        self.threshold = threshold
