"""FSDDIM's output layer, DDIM update and input layer, merged into one recurrence between network evaluations.

The network ends in a 1x1 convolution `O = W_o s + b_o` and begins with a 3x3 convolution `A = W_i X + b_i`. Between
them, DDIM (arXiv 2312.01742) is linear: `X <- p X + q O`. The next input current `A` can therefore be computed from the
last one and the transmitted features `s`, without an image in between:

    A <- p (A - b_i) + b_i + q (W_f s + M),    W_f = W_i W_o,    M = W_i applied to the constant image b_o

`W_f` is a 3x3 kernel, exact under zero padding because `W_o` is 1x1. `M` is a map `(K, H, W)`, not a constant: at the
border, taps outside the image do not contribute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from systems.networks.fsddim_unet import FSDDIMUNet
from systems.ops.uncounted import uncounted
from systems.spiking.steps import fold, unfold


class _Merged(nn.Conv2d):
    """Convolution without parameters: its kernel is computed from other layers and never saved."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        kernel = self.weight.detach()
        del self.weight
        self.register_buffer("weight", kernel, persistent=False)

    def set_kernel(self, kernel: Tensor) -> None:
        """Sets the kernel, `(out_channels, in_channels, kh, kw)`."""
        self._buffers["weight"] = kernel.contiguous()


class FusedRecurrence(nn.Module):
    """Maps the transmitted features of an `FSDDIMUNet` to the next current of its input layer.

    Spikes and real-valued features have separate kernels, so that a cost meter counts the former as accumulates and
    the latter as multiply-accumulates. With `activate_first_conv` no feature is real-valued.

    Args:
        network: Determines the sizes; `merge` reads its weights.
    """

    bias: Tensor
    border: Tensor
    output_bias: Tensor

    def __init__(self, network: FSDDIMUNet) -> None:
        super().__init__()
        base, images, transmitted = network.conv_in.out_channels, network.in_channels, network.conv_out.in_channels
        self.base_channels = base
        self.real_channels = 0 if network.activate_first_conv else base
        spiking = transmitted - self.real_channels
        self.spikes_to_current = _Merged(spiking, base, 3)
        self.spikes_to_image = _Merged(spiking, images, 1)
        if self.real_channels:
            self.current_to_current = _Merged(base, base, 3)
            self.current_to_image = _Merged(base, images, 1)
        for name in ("bias", "border", "output_bias"):
            self.register_buffer(name, torch.zeros(()), persistent=False)

    @property
    def transmitted(self) -> str:
        """Describes which of the transmitted channels are not spikes."""
        total = self.spikes_to_image.in_channels + self.real_channels
        if not self.real_channels:
            return f"the fused sampler transmits {total} channels, all of them spikes"
        return (
            f"the fused sampler transmits {total} channels, {self.real_channels} of them the real-valued current "
            "of conv_in, counted as MACs; with activate_first_conv=true all are spikes"
        )

    @uncounted("weights merged once per chain")
    @torch.no_grad()
    def merge(self, network: FSDDIMUNet, size: Sequence[int]) -> None:
        """Computes the kernels and the map `M` from the network's weights, for images of `size` `(H, W)`."""
        w_in, w_out = network.conv_in.weight, network.conv_out.weight[:, :, 0, 0]  # (K, C, 3, 3), (C, S)
        fused = torch.einsum("kcij,cs->ksij", w_in, w_out)
        first = slice(self.base_channels, 2 * self.base_channels)  # output of `conv_in`
        spiking = torch.ones(w_out.shape[1], dtype=torch.bool, device=w_out.device)
        if self.real_channels:
            spiking[first] = False
            self.current_to_current.set_kernel(fused[:, first])
            self.current_to_image.set_kernel(w_out[:, first, None, None])
        self.spikes_to_current.set_kernel(fused[:, spiking])
        self.spikes_to_image.set_kernel(w_out[:, spiking, None, None])
        b_in, b_out = network.conv_in.bias, network.conv_out.bias
        assert b_in is not None
        assert b_out is not None
        self.bias = b_in.view(-1, 1, 1)
        self.output_bias = b_out.view(-1, 1, 1)
        self.border = F.conv2d(self.output_bias.expand(-1, *size)[None], w_in, padding=1)[0]  # (K, H, W)

    def forward(self, transmitted: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns `W_f s + M` `(T, B, base_channels, H, W)` and `W_o s + b_o` `(T, B, C, H, W)`.

        Args:
            transmitted: The parts of `s`, as `FSDDIMUNet.features` returns them.

        Raises:
            RuntimeError: If features expected to be spikes have other values than 0 and 1.
        """
        num_steps = transmitted[0].shape[0]
        last, first, *others = map(fold, transmitted)
        spikes = torch.cat([last, *others] if self.real_channels else [last, first, *others], dim=1)
        torch._assert_async(  # does not synchronise with a GPU
            ((spikes == 0) | (spikes == 1)).all(),
            "the fused sampler received other values than 0 and 1 as spikes",
        )
        into_current, into_image = self.spikes_to_current(spikes), self.spikes_to_image(spikes)
        if self.real_channels:
            into_current = into_current + self.current_to_current(first)
            into_image = into_image + self.current_to_image(first)
        return unfold(into_current + self.border, num_steps), unfold(into_image + self.output_bias, num_steps)
