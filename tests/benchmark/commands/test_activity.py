"""A tiny FSDDIM through the command line, from training to the pictures of its activity."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmark.cli import main
from benchmark.commands.activity import draw_denoising, draw_spikes, measure_spikes
from benchmark.runs import find_checkpoint, load_run, newest_run
from datamodules import Digits
from leaderboard.evaluation.cost import CostMeter
from leaderboard.metrics.fad import FADEncoder
from leaderboard.record.records import read_record
from systems import DDPM, FSDDIM, SDDPM, SpikingDiffusion

pytestmark = pytest.mark.slow


def tiny(method: type[FSDDIM] | type[SDDPM]) -> FSDDIM | SDDPM:
    torch.manual_seed(0)
    sizes = dict(in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_steps=2)
    return method(**sizes, num_inference_steps=3).eval()


@pytest.mark.parametrize("method", [FSDDIM, SDDPM])
def test_spikes_are_those_of_the_cost_meter(method: type[FSDDIM] | type[SDDPM]) -> None:
    system, seeds = tiny(method), torch.arange(2)
    counts = measure_spikes(system, seeds, (1, 8, 8))
    with CostMeter(system.network) as meter:
        system.sample(seeds, (1, 8, 8))
    expected = meter.take().cost(system.network, 2, 3).firing_rates
    rates = counts.rates()
    assert rates.shape == (len(expected), 3)
    for name, row in zip(counts.spikes, rates, strict=True):
        assert float(row.mean()) == pytest.approx(expected[name]), name
    figure = draw_spikes(counts, "title")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(counts.spikes)
    assert not any(module._forward_hooks for module in system.network.modules())


def test_of_spiking_diffusion_the_denoiser_is_shown() -> None:
    sizes = dict(in_channels=1, base_channels=4, num_codes=8, code_channels=4, num_steps=2)
    system = SpikingDiffusion(**sizes, num_train_timesteps=4, num_inference_steps=2, data_variance=1.0).eval()
    counts = measure_spikes(system, torch.arange(2), (1, 8, 8))
    with CostMeter(system) as meter:
        system.sample(torch.arange(2), (1, 8, 8))
    updates = meter.take().cost(system, 2, 2).counts
    assert updates is not None
    for name, per_step in counts.neurons.items():
        assert 2 * per_step == updates.neurons[f"network.denoiser.{name}"].updates, name
    assert sum(name.startswith("network.denoiser.") for name in updates.neurons) == len(counts.neurons)


@pytest.mark.parametrize(
    ("method", "rows"), [(FSDDIM, ["SNN step 1", "SNN step 2", "mean"]), (SDDPM, ["seed 5", "seed 6"])]
)
def test_strip_shows_currents_or_images(method: type[FSDDIM] | type[SDDPM], rows: list[str]) -> None:
    figure = draw_denoising(tiny(method), Digits(), torch.tensor([5, 6]), columns=3)
    axes = np.array(figure.axes).reshape(len(rows), 3)
    assert [axis.get_ylabel() for axis in axes[:, 0]] == rows
    assert [axis.get_title() for axis in axes[0]] == ["noise", "step 2", "step 3"]
    if method is FSDDIM:
        spreads = [float(axis.get_xlabel()) for axis in axes[-1]]
        assert spreads[0] == 0
        assert min(spreads[1:]) > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random digits under `data/`, FAD files of random weights under `fad/`, and one run of two steps under `runs/`."""
    folder = tmp_path_factory.mktemp("fsddim")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for k in range(30):
            path = folder / "data" / split / str(k % 2) / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(path)
    for name in ("stat_checkpoints", "stats"):
        (folder / "fad" / name).mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(FADEncoder(1, 64).state_dict(), folder / "fad" / "stat_checkpoints" / "mnist_64.pth")
    np.savez(folder / "fad" / "stats" / "mnist_test_64.npz", mu=np.zeros(64), sigma=np.eye(64))
    options = [
        "--config=configs/fsddim_mnist.yaml",
        f"--data.root={folder / 'data'}",
        f"--data.cache_dir={folder / 'cache'}",
        "--data.batch_size=10",
        "--data.val_size=4",
        "--data.num_samples=24",
        "--data.sample_batch_size=12",
        "--model.base_channels=4",
        "--model.channel_mult=[1, 2]",
        "--model.num_res_blocks=1",
        "--model.num_steps=2",
        "--model.num_inference_steps=3",
        "--trainer.max_steps=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--monitor.num_inference_steps=2",
        "--monitor.every_n_epochs=1",
        f"--trainer.default_root_dir={folder / 'runs'}",
    ]
    main(["fit", *options])
    return folder


