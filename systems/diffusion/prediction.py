"""Conversions between what a network predicts and the noise."""

from __future__ import annotations

from torch import Tensor


def to_noise(prediction: Tensor, x_t: Tensor, a: float | Tensor, sigma: float | Tensor, kind: str) -> Tensor:
    """Turns what a network predicts of `x_t = a x_0 + sigma noise` into the noise.

    Args:
        prediction: Prediction `(B, C, H, W)`.
        x_t: Noisy images `(B, C, H, W)`.
        a: Factor of the image.
        sigma: Factor of the noise.
        kind: What is predicted: `epsilon`, `sample` or `v_prediction`.
    """
    if kind == "sample":
        return (x_t - a * prediction) / sigma
    return a * prediction + sigma * x_t if kind == "v_prediction" else prediction
