"""A neuron of one's own for every spiking method of the suite: `--model.neuron mypackage.neuron.AdaptiveLeaky`."""

import snntorch as snn
import torch


class AdaptiveLeaky(snn.Leaky):
    """Leaky neuron of snnTorch whose threshold and decay are learned."""

    def __init__(self, beta: float = 0.9, threshold: float = 1.0) -> None:
        super().__init__(beta=beta, threshold=threshold, learn_beta=True, learn_threshold=True)

    def forward(self, input_: torch.Tensor, mem: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the spikes and potentials `(B, ...)` of one SNN step."""
        return super().forward(input_, mem)
