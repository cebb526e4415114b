"""Spiking U-Net of SDDPM and SDM: a noise predictor with pre-spike residual blocks.

J. Cao et al., "Spiking Denoising Diffusion Probabilistic Models", WACV 2024, https://arxiv.org/abs/2306.17046, and
"Spiking Diffusion Models", IEEE TAI 2024, https://arxiv.org/abs/2408.16467; authors' code
https://github.com/AndyCao1125/SDDPM and https://github.com/AndyCao1125/SDM. The structure follows the released
networks, which differ from the papers' text in some details, so that their checkpoints load: integrate-and-fire
neurons, no dropout, no attention, and a leaky read-out at the end. Module names follow the released checkpoints.

Axes: `T` SNN time steps, `B` images, `C` channels, `H`, `W` pixels. Convolutions and norms process `T` folded into the
batch; only the neurons use it as a time axis. In all blocks, `temb_channels` is the size of the time embedding,
`neuron` creates the neurons of one layer (see `spiking_layer`) and `conv` one convolution.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from systems.networks.checks import check_images, check_range, check_unet_size
from systems.networks.unet import TimeEmbedding, assemble, double_size
from systems.ops.norms import add_normed
from systems.ops.scale_steps import ScaleSteps
from systems.spiking.adapter import spiking_layer
from systems.spiking.neurons import NeuronFactory, integrate_and_fire, membrane_output
from systems.spiking.steps import concatenate, fold, to_channels_last_on_gpu, unfold

ConvFactory = Callable[..., nn.Module]
"""Creates a convolution from the arguments of `nn.Conv2d`."""


class TemporalConv2d(nn.Module):
    """Convolution with one learned factor for each SNN time step: the temporal-wise spiking mechanism (TSM) of SDM.

    As released, the factor also multiplies the bias and is applied before the norm (in arXiv 2408.16467 it multiplies
    only the weights). It is the same for all channels and can therefore be folded into the weights of its step at no
    cost.

    Args:
        num_steps: SNN time steps `T`.
        *args: Arguments of `nn.Conv2d`.
        **kwargs: Arguments of `nn.Conv2d`.

    Shapes:
        `(T*B, C, H, W)` in and out.
    """

    def __init__(self, num_steps: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.tsmconv = nn.Conv2d(*args, **kwargs)
        self.tsmp = nn.Parameter(torch.ones(num_steps, 1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns `p[k] * (conv(x[k]) + bias)` for each step `k`, folded."""
        return fold(ScaleSteps.apply(unfold(self.tsmconv(x), len(self.tsmp)), self.tsmp.flatten()))


