"""Spiking U-Net of FSDDIM ("V2"): synaptic currents in, synaptic currents out, spikes between its blocks.

R. Watanabe, Y. Mukuta, T. Harada, "Fully Spiking Denoising Diffusion Implicit Models", 2023,
https://arxiv.org/abs/2312.01742; authors' code https://github.com/mil-tokyo/FSDDIM. The structure and the
module names follow the released network, so that its checkpoints load.

With the released settings not all features are spikes: the current of `conv_in`, which also enters the last block and
the output layer, and the outputs of the resampling layers are real-valued.

Axes: `T` SNN time steps, `B` images, `C` channels, `H`, `W` pixels. Convolutions and norms process `T` folded into the
batch (`N = T*B`); only the neurons use it as a time axis. In all blocks, `temb_channels` is the size of the time
embedding, `norm` the kind of batch norm (`Norm`), and `neuron` creates the neurons of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from systems.networks.checks import check_unet_size
from systems.networks.unet import double_size
from systems.ops.norms import add_normed, scaled
from systems.spiking.adapter import spiking_layer
from systems.spiking.neurons import NeuronFactory, SpikingNeuron
from systems.spiking.steps import fold, to_channels_last_on_gpu, unfold
from systems.spiking.surrogates import get_surrogate

LIF = partial(SpikingNeuron, beta=0.8, detach_reset=True, fire_at_threshold=False, spike_grad=get_surrogate("triangle"))
"""Published neuron: leaky, hard reset without gradient, spikes strictly above the threshold."""

Norm = Literal["plain", "tdbn"]
"""Batch normalisation over `(T, B, H, W)`.

`tdbn` is the paper's threshold-dependent batch norm (Zheng et al., arXiv 2011.05280), which scales each of two summed
branches by `1/sqrt(2)`. `plain` is used by the released trainer, whose conversion to synchronised batch norm loses that
factor. Checkpoints have the same tensors with both.
"""

BRANCH_GAIN = 1 / math.sqrt(2)
"""tdBN's gain for each of two summed branches: `alpha V_th` with `alpha = 1/sqrt(2)` and the published threshold 1."""


def scaled_norm(bn: nn.Module, x: Tensor, gain: float) -> Tensor:
    """Returns `gain (bn(x) - bias) + bias`: tdBN with the gain `alpha V_th`, which leaves the bias unscaled."""
    return scaled(bn, bn(x), gain)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenates `(N, C1, H, W)`, `(N, C2, H, W)`, ... along `C`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


class Convolution(nn.Conv2d):
    """Size-preserving convolution of concatenated inputs, followed by a batch norm if a `gain` is given.

    The inputs are separate arguments so that a cost meter sees which of them are spikes.

    Shapes:
        Parts `(N, C1, H, W)`, `(N, C2, H, W)`, ... to `(N, out_channels, H, W)`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, gain: float | None = None) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.gain = gain
        if gain is not None:
            self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, *parts: Tensor, joined: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Returns `scaled_norm(conv(concat(parts))) + residual`, without norm and residual if there is no gain.

        Args:
            parts: Inputs `(N, C1, H, W)`, `(N, C2, H, W)`, ...
            joined: Their concatenation, if it is already computed.
            residual: Features `(N, out_channels, H, W)` to add; only with a norm.
        """
        y = super().forward(join(parts) if joined is None else joined)
        if self.gain is None:
            return y
        if residual is None:
            return scaled_norm(self.bn, y, self.gain)
        return add_normed(self.bn, y[None], residual[None], self.gain)[0]


class SpikingConvolution(Convolution):
    """Convolution, norm, neuron: the last layer on the way down and on the way up; `(T, B, C, H, W)` in and out."""

    def __init__(self, in_channels: int, out_channels: int, neuron: NeuronFactory) -> None:
        super().__init__(in_channels, out_channels, 3, gain=1.0)
        self.neuron = spiking_layer(neuron, out_channels)

    def forward(  # type: ignore[override]  # without residual
        self, *parts: Tensor, joined: Tensor | None = None
    ) -> Tensor:
        """Returns spikes."""
        y = nn.Conv2d.forward(self, join([fold(x) for x in parts]) if joined is None else joined)
        return self.neuron(unfold(y, len(parts[0])), self.bn)  # neuron(bn(y)), fused


