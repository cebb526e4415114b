"""Mistakes in a method of one's own are found early and named; what it declares is compared with what ran."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snntorch as snn
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor, nn

from benchmark import DiffusionSystem, GaussianDiffusion, SpikingLayer, multistep
from benchmark.cli import main
from benchmark.runs import newest_run
from leaderboard.record.records import Record, find_records, read_record
from systems.spiking.neurons import SpikingLayer as SuiteLayer


class Plain(DiffusionSystem):
    """Maps noise to 8x8 images in several evaluations of a spiking layer with T = 4."""

    def __init__(self) -> None:
        super().__init__()
        self.num_steps, self.num_inference_steps = 4, 3
        self.body, self.head = nn.Linear(64, 32), nn.Linear(32, 64)
        self.neuron = multistep(snn.Leaky(beta=0.9))

    def loss(self, images: Any, generator: torch.Generator | None = None) -> Tensor:
        return (self.step(torch.zeros_like(images)) - images).square().mean()

    def step(self, x: Tensor) -> Tensor:
        spikes = self.neuron(self.body(x.flatten(1)).expand(4, -1, -1))
        return self.head(spikes).mean(0).view_as(x)

    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        x = self.noise(seeds, image_shape)
        for _ in range(3):
            x = self.step(x)
            yield x


class Undeclared(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.num_steps = self.num_inference_steps = 1


class HandWritten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype) + x - x.detach()


class Invisible(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.neuron = HandWritten()


class Registered(SpikingLayer):
    def forward(self, x: Tensor, norm: nn.Module | None = None, temb: Tensor | None = None) -> Tensor:
        return (x > 0).to(x.dtype)


class Visible(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.neuron = Registered()


class Random(Plain):
    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        yield self.step(torch.randn(len(seeds), *image_shape))


class Classes(Plain):
    """Needs the pairs that `with_labels` asks for."""

    with_labels = True
    conditional = 1.0

    def loss(self, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        images, labels = batch
        assert labels.dtype == torch.int64
        return super().loss(images)

    def labels(self, seeds: Tensor) -> Tensor:
        return seeds % 10


class Unmarked(Classes):
    conditional = None


class Weightless(Plain):
    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        yield self.noise(seeds, image_shape)

    def __init__(self) -> None:
        super().__init__()
        self.body = self.head = nn.Identity()  # type: ignore[assignment]
        self.scale = nn.Parameter(torch.ones(()))

    def step(self, x: Tensor) -> Tensor:
        return x * self.scale


class LossOnly(Weightless):
    """Has layers, which only its loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Linear(3, 1)


class Vector(Plain):
    def loss(self, images: Any, generator: torch.Generator | None = None) -> Tensor:
        return (self.step(images) - images).square().flatten(1).mean(1)


class Returns(Plain):
    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        return self.step(self.noise(seeds, image_shape))  # type: ignore[return-value]


class Nothing(Plain):
    def trajectory(self, seeds: Tensor, image_shape: tuple[int, int, int]) -> Iterator[Tensor]:
        yield from ()


class Broadcast(GaussianDiffusion):
    """Forgets the mean over T."""

    def __init__(self) -> None:
        super().__init__(Wide(), DDPMScheduler(), 3)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x).expand(4, *x.shape)


class Contract(Plain):
    @property
    def num_inference_steps(self) -> int:  # type: ignore[override]
        return 3

    @num_inference_steps.setter
    def num_inference_steps(self, value: int) -> None:
        pass


