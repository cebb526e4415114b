"""Fully spiking transformer after SDiT's paper: a noise predictor of RWKV blocks whose weights receive only spikes.

S. Yang, H. Ma, C. Yu, A. Wang, E.-P. Li, "SDiT: Spiking Diffusion Model with Transformer", 2024,
https://arxiv.org/abs/2402.11588. It is the suite's own design, not the released network (that is
`systems/networks/rate_transformer.py`); `systems/spiking_rwkv.py` lists the published parts and the suite's choices.
Background: U-ViT (https://arxiv.org/abs/2209.12152: tokens, long skips, final convolution), RWKV-4
(https://arxiv.org/abs/2305.13048: token shift, WKV, receptance), SpikeGPT (https://arxiv.org/abs/2302.13939).

Axes: `T` SNN time steps, `B` images, `N` tokens (the diffusion step, then the patches), `D` channels, `M = T*B`.
Weights, norms and attention process `T` folded into the batch; only neurons and the Reconstruction Module use it as a
time axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from systems.networks.checks import check_range
from systems.networks.unet import TimeEmbedding
from systems.ops.compiled import compiled
from systems.ops.token_shift import TokenShift
from systems.ops.uncounted import uncounted
from systems.ops.wkv import bidirectional_wkv, wkv
from systems.spiking.adapter import spiking_layer
from systems.spiking.neurons import NeuronFactory, SpikingNeuron
from systems.spiking.steps import fold, unfold
from systems.spiking.surrogates import get_surrogate

MixFactory = Callable[[int], nn.Module]
"""Creates a token mixer, `(r, k, v)` each `(M, N, D)` to `(M, N, D)`, from its channels."""

LIF = partial(SpikingNeuron, beta=0.5, spike_grad=get_surrogate("atan"))
"""Leaky neuron with hard reset. The surrogate is shared, so that it is compiled only once."""


class NormedNeuron(nn.Module):
    """Batch norm over each channel, then neurons; `(T, B, N, D)` in and out."""

    def __init__(self, channels: int, neuron: NeuronFactory) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.neuron = spiking_layer(neuron, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the spikes `neuron(norm(x))`, computed as one fused operation."""
        return self.neuron(x, self.norm)


@compiled
def receptance_gate(r: Tensor, y: Tensor) -> Tensor:
    """Returns `sigmoid(r) * y`, RWKV's receptance gate."""
    return torch.sigmoid(r) * y


@compiled
def _gated_sum(x: Tensor, r: Tensor, y: Tensor, factors: Tensor | None) -> Tensor:
    """Returns `(x + sigmoid(r) * y) * factors`."""
    x = x + torch.sigmoid(r) * y
    return x if factors is None else x * factors


class ShiftedLinear(nn.Linear):
    """Linear layer on RWKV's token shift: `W (mu * s[n] + (1 - mu) * s[n-1]) + b`, with `mu` learned for each channel.

    Equivalent to a convolution along the tokens with the two taps `W diag(mu)` and `W diag(1 - mu)`. With spikes as
    input it needs only accumulates of either tap and, once the taps are stored, no multiplication.

    Shapes:
        `(..., N, in_features)` to `(..., N, out_features)`; the token before the first is zero.
    """

    taps_per_weight = 2
    """Connections for which each stored weight counts: one to the token itself and one to the token before it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.mix = nn.Parameter(torch.arange(in_features) / in_features)  # initial values of RWKV-4's first layer

    def forward(self, input: Tensor, *, shifted: Tensor | None = None) -> Tensor:
        """Returns the currents caused by the spikes `input`; `shifted` is their token shift, if already computed."""
        if shifted is None:
            (shifted,) = TokenShift.apply(input, self.mix)
        return super().forward(shifted)

    @property
    def taps(self) -> tuple[Tensor, Tensor]:
        """Weights of the spikes of the token itself and of the one before it, `(out_features, in_features)` each."""
        return self.weight * self.mix, self.weight * (1 - self.mix)


def token_shift(x: Tensor, *layers: ShiftedLinear) -> tuple[Tensor, ...]:
    """Returns the token shifts of `x` `(..., N, D)` for several layers, computed in one pass."""
    return TokenShift.apply(x, *(layer.mix for layer in layers))


class RWKVMix(nn.Module):
    """RWKV-4's replacement of attention, `sigmoid(r) * wkv(k, v)`: linear in the number of tokens.

    Decays are initialised from `e^-5` to `e^3` and bonuses to `log 0.3`, as in RWKV-4.
    """

    def __init__(self, channels: int, bidirectional: bool = False) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(-5, 3, channels).exp().expm1().log())  # w = softplus(decay)
        self.bonus = nn.Parameter(torch.full((channels,), 0.3).log())
        self.bidirectional = bidirectional

    def forward(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns `(M, N, D)`."""
        scan = bidirectional_wkv if self.bidirectional else wkv
        return receptance_gate(r, scan(k, v, F.softplus(self.decay), self.bonus))