class ResBlock(nn.Module):
    """Two convolutions and a shortcut, summed as currents into a final neuron; `(T, B, C, H, W)` in and out."""

    def __init__(
        self, in_channels: int, out_channels: int, temb_channels: int, norm: Norm, neuron: NeuronFactory
    ) -> None:
        super().__init__()
        self.gain = BRANCH_GAIN if norm == "tdbn" else 1.0
        self.conv1 = Convolution(in_channels, out_channels, 3)
        self.temb_neuron = spiking_layer(neuron, temb_channels)
        self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.neuron1 = spiking_layer(neuron, out_channels)
        self.conv2 = Convolution(out_channels, out_channels, 3, self.gain)
        self.nin_shortcut: nn.Module = (
            nn.BatchNorm2d(out_channels)
            if in_channels == out_channels
            else Convolution(in_channels, out_channels, 1, self.gain)
        )
        self.neuron2 = spiking_layer(neuron, out_channels)

    def forward(self, temb: Tensor, *parts: Tensor) -> Tensor:
        """Returns spikes `(T, B, out_channels, H, W)`.

        Args:
            temb: Currents of the time embedding `(T, B, temb_channels)`.
            parts: Inputs `(T, B, C, H, W)`, concatenated along `C`.
        """
        num_steps = temb.shape[0]
        folded = [fold(x) for x in parts]
        joined = join(folded)  # shared by two convolutions
        temb_current = fold(self.temb_proj(self.temb_neuron(temb)))[:, :, None, None]
        h = unfold(self.conv1(*folded, joined=joined) + temb_current, num_steps)  # (T, B, C, H, W)
        s = fold(self.neuron1(h, self.bn1))  # neuron(bn(h)), fused
        if isinstance(self.nin_shortcut, Convolution):
            shortcut = self.nin_shortcut(*folded, joined=joined)
        else:
            shortcut = scaled_norm(self.nin_shortcut, folded[0], self.gain)
        return self.neuron2(unfold(self.conv2(s, residual=shortcut), num_steps))


class Downsample(nn.Module):
    """Average pooling over 2x2 pixels and a 1x1 convolution: halves `H` and `W`, returns real-valued currents."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns `(T, B, out_channels, H/2, W/2)`."""
        return unfold(self.conv(fold(x)), x.shape[0])


class Upsample(nn.Module):
    """Nearest neighbour and a 3x3 convolution: doubles `H` and `W`, returns real-valued currents."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `(T, B, out_channels, 2H, 2W)`."""
        return unfold(self.conv(double_size(fold(x))), x.shape[0])


