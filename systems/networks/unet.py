"""Parts shared by the U-Nets: the order of their blocks, the time embedding, upsampling, and their size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def double_size(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling, `(N, C, H, W)` to `(N, C, 2H, 2W)`, in the dtype of `x` even under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2, mode="nearest")


def assemble(
    base_channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int,
    res_block: Callable[[int, int], nn.Module],
    downsample: Callable[[int], nn.Module],
    upsample: Callable[[int], nn.Module],
) -> tuple[nn.ModuleList, nn.ModuleList, nn.ModuleList]:
    """Returns the blocks of a U-Net on the way down, in the middle and on the way up.

    The outputs of the stem and of every block on the way down are skips, one for each residual block on the way up.

    Args:
        base_channels: Channels of the stem's output.
        channel_mult: Channels of each level, as multiples of `base_channels`.
        num_res_blocks: Residual blocks per level on the way down; one more on the way up.
        res_block: Creates a residual block from its input and output channels.
        downsample: Creates a layer that halves the image, from its channels.
        upsample: Creates a layer that doubles the image, from its channels.
    """
    channels, skips = base_channels, [base_channels]
    down, up = nn.ModuleList(), nn.ModuleList()
    for level, multiple in enumerate(channel_mult):
        for _ in range(num_res_blocks):
            down.append(res_block(channels, multiple * base_channels))
            channels = multiple * base_channels
            skips.append(channels)
        if level + 1 < len(channel_mult):
            down.append(downsample(channels))
            skips.append(channels)
    middle = nn.ModuleList(res_block(channels, channels) for _ in range(2))
    for level, multiple in reversed(list(enumerate(channel_mult))):
        for _ in range(num_res_blocks + 1):
            up.append(res_block(channels + skips.pop(), multiple * base_channels))
            channels = multiple * base_channels
        if level > 0:
            up.append(upsample(channels))
    return down, middle, up


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the diffusion step (sine and cosine interleaved) and a two-layer swish MLP; no spikes.

    Integer steps read the table stored in the checkpoints; real-valued steps (DPM-Solver) evaluate the same sinusoids.

    Shapes:
        `(B,)` steps to `(B, 4 * channels)`.
    """

    def __init__(self, channels: int, num_train_timesteps: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.arange(0, channels, 2) / channels * -math.log(10000))
        table = self._sinusoids(torch.arange(num_train_timesteps), frequencies)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.timembedding = nn.Sequential(
            nn.Embedding.from_pretrained(table),  # frozen, as released
            nn.Linear(channels, 4 * channels),
            nn.SiLU(),
            nn.Linear(4 * channels, 4 * channels),
        )

    @staticmethod
    def _sinusoids(t: Tensor, frequencies: Tensor) -> Tensor:
        angle = t[:, None] * frequencies
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)

    def sinusoids(self, t: Tensor) -> Tensor:
        """Returns the input of the MLP, `(B, channels)`, for diffusion steps `t` `(B,)`."""
        table = cast(nn.Embedding, self.timembedding[0])
        if not t.is_floating_point():
            return table(t)
        return self._sinusoids(t, self.get_buffer("frequencies")).type_as(table.weight)

    def forward(self, t: Tensor) -> Tensor:
        """Returns the embedding `(B, 4 * channels)` of diffusion steps `t` `(B,)`."""
        return self.timembedding[1:](self.sinusoids(t))


def read_size(state: Mapping[str, Tensor], stem: str, width: str) -> dict[str, Any]:
    """Reads the size of a U-Net from its tensors.

    Args:
        state: Tensors by name.
        stem: Name of the weight of the first convolution.
        width: Name, within a residual block, of a tensor with one element per channel.

    Returns:
        `in_channels`, `base_channels`, `channel_mult` and `num_res_blocks`.

    Raises:
        KeyError: If there is no tensor named `stem`.
    """
    base_channels, in_channels = state[stem].shape[:2]
    levels: list[list[int]] = [[]]
    block = 0
    while any(key.startswith(f"downblocks.{block}.") for key in state):
        bias = state.get(f"downblocks.{block}.{width}")
        if bias is not None:
            levels[-1].append(len(bias) // base_channels)
        else:
            levels.append([])
        block += 1
    return {
        "in_channels": in_channels,
        "base_channels": base_channels,
        "channel_mult": [level[-1] for level in levels if level],
        "num_res_blocks": len(levels[0]),
    }
