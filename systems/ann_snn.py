"""ANN-SNN: a quantised DDPM converted to a spiking network and fine-tuned block by block.

J. Cao et al., "Spiking Diffusion Models", IEEE TAI 2024, https://arxiv.org/abs/2408.16467; authors' code
https://github.com/AndyCao1125/SDM (its ANN2SNN part, after Fast-SNN, arXiv 2305.19868).

Every quantised activation of `b` bits becomes a neuron that spikes over `T = 2^b - 1` steps; the weights are kept.
Training is the fine-tuning, which fits one block after another to the same block of the ANN.

Departures: spikes are unsigned by default, as published (the released code keeps signed ones enabled); sampling never
drops activations (the released conversion script does); and the single update of `head` is kept, which the released
code discards. As released, fine-tuning sees only clean images and the diffusion steps 0 to `T - 1`, where noisy images
and all diffusion steps were probably intended: `finetune_inputs="diffused"` uses these.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from systems import ddpm
from systems.base import OptimizerFactory
from systems.checkpoints import check_state, network_state, read_trained, rename, training_data_of
from systems.ddpm import DDPM, QuantisedDiffusion, check_recorded
from systems.networks.ann_unet import ANNUNet, BlockCall
from systems.networks.checks import check_range
from systems.ops.quantise import quantised_relu
from systems.spiking.neurons import ConvertedNeuron

STEM = ("time_embedding", "head")
"""Blocks that are tuned for one iteration and evaluated once for all SNN time steps."""


class ANNSNN(QuantisedDiffusion):
    """Converted spiking U-Net of Cao et al.

    Training needs the DDPM and ends by itself, after one iteration for the time embedding, one for `head` and
    `finetune_steps` for each other block except the tail. Training resumes in the block in which the checkpoint was
    written. Several devices need `--trainer.strategy ddp_find_unused_parameters_true`, since only one block at a time
    has gradients.

    Args:
        init_from: DDPM checkpoint: start and target of the fine-tuning.
        dropout: Probability that fine-tuning drops an activation; sampling never does.
        activation_bits: Bits `b` of the DDPM's activations; the SNN time steps are `T = 2^b - 1`.
        spikes: Without negative spikes (unsigned, as published), with (signed, as released), or with them only in time
            embedding and tail (unsigned_blocks).
        threshold: Factor on every firing threshold; values near 1 are threshold guidance.
        finetune_steps: Iterations per block.
        finetune_inputs: Clean images at diffusion steps below `T` (as released), or noisy images at all steps.
        scheduler: Noise schedule and sampler, a scheduler of diffusers.
        num_inference_steps: Diffusion steps of the sampler.
        eta: Noise of DDIM, from 0 to 1.
        optimizer: Optimiser of the fine-tuning; by default the released Adam with lr 1e-6.
        final_clip: Whether the final images of the sampler are clamped to [-1, 1].
        **kwargs: Arguments of `ANNUNet`.
    """

    method = "ann-snn"
    trains_in_parts = True

    def __init__(
        self,
        init_from: str | None = None,
        dropout: float = 0.1,
        activation_bits: int = 2,
        spikes: Literal["unsigned", "signed", "unsigned_blocks"] = "unsigned",
        threshold: float = 1.0,
        finetune_steps: int = 20_000,
        finetune_inputs: Literal["clean", "diffused"] = "clean",
        scheduler: SchedulerMixin | None = None,
        num_inference_steps: int = 1000,
        eta: float = 0.0,
        optimizer: OptimizerFactory | None = None,
        final_clip: bool = True,
        **kwargs: Any,
    ) -> None:
        if isinstance(quantised_relu(activation_bits), nn.ReLU):
            raise ValueError(
                f"activation_bits={activation_bits}: a plain ReLU has no levels to encode as spike counts; train a "
                "DDPM with --model.activation_bits 2 and convert that"
            )
        check_range("finetune_steps", finetune_steps, 1)
        scheduler = scheduler or DDPMScheduler(variance_type="fixed_large", clip_sample=False)
        num_train_timesteps, num_steps = scheduler.config.num_train_timesteps, 2**activation_bits - 1
        network = ANNUNet(
            dropout=0,
            num_train_timesteps=num_train_timesteps,
            activation=partial(ConvertedNeuron, threshold=threshold),
            num_steps=num_steps,
            **kwargs,
        )
        activation = partial(quantised_relu, activation_bits)
        self._ann = lambda: ANNUNet(
            dropout=dropout, num_train_timesteps=num_train_timesteps, activation=activation, num_steps=1, **kwargs
        )
        optimizer = optimizer or partial(Adam, lr=1e-6, fused=True)
        super().__init__(network, scheduler, num_inference_steps, eta, optimizer, None, final_clip)
        self.num_steps = num_steps
        self.init_from = init_from
        self.threshold = threshold
        self.activation_bits = activation_bits
        self.finetune_steps = finetune_steps
        self.finetune_inputs = finetune_inputs
        self._reference: list[ANNUNet] = []  # in a list, so that it does not become a submodule and enter checkpoints
        for name, module in network.named_modules():
            if isinstance(module, ConvertedNeuron):
                outside = name.startswith(("time_embedding.", "tail."))
                module.signed = spikes == "signed" or (spikes == "unsigned_blocks" and outside)

    def setup(self, stage: str) -> None:
        """Loads the ANN when fine-tuning starts, copies its weights unless resumed, and sets the number of steps.

        Raises:
            ValueError: If `init_from` is not given.
            CheckpointMismatchError: If it is of another method, size, diffusion process, number of bits or of groups.
        """
        if stage != "fit":
            return
        if self.init_from is None:
            raise ValueError(
                "fine-tuning needs the converted ANN; give --model.init_from DDPM_CHECKPOINT, or create the whole "
                "configuration with `python -m benchmark convert DDPM_CHECKPOINT`"
            )
        checkpoint = read_trained(self.init_from, DDPM.method)
        self.check_process(checkpoint, self.init_from)
        check_recorded(checkpoint, self.activation_bits, self.network.norm_groups, self.init_from)
        state = network_state(checkpoint)
        check_state(state, self.network, self.init_from)
        reference = self._ann().eval().requires_grad_(False)
        reference.load_state_dict(state)
        self._reference = [reference]
        if not self.trainer.ckpt_path:
            self.network.load_state_dict(state)
            self.training_data = training_data_of(checkpoint)
        if not 0 <= self.trainer.max_steps <= self.total_steps:
            self.trainer.fit_loop.epoch_loop.max_steps = self.total_steps

    def on_fit_start(self) -> None:
        """Moves the ANN to the device of the network."""
        self._reference[0].to(self.device)

    @property
    def total_steps(self) -> int:
        """Iterations of the whole fine-tuning."""
        return len(STEM) + (len(self.network.block_names) - len(STEM)) * self.finetune_steps

    def block_at(self, step: int) -> int:
        """Index, among the network's `block_names`, of the block that iteration `step` tunes."""
        return step if step < len(STEM) else len(STEM) + (step - len(STEM)) // self.finetune_steps

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Returns the loss of the block being tuned at this step.

        The optimiser contains all blocks, but only this one has gradients; the others and their optimiser state do not
        change, which is equivalent to a fresh optimiser for each block.
        """
        index = self.block_at(self.trainer.global_step)
        x, t = batch, torch.randint(self.num_steps, (len(batch),), device=batch.device)
        if self.finetune_inputs == "diffused":
            t = torch.randint(self.scheduler.config.num_train_timesteps, (len(batch),), device=batch.device)
            x, _ = self.diffuse(batch, torch.randn_like(batch), t)
        loss = self.block_loss(self.network.block_names[index], x, t)
        self.log_dict(
            {"train/loss": loss, "train/block": float(index)}, prog_bar=True, sync_dist=True, batch_size=len(batch)
        )
        return loss

    def block_loss(self, name: str, x: Tensor, t: Tensor) -> Tensor:
        """Mean squared error between a block's output, averaged over the SNN time steps, and the ANN block's output.

        The ANN's block receives the ANN's features, the SNN's block the SNN's features. The gradient is computed
        straight-through: from the quantised block with the SNN's weights and dropout, at the averaged input.

        Args:
            name: One of the network's `block_names`.
            x: Images `(B, C, H, W)`.
            t: Diffusion steps `(B,)`.
        """
        reference = self._reference[0]
        with torch.no_grad():
            target = _run_until(name, reference, x, t).output
            spiking = _run_until(name, self.network, x, t)
            inputs = spiking.inputs if name in STEM else tuple(map(self.network.mean, spiking.inputs))
            value = self.network.mean(spiking.output)
        weights: dict[str, Tensor] = dict(self.network.get_submodule(name).named_parameters())
        block = reference.get_submodule(name).train()
        output = torch.func.functional_call(block, weights, inputs)
        block.eval()
        return F.mse_loss(value + (output - output.detach()), target)


def _run_until(name: str, network: ANNUNet, x: Tensor, t: Tensor) -> BlockCall:
    return next(call for call in network.blocks(x, t) if call.name == name)


def read_official(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Renames the tensors of a released converted network; see `systems.ddpm.read_official`."""
    return ddpm.read_official(rename(state, lambda key: key.replace(".block.", ".")))
