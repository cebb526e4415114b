"""`--model.neuron CLASS`: other neurons in every spiking method, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SDDPM as TINY

from benchmark.cli import main
from benchmark.runs import find_checkpoint, newest_run
from benchmark.stages import DryRun, run_stage
from systems import FSDDIM, SDDPM
from systems.spiking.adapter import spiking_layers
from systems.spiking.neurons import SpikingNeuron

UNET = ["--model.in_channels=1", "--model.base_channels=8", "--model.channel_mult=[1,2]", "--model.num_res_blocks=1"]
SIZES = {
    "SDDPM": UNET,
    "SDM": UNET,
    "FSDDIM": [*UNET, "--model.num_steps=2"],
    "SDiT": ["--model.embed_dim=16", "--model.depth=3", "--model.image_size=8"],
    "SpikingDiffusion": [
        "--model.base_channels=8",
        "--model.num_train_timesteps=4",
        "--model.autoencoder_channels=8",
        "--model.num_steps=2",
    ],
}
NEURONS = {
    "snntorch.Leaky": ["beta=0.9", "learn_beta=true", "spike_grad=triangle"],
    "snntorch.Synaptic": ["alpha=0.8", "beta=0.9"],
    "snntorch.RLeaky": ["beta=0.9", "linear_features=channels"],
    "snntorch.LeakyParallel": ["input_size=channels", "hidden_size=channels", "beta=0.9"],
    "systems.spiking.neurons.SpikingNeuron": ["beta=0.9", "learn_beta=true", "learn_threshold=true"],
}


def built(method: str, *options: str) -> Any:
    args = ["fit", f"--model={method}", "--data=Digits", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    return run_stage([*args, *SIZES[method], *options], DryRun).model


@pytest.mark.parametrize("method", SIZES)
def test_every_method_accepts_other_neurons(method: str) -> None:
    neuron = list(NEURONS)[list(SIZES).index(method)]
    options = [f"--model.neuron.{option}" for option in NEURONS[neuron]]
    system = built(method, f"--model.neuron={neuron}", *options, "--model.threshold=0.9")
    system.num_inference_steps = 2
    system.eval()
    layers = [layer for _, layer in spiking_layers(system.network)]
    assert {type(getattr(layer, "neuron", layer)).__name__ for layer in layers} == {neuron.rsplit(".")[-1]}
    assert {layer.threshold_scale for layer in layers} == {0.9}
    assert len({id(p) for layer in layers for p in layer.parameters()}) == sum(
        len(list(x.parameters())) for x in layers
    )
    side = 28 if method == "SpikingDiffusion" else 8
    image = system.sample(torch.tensor([0]), (1, side, side))
    assert image.isfinite().all()


def test_published_neurons_keep_their_names() -> None:
    assert {layer.input_scale for _, layer in spiking_layers(SDDPM(neuron="lif", base_channels=8).network)} == {0.5}


def test_options_of_the_published_neuron_are_refused() -> None:
    with pytest.raises(ValueError, match=r"beta=0.5, reset_mechanism=subtract: .*set --model.neuron.init_args.beta"):
        FSDDIM(neuron=SpikingNeuron, beta=0.5, reset_mechanism="subtract", base_channels=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.neuron=snntorch.Leaky"], "Leaky needs beta; give --model.neuron.beta VALUE"),
        (["--model.neuron=torch.nn.ReLU"], "ReLU is not a spiking neuron"),
        (["--model.neuron=snntorch.RLeaky", "--model.neuron.beta=0.9"], "linear_features"),
    ],
)
def test_mistakes_are_explained(options: list[str], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        built("SDDPM", *options)


@pytest.mark.slow
def test_train_with_averaged_weights_and_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    neuron = ["--model.neuron=snntorch.Leaky", "--model.neuron.beta=0.9", "--model.neuron.learn_beta=true"]
    averaging = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.5"]
    main(["fit", *TINY, *neuron, *averaging, "--model.num_inference_steps=2"])
    state = torch.load(find_checkpoint(newest_run(Path("runs")), "last"), weights_only=False)["state_dict"]
    betas = [value for key, value in state.items() if key.endswith("neuron.beta")]
    assert len(betas) > 3
    assert all(beta != 0.9 for beta in betas)
    main(["test", "--draft", "--evaluation.protocol=offline-v1", "--data.num_samples=20"])
    record = next(newest_run(Path("runs")).glob("records/*.json")).read_text()
    assert '"class_path": "snntorch.Leaky"' in record
    assert '"incomplete"' not in record
