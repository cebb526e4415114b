"""VQ-SVAE of Spiking-Diffusion: a spiking autoencoder that represents images as grids of code indices.

M. Liu, J. Gan, R. Wen, T. Li, Y. Chen, H. Chen, "Spiking-Diffusion: Vector Quantized Discrete Diffusion Model with
Spiking Neural Networks", https://arxiv.org/abs/2308.10187; authors' code https://github.com/Arktis2022/Spiking-Diffusion.

Symbols of the paper: `z` spikes of the encoder, `e` the weighted mean of their membrane output and firing rate
(`features`), `q` the nearest codes, `g` spikes of the adaptive spike generator.

Axes: `T` SNN time steps, `B` images, `C` channels, `H`, `W` pixels, `h = H/4`, `w = W/4` tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from systems.networks.checks import check_range
from systems.ops.precision import full_precision
from systems.spiking.adapter import spiking_layer
from systems.spiking.neurons import NeuronFactory, leaky_integrate_and_fire, membrane_output
from systems.spiking.steps import fold, unfold

SYNAPSE_DECAY = 0.5
"""Decay per SNN step of the postsynaptic potential, `1 - 1/tau` with tau = 2."""
COMMITMENT = 0.25
"""Weight of the commitment terms, which pull the encoder towards its quantised values."""
REDUCTION = 4
"""Pixels per token along each side."""


class SpikingConv(nn.Sequential):
    """Convolution, batch norm and neurons.

    Args:
        conv: Convolution or transposed convolution.
        num_steps: SNN time steps `T`.
        neuron: Creates the neurons.

    Shapes:
        `(T, B, C, H, W)`, or `(B, C, H, W)` for an input that is equal in all SNN steps, to `(T, B, C', H', W')`.
    """

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, num_steps: int, neuron: NeuronFactory) -> None:
        super().__init__(conv, nn.BatchNorm2d(conv.out_channels), spiking_layer(neuron, conv.out_channels))
        self.num_steps = num_steps

    def forward(self, x: Tensor) -> Tensor:
        """Returns the spikes `neuron(norm(conv(x)))`; a constant input is convolved once."""
        conv, norm, neuron = self
        h = conv(x).repeat(self.num_steps, 1, 1, 1) if x.dim() == 4 else conv(fold(x))  # (T*B, C', H', W')
        return neuron(unfold(h, self.num_steps), norm)  # neuron(norm(h)), fused


def postsynaptic_potential(x: Tensor) -> Tensor:
    """First-order synapse `y[k] = y[k-1] + (x[k] - y[k-1]) / tau`, tau = 2, from zero: `(T, ...)` to `(T, ...)`."""
    k = torch.arange(len(x), dtype=torch.float32, device=x.device)
    response = (1 - SYNAPSE_DECAY) * (SYNAPSE_DECAY ** (k[:, None] - k)).tril()  # (T, T)
    response = response.to(torch.promote_types(x.dtype, torch.float32))
    with full_precision(x.device.type):
        return torch.tensordot(response, x.to(response.dtype), dims=1)


class Reconstruction(NamedTuple):
    """Outputs of a forward pass, for the losses."""

    encoder_spikes: Tensor
    """`z`, `(T, B, code_channels, h, w)`."""
    features: Tensor
    """`e`, `(B, code_channels, h, w)`."""
    codes: Tensor
    """`q`, the code nearest to each feature, `(B, code_channels, h, w)`."""
    indices: Tensor
    """Indices of these codes, `(B, h, w)`."""
    generator_spikes: Tensor
    """`g`, `(T, B, code_channels, h, w)`."""
    images: Tensor
    """Reconstructions `(B, C, H, W)` in (-1, 1); the target range is [-0.5, 0.5]."""


class VQSVAE(nn.Module):
    """Vector-quantised spiking variational autoencoder.

    Images are a constant current (direct encoding). The potentials of all neurons start at zero in each call.

    Args:
        in_channels: Image channels.
        num_codes: Size of the codebook.
        code_channels: Dimension of a code.
        base_channels: Channels of the first convolution; the second has twice as many.
        num_steps: SNN time steps `T`.
        neuron: Creates the neurons of one layer.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_codes: int = 128,
        code_channels: int = 16,
        base_channels: int = 32,
        num_steps: int = 16,
        neuron: NeuronFactory = leaky_integrate_and_fire,
    ) -> None:
        super().__init__()
        check_range("num_steps", num_steps, 1)
        check_range("num_codes", num_codes, 2)
        check_range("code_channels", code_channels, 1)
        check_range("base_channels", base_channels, 1)
        self.in_channels = in_channels
        self.num_steps = num_steps
        narrow, wide = base_channels, 2 * base_channels

        def layer(conv: nn.Conv2d | nn.ConvTranspose2d) -> SpikingConv:
            return SpikingConv(conv, num_steps, neuron)

        self.encoder = nn.Sequential(
            layer(nn.Conv2d(in_channels, narrow, 3, stride=2, padding=1)),
            layer(nn.Conv2d(narrow, wide, 3, stride=2, padding=1)),
            layer(nn.Conv2d(wide, code_channels, 1)),
        )
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.codebook = nn.Embedding(num_codes, code_channels)
        self.generator = layer(nn.Conv2d(code_channels, code_channels, 1))
        self.decoder = nn.Sequential(
            layer(nn.ConvTranspose2d(code_channels, wide, 3, stride=2, padding=1, output_padding=1)),
            layer(nn.ConvTranspose2d(wide, narrow, 3, stride=2, padding=1, output_padding=1)),
        )
        self.output = nn.ConvTranspose2d(narrow, in_channels, 3, padding=1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the spikes `z` `(T, B, code_channels, h, w)` and the features `e` `(B, code_channels, h, w)`.

        `e = (1 - alpha) membrane_output(z) + alpha mean_k z[k]`.

        Args:
            images: `(B, C, H, W)` in [-0.5, 0.5]; `H` and `W` multiples of 4.

        Raises:
            ValueError: If the images do not fit the network.
        """
        if images.dim() != 4 or images.shape[1] != self.in_channels or any(n % REDUCTION for n in images.shape[2:]):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this autoencoder takes (B, {self.in_channels}, H, W) with H "
                f"and W multiples of {REDUCTION}: set --data.image_size and --model.in_channels"
            )
        spikes = self.encoder(images)
        return spikes, (1 - self.alpha) * membrane_output(spikes) + self.alpha * spikes.mean(0)

    def quantise(self, features: Tensor) -> Tensor:
        """Returns the index of the nearest code, `(B, h, w)`, of features `(B, code_channels, h, w)`."""
        codes = self.codebook.weight
        vectors = features.movedim(1, -1).to(codes.dtype)  # (B, h, w, code_channels)
        with full_precision(vectors.device.type):  # lower precision would confuse close codes
            distances = vectors.square().sum(-1, keepdim=True) + codes.square().sum(1) - 2 * vectors @ codes.T
        return distances.argmin(-1)

    def decode(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the generator's spikes `g` `(T, B, code_channels, h, w)` and the decoded images `(B, C, H, W)`.

        Args:
            codes: `(B, code_channels, h, w)`.
        """
        spikes = self.generator(codes)
        currents = unfold(self.output(fold(self.decoder(spikes))), self.num_steps)  # (T, B, C, H, W)
        return spikes, torch.tanh(membrane_output(currents))

    def lookup(self, indices: Tensor) -> Tensor:
        """Returns the codes `(B, code_channels, h, w)` of indices `(B, h, w)`."""
        return self.codebook(indices).movedim(-1, 1)

    def forward(self, images: Tensor) -> Reconstruction:
        """Encodes, quantises (with straight-through gradients) and decodes images `(B, C, H, W)` in [-0.5, 0.5]."""
        encoder_spikes, features = self.encode(images)
        indices = self.quantise(features)
        codes = self.lookup(indices)
        generator_spikes, reconstructions = self.decode(features + (codes - features).detach())
        return Reconstruction(encoder_spikes, features, codes, indices, generator_spikes, reconstructions)


def equilibrium_loss(r: Reconstruction) -> Tensor:
    """Returns the quantiser's loss, `d(q, e) + d(psp(g), psp(z))` with the postsynaptic potential `psp`.

    `d(a, b) = mse(a, sg[b]) + COMMITMENT mse(b, sg[a])`, with `sg` the stop-gradient.
    """
    generated, encoded = postsynaptic_potential(r.generator_spikes), postsynaptic_potential(r.encoder_spikes)
    loss = torch.zeros((), dtype=r.features.dtype, device=r.features.device)
    for a, b in ((r.codes, r.features), (generated, encoded)):
        loss = loss + F.mse_loss(a, b.detach()) + COMMITMENT * F.mse_loss(b, a.detach())
    return loss
