"""Network of SDiT as released: an RWKV transformer whose blocks quantise what they add to real-valued features.

S. Yang, H. Ma, C. Yu, A. Wang, E.-P. Li, "SDiT: Spiking Diffusion Model with Transformer", 2024,
https://arxiv.org/abs/2402.11588; public code https://github.com/foolLain/SDiT (no authors named). Written from a
description of that code and checked against recordings of it; names of parameters are those of its checkpoints.

No weight matrix ever receives spikes. Each block has two neuron layers, one behind each mixer, which receive the same
current in all `T` SNN time steps and are averaged over them at once: a staircase with the levels 0, 1/4, 1/2 and 1.

Axes: `B` images, `N` patches, `M = N + 1` tokens (time and class, then the patches), `L` tokens that the mixers see
(`2 M` with the Reconstruction Module, else `M`), `D` channels, `T` SNN time steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from systems.networks.checks import check_range
from systems.networks.spiking_transformer import SoftmaxMix, receptance_gate
from systems.ops.compiled import compiled
from systems.ops.token_shift import TokenShift
from systems.ops.wkv import wkv
from systems.spiking.adapter import spiking_layer
from systems.spiking.neurons import NeuronFactory, leaky_integrate_and_fire
from systems.spiking.surrogates import get_surrogate

rate_lif = partial(leaky_integrate_and_fire, tau=2.0, spike_grad=get_surrogate("atan"))
"""`U = V + (X - V) / 2`, hard reset, which is not detached. The surrogate is shared: it is compiled only once."""

SINUSOIDS = 256
"""Numbers of the sinusoidal embedding of a diffusion step."""


class RateNeuron(nn.Module):
    """Neurons under a constant current: the mean of their spikes over the time steps, `(B, L, D)` in and out.

    With the released constants it is 0 below a current of 16/15, 1/4 below 4/3, 1/2 below 2, and 1 from there on.

    Args:
        neuron: Creates the spiking layer.
        num_steps: SNN time steps T.
        channels: D.
    """

    def __init__(self, neuron: NeuronFactory, num_steps: int, channels: int) -> None:
        super().__init__()
        self.neuron = spiking_layer(neuron, channels)
        self.num_steps = num_steps

    def forward(self, current: Tensor) -> Tensor:
        """Returns the firing rate of each neuron."""
        rate: Tensor = self.neuron(current.expand(self.num_steps, *current.shape)).mean(0)
        return rate


class TimeMix(nn.Module):
    """RWKV-4's replacement of attention, `W_o (sigmoid(r) * wkv(k, v))`, or softmax attention (the ablation).

    Args:
        channels: Channels `D`.
        layer: Index `l` of the block, by which decays, bonuses and mixes are initialised as in RWKV-4.
        num_layers: Number of blocks that these initial values assume.
        attention: `rwkv`, or `softmax` attention between all tokens with `r` as queries.
        num_heads: Heads of softmax attention.
    """

    def __init__(self, channels: int, layer: int, num_layers: int, attention: str, num_heads: int) -> None:
        super().__init__()
        later, earlier = layer / (num_layers - 1), 1 - layer / num_layers
        channel = torch.arange(channels)
        self.softmax = SoftmaxMix(channels, num_heads) if attention == "softmax" else None
        if self.softmax is None:
            self.time_decay = nn.Parameter(-5 + 8 * (channel / max(channels - 1, 1)) ** (0.7 + 1.3 * later))
            self.time_first = nn.Parameter(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        mix = _initial_mix(channels, earlier)
        self.time_mix_k = nn.Parameter(mix.clone())
        self.time_mix_v = nn.Parameter(mix + 0.3 * later)
        self.time_mix_r = nn.Parameter(_initial_mix(channels, earlier / 2))
        self.key, self.value, self.receptance, self.output = (
            nn.Linear(channels, channels, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the current of the first neuron layer, `(B, L, D)`."""
        for_k, for_v, for_r = _token_shift(x, self.time_mix_k, self.time_mix_v, self.time_mix_r)
        k, v, r = self.key(for_k), self.value(for_v), self.receptance(for_r)
        if self.softmax is not None:
            mixed = self.softmax(r, k, v)
        else:
            mixed = receptance_gate(r, wkv(k, v, self.time_decay.exp(), self.time_first))
        current: Tensor = self.output(mixed)
        return current


