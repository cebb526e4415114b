"""ReLU twins: the network of a spiking method with ReLU in place of neurons."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import SDDPM as TINY
from torch import Tensor, nn

from benchmark.cli import main
from benchmark.runs import find_checkpoint, newest_run
from leaderboard.evaluation.cost import CostMeter
from leaderboard.record.records import find_records, read_record
from systems import FSDDIM, SDDPM, SDM, SpikingRWKV
from systems.base import DiffusionSystem
from systems.checkpoints import CheckpointMismatchError
from systems.ops.quantise import QReLU
from systems.spiking.adapter import spiking_layers
from systems.spiking.relu import ReLULayer

SIZE: dict[str, Any] = dict(in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_steps=1)
METHODS: dict[str, tuple[type[DiffusionSystem], dict[str, Any]]] = {
    "SDDPM": (SDDPM, {}),
    "SDM": (SDM, {}),
    "FSDDIM": (FSDDIM, {"norm": "tdbn"}),
    "FSDDIM, strict": (FSDDIM, {"activate_first_conv": True}),
}


class ByHand(nn.Module):
    """ReLU that a test puts in the place of a neuron."""

    def forward(self, x: Tensor, norm: nn.Module | None = None, temb: Tensor | None = None) -> Tensor:
        steps, images = x.shape[:2]
        y = x.flatten(0, 1) if norm is None else norm(x.flatten(0, 1))
        if temb is not None:
            y = y + temb.repeat(steps, 1)[:, :, None, None]
        return y.relu().unflatten(0, (steps, images))


def inputs(system: DiffusionSystem) -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 1, 8, 8)
    return (x[None] if isinstance(system, FSDDIM) else x), torch.tensor([0, 10, 500, 999])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_spiking_network_with_relu_put_in_by_hand(name: str, training: bool) -> None:
    torch.manual_seed(0)
    method, options = METHODS[name]
    twin, spiking = method(neuron="relu", **SIZE, **options), method(**SIZE, **options)
    for parameter in twin.network.parameters():
        nn.init.normal_(parameter, std=0.1)
    network = spiking.network
    network.load_state_dict(twin.network.state_dict())  # a plain twin has the tensors of its spiking network
    for layer_name, _ in list(spiking_layers(network)):
        parent, _, child = layer_name.rpartition(".")
        setattr(network.get_submodule(parent), child, ByHand())
    twin.train(training)
    network.train(training)
    x, t = inputs(twin)
    out, expected = twin.network(x, t), network(x, t)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    expected.square().sum().backward()
    gradients = {key: p.grad for key, p in network.named_parameters()}
    for key, parameter in twin.network.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", METHODS)
def test_is_an_ann(name: str) -> None:
    method, options = METHODS[name]
    if issubclass(method, SDDPM):  # steps 999 and 499; at step 0 the time embedding's sinusoids are 0 and 1, as spikes
        options = options | {"scheduler": DDIMScheduler(timestep_spacing="trailing")}
    twin, spiking = method(neuron="relu", **SIZE, **options), method(**SIZE, **options)
    layers = [m for m in twin.network.modules() if isinstance(m, ReLULayer)]
    assert len(layers) == len(list(spiking_layers(spiking.network))) > 5
    assert not list(spiking_layers(twin.network))
    twin.num_inference_steps = 2
    twin.eval()
    with CostMeter(twin, home="network") as meter:
        images = twin.sample(torch.arange(2), (1, 8, 8))
    cost = meter.take().cost(twin.network, 2, twin.nfe)
    assert images.isfinite().all()
    assert cost.firing_rate is None
    assert (cost.firing_rates, cost.sops, cost.acs) == ({}, 0, 0)
    assert cost.macs > 0
    assert twin.num_steps == 1
    assert twin.threshold is None


@pytest.mark.parametrize("name", METHODS)
def test_few_bits_add_a_clip_value_to_each_layer_and_learn_it(name: str) -> None:
    torch.manual_seed(0)
    method, options = METHODS[name]
    twin = method(neuron="relu", activation_bits=3, **SIZE, **options)
    layers = [m for m in twin.network.modules() if isinstance(m, QReLU)]
    assert {layer.bits for layer in layers} == {3}
    assert len(layers) == len(list(spiking_layers(method(**SIZE, **options).network)))
    loss = twin.loss(torch.randn(8, 1, 8, 8).tanh(), torch.Generator().manual_seed(0))
    loss.backward()
    assert all(layer.act_alpha.grad is not None for layer in layers)
    assert any(layer.act_alpha.grad != 0 for layer in layers)


def test_names_keep_twins_apart() -> None:
    names = [
        SDDPM(**SIZE).method,
        SDDPM(neuron="relu", **SIZE).method,
        SDDPM(neuron="relu", activation_bits=3, **SIZE).method,
        SDM(neuron="relu", **SIZE).method,
        FSDDIM(neuron="relu", activation_bits=2, **SIZE).method,
        FSDDIM(**SIZE).method,
    ]
    assert names == [
        "sddpm",
        "sddpm-relu-twin",
        "sddpm-relu-twin-3bit",
        "sdm-relu-twin",
        "fsddim-relu-twin-2bit",
        "fsddim",
    ]


@pytest.mark.parametrize(
    ("trained", "configured", "message"),
    [
        ({}, {"neuron": "relu"}, "of method 'sddpm', expected 'sddpm-relu-twin'"),
        ({"neuron": "relu"}, {}, "of method 'sddpm-relu-twin', expected 'sddpm'"),
        (
            {"neuron": "relu", "activation_bits": 2},
            {"neuron": "relu", "activation_bits": 3},
            "of method 'sddpm-relu-twin-2bit', expected 'sddpm-relu-twin-3bit'",
        ),
    ],
)
def test_weights_of_another_kind_are_refused(trained: dict, configured: dict, message: str) -> None:
    source = SDDPM(**SIZE, **trained)
    checkpoint: dict[str, Any] = {"state_dict": source.state_dict()}
    source.on_save_checkpoint(checkpoint)
    with pytest.raises(CheckpointMismatchError, match=message):
        SDDPM(**SIZE, **configured).on_load_checkpoint(deepcopy(checkpoint))
    same = SDDPM(**SIZE, **trained)
    same.on_load_checkpoint(checkpoint)
    same.load_state_dict(checkpoint["state_dict"])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (SDDPM, {"num_steps": 4}, "num_steps=4: .* give --model.num_steps 1"),
        (FSDDIM, {"num_steps": 8}, "num_steps=8: .* give --model.num_steps 1"),
        (SDDPM, {"threshold": 0.99}, "threshold=0.99: a ReLU twin has no neurons"),
        (SDM, {"spike_grad": "triangle"}, "spike_grad=triangle: a ReLU twin has no neurons"),
        (FSDDIM, {"beta": 0.5, "reset_mechanism": "subtract"}, "beta=0.5, reset_mechanism=subtract: a ReLU twin"),
        (FSDDIM, {"fused": True}, "give --model.fused false"),
        (SDDPM, {"activation_bits": 9}, "activation_bits=9; give 1 to 8, or 32"),
        (SDDPM, {"neuron": "if", "activation_bits": 3}, "activation_bits=3: an option of ReLU twins"),
        (FSDDIM, {"neuron": None, "activation_bits": 3}, "activation_bits=3: an option of ReLU twins"),
        (SDDPM, {"neuron": ReLULayer}, "made by --model.neuron relu"),
        (FSDDIM, {"neuron": ReLULayer}, "made by --model.neuron relu"),
    ],
)
def test_options_without_effect_are_refused(method: type[DiffusionSystem], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**(SIZE | {"neuron": "relu"} | options))


def test_other_methods_name_those_that_have_twins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"neuron='relu' is not a neuron of this method; .* SDDPM, SDM and FSDDIM"):
        SpikingRWKV(neuron="relu", embed_dim=16, depth=3, image_size=8)  # type: ignore[arg-type]
    with pytest.raises(SystemExit):
        main(["fit", "--model=SpikingRWKV", "--model.neuron=relu", "--data=Digits"])
    assert "ReLU twins exist of SDDPM, SDM and FSDDIM" in capsys.readouterr().err


@pytest.mark.slow
def test_trains_fine_tunes_and_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    twin = ["--model.neuron=relu", "--model.num_steps=1", "--model.num_inference_steps=2", "--model.activation_bits=3"]
    main(["fit", *TINY, *twin])
    checkpoint = find_checkpoint(newest_run(Path("runs")), "last")
    main(["test", "--draft", "--evaluation.protocol=offline-v1", "--data.num_samples=20"])
    record = read_record(find_records([newest_run(Path("runs"))])[0])
    assert record.method == "sddpm-relu-twin-3bit"
    assert record.cost is not None
    assert record.cost.firing_rate is None
    main(["fit", *TINY, "--model=SDM", *twin, f"--model.init_from={checkpoint}"])
    with pytest.raises(CheckpointMismatchError, match="expected 'sddpm'"):
        main(["fit", *TINY, "--model=SDM", f"--model.init_from={checkpoint}"])
