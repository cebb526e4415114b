"""The speed suite measures what it claims to; no test depends on the speed itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmark import stages
from benchmark.cli import main
from benchmark.speed.sampling import _line
from benchmark.speed.steps import _Saved
from benchmark.speed.timing import Products
from systems.spiking.neurons import integrate_and_fire

pytestmark = pytest.mark.slow


def test_floor_counts_convolutions_and_products_of_both_passes() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    with Products() as products:
        network(torch.randn(8, 1, 4, 4)).sum().backward()
    counted = Counter(str(func).removeprefix("aten.").removesuffix(".default") for func, _ in products.calls)
    assert counted == {"convolution": 1, "convolution_backward": 1, "addmm": 1, "mm": 2}
    run = products.work()
    with Products() as repeated:
        run()
    assert Counter(func for func, _ in repeated.calls) == Counter(func for func, _ in products.calls)


def test_floor_reads_the_same_memory_as_the_products() -> None:
    x, weight, other = torch.randn(3, 4, 4)
    with Products() as products:
        for y in (weight, weight.T, weight, other):
            x @ y
    addresses = [[arg.address for arg in args] for _, args in products.calls]
    assert addresses == [[x.data_ptr(), y.data_ptr()] for y in (weight, weight, weight, other)]
    assert products.calls[0] == products.calls[2] != products.calls[1]


def test_saved_memory_is_counted_once_and_spikes_as_bytes() -> None:
    spikes, real = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([0.5, 2.0])
    layer = nn.Linear(2, 2)
    saved = _Saved(layer)
    for tensor in (spikes, spikes, spikes[:2], real, layer.weight):
        assert saved.keep(tensor) is tensor
    assert saved.bytes == 16 + 8
    assert saved.with_small_spikes == 4 + 8


def test_growth_is_a_straight_line() -> None:
    line = _line([(2, 0.005), (4, 0.009), (8, 0.017)])
    assert line["ms at 0"] == pytest.approx(1)
    assert line["ms each"] == pytest.approx(2)
    assert line["R²"] == "1.0000"


def test_steps_are_measured_and_save_less_than_plain_autograd(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], uncompiled: None
) -> None:
    configs = "--configs=[regress/sddpm, regress/sdit, regress/spiking_diffusion]"
    options = [configs, "--batch_size=2", "--repetitions=1"]
    main(["speed", "--parts=[step]", *options, f"--output={tmp_path}"])
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["about"]["threads"] == torch.get_num_threads()
    steps = [(row["config"], row["step"]) for row in result["step"]]
    assert steps == [
        ("regress/sddpm", "training"),
        ("regress/sddpm", "denoising"),
        ("regress/sdit", "training"),
        ("regress/sdit", "denoising"),
        ("regress/spiking_diffusion", "training, stage 1"),
        ("regress/spiking_diffusion", "training, stage 2"),
        ("regress/spiking_diffusion", "denoising"),
    ]
    for row in result["step"]:
        assert row["over floor"] == pytest.approx(row["ms"] / row["floor ms"])
        if "training" in row["step"]:
            assert 0 < float(row["of plain autograd"]) < 1
        assert (row["WKV"] != "") == (row["config"] == "regress/sdit" and row["step"] == "denoising")
    assert "over floor" in capsys.readouterr().out


def test_neurons_save_less_than_plain_autograd() -> None:
    neuron, x = integrate_and_fire(), torch.randn(4, 2, 8, 4, 4, requires_grad=True)
    kept = []
    for layer in (neuron, neuron.stepwise):
        saved = _Saved(nn.Identity())
        with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            layer(x)
        kept.append(saved.with_small_spikes)
    assert kept[0] == x.untyped_storage().nbytes()  # only its input
    assert kept[0] < kept[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--repetitions=0"], "use 1 or more"),
        (["--configs=[nothing]"], "nothing is unknown"),
        (["--parts=[wheels]"], "wheels"),
    ],
)
def test_wrong_options_are_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ValueError, SystemExit)) as error:
        main(["speed", *options])
    assert said in str(error.value) + capsys.readouterr().err


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for supported, precision in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert stages.fastest_precision("cpu") == stages.fastest_precision("auto") == precision
    assert stages.fastest_precision("mps") == "32-true"


def test_half_precision_trains_with_clipped_gradients(tmp_path: Path, uncompiled: None) -> None:
    options = ["--trainer.precision=bf16-mixed", "--trainer.max_steps=2", "--data.batch_size=64"]
    quiet = ["--trainer.enable_progress_bar=false", "--monitor.every_n_epochs=0"]
    root = f"--trainer.default_root_dir={tmp_path}"
    main(["fit", "--config=configs/quickstart.yaml", "--trainer.gradient_clip_val=1.0", *options, *quiet, root])
    (config,) = tmp_path.glob("*/config.yaml")
    assert "precision: bf16-mixed" in config.read_text()