class ChannelMix(nn.Module):
    """RWKV-4's feed-forward layer, `sigmoid(r) * W_v relu(k)^2`; arguments as for `TimeMix`."""

    def __init__(self, channels: int, layer: int, num_layers: int) -> None:
        super().__init__()
        mix = _initial_mix(channels, 1 - layer / num_layers)
        self.time_mix_k = nn.Parameter(mix.clone())
        self.time_mix_r = nn.Parameter(mix.clone())
        self.key = nn.Linear(channels, 4 * channels, bias=False)
        self.receptance = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the current of the second neuron layer, `(B, L, D)`."""
        for_k, for_r = _token_shift(x, self.time_mix_k, self.time_mix_r)
        return receptance_gate(self.receptance(for_r), self.value(_squared_relu(self.key(for_k))))


class PatchEmbedding(nn.Module):
    """Patches `(B, N, D)` of images, row by row, as real values; through batch norm and neurons if `rates` is given."""

    def __init__(
        self, in_channels: int, channels: int, patch_size: int, rates: Callable[[], RateNeuron] | None
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(channels, -1))
        nn.init.zeros_(cast(Tensor, self.proj.bias))
        self.norm = None if rates is None else nn.BatchNorm1d(channels)
        self.lif = None if rates is None else rates()

    def forward(self, x: Tensor) -> Tensor:
        """Returns the patches of images `(B, C, H, W)`."""
        patches: Tensor = self.proj(x).flatten(2)
        if self.norm is not None and self.lif is not None:
            patches = self.lif(self.norm(patches))
        return patches.mT


class StepEmbedding(nn.Module):
    """Sinusoids of the diffusion step through a two-layer MLP, `(B,)` to `(B, D)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, channels), nn.SiLU(), nn.Linear(channels, channels))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Returns the embedding of diffusion steps `t`."""
        embedding: Tensor = self.mlp(sinusoids(t, next(self.mlp.parameters()).dtype))
        return embedding


class ClassEmbedding(nn.Module):
    """One vector per class, and one for images whose class is withheld, `(B,)` to `(B, D)`."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, channels)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        """Returns the vectors of the classes `y`."""
        vectors: Tensor = self.embedding_table(y)
        return vectors


class FinalLayer(nn.Module):
    """Layer norm, and a linear layer that starts at zero: tokens `(B, M, D)` to `(B, M, outputs)`."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(channels, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the values of the tokens."""
        values: Tensor = self.linear(self.norm(x))
        return values


class Block(nn.Module):
    """Both mixers with their neurons, then the Reconstruction Module.

    The module appends `M` learned tokens, which the mixers process after the image's, and multiplies the image's tokens
    by `1 + G`. `G = W_2 (W_1 r + b_1)^T + b_2` is computed from the learned tokens `r` after the mixers; its second
    linear layer sums over the tokens. The learned tokens are not passed on to the next block.

    Args:
        channels: Channels `D`.
        num_tokens: Tokens `M`.
        layer: See `TimeMix`.
        num_layers: See `TimeMix`.
        neuron: Creates a neuron layer.
        skip: Whether the block also receives the output of an earlier block.
        reconstruction: Whether it has the Reconstruction Module.
        attention: See `TimeMix`.
        num_heads: See `TimeMix`.

    Shapes:
        `(B, M, D)` in and out.
    """

    def __init__(
        self,
        channels: int,
        num_tokens: int,
        layer: int,
        num_layers: int,
        neuron: Callable[[], RateNeuron],
        skip: bool,
        reconstruction: bool,
        attention: str,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.att = TimeMix(channels, layer, num_layers, attention, num_heads)
        self.lif1 = neuron()
        self.ffn = ChannelMix(channels, layer, num_layers)
        self.lif2 = neuron()
        self.skip_linear = _xavier(nn.Linear(2 * channels, channels)) if skip else None
        self.restruction_token = None
        if reconstruction:
            self.restruction_token = nn.Parameter(torch.ones(1, num_tokens, channels))
            self.restruction_token_MLP = _xavier(nn.Linear(channels, num_tokens))
            self.another_MLP = _xavier(nn.Linear(num_tokens, channels))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Returns the features after both mixers and the gate; `skip` is the output of an earlier block."""
        if self.skip_linear is not None:
            assert skip is not None, "an output block receives the output of an input block"
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        tokens = x.shape[1]
        if self.restruction_token is not None:
            x = torch.cat([x, self.restruction_token.expand(len(x), -1, -1).to(x.dtype)], dim=1)
        x = x + self.lif1(self.att(self.norm(x)))
        x = x + self.lif2(self.ffn(self.norm(x)))
        if self.restruction_token is None:
            return x
        gate = self.another_MLP(self.restruction_token_MLP(x[:, tokens:]).mT)
        return _gated(x[:, :tokens].contiguous(), gate)


class SDiTNetwork(nn.Module):
    """Predicts noise and variance from noisy images, diffusion steps and classes.

    Args:
        in_channels: Image channels.
        image_size: Height and width of the images (positions are learned for one size).
        patch_size: Height and width of a patch; divides image_size.
        embed_dim: Channels `D` of a token.
        depth: Released size parameter: `depth // 2` blocks in, one in the middle, as many out; 2 or more.
        num_classes: Classes; there is one more embedding, for images whose class is withheld. 0 makes an unconditional
            network without embeddings.
        num_steps: SNN time steps T within each neuron layer.
        neuron: Creates one spiking layer.
        reconstruction: Reconstruction Module; false is the ablation.
        attention: Token mixing: rwkv (released), or softmax attention between all tokens, the ablation.
        num_heads: Heads of softmax attention; divides embed_dim.
        embedding: Patches enter as real values of an ANN layer (ann, released), or through batch norm and a neuron
            layer (spiking), the ablation.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 28,
        patch_size: int = 2,
        embed_dim: int = 384,
        depth: int = 4,
        num_classes: int = 10,
        num_steps: int = 4,
        neuron: NeuronFactory = rate_lif,
        reconstruction: bool = True,
        attention: Literal["rwkv", "softmax"] = "rwkv",
        num_heads: int = 8,
        embedding: Literal["ann", "spiking"] = "ann",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_steps", num_steps, 1),
            ("in_channels", in_channels, 1),
            ("embed_dim", embed_dim, 1),
            ("depth", depth, 2),
            ("num_classes", num_classes, 0),
        ):
            check_range(name, value, least)
        if patch_size < 1 or image_size < 1 or image_size % patch_size:
            raise ValueError(
                f"image_size={image_size} is not a multiple of patch_size={patch_size}; give a patch_size that divides "
                "it, or pad the images (--data.image_size)"
            )
        self.image_shape = (in_channels, image_size, image_size)
        self.patch_size = patch_size
        self.num_steps = num_steps
        self.num_classes = num_classes
        num_tokens = (image_size // patch_size) ** 2 + 1
        rates = partial(RateNeuron, neuron, num_steps, embed_dim)

        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, embed_dim))
        self.x_embedder = PatchEmbedding(in_channels, embed_dim, patch_size, rates if embedding == "spiking" else None)
        self.t_embedder = StepEmbedding(embed_dim)
        self.y_embedder = ClassEmbedding(num_classes, embed_dim) if num_classes else None
        self.conv = nn.Conv2d(2 * in_channels, 2 * in_channels, 3, padding=1)
        self.final_layer = FinalLayer(embed_dim, patch_size**2 * 2 * in_channels)

        def block(layer: int, skip: bool = False) -> Block:
            return Block(embed_dim, num_tokens, layer, depth, rates, skip, reconstruction, attention, num_heads)

        self.in_blocks = nn.ModuleList(block(i) for i in range(depth // 2))
        self.mid_block = block(depth // 2)
        self.out_blocks = nn.ModuleList(block(i, skip=True) for i in range(depth // 2))  # indices as released

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns predicted noise and variance `(B, 2 C, H, W)`, noise first.

        Args:
            x: Noisy images `(B, C, H, W)` of the network's size.
            t: Diffusion steps `(B,)`, in the numbering of training.
            y: Classes `(B,)` from 0; `num_classes` withholds the class. None if the network is unconditional.

        Raises:
            ValueError: If the images do not fit the network, or classes are missing or given to an unconditional one.
        """
        if x.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"images have shape {tuple(x.shape)}; this network takes (B, {expected}): set --model.in_channels "
                "and --model.image_size, or --data.image_size"
            )
        h = self._embed(x, t, y)  # (B, M, D)
        skips: list[Tensor] = []
        for block in self.in_blocks:
            h = block(h)
            skips.append(h)
        h = self.mid_block(h)
        for block in self.out_blocks:
            h = block(h, skips.pop())
        image: Tensor = self.conv(self._unpatchify(self.final_layer(h)[:, 1:]))
        return image

    def _embed(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """Returns the tokens `(B, M, D)`, time and class first."""
        if (y is None) != (self.num_classes == 0):
            state = f"has {self.num_classes} classes but received none" if y is None else "is unconditional"
            raise ValueError(f"the network {state}; give classes (B,) to a conditional network, and only to such a one")
        patches = self.x_embedder(x)
        condition = self.t_embedder(t)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(y)
        return torch.cat([condition[:, None].to(patches.dtype), patches], dim=1) + self.pos_embed

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Arranges patches `(B, N, p*p*2C)`, channels fastest, as images `(B, 2C, H, W)`."""
        rows, p = self.image_shape[1] // self.patch_size, self.patch_size
        image = patches.view(len(patches), rows, rows, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(len(patches), -1, rows * p, rows * p)


def sinusoids(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `[cos(t f_i), sin(t f_i)]`, `f_i = 10000^(-i/128)`, `(B, 256)`, in float32 or more."""
    dtype = torch.promote_types(dtype, torch.float32)
    half = SINUSOIDS // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angle = t[:, None].to(dtype) * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


@compiled
def _squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


@compiled
def _gated(x: Tensor, gate: Tensor) -> Tensor:
    """Returns `x + x * gate`, the Reconstruction Module's gate."""
    return x + x * gate


def _token_shift(x: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
    """Returns the token shifts of `x` `(B, L, D)` for mixes `(1, 1, D)`, computed in one pass."""
    return TokenShift.apply(x, *(mix.view(-1) for mix in mixes))


def _initial_mix(channels: int, power: float) -> Tensor:
    """Returns `(h / D)^power` for the channels `h`, `(1, 1, D)`, as RWKV-4 initialises its token shifts."""
    return ((torch.arange(channels) / channels) ** power).view(1, 1, -1)


def _xavier(layer: nn.Linear) -> nn.Linear:
    """Initialises a linear layer by Xavier's uniform distribution, and its bias to zero."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