def sinusoids(max_time: int, channels: int) -> Tensor:
    """Returns the time table `(max_time, channels)`, sine and cosine interleaved; the lowest frequency is 1/10000."""
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10000) / (half - 1)))
    angle = torch.arange(max_time, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


class FSDDIMUNet(nn.Module):
    """Predicts `v` as synaptic currents from noisy synaptic currents.

    `forward` is `conv_in`, `features` and `conv_out`; the fused sampler calls only `features`.

    Args:
        in_channels: Image channels.
        base_channels: Channels of the first level, even and at least 4.
        channel_mult: Channels in which each level ends, as multiples of `base_channels`; each level but the last halves
            the image.
        num_res_blocks: Residual blocks per level, down and up.
        max_time: Rows of the time embedding's table, one for each diffusion step, or more.
        norm: Batch norm: `plain`, as the released trainer runs it, or the paper's `tdbn`, whose factor uses the
            published threshold of 1 for any `threshold`.
        activate_first_conv: Whether norm and neuron follow `conv_in` (published: no); then all features that `conv_out`
            receives are spikes.
        neuron: Creates the neurons of one layer.

    Raises:
        ValueError: If a size or a name is out of range.
    """

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_res_blocks: int = 2,
        max_time: int = 1000,
        norm: Norm = "plain",
        activate_first_conv: bool = False,
        neuron: NeuronFactory = LIF,
    ) -> None:
        super().__init__()
        check_unet_size(base_channels, channel_mult, num_res_blocks, multiple_of=2, at_least=4)
        if norm not in ("plain", "tdbn"):
            raise ValueError(f"norm={norm!r} is unknown; choose 'plain' (as released) or 'tdbn' (as in the paper)")
        self.in_channels = in_channels
        self.num_res_blocks = num_res_blocks
        self.activate_first_conv = activate_first_conv
        base, tdim, levels = base_channels, 4 * base_channels, len(channel_mult)
        ends = [multiple * base for multiple in channel_mult]
        starts = [base, *ends[:-1]]  # the last layer of a level changes the channels
        self.multiple = 2 ** (levels - 1)

        def block(channels_in: int, channels_out: int) -> ResBlock:
            return ResBlock(channels_in, channels_out, tdim, norm, neuron)

        self.register_buffer("pe", sinusoids(max_time, base))
        self.temb = nn.ModuleList([nn.Linear(base, tdim), nn.Linear(tdim, tdim)])
        self.temb_neuron = spiking_layer(neuron, tdim)
        self.conv_in = Convolution(in_channels, base, 3)
        if activate_first_conv:
            self.bn_in = nn.BatchNorm2d(base)
            self.neuron_in = spiking_layer(neuron, base)
        self.downs = nn.ModuleList()
        for level, (start, end) in enumerate(zip(starts, ends, strict=True)):
            last = level == levels - 1
            down = SpikingConvolution(start, end, neuron) if last else Downsample(start, end)
            self.downs.append(nn.ModuleList([*(block(start, start) for _ in range(num_res_blocks)), down]))
        self.mid_block1 = block(ends[-1], ends[-1])
        self.mid_block2 = block(ends[-1], ends[-1])
        self.ups = nn.ModuleList()
        for level, (start, end) in reversed(list(enumerate(zip(starts, ends, strict=True)))):
            up = Upsample(end, start) if level else SpikingConvolution(end, base, neuron)
            self.ups.append(nn.ModuleList([*(block(end + start, end) for _ in range(num_res_blocks)), up]))
        self.final_res_block = block(2 * base, base)
        self.conv_out = Convolution(2 * base + num_res_blocks * (base + ends[0]), in_channels, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the predicted `v` as currents `(T, B, C, H, W)`.

        Args:
            x: Noisy currents `(T, B, C, H, W)`; `H` and `W` multiples of `2^(levels - 1)`.
            t: Diffusion steps `(B,)`, whole numbers below `max_time`.

        Raises:
            ValueError: If the currents do not fit the network.
        """
        if x.dim() != 5 or x.shape[2] != self.in_channels or x.shape[3] % self.multiple or x.shape[4] % self.multiple:
            raise ValueError(
                f"currents have shape {tuple(x.shape)}; this U-Net takes (T, B, {self.in_channels}, H, W) with H and W "
                f"multiples of {self.multiple}: set --data.image_size, or give fewer channel_mult"
            )
        current = unfold(to_channels_last_on_gpu(self.conv_in(fold(x))), x.shape[0])
        return unfold(self.conv_out(*map(fold, self.features(current, t))), x.shape[0])

    def features(self, current: Tensor, t: Tensor) -> list[Tensor]:
        """Runs the network between `conv_in` and `conv_out`.

        Args:
            current: Output of `conv_in` `(T, B, base_channels, H, W)`.
            t: Diffusion steps `(B,)`.

        Returns:
            The inputs `(T, B, C_i, H, W)` that `conv_out` concatenates: last block; output of `conv_in`; blocks of the
            first level down; blocks of the last level up. All are spikes, the second only with
            `activate_first_conv`.
        """
        num_steps = current.shape[0]
        temb = self.temb[0](self.get_buffer("pe")[t])  # (B, 4 * base), equal in all SNN steps, computed once
        temb = self.temb[1](self.temb_neuron(temb.expand(num_steps, *temb.shape)))  # (T, B, 4 * base)
        first = current
        if self.activate_first_conv:
            first = self.neuron_in(current, self.bn_in)  # neuron(bn(current)), fused
        h, skips = first, [first]
        for level in self.downs:
            *blocks, resample = cast(nn.ModuleList, level)
            for block in blocks:
                h = block(temb, h)
                skips.append(h)
            h = resample(h)
        h = self.mid_block2(temb, self.mid_block1(temb, h))
        shallow = skips[1 : 1 + self.num_res_blocks]
        for level in self.ups:
            *blocks, resample = cast(nn.ModuleList, level)
            ups = []
            for block in blocks:
                h = block(temb, h, skips.pop())
                ups.append(h)
            h = resample(h)
        return [self.final_res_block(temb, h, skips.pop()), first, *shallow, *ups]
