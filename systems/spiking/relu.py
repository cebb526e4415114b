"""The layer of ReLU twins, networks with ReLU in place of neurons (`systems.twins`)."""

from __future__ import annotations

from torch import Tensor, nn

from systems.ops.quantise import PLAIN_BITS, quantised_relu
from systems.spiking.neurons import check_currents, norm_and_embed


class ReLULayer(nn.Module):
    """ReLU of `norm(x) + temb`, called like the spiking layer that it replaces.

    It is not a `SpikingLayer`: it has no threshold, no firing rate, and is not counted as neurons.

    Args:
        bits: Bits of the activation, 1 to 8; 32 is a plain ReLU.

    Shapes:
        `(1, B, ...)` currents to `(1, B, ...)` activations.

    Raises:
        ValueError: If `bits` is neither 1 to 8 nor 32.
    """

    def __init__(self, bits: int = PLAIN_BITS) -> None:
        super().__init__()
        self.activation = quantised_relu(bits)

    def forward(self, x: Tensor, norm: nn.Module | None = None, temb: Tensor | None = None) -> Tensor:
        """Returns the activations of currents (arguments: `SpikingLayer.forward`).

        Raises:
            ValueError: If the currents have several time steps, or no axes beside `(T, B)`.
        """
        check_currents(x)
        if len(x) != 1:
            raise ValueError(f"currents have {len(x)} time steps, shape {tuple(x.shape)}; a ReLU twin has one")
        out: Tensor = self.activation(x if norm is None else norm_and_embed(x, norm, temb))
        return out
