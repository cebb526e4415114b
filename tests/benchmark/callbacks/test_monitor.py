"""Layers that stopped spiking, or never stop, are named once."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import snntorch as snn
import torch
from tiny import SDDPM, fit

from benchmark.callbacks.monitor import TrainingMonitor
from systems.spiking.neurons import SpikingNeuron

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("uncompiled")]
LAYER = "network.downblocks.0.neuron2"


def stick(monkeypatch: pytest.MonkeyPatch, value: float, forward_calls: int | None = None) -> None:
    """Makes one layer put out a constant, in its first calls or for ever."""
    forward = SpikingNeuron.forward
    calls = 0

    def stuck(neuron: SpikingNeuron, *args: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        spikes = forward(neuron, *args)
        if getattr(neuron, "stuck", False):
            calls += 1
            if forward_calls is None or calls <= forward_calls:
                return spikes * 0 + value
        return spikes

    monkeypatch.setattr(SpikingNeuron, "forward", stuck)
    start = TrainingMonitor.on_train_start

    def mark(monitor: TrainingMonitor, trainer: object, module: torch.nn.Module) -> None:
        module.get_submodule(LAYER).stuck = True  # type: ignore[assignment]
        start(monitor, trainer, module)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingMonitor, "on_train_start", mark)


@pytest.mark.parametrize(("value", "state"), [(0.0, "silent: firing rate 0"), (1.0, "saturated: firing rate 1")])
def test_a_stuck_layer_is_named_once(value: float, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stick(monkeypatch, value)
    with pytest.warns(UserWarning, match=re.escape(LAYER)) as told:
        fit(tmp_path, *SDDPM, "--data.val_size=0")
    messages = [str(w.message) for w in told if re.search(f"{re.escape(LAYER)} is {state}", str(w.message))]
    assert len(messages) == 1
    assert "firing_rate/downblocks.0.neuron2 in TensorBoard" in messages[0]


def test_a_layer_that_spikes_between_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stick(monkeypatch, 0.0, forward_calls=2)  # the first logged step, but not all of the next interval
    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*layer {re.escape(LAYER)}.*")
        fit(tmp_path, *SDDPM, "--data.val_size=0")


def test_steps_of_a_neuron_of_snntorch_are_one_layer() -> None:
    """A network that steps it calls the layer once per SNN step: only the rate over all steps is the layer's."""
    monitor, neuron = TrainingMonitor(), snn.Leaky(beta=1.0)
    neuron.register_forward_hook(monitor._watch("neuron"))
    monitor._suspects = {"neuron": 0.0}
    mem = torch.zeros(2, 3)
    for current in (0.6, 0.6, 0.0):  # fires in the second step only
        _, mem = neuron(torch.full((2, 3), current), mem)
    assert float(monitor._take_rates()["neuron"]) == pytest.approx(1 / 3)
    assert not bool(monitor._stuck["neuron"])
    for _ in range(4):
        neuron(torch.zeros(2, 3), torch.zeros(2, 3))
    assert float(monitor._take_rates()["neuron"]) == 0
