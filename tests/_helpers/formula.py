"""The noise predictor of the recorded sampler runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Formula(nn.Module):
    """Predicts `0.5 x + 0.25 sin(3 x) + 0.1 t / 1000`."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x + 0.25 * torch.sin(3 * x) + 0.1 * t.view(-1, 1, 1, 1).to(x) / 1000