class ReadOnly(DiffusionSystem):
    num_inference_steps = property(lambda self: 3)  # type: ignore[assignment]

    def loss(self, images: Any) -> Tensor:  # type: ignore[override]
        return images.mean()

    def trajectory(self, seeds: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        yield seeds


def fit(method: type[DiffusionSystem], folder: Path, *options: str) -> None:
    common = ["--trainer.max_steps=1", "--data.batch_size=64", "--monitor.every_n_epochs=0", "--data.num_samples=20"]
    common += ["--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}", *options]
    main(["fit", f"--model={__name__}.{method.__name__}", "--data=Digits", *common])


def record_of(method: type[DiffusionSystem], folder: Path) -> Record:
    fit(method, folder)
    main(["test", "--draft", "--evaluation.protocol=offline-v1", f"--trainer.default_root_dir={folder}"])
    return read_record(find_records([folder])[-1])


def test_a_complete_method_is_measured_without_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(Plain, tmp_path)
    assert (record.num_steps, record.nfe, record.conditional) == (4, 3, None)
    assert "note:" not in capsys.readouterr().out


def test_steps_that_are_not_declared_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_of(Undeclared, tmp_path)
    assert "neurons ran 12 steps per image, more than num_steps x nfe = 1 x 1: set" in capsys.readouterr().out


def test_neurons_that_the_meter_cannot_see_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(Invisible, tmp_path / "invisible")
    assert record.cost is not None
    assert record.cost.firing_rate is None
    assert "num_steps is 4, but no spiking layer ran" in capsys.readouterr().out
    record = record_of(Visible, tmp_path / "visible")
    assert record.cost is not None
    assert record.cost.firing_rate
    assert "note:" not in capsys.readouterr().out
    assert SpikingLayer is SuiteLayer


def test_images_that_do_not_follow_from_their_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two different images from the same seed"):
        record_of(Random, tmp_path)


def test_a_method_that_is_trained_on_classes_receives_them_and_is_marked(tmp_path: Path) -> None:
    assert record_of(Classes, tmp_path / "marked").conditional == 1.0
    with pytest.raises(ValueError, match=r"`labels` returns classes, so set `conditional = 1\.0`"):
        record_of(Unmarked, tmp_path / "unmarked")


@pytest.mark.parametrize("method", [Weightless, LossOnly])
def test_a_method_without_weights_has_no_cost(method: type[Plain], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="generates without a convolution, a linear layer or a matrix product"):
        record_of(method, tmp_path)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Vector, r"vector: `loss` returns the shape \(64,\), expected a scalar"),
        (Broadcast, r"the network returns the shape \(4, 64, 1, 8, 8\) for images of shape \(64, 1, 8, 8\)"),
    ],
)
def test_wrong_losses_are_named(method: type[DiffusionSystem], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fit(method, tmp_path)


def test_wrong_samples_are_named() -> None:
    seeds = torch.arange(2)
    with pytest.raises(TypeError, match="returns: `trajectory` returns Tensor; it must yield images"):
        Returns().sample(seeds, (1, 8, 8))
    with pytest.raises(ValueError, match=r"nothing: `trajectory` yields nothing, expected images of shape \(2, 1, 8"):
        Nothing().sample(seeds, (1, 8, 8))


def test_the_contract_includes_signatures_and_names(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError) as error:
        ReadOnly().check_contract()
    for part in ("`loss` must accept (", "`trajectory` must accept (", "`num_inference_steps` must be an attribute"):
        assert part in str(error.value)
    Contract().check_contract()
    unsafe = type("Unsafe", (Plain,), {"method": "own/VAE*", "__module__": __name__})
    globals()["Unsafe"] = unsafe
    with pytest.raises(ValueError, match="method: expected a name of 1 to 100 letters"):
        fit(unsafe, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_method_without_options_is_exported(tmp_path: Path) -> None:
    fit(Plain, tmp_path / "runs")
    main(["export", str(newest_run(tmp_path / "runs")), str(tmp_path / "exported")])
    assert "unconditional-image-generation" in (tmp_path / "exported" / "README.md").read_text()


SDIT = ["--model=SDiT", "--model.image_size=8", "--model.in_channels=1", "--model.embed_dim=8", "--model.depth=2"]


def test_classes_of_own_images_are_given_and_checked(tmp_path: Path) -> None:
    for index in range(40):
        folder = tmp_path / "images" / f"class{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(folder / f"{index}.png")
    data = ["--data=ImageFolder", f"--data.root={tmp_path / 'images'}", "--data.image_size=8", "--data.channels=1"]
    common = ["--trainer.max_steps=1", "--data.batch_size=8", "--monitor.every_n_epochs=0", "--trainer.accelerator=cpu"]
    common += [f"--data.cache_dir={tmp_path / 'cache'}", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    with pytest.raises(ValueError, match=r"classes of datamodules.ImageFolder is not known .* --model.num_classes N"):
        main(["fit", *SDIT, *data, *common])
    with pytest.raises(ValueError, match=r"num_classes=4, but images has 3 classes; give --model.num_classes 3"):
        main(["fit", *SDIT, *data, *common, "--model.num_classes=4"])
    main(["fit", *SDIT, *data, *common, "--model.num_classes=3"])
    assert "num_classes: 3" in (newest_run(tmp_path / "runs") / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('{}["a"]', r"error: KeyError: 'a' \(.*wrong\.py, line 1\)\n"),
        ("def f(:", r"error: SyntaxError: .* \(.*wrong\.py, line 1\)\n"),
        ("import numpy\nimport missing_package", r"No module named 'missing_package' \(.*wrong\.py, line 2\)\ntip"),
        ("from benchmark import SpikingLayer", r"module 'wrong' has no attribute 'Own'"),
    ],
)
def test_errors_in_a_module_of_ones_own_are_named_with_their_place(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wrong", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model=wrong.Own", "--data=Digits"])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown), shown
    assert "Union" not in shown


def test_a_missing_package_is_to_be_put_on_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model=missing_package.Own", "--data=Digits"])
    assert "run in the folder that contains missing_package" in capsys.readouterr().err


class SpikesOnly(snn.Leaky):
    def forward(self, input_: Tensor, mem: Tensor) -> Tensor:
        return super().forward(input_, mem)[0]


class Stateless(snn.Leaky):
    def forward(self, input_: Tensor) -> Tensor:
        return super().forward(input_, input_)[0]


def test_neurons_with_another_interface_are_named() -> None:
    layer = multistep(SpikesOnly(beta=0.9))
    with pytest.raises(ValueError, match=r"SpikesOnly returns the shapes \[\(2, 3\)\] for currents of shape"):
        layer(torch.ones(4, 2, 3))
    with pytest.raises(TypeError, match=r"Stateless.forward\(input_\) takes no state; the suite passes the state"):
        multistep(Stateless(beta=0.9))
