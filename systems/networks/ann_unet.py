"""U-Net with quantised activations, and the spiking network it is converted to: one network, two activations.

J. Cao et al., "Spiking Diffusion Models", IEEE TAI 2024, https://arxiv.org/abs/2408.16467; authors' code
https://github.com/AndyCao1125/SDM (its ANN2SNN part, after Fast-SNN, arXiv 2305.19868). Only activations are quantised,
weights stay in full precision. Module names follow the released checkpoints.

Axes: `T` SNN time steps (1 for the ANN), `B` images, `C` channels, `H`, `W` pixels. Tensors between the layers are
`(T*B, ...)`, `T` outermost: convolutions, linear layers and group norms process each step separately; only spiking
activations use `T` as a time axis. The image is a constant current and the output the mean over the steps. In all
blocks, `temb_channels` is the size of the time embedding, `activation` creates one activation, and `norm_groups` is the
number of groups of each group norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor, nn

from systems.networks.checks import check_images, check_unet_size
from systems.networks.unet import TimeEmbedding, assemble, double_size
from systems.spiking.neurons import SpikingLayer
from systems.spiking.steps import fold, to_channels_last_on_gpu, unfold

GROUPS = 32
"""Groups of all group norms, as published."""

ActivationFactory = Callable[[], nn.Module]


class Chain(nn.Sequential):
    """Sequence of layers on `(T*B, ...)`; a spiking layer receives `(T, B, ...)`."""

    def __init__(self, num_steps: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.num_steps = num_steps

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of the last layer, folded."""
        for layer in self:
            x = fold(layer(unfold(x, self.num_steps))) if isinstance(layer, SpikingLayer) else layer(x)
        return x


class StepTimeEmbedding(TimeEmbedding):
    """Sinusoids of the diffusion step, linear layer, activation, linear layer.

    The layers before the activation are computed once for all SNN time steps.

    Shapes:
        `(B,)` steps to `(T*B, 4 * channels)`.
    """

    def __init__(self, channels: int, num_train_timesteps: int, activation: nn.Module, num_steps: int) -> None:
        super().__init__(channels, num_train_timesteps)
        self.timembedding[2] = activation
        self.num_steps = num_steps

    def forward(self, t: Tensor) -> Tensor:
        """Returns the embedding `(T*B, 4 * channels)` of diffusion steps `t` `(B,)`."""
        _, first, activation, second = self.timembedding
        current = first(self.sinusoids(t)).repeat(self.num_steps, 1)
        return Chain(self.num_steps, activation, second)(current)


class ResBlock(nn.Module):
    """Twice group norm, activation, convolution; the time embedding is added in between, dropout before the second."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        activation: ActivationFactory,
        num_steps: int,
        dropout: float,
        norm_groups: int,
    ) -> None:
        super().__init__()
        self.block1 = Chain(
            num_steps,
            nn.GroupNorm(norm_groups, in_channels),
            activation(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.temb_proj = Chain(num_steps, activation(), nn.Linear(temb_channels, out_channels))
        self.block2 = Chain(
            num_steps,
            nn.GroupNorm(norm_groups, out_channels),
            activation(),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Returns `(T*B, out_channels, H, W)` of features `x` and the time embedding `temb` `(T*B, temb_channels)`."""
        h = self.block1(x) + self.temb_proj(temb)[:, :, None, None]
        return self.block2(h) + self.shortcut(x)


class Downsample(nn.Module):
    """Strided convolution of the real-valued features: halves `H` and `W`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Returns `(T*B, C, H/2, W/2)`; `temb` is not used."""
        return self.main(x)


class Upsample(nn.Module):
    """Nearest neighbour and convolution of the real-valued features: doubles `H` and `W`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Returns `(T*B, C, 2H, 2W)`; `temb` is not used."""
        return self.main(double_size(x))


class BlockCall(NamedTuple):
    """Name, inputs and output of one block in a forward pass."""

    name: str
    inputs: tuple[Tensor, ...]
    output: Tensor


