"""Checks of configured sizes and of images, each with one message."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def check_range(name: str, value: int, low: int, high: int | None = None) -> None:
    """Checks that an option lies between `low` and `high`, both included.

    Raises:
        ValueError: If it does not.
    """
    if value < low or (high is not None and value > high):
        allowed = f"{low} or more" if high is None else f"a number from {low} to {high}"
        raise ValueError(f"{name}={value}; give {allowed}")


def check_unet_size(
    base_channels: int, channel_mult: Sequence[int], num_res_blocks: int, multiple_of: int, at_least: int = 1
) -> None:
    """Checks the size of a U-Net; `multiple_of` and `at_least` constrain its `base_channels`.

    Raises:
        ValueError: If it does not describe a U-Net.
    """
    at_least = max(at_least, multiple_of)
    if base_channels < at_least or base_channels % multiple_of or not channel_mult or num_res_blocks < 1:
        raise ValueError(
            f"base_channels={base_channels}, channel_mult={list(channel_mult)}, num_res_blocks={num_res_blocks} do not "
            f"describe a U-Net; base_channels must be a multiple of {multiple_of} and at least {at_least}, "
            "channel_mult not empty, num_res_blocks 1 or more"
        )


def check_images(x: Tensor, in_channels: int, num_levels: int) -> None:
    """Checks that images `(B, C, H, W)` fit a U-Net.

    Raises:
        ValueError: If they do not.
    """
    multiple = 2 ** (num_levels - 1)
    if x.dim() != 4 or x.shape[1] != in_channels or x.shape[2] % multiple or x.shape[3] % multiple:
        raise ValueError(
            f"images have shape {tuple(x.shape)}; this U-Net takes (B, {in_channels}, H, W) with H and W "
            f"multiples of {multiple}: set --data.image_size, or give fewer channel_mult"
        )