class ResBlock(nn.Module):
    """Twice neuron, convolution, norm; then a real-valued residual sum; `(T, B, C, H, W)` in and out."""

    def __init__(
        self, in_channels: int, out_channels: int, temb_channels: int, neuron: NeuronFactory, conv: ConvFactory
    ) -> None:
        super().__init__()
        self.neuron1 = spiking_layer(neuron, in_channels)
        self.conv1 = conv(in_channels, out_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.temb_proj = nn.Sequential(nn.SiLU(), nn.Linear(temb_channels, out_channels))
        self.neuron2 = spiking_layer(neuron, out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if in_channels == out_channels else conv(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Returns `(T, B, out_channels, H, W)` of features `x` and the time embedding `temb` `(B, temb_channels)`."""
        num_steps = x.shape[0]
        h = unfold(self.conv1(fold(self.neuron1(x))), num_steps)
        s = self.neuron2(h, self.bn1, self.temb_proj(temb))  # neuron(bn(h) + temb), fused
        h = unfold(self.conv2(fold(s)), num_steps)
        return add_normed(self.bn2, h, unfold(self.shortcut(fold(x)), num_steps))  # bn(h) + shortcut(x), fused


class Downsample(nn.Module):
    """Neuron, strided convolution, norm: halves `H` and `W`."""

    def __init__(self, channels: int, neuron: NeuronFactory, conv: ConvFactory) -> None:
        super().__init__()
        self.neuron = spiking_layer(neuron, channels)
        self.conv = conv(channels, channels, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Returns `(T, B, C, H/2, W/2)`; `temb` is not used."""
        return unfold(self.bn(self.conv(fold(self.neuron(x)))), x.shape[0])


class Upsample(nn.Module):
    """Neuron, nearest neighbour, convolution, norm: doubles `H` and `W`."""

    def __init__(self, channels: int, neuron: NeuronFactory, conv: ConvFactory) -> None:
        super().__init__()
        self.neuron = spiking_layer(neuron, channels)
        self.conv = conv(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Returns `(T, B, C, 2H, 2W)`; `temb` is not used."""
        return unfold(self.bn(self.conv(double_size(fold(self.neuron(x))))), x.shape[0])


class SpikingUNet(nn.Module):
    """Predicts the noise in `x_t` with integrate-and-fire neurons under direct encoding.

    The image is a constant current in all `T` SNN time steps; the output is the potential of a leaky integrator without
    threshold, `sum_k 0.8^(T-1-k) h[k]`. The potentials of all neurons start at zero in each call.

    Args:
        in_channels: Image channels.
        base_channels: Channels of the first level, a multiple of 2.
        channel_mult: Channels of each level, as multiples of `base_channels`; each level but the last halves the image.
        num_res_blocks: Residual blocks per level on the way down; one more on the way up.
        num_steps: SNN time steps T (paper: 4 or 8).
        num_train_timesteps: Diffusion steps that the time embedding knows.
        neuron: Creates the neurons of one layer.
        temporal_scaling: Whether every convolution learns one factor per SNN time step (`TemporalConv2d`).
        attention_levels: Must be empty (or name no existing level): the published network has no attention.
        dropout: Ignored with a warning: the paper lists 0.1, but the released network has no dropout layer.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int = 2,
        num_steps: int = 4,
        num_train_timesteps: int = 1000,
        neuron: NeuronFactory = integrate_and_fire,
        temporal_scaling: bool = False,
        attention_levels: Sequence[int] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_range("num_steps", num_steps, 1)
        check_unet_size(base_channels, channel_mult, num_res_blocks, multiple_of=2)
        if any(level < len(channel_mult) for level in attention_levels):
            raise ValueError(
                f"attention_levels={list(attention_levels)}: the published network has no attention; give an empty list"
            )
        if dropout:
            warnings.warn(f"dropout={dropout} is ignored: the released network has no dropout layer", stacklevel=2)
        self.in_channels = in_channels
        self.num_steps = num_steps
        self.num_levels = len(channel_mult)
        self.temporal_scaling = temporal_scaling
        tdim = 4 * base_channels
        conv: ConvFactory = partial(TemporalConv2d, num_steps) if temporal_scaling else nn.Conv2d

        self.time_embedding = TimeEmbedding(base_channels, num_train_timesteps)
        self.conv = conv(in_channels, base_channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(base_channels)
        self.neuron = spiking_layer(neuron, base_channels)
        self.conv_identity = conv(base_channels, base_channels, 3, padding=1)
        self.bn_identity = nn.BatchNorm2d(base_channels)

        self.downblocks, self.middleblocks, self.upblocks = assemble(
            base_channels,
            channel_mult,
            num_res_blocks,
            lambda channels, out_channels: ResBlock(channels, out_channels, tdim, neuron, conv),
            lambda channels: Downsample(channels, neuron, conv),
            lambda channels: Upsample(channels, neuron, conv),
        )
        channels = channel_mult[0] * base_channels
        self.tail_bn = nn.BatchNorm2d(channels)
        self.tail_conv = conv(channels, in_channels, 3, padding=1)
        self.T_output_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.last_bn = nn.BatchNorm2d(in_channels)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier uniform with zero bias, as released.

        `T_output_layer` keeps torch's initialisation; without temporal scaling, `conv_identity` does so too, and
        `tail_conv` has a gain of 1e-5.
        """
        defaults = ("T_output_layer",) if self.temporal_scaling else ("T_output_layer", "conv_identity")
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and name not in defaults:
                nn.init.xavier_uniform_(module.weight, gain=1e-5 if name == "tail_conv" else 1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the predicted noise `(B, C, H, W)`.

        Args:
            x: Noisy images `(B, C, H, W)` in [-1, 1] plus noise; `H` and `W` multiples of `2^(levels - 1)`.
            t: Diffusion steps `(B,)`, whole or real numbers below `num_train_timesteps`.

        Raises:
            ValueError: If the images do not fit the network.
        """
        check_images(x, self.in_channels, self.num_levels)
        temb = self.time_embedding(t)
        h = self.neuron(unfold(self._stem(x), self.num_steps), self.bn)  # neuron(bn(stem(x))), fused
        h = unfold(self.bn_identity(self.conv_identity(fold(h))), self.num_steps)  # (T, B, C, H, W)
        skips = [h]
        for block in self.downblocks:
            h = block(h, temb)
            skips.append(h)
        for block in self.middleblocks:
            h = block(h, temb)
        for block in self.upblocks:
            if isinstance(block, ResBlock):
                h = concatenate(h, skips.pop())
            h = block(h, temb)
        h = self.tail_conv(F.silu(self.tail_bn(fold(h))))  # real-valued: no neuron in the tail
        h = h + F.silu(self.last_bn(self.T_output_layer(h)))
        return membrane_output(unfold(h, self.num_steps))

    def _stem(self, x: Tensor) -> Tensor:
        """First convolution, `(B, C, H, W)` to `(T*B, ...)`; computed once, as the image is equal in all SNN steps."""
        if isinstance(self.conv, TemporalConv2d):
            y = self.conv.tsmconv(x)
            return to_channels_last_on_gpu(fold(self.conv.tsmp * y).to(y.dtype))
        return to_channels_last_on_gpu(self.conv(x).repeat(self.num_steps, 1, 1, 1))