def test_loss_terms_are_logged_one_by_one(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(newest_run(folder / "runs")))
    events.Reload()
    terms = {name: events.Scalars(f"train/{name}")[0].value for name in ("loss", "loss_image", "loss_reconstruction")}
    assert terms["loss"] == pytest.approx(terms["loss_image"] + terms["loss_reconstruction"])
    assert {"train/loss_spike", "val/loss", "firing_rate/downs.0.0.neuron1"} <= set(events.Tags()["scalars"])
    assert {"samples", "denoising"} <= set(events.Tags()["images"])


def test_record_has_both_autoencoder_distances(folder: Path) -> None:
    extractor = folder / "mnist.safetensors"
    places = ["--root", str(folder / "data"), "--output", str(extractor)]
    places += ["--data_options", json.dumps({"cache_dir": str(folder / "cache")})]  # not that of the user
    main(["train-extractor", "mnist", "--epochs", "1", *places])
    run = newest_run(folder / "runs")
    options = [
        f"--trainer.default_root_dir={folder / 'runs'}",
        "--trainer.precision=32-true",  # the two samplers round differently, and spikes are all or nothing
        "--evaluation.protocol=offline-v1",
        f"--evaluation.extractor={extractor}",
        f"--evaluation.fad_dir={folder / 'fad'}",
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the fused sampler transmits")
        main(["test", "--draft", *options, "--model.fused=true"])
        main(["test", "--draft", *options])
    fused, plain = sorted(map(read_record, (run / "records").glob("*.json")), key=lambda r: r.solver, reverse=True)
    assert (fused.method, fused.solver, plain.solver) == ("fsddim", "DDIM in currents, fused", "DDIM in currents")
    for key in ("fd_mnist", "fad_eval", "fad_published"):
        assert fused.metrics[key].value == pytest.approx(plain.metrics[key].value, rel=1e-4)
        assert fused.metrics[key].num_samples == 24
        assert fused.metrics[key].uncertainty > 0
    assert fused.cost.parameters == plain.cost.parameters
    assert fused.cost.macs != plain.cost.macs


def test_pictures_are_drawn_from_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = find_checkpoint(newest_run(folder / "runs"))
    main(["activity", f"--ckpt_path={checkpoint}", "--num_images=2", "--num_inference_steps=2"])
    shown = capsys.readouterr().out
    for name in ("spikes", "denoising"):
        path = checkpoint.parent.parent / "activity" / f"{name}.png"
        assert str(path) in shown
        assert min(Image.open(path).size) > 200


def test_run_is_loaded_as_trained(folder: Path) -> None:
    checkpoint = find_checkpoint(newest_run(folder / "runs"))
    system, data = load_run(checkpoint)
    assert (type(system).__name__, data.name, system.training) == ("FSDDIM", "mnist", False)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, tensor in system.state_dict().items():
        assert torch.equal(tensor, saved[name]), name


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt is not a file; name a checkpoint"):
        main(["activity", f"--ckpt_path={tmp_path / 'none.ckpt'}"])
    (tmp_path / "other.ckpt").touch()
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        main(["activity", f"--ckpt_path={tmp_path / 'other.ckpt'}"])
    with pytest.raises(ValueError, match="num_images=0; give 1 or more"):
        main(["activity", "--num_images=0"])


def test_networks_without_spikes_are_refused() -> None:
    system = DDPM(in_channels=1, base_channels=32, channel_mult=(1, 2), num_res_blocks=1, num_inference_steps=2)
    with pytest.raises(ValueError, match="has no spiking layer, but `activity` plots spikes"):
        measure_spikes(system, torch.arange(2), (1, 8, 8))