class ANNUNet(nn.Module):
    """Predicts the noise in `x_t`, as an ANN (`num_steps = 1`) or, converted, with spiking activations over `T` steps.

    Args:
        in_channels: Image channels.
        base_channels: Channels of the first level, even, and a multiple of `norm_groups`.
        channel_mult: Channels of each level, as multiples of `base_channels`; each level but the last halves the image.
        num_res_blocks: Residual blocks per level on the way down; one more on the way up.
        dropout: Probability that training drops an activation before the second convolution of a residual block.
        num_train_timesteps: Diffusion steps that the time embedding knows.
        activation: Creates one activation.
        num_steps: SNN time steps `T`; 1 for activations that do not spike.
        norm_groups: Groups of each group norm; must divide `base_channels`, and so the channels of every level.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        dropout: float = 0.1,
        num_train_timesteps: int = 1000,
        activation: ActivationFactory = nn.ReLU,
        num_steps: int = 1,
        norm_groups: int = GROUPS,
    ) -> None:
        super().__init__()
        check_unet_size(base_channels, channel_mult, num_res_blocks, multiple_of=2)
        if norm_groups < 1 or base_channels % norm_groups:
            raise ValueError(
                f"norm_groups={norm_groups} with base_channels={base_channels}: the channels of every level must be "
                f"divisible by the number of groups; give --model.norm_groups {gcd(GROUPS, base_channels)} or another "
                "divisor of base_channels"
            )
        self.in_channels = in_channels
        self.num_steps = num_steps
        self.norm_groups = norm_groups
        self.num_levels = len(channel_mult)
        tdim = 4 * base_channels
        self.time_embedding = StepTimeEmbedding(base_channels, num_train_timesteps, activation(), num_steps)
        self.head = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        self.downblocks, self.middleblocks, self.upblocks = assemble(
            base_channels,
            channel_mult,
            num_res_blocks,
            lambda channels, out_channels: ResBlock(
                channels, out_channels, tdim, activation, num_steps, dropout, norm_groups
            ),
            Downsample,
            Upsample,
        )
        channels = channel_mult[0] * base_channels
        self.tail = Chain(
            num_steps,
            nn.GroupNorm(norm_groups, channels),
            activation(),
            nn.Conv2d(channels, in_channels, 3, padding=1),
        )
        self._initialise()

    def _initialise(self) -> None:
        """Xavier uniform with zero bias; gain 1e-5 for the last convolution of each residual block and of the tail."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=1e-5 if name.endswith(("block2.3", "tail.2")) else 1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the predicted noise `(B, C, H, W)`.

        Args:
            x: Noisy images `(B, C, H, W)`; `H` and `W` multiples of `2^(levels - 1)`.
            t: Diffusion steps `(B,)`, whole or real numbers below `num_train_timesteps`.

        Raises:
            ValueError: If the images do not fit the network.
        """
        for call in self.blocks(x, t):
            h = call.output
        return self.mean(self.tail(h))

    def blocks(self, x: Tensor, t: Tensor) -> Iterator[BlockCall]:
        """Runs the network lazily, block by block, up to the tail.

        Features and time embeddings are `(T*B, ...)`; `t` and `x`, inputs of the first two blocks, are `(B, ...)`. The
        input of a residual block on the way up already includes the skip.
        """
        check_images(x, self.in_channels, self.num_levels)
        temb = self.time_embedding(t)
        yield BlockCall("time_embedding", (t,), temb)
        h = self.head(x).repeat(self.num_steps, 1, 1, 1)  # equal in all SNN steps, computed once
        h = to_channels_last_on_gpu(h)
        yield BlockCall("head", (x,), h)
        skips = [h]
        for part in ("downblocks", "middleblocks", "upblocks"):
            for name, block in self.get_submodule(part).named_children():
                if part == "upblocks" and isinstance(block, ResBlock):
                    h = torch.cat([h, skips.pop()], dim=1)
                output = block(h, temb)
                yield BlockCall(f"{part}.{name}", (h, temb), output)
                h = output
                if part == "downblocks":
                    skips.append(h)

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks in the order of the forward pass."""
        parts = ("downblocks", "middleblocks", "upblocks")
        inner = [f"{part}.{name}" for part in parts for name, _ in self.get_submodule(part).named_children()]
        return ["time_embedding", "head", *inner]

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the SNN time steps, `(T*B, ...)` to `(B, ...)`."""
        return unfold(x, self.num_steps).mean(0)
