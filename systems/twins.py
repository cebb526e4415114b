"""ReLU twins: networks with ReLU in place of neurons, the controls for what spikes cost and save.

A twin has the weights, norms, widths, skips and read-out of its spiking network. Each spiking layer is replaced by a
ReLU, and there is a single time step: the image is a constant current and a ReLU has no state, so that further steps
would be equal. With few bits the ReLU is quantised as in the ANN (`systems.ops.quantise.QReLU`). A neuron sends 0 to
`T` spikes in `T` steps; `bits_of_steps(T)`, `ceil(log2(T + 1))`, have at least as many levels (Yan et al., arXiv
2409.08290, who compare spiking with quantised networks on this basis).
"""

from __future__ import annotations

from systems.ops.quantise import PLAIN_BITS
from systems.spiking.adapter import check_unused

TWIN_SUFFIX = "-relu-twin"
"""Follows the name of the method in records and checkpoints of its twins."""


def check_twin(method: type, num_steps: int, **published: float | str) -> None:
    """Checks the options of a ReLU twin.

    Args:
        method: Class of the method; its defaults are read.
        num_steps: SNN time steps of the method.
        **published: Options of the method that have no effect on a twin.

    Raises:
        ValueError: If there are several time steps, or such an option is not at its default.
    """
    check_unused(method, "a ReLU twin has no neurons to which this applies; leave it at its default", **published)
    if num_steps != 1:
        raise ValueError(
            f"num_steps={num_steps}: the image is a constant current and a ReLU has no state, so that all steps of a "
            "ReLU twin would be equal; give --model.num_steps 1"
        )


def check_not_quantised(method: type, bits: int) -> None:
    """Checks that the bits of a twin are not set for a network of neurons.

    Raises:
        ValueError: If they are.
    """
    reason = "an option of ReLU twins, but this network has neurons; leave it out, or give --model.neuron relu"
    check_unused(method, reason, activation_bits=bits)


def twin_name(method: str, bits: int | None) -> str:
    """Returns the name of a method in records and checkpoints, or that of its twin with activations of some bits.

    So no record or checkpoint of a twin is taken for one of the spiking method, or of a twin with other bits.

    Args:
        method: Name of the spiking method.
        bits: Bits of the twin's activations; None for the spiking method itself.
    """
    if bits is None:
        return method
    return method + TWIN_SUFFIX + (f"-{bits}bit" if bits != PLAIN_BITS else "")