class SoftmaxMix(nn.Module):
    """Multi-head softmax attention between all tokens, with `r` as queries and without parameters."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide embed_dim={channels}; give a divisor")
        self.num_heads = num_heads

    def forward(self, r: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns `(M, N, D)`."""
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (r, k, v))  # (M, heads, N, D/heads)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Token mix and channel mix with pre-spike residuals: sums are real-valued, weights receive spikes.

    Args:
        channels: Channels `D`.
        hidden_channels: Channels of the hidden layer of the channel mix.
        neuron: Creates the neurons of one layer.
        mix: Creates the token mixer.
        inner_norm: Whether the neurons after the token mixer and in the channel mix have a norm too.
        skip: Whether the block also receives the features of an input block (a long skip).

    Shapes:
        `(T, B, N, D)` in and out.
    """

    def __init__(
        self,
        channels: int,
        hidden_channels: int,
        neuron: NeuronFactory,
        mix: MixFactory,
        inner_norm: bool = False,
        skip: bool = False,
    ) -> None:
        super().__init__()
        inner = NormedNeuron if inner_norm else lambda channels, neuron: spiking_layer(neuron, channels)
        if skip:
            self.skip_neuron = NormedNeuron(2 * channels, neuron)
            self.skip_out = nn.Linear(2 * channels, channels)
        self.spatial_neuron = NormedNeuron(channels, neuron)
        self.spatial_r, self.spatial_k, self.spatial_v = (ShiftedLinear(channels, channels) for _ in range(3))
        self.mix = mix(channels)
        self.mix_neuron = inner(channels, neuron)
        self.spatial_out = nn.Linear(channels, channels)
        self.channel_neuron = NormedNeuron(channels, neuron)
        self.channel_r = ShiftedLinear(channels, channels)
        self.channel_k = ShiftedLinear(channels, hidden_channels)
        self.hidden_neuron = inner(hidden_channels, neuron)
        self.channel_out = nn.Linear(hidden_channels, channels)

    def forward(self, x: Tensor, skip: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
        """Returns the features after both mixes, multiplied by the factors if given.

        Args:
            x: Features `(T, B, N, D)`.
            skip: Features of an input block, in the same shape.
            factors: Factors of the Reconstruction Module `(T, 1, 1, D)`.
        """
        if skip is not None:
            x = x + self.skip_out(self.skip_neuron(torch.cat([x, skip], dim=-1)))
        s = fold(self.spatial_neuron(x))  # (T*B, N, D)
        for_r, for_k, for_v = token_shift(s, self.spatial_r, self.spatial_k, self.spatial_v)
        mixed = self.mix(
            self.spatial_r(s, shifted=for_r), self.spatial_k(s, shifted=for_k), self.spatial_v(s, shifted=for_v)
        )
        x = x + self.spatial_out(self.mix_neuron(unfold(mixed, len(x))))
        s = self.channel_neuron(x)
        for_r, for_k = token_shift(s, self.channel_r, self.channel_k)
        hidden = self.hidden_neuron(self.channel_k(s, shifted=for_k))
        return _gated_sum(x, self.channel_r(s, shifted=for_r), self.channel_out(hidden), factors)


class Reconstruction(nn.Module):
    """Reconstruction Module: a learned token passes through membranes that never fire and scales the blocks' outputs.

    `m[l,t] = beta m[l,t-1] + W[l] rho[l-1,t]`, `rho[l,t] = rho[l-1,t] + tanh(m[l,t])`, and the factors of block `l` are
    `1 + V[l] rho[l,t]`. `V` is initialised to zero, so that the factors start at 1. They do not depend on the image:
    a trained network can store them and needs no matrix product per image. The matrices are therefore plain parameters,
    not layers.

    Args:
        channels: Channels `D`.
        depth: Blocks `L`.
        beta: Membrane decay, equal to the neurons' decay.
    """

    def __init__(self, channels: int, depth: int, beta: float) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(channels))
        self.drive = nn.Parameter(torch.randn(depth, channels, channels) / channels**0.5)
        self.gate = nn.Parameter(torch.zeros(depth, channels, channels))
        self.beta = beta

    @uncounted("constants of a trained network")
    def forward(self, num_steps: int) -> Tensor:
        """Returns the factors `(L, T, D)`."""
        rho = self.token.expand(num_steps, -1)
        factors = []
        for drive, gate in zip(self.drive, self.gate, strict=True):
            m, membrane = torch.zeros_like(self.token), []
            for current in rho @ drive.T:
                m = self.beta * m + current
                membrane.append(m)
            rho = rho + torch.tanh(torch.stack(membrane))
            factors.append(1 + rho @ gate.T)
        return torch.stack(factors)


class SpikingTransformer(nn.Module):
    """Predicts the noise in `x_t` with RWKV blocks of leaky integrate-and-fire neurons, in the layout of U-ViT.

    The potentials of all neurons start at zero in each call. `systems.spiking_rwkv.SpikingRWKV` explains the design.

    Args:
        in_channels: Image channels.
        image_size: Height and width of the images (positions are learned for one size).
        patch_size: Height and width of a patch; divides image_size.
        embed_dim: Channels `D` of a token, a multiple of 8.
        depth: Blocks, an odd number: (depth - 1) / 2 in, one in the middle, as many out.
        num_steps: SNN time steps T.
        mlp_ratio: Hidden channels of the channel mix, as a multiple of `embed_dim`.
        num_train_timesteps: Diffusion steps that the time embedding knows.
        beta: Membrane decay of the Reconstruction Module.
        neuron: Creates the neurons of one layer.
        inner_norm: Batch norm before the neurons after RWKV and in the channel mix too. With it they fire at a rate
            near 0.17 from the start, without it almost never at first. The small configurations use it because the
            network trains faster with it.
        reconstruction: Reconstruction Module; false is the ablation.
        attention: Token mixing: rwkv (published), or softmax attention between all tokens, the ablation.
        num_heads: Heads of softmax attention; divides embed_dim.
        embedding: Patches enter as real values of an ANN layer (ann, published), or through a neuron (spiking), the
            ablation.
        scan: RWKV sees the tokens before each one (causal), or adds a scan from the last to the first (bidirectional).

    Raises:
        ValueError: If a size is out of range or options do not go together.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 28,
        patch_size: int = 2,
        embed_dim: int = 384,
        depth: int = 9,
        num_steps: int = 4,
        mlp_ratio: float = 4.0,
        num_train_timesteps: int = 1000,
        beta: float = 0.5,
        neuron: NeuronFactory = LIF,
        inner_norm: bool = False,
        reconstruction: bool = True,
        attention: Literal["rwkv", "softmax"] = "rwkv",
        num_heads: int = 8,
        embedding: Literal["ann", "spiking"] = "ann",
        scan: Literal["causal", "bidirectional"] = "causal",
    ) -> None:
        super().__init__()
        check_range("num_steps", num_steps, 1)
        if patch_size < 1 or image_size < 1 or image_size % patch_size:
            raise ValueError(
                f"image_size={image_size} is not a multiple of patch_size={patch_size}; give a patch_size that divides "
                "it, or pad the images (--data.image_size)"
            )
        if depth < 1 or depth % 2 == 0:
            raise ValueError(
                f"depth={depth} leaves no middle block; give an odd number, such as {max(depth, 2) + 1}: equally "
                "many input and output blocks, and one in the middle"
            )
        if embed_dim < 8 or embed_dim % 8 or not mlp_ratio * embed_dim >= 1:
            raise ValueError(
                f"embed_dim={embed_dim}, mlp_ratio={mlp_ratio}; give a multiple of 8 for embed_dim (a quarter of it is "
                "the even number of sinusoids) and an mlp_ratio above 0"
            )
        if attention == "softmax" and scan != "causal":
            raise ValueError(
                f"scan={scan!r} is an option of attention='rwkv'; softmax attention already sees all "
                "tokens, omit the option"
            )
        self.image_shape = (in_channels, image_size, image_size)
        self.patch_size = patch_size
        self.num_steps = num_steps

        self.time_embedding = TimeEmbedding(embed_dim // 4, num_train_timesteps)
        self.patch_embedding = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)
        self.position = nn.Parameter(0.02 * torch.randn((image_size // patch_size) ** 2, embed_dim))
        self.patch_neuron = NormedNeuron(embed_dim, neuron) if embedding == "spiking" else None

        mixes: dict[str, MixFactory] = {
            "rwkv": partial(RWKVMix, bidirectional=scan == "bidirectional"),
            "softmax": partial(SoftmaxMix, num_heads=num_heads),
        }
        block = partial(Block, embed_dim, int(mlp_ratio * embed_dim), neuron, mixes[attention], inner_norm)
        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(depth // 2))
        self.reconstruction = Reconstruction(embed_dim, depth, beta) if reconstruction else None

        self.norm = nn.LayerNorm(embed_dim)
        self.to_patches = nn.Linear(embed_dim, patch_size**2 * in_channels)
        self.final_conv = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the predicted noise `(B, C, H, W)`.

        Args:
            x: Noisy images `(B, C, H, W)` in [-1, 1] plus noise, of the network's size.
            t: Diffusion steps `(B,)`, whole or real numbers below `num_train_timesteps`.

        Raises:
            ValueError: If the images do not fit the network.
        """
        if x.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"images have shape {tuple(x.shape)}; this network takes (B, {expected}): set --model.in_channels "
                "and --model.image_size, or --data.image_size"
            )
        h = self._embed(x, t)  # (T, B, N, D)
        blocks = (*self.in_blocks, self.mid_block, *self.out_blocks)
        factors = self.reconstruction(self.num_steps)[:, :, None, None] if self.reconstruction else [None] * len(blocks)
        skips: list[Tensor] = []
        for i, block in enumerate(blocks):
            h = block(h, skips.pop() if i > len(self.in_blocks) else None, factors[i])
            if i < len(self.in_blocks):
                skips.append(h)
        patches = self.to_patches(self.norm(h.mean(0))[:, 1:])  # (B, N-1, C*p*p)
        rows = self.image_shape[1] // self.patch_size
        return self.final_conv(F.pixel_shuffle(patches.mT.unflatten(2, (rows, rows)), self.patch_size))

    def _embed(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the tokens `(T, B, N, D)`, the diffusion step first, repeated over `T` (direct encoding)."""
        patches = (self.patch_embedding(x).flatten(2).mT + self.position).expand(self.num_steps, -1, -1, -1)
        if self.patch_neuron is not None:
            patches = self.patch_neuron(patches)
        step = self.time_embedding(t)[:, None].expand(self.num_steps, -1, -1, -1)
        return torch.cat([step, patches], dim=2)
