"""Neurons of snnTorch as layers of the suite: `multistep` runs any of them over all SNN time steps.

snnTorch (https://github.com/jeshraghian/snntorch) computes one step per call and keeps the state in buffers of the
layer: potentials of one batch would enter the next, a deep copy fails on them, and averaged weights do not fit their
changing shapes. Here state exists only during a forward pass, so that nothing has to be reset. Spikes and gradients
equal those of the same layer stepped by hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import Parameter, isclass, signature
from typing import Any

import snntorch as snn
import torch
from torch import Tensor, nn

from systems.spiking.multistep import spike_dtype
from systems.spiking.neurons import NeuronFactory, SpikingLayer, check_currents, norm_and_embed, scale_thresholds
from systems.spiking.relu import ReLULayer
from systems.spiking.surrogates import get_surrogate

CHANNELS = "channels"
"""Value of a neuron's argument that stands for the channels of its layer, such as `linear_features: channels`."""


class SteppedNeuron(SpikingLayer):
    """A neuron of snnTorch, or one with its interface, over all SNN time steps; use `multistep` to make it.

    The neuron's `forward` is called once per step as `forward(currents, *state)`, from a state of zeros, and returns
    the spikes and the new state; one that takes no state (`LeakyParallel`) is called once with all steps. Neurons whose
    weights act on features (`linear_features`, `LeakyParallel`) see the channels as features, the same for each pixel.

    Args:
        neuron: The neuron. It becomes part of this layer and must not be used otherwise: buffers of its state are
            removed, and integer constants become real numbers, because averaged weights would round them down.

    Shapes:
        `(T, B, ...)` currents to `(T, B, ...)` spikes, 0 or the neuron's `graded_spikes_factor`, in the input's dtype,
        or in autocast's if it is on. Potentials are in float32 or more.

    Raises:
        TypeError: If the module is not a spiking neuron.
        ValueError: If an option contradicts the adapter, or would have no effect in snnTorch.
    """

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        name = type(neuron).__name__
        if not isinstance(getattr(neuron, "threshold", None), Tensor):
            raise TypeError(
                f"{name} is not a spiking neuron: it has no threshold; give a neuron of snnTorch, such as "
                "snntorch.Leaky, or derive the layer from systems.spiking.neurons.SpikingLayer"
            )
        if getattr(neuron, "init_hidden", False):
            raise ValueError(f"{name}(init_hidden=True) keeps its state between calls; leave the option out")
        if isinstance(neuron, snn.Lapicque) and isinstance(neuron.beta, nn.Parameter):
            raise ValueError(
                "Lapicque(learn_beta=True) never trains in snnTorch, which computes R and C from beta only once; use "
                "Leaky to learn a decay"
            )
        surrogate: Any = getattr(neuron, "spike_grad", None)
        if isinstance(surrogate, str):
            neuron.spike_grad = get_surrogate(surrogate)  # type: ignore[assignment]  # a function, not a module
        arguments = list(signature(neuron.forward).parameters)
        self._states = arguments[1:]
        if not self._states and not isinstance(neuron, snn.LeakyParallel):
            raise TypeError(
                f"{name}.forward({', '.join(arguments)}) takes no state; the suite passes the state of a step to the "
                "next one: forward(currents, potential) returns spikes and potential"
            )
        for buffer, value in list(neuron._buffers.items()):
            if buffer in self._states:
                delattr(neuron, buffer)
            elif value is not None and not value.is_floating_point():
                setattr(neuron, buffer, value.to(torch.get_default_dtype()))
        instances = snn.SpikingNeuron.instances  # would keep every layer of the process alive
        instances[:] = [other for other in instances if other is not neuron]
        self.neuron = neuron
        self._on_features = isinstance(neuron, snn.LeakyParallel) or isinstance(
            getattr(neuron, "recurrent", None), nn.Linear
        )
        self._on_images = isinstance(getattr(neuron, "recurrent", None), nn.Conv2d)

    @property
    def amplitude(self) -> Tensor | float | None:
        """Amplitude of a spike, the neuron's `graded_spikes_factor`; None if it has several."""
        return amplitude(self.neuron)

    def forward(self, x: Tensor, norm: nn.Module | None = None, temb: Tensor | None = None) -> Tensor:
        """Returns the spikes `(T, B, ...)` (see `SpikingLayer`).

        Raises:
            ValueError: If the currents have no axes beside `(T, B)`, or do not fit the neuron.
        """
        check_currents(x)
        dtype = spike_dtype(x)
        if norm is not None:
            x = norm_and_embed(x, norm, temb)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        moved = self._on_features and x.dim() == 5
        if moved:
            x = x.movedim(2, -1)  # (T, B, H, W, C)
        self._check_shape(x)
        spikes = (self._step(x) if self._states else self._at_once(x)).to(dtype)
        return spikes.movedim(-1, 2) if moved else spikes

    def _step(self, x: Tensor) -> Tensor:
        """Calls the neuron once per step."""
        state: tuple[Tensor, ...] = tuple(torch.zeros_like(x[0]) for _ in self._states)
        spikes: list[Tensor] = []
        try:
            for currents in x.unbind(0):
                out = self._call(currents, *state)
                if not isinstance(out, tuple) or len(out) < len(self._states) or out[0].shape != currents.shape:
                    shapes = [tuple(part.shape) for part in (out if isinstance(out, tuple) else (out,))]
                    raise ValueError(
                        f"{type(self.neuron).__name__} returns the shapes {shapes} for currents of shape "
                        f"{tuple(currents.shape)}; it must return spikes of that shape and {', '.join(self._states)}"
                    )
                spikes.append(out[0])
                state = out[len(out) - len(self._states) :]  # in recurrent neurons the spikes are part of it
        finally:
            for name in (*self._states, "reset"):
                vars(self.neuron).pop(name, None)
        return torch.stack(spikes)

    def _at_once(self, x: Tensor) -> Tensor:
        """Calls the neuron once with all steps, `(T, M, C)`."""
        spikes: Tensor = self._call(x.flatten(1, -2))
        return spikes.view(x.shape)

    def _call(self, *args: Tensor) -> Any:
        """Calls the neuron, with its threshold scaled if guidance is on."""
        if self.threshold_scale == 1:
            return self.neuron(*args)
        threshold = self.neuron.threshold
        assert isinstance(threshold, Tensor)
        scaled = {"threshold": threshold * self.threshold_scale}
        return torch.func.functional_call(self.neuron, scaled, args)

    def _check_shape(self, x: Tensor) -> None:
        name = type(self.neuron).__name__
        if self._on_images and x.dim() != 5:
            raise ValueError(
                f"{name} with conv2d_channels takes features (T, B, C, H, W), not {tuple(x.shape)}; use linear_features"
            )
        if getattr(self.neuron, "inhibition", False) and x.dim() != 3:
            raise ValueError(
                f"{name}(inhibition=True) of snnTorch takes dense layers (T, B, F), not {tuple(x.shape)}; leave it out"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Warns where the checkpoint replaces a constant that was configured: snnTorch stores them with the weights."""
        for name, value in self.neuron.named_buffers():
            loaded = state_dict.get(f"{prefix}neuron.{name}")
            if loaded is not None and value.numel() == loaded.numel() == 1 and float(value) != float(loaded):
                warnings.warn(
                    f"{prefix}neuron.{name} is {float(loaded):g} as in the checkpoint, not {float(value):g} as in the "
                    "options; to change all thresholds of a trained network use --model.threshold",
                    stacklevel=2,
                )
        super()._load_from_state_dict(state_dict, prefix, *args)


def multistep(neuron: nn.Module) -> SpikingLayer:
    """Returns a layer of the suite for a neuron of snnTorch, or the layer itself if it is one already.

    Example:
        >>> layer = multistep(snntorch.Synaptic(alpha=0.8, beta=0.9, learn_alpha=True))
        >>> layer(torch.rand(4, 2, 16, 8, 8)).shape  # (T, B, C, H, W)
        torch.Size([4, 2, 16, 8, 8])
    """
    return neuron if isinstance(neuron, SpikingLayer) else SteppedNeuron(neuron)


def spiking_layer(neuron: NeuronFactory, channels: int) -> SpikingLayer | ReLULayer:
    """Creates one spiking layer of a network, or what replaces it in a ReLU twin; each call creates a new one.

    Args:
        neuron: Creates the neurons, of the suite or of snnTorch. Arguments set to `CHANNELS` in a `functools.partial`,
            which is how options arrive from the command line, become the channels of the layer; so does a parameter
            of that name.
        channels: Channels of the currents.

    Raises:
        TypeError: If `neuron` is not a class or function that creates spiking neurons.
    """
    if isinstance(neuron, nn.Module):
        raise TypeError(
            f"neuron={type(neuron).__name__}(...) is one layer, but every layer needs its own; give a class or a "
            f"function that creates it, such as functools.partial({type(neuron).__name__}, ...)"
        )
    if not callable(neuron):
        raise TypeError(
            f"neuron={neuron!r} is not a neuron of this method; give a class or a function that creates one, such as "
            "snntorch.Leaky; the name relu makes ReLU twins of SDDPM, SDM and FSDDIM"
        )
    given = neuron.keywords if isinstance(neuron, partial) else {}
    sizes = {name: channels for name, value in given.items() if isinstance(value, str) and value == CHANNELS}
    parameter = signature(neuron).parameters.get(CHANNELS)
    if parameter is not None and parameter.kind is not Parameter.POSITIONAL_ONLY and CHANNELS not in given:
        sizes[CHANNELS] = channels
    create: Callable[..., nn.Module] = neuron
    _check_required(given | sizes, *getattr(neuron, "args", ()))
    layer = create(**sizes)
    return layer if isinstance(layer, ReLULayer) else multistep(layer)


def _check_required(given: Mapping[str, Any], *args: Any) -> None:
    """Checks that a class from the command line, which passes None for what is missing, has all its options.

    Raises:
        ValueError: If it has not.
    """
    for kind in filter(isclass, args):
        required = [p.name for p in signature(kind).parameters.values() if p.default is p.empty]
        missing = [name for name in required if name in given and given[name] is None]
        if missing:
            raise ValueError(
                f"{kind.__name__} needs {', '.join(missing)}; give --model.neuron.{missing[0]} VALUE (or the word "
                f"{CHANNELS}, where it is the number of channels of the layer)"
            )


def apply_options(network: nn.Module, method: type, threshold: float, **published: Any) -> None:
    """Applies a method's options to a network whose neurons were given by `--model.neuron CLASS`.

    Args:
        network: The network.
        method: The method; its defaults are read.
        threshold: The method's option: a factor on the thresholds of the given neurons.
        **published: Further options of the method's published neuron, which have no effect on others.

    Raises:
        ValueError: If one of those options is not at its default, or the network is a ReLU twin.
    """
    if any(isinstance(module, ReLULayer) for module in network.modules()):
        raise ValueError("ReLULayer is not a neuron; give --model.neuron relu, which makes a ReLU twin")
    check_unused(
        method,
        "an option of the published neuron, which is replaced by --model.neuron; leave it at its default and set "
        "--model.neuron.init_args.{name}",
        **published,
    )
    scale_thresholds(network, threshold)


def check_unused(method: type, reason: str, **options: Any) -> None:
    """Checks that options that have no effect are at their defaults.

    Args:
        method: The method; its defaults are read.
        reason: Why they have no effect and what to do; `{name}` is replaced by the first such option.
        **options: Their values.

    Raises:
        ValueError: If one is not at its default.
    """
    parameters = signature(method).parameters
    changed = [name for name, value in options.items() if value != parameters[name].default]
    if changed:
        given = ", ".join(f"{name}={options[name]}" for name in changed)
        raise ValueError(f"{given}: {reason.format(name=changed[0])}")


def spiking_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields name and module of every spiking layer: of the suite, or neurons of snnTorch that a network steps itself.

    The first return spikes `(T, B, ...)`, the others spikes `(B, ...)` of one step, in a tuple with their state (see
    `spikes_of`).
    """
    inside = {
        id(part)
        for layer in network.modules()
        if isinstance(layer, SpikingLayer)
        for part in layer.modules()
        if part is not layer
    }
    for name, module in network.named_modules():
        if isinstance(module, SpikingLayer | snn.SpikingNeuron | snn.LeakyParallel) and id(module) not in inside:
            yield name, module


def spikes_of(output: Any) -> Tensor:
    """Returns the spikes in the output of a spiking layer."""
    spikes: Tensor = output[0] if isinstance(output, tuple) else output
    return spikes


def amplitude(layer: nn.Module) -> Tensor | float | None:
    """Returns the amplitude of the spikes of a spiking layer; None if they have several."""
    if isinstance(layer, SpikingLayer):
        return layer.amplitude
    factor = getattr(layer, "graded_spikes_factor", None)
    if not isinstance(factor, Tensor):
        return 1.0
    return factor.detach().abs() if factor.numel() == 1 else None


def leaks(layer: nn.Module) -> bool:
    """Returns whether a spiking layer multiplies its membrane by a decay; an unknown neuron is taken to do so."""
    neuron = layer.neuron if isinstance(layer, SteppedNeuron) else layer
    beta = getattr(neuron, "beta", None)
    if beta is None or isinstance(beta, nn.Parameter):
        return True
    return bool((torch.as_tensor(beta) != 1).any())
