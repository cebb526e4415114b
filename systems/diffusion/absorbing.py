"""Absorbing-state diffusion of code indices: loss and sampler.

S. Bond-Taylor et al., "Unleashing Transformers", ECCV 2022, https://arxiv.org/abs/2111.12701. At step `t` of
`num_train_timesteps` each token is masked with probability `t / num_train_timesteps`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from systems.ops.cuda_graphs import Replay

Objective = Literal["reweighted_elbo", "elbo"]


def denoising_loss(
    logits: Tensor, codes: Tensor, masked: Tensor, t: Tensor, num_train_timesteps: int, objective: Objective
) -> Tensor:
    """Returns a bound on the negative log-likelihood of codes, in bits per token, averaged over the images.

    The cross-entropy of an image's masked tokens has the weight `num_train_timesteps / t` (`elbo`) or
    `1 - t / num_train_timesteps` (`reweighted_elbo`, arXiv 2111.12701, section 4.2; 0 for fully masked images).

    Args:
        logits: `(B, num_codes, h, w)`.
        codes: `(B, h, w)`.
        masked: True where a token was masked, `(B, h, w)`.
        t: Diffusion steps `(B,)`, from 1.
        num_train_timesteps: Number of diffusion steps.
        objective: Weighting of the steps.
    """
    nats = (F.cross_entropy(logits.float(), codes, reduction="none") * masked).sum((1, 2))
    weight = num_train_timesteps / t if objective == "elbo" else 1 - t / num_train_timesteps
    return (weight * nats).mean() / (codes[0].numel() * math.log(2))


def unmask(
    denoiser: nn.Module, masked: Tensor, uniforms: Iterable[Tensor], num_steps: int, mask_id: int, temperature: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples codes by absorbing diffusion; yields tokens and mask, both `(B, h, w)`, first and after each step.

    Step `t` of `num_steps, ..., 1` fills each masked token with probability `1 / t`, so that none remains at the end.

    Args:
        denoiser: Maps tokens `(B, h, w)` and steps `(B,)` to logits `(B, num_codes, h, w)`.
        masked: Tokens masked at the start, `(B, h, w)`.
        uniforms: Uniform random numbers `(B, 2, h, w)` for each step: which tokens to fill, and with which code.
        num_steps: Diffusion steps.
        mask_id: Index of the mask.
        temperature: Divides the logits.
    """
    tokens = torch.full(masked.shape, mask_id, device=masked.device)
    yield tokens, masked
    replay = Replay(denoiser, denoiser)
    for t, u in zip(range(num_steps, 0, -1), uniforms, strict=True):
        filled = masked & (u[:, 0] < 1 / t)
        logits = replay(tokens, torch.full((len(tokens),), t, device=tokens.device)) / temperature
        tokens = torch.where(filled, _draw(logits.float(), u[:, 1]), tokens)
        masked = masked & ~filled
        yield tokens, masked


def _draw(logits: Tensor, u: Tensor) -> Tensor:
    """Draws codes `(B, h, w)` from logits `(B, num_codes, h, w)` by inverse transform of `u` `(B, h, w)` in [0, 1)."""
    cumulative = logits.softmax(1).cumsum(1).movedim(1, -1).contiguous()  # (B, h, w, num_codes)
    index = torch.searchsorted(cumulative, u[..., None].contiguous(), right=True).squeeze(-1)
    return index.clamp(max=logits.shape[1] - 1)  # the sum may round to less than 1
