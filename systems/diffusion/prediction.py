"""Forward process `x_t = a x_0 + sigma noise`, and conversions between the quantities that a network may predict.

Images, noise and predictions are `(B, C, H, W)`; signal scale `a` and noise scale `sigma` are numbers or broadcast to
that shape.
"""

from __future__ import annotations

from torch import Tensor


def noise_images(images: Tensor, noise: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
    """Returns `x_t = a x_0 + sigma noise`."""
    return a * images + sigma * noise


def velocity(images: Tensor, noise: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
    """Returns `v_t = a noise - sigma x_0`."""
    return a * noise - sigma * images


def to_noise(prediction: Tensor, x_t: Tensor, a: float | Tensor, sigma: float | Tensor, prediction_type: str) -> Tensor:
    """Converts a prediction from `x_t` to the noise.

    Raises:
        ValueError: If `prediction_type` is unknown.
    """
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "sample":
        return (x_t - a * prediction) / sigma
    if prediction_type == "v_prediction":
        return a * prediction + sigma * x_t
    raise unknown_prediction_type(prediction_type)


def to_x0(prediction: Tensor, x_t: Tensor, a: float | Tensor, sigma: float | Tensor, prediction_type: str) -> Tensor:
    """Converts a prediction from `x_t` to the clean images `x_0`.

    Raises:
        ValueError: If `prediction_type` is unknown.
    """
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / a
    if prediction_type == "sample":
        return prediction
    if prediction_type == "v_prediction":
        return a * x_t - sigma * prediction
    raise unknown_prediction_type(prediction_type)


def unknown_prediction_type(prediction_type: str) -> ValueError:
    """Returns the error to raise for a prediction type that is not supported."""
    return ValueError(f"prediction_type={prediction_type!r}; give epsilon, sample or v_prediction")
