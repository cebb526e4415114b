from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from spiking_diffusion_reference import check_gradients, load
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.cli import main
from benchmark.commands.activity import measure_spikes
from benchmark.runs import find_checkpoint, newest_run
from leaderboard.evaluation.cost import CostMeter
from leaderboard.record.records import read_record
from systems import SpikingDiffusion
from systems.checkpoints import CheckpointMismatchError
from systems.diffusion.absorbing import _draw, denoising_loss, unmask
from systems.figures import perplexity
from systems.spiking_diffusion import _rename, _variance

pytestmark = pytest.mark.slow

Reference = Callable[[str], dict[str, Tensor]]
SIZE = dict(num_codes=8, code_channels=4, autoencoder_channels=4, base_channels=4, num_steps=2, num_train_timesteps=4)
SHAPE = (1, 8, 8)


@pytest.fixture(autouse=True, scope="module")
def _uncompiled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("systems.ops.compiled.COMPILE_FROM", sys.maxsize)  # compilation takes longer than these tests
        yield


@pytest.fixture
def recorded(reference: Reference) -> dict[str, Tensor]:
    return reference("sdid_small.safetensors")


def small(**arguments: object) -> SpikingDiffusion:
    torch.manual_seed(0)
    return SpikingDiffusion(**(SIZE | arguments)).eval()


# The published method


@pytest.mark.parametrize("objective", ["reweighted_elbo", "elbo"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_reproduces_the_losses(objective: str, mode: str, recorded: dict[str, Tensor], reference: Reference) -> None:
    system = load(reference).train(mode == "train")
    codes, t = recorded["loss.x0"].squeeze(1), recorded["loss.t"]
    masked = recorded["loss.u"].squeeze(1) < (t / 49)[:, None, None]
    assert torch.equal(masked, recorded["loss.target_ignore"].squeeze(1) != -1)
    logits = system.denoiser(codes.masked_fill(masked, system.mask_id), t)
    loss = denoising_loss(logits, codes, masked, t, 49, objective)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, recorded[f"loss.{objective}.{mode}"].squeeze(), rtol=1e-5, atol=1e-5)
    if (objective, mode) == ("reweighted_elbo", "train"):
        loss.backward()
        theirs = {_rename(k.removeprefix("loss.grad.")): v for k, v in recorded.items() if k.startswith("loss.grad.")}
        check_gradients({name: p.grad for name, p in system.denoiser.named_parameters()}, theirs, floor=1e-3)


def test_reproduces_the_sampling_loop(recorded: dict[str, Tensor], reference: Reference) -> None:
    system = load(reference).eval()
    chances = recorded["sample.u"].squeeze(2)  # (49, B, h, w)
    uniforms = torch.stack([chances, torch.zeros_like(chances)], dim=2)
    masked = torch.ones(chances.shape[1:], dtype=torch.bool)
    with torch.no_grad():  # at this temperature the likeliest code is drawn, as recorded
        states = [tokens for tokens, _ in unmask(system.denoiser, masked, uniforms, 49, system.mask_id, 1e-6)]
    assert torch.equal(torch.stack(states[:-1]), recorded["sample.x_before_step"].squeeze(2))
    assert torch.equal(states[-1], recorded["sample.x_final"].squeeze(1))


class Uniform(nn.Module):
    """Predicts four equally likely codes."""

    def forward(self, tokens: Tensor, t: Tensor) -> Tensor:
        return torch.zeros(len(tokens), 4, *tokens.shape[1:])


@pytest.mark.parametrize("num_steps", [1, 3, 16])
def test_every_token_is_filled_once(num_steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(num_steps, 2, 2, 4, 4, generator=generator)
    states = list(unmask(Uniform(), torch.ones(2, 4, 4, dtype=torch.bool), uniforms, num_steps, 4, 1.0))
    assert len(states) == num_steps + 1
    assert (states[0][0] == 4).all()
    for (before, masked), (after, still) in pairwise(states):
        assert torch.equal(before[~masked], after[~masked])
        assert not (still & ~masked).any()
    tokens, masked = states[-1]
    assert not masked.any()
    assert tokens.max() < 4


def test_codes_are_drawn_from_their_distribution() -> None:
    logits = torch.tensor([0.1, 0.2, 0.0, 0.7]).log().view(1, 4, 1, 1).expand(1, 4, 100, 100)
    u = torch.rand(1, 100, 100, generator=torch.Generator().manual_seed(0))
    shares = _draw(logits, u).flatten().bincount(minlength=4) / 10_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.0, 0.7]), rtol=0, atol=0.02)
    assert _draw(logits, torch.full_like(u, 1.0)).max() == 3  # the sum of probabilities may round to less


def test_weights_of_the_objectives() -> None:
    codes, logits = torch.zeros(2, 2, 2, dtype=torch.long), torch.zeros(2, 4, 2, 2)
    masked = torch.ones(2, 2, 2, dtype=torch.bool)
    t = torch.tensor([1, 4])
    bits = 2  # of four equally likely codes
    assert denoising_loss(logits, codes, masked, t, 4, "elbo").item() == pytest.approx(bits * (4 + 1) / 2)
    assert denoising_loss(logits, codes, masked, t, 4, "reweighted_elbo").item() == pytest.approx(bits * 0.75 / 2)
    assert denoising_loss(logits, codes, ~masked, t, 4, "elbo") == 0


def test_a_seed_determines_its_image() -> None:
    system = small()
    together = system.sample(torch.tensor([3, 4, 5]), SHAPE)
    torch.testing.assert_close(system.sample(torch.tensor([5, 4]), SHAPE), together[[2, 1]], rtol=0, atol=1e-5)
    assert system.solver == "absorbing"
    with torch.no_grad():
        states = list(system.trajectory(torch.tensor([3, 4, 5]), SHAPE))
    assert len(states) == system.nfe + 1 == 5
    torch.testing.assert_close(states[-1], together, rtol=0, atol=0)
    assert torch.equal(states[0][0], states[0][2])  # all masked
    assert together.abs().max() <= 1


def test_sampling_counts_the_denoiser_and_one_decoding() -> None:
    system = small()
    with CostMeter(system.network) as meter:
        system.sample(torch.arange(2), SHAPE)
    cost = meter.take().cost(system.network, 2, system.nfe)
    assert cost.parameters == sum(p.numel() for p in system.parameters())
    assert set(cost.firing_rates) == {
        *(f"denoiser.layers.{i}.2" for i in range(5)),
        "autoencoder.generator.2",
        "autoencoder.decoder.0.2",
        "autoencoder.decoder.1.2",
    }
    first_layer, generator = (
        4 * 2 * 9 * 4 * system.nfe,
        4 * 4 * 4,
    )  # real-valued inputs; the generator runs once for all SNN steps
    assert cost.macs == first_layer + generator


def test_activity_has_a_row_for_each_layer_of_the_denoiser_and_a_column_for_each_step() -> None:
    counts = measure_spikes(small(), torch.arange(2), SHAPE)
    assert counts.rates().shape == (5, 4)
    assert 0 < counts.rates().mean() < 1


def test_larger_grids_and_colours() -> None:
    system = small(in_channels=3, num_train_timesteps=16)
    assert system.sample(torch.arange(2), (3, 16, 16)).shape == (2, 3, 16, 16)


def test_loss_before_stage_two_uses_uniform_logits() -> None:
    system = small(data_variance=0.1)
    images = torch.rand(4, *SHAPE) * 2 - 1
    before = system.loss(images, torch.Generator().manual_seed(0))
    logits = torch.zeros(1, 8, 1, 1)
    assert F.cross_entropy(logits, torch.zeros(1, 1, 1, dtype=torch.long)).item() == pytest.approx(math.log(8))
    system._in_stage_two = True
    assert system.loss(images, torch.Generator().manual_seed(0)) != before


def test_variance_and_perplexity() -> None:
    images = torch.rand(10, 1, 4, 4) * 2 - 1
    assert _variance(images.split(3)) == pytest.approx(((images + 1) / 2).var().item(), rel=1e-5)
    assert perplexity(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([7, 0])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_id": 9}, "mask_id=9 is outside the codebook of 8 codes"),
        ({"mask_id": -1}, "mask_id=-1"),
        ({"num_inference_steps": 5}, "from 1 to 4"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"denoiser_epochs": -1}, "denoiser_epochs=-1"),
        ({"data_variance": 0.0}, "data_variance=0"),
        ({"gradient_clip_val": 0.0}, "gradient_clip_val=0.0 is not a norm"),
        ({"num_codes": 1}, "num_codes=1"),
        ({"threshold": 0.0}, "not a firing threshold"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize("shape", [(1, 10, 10), (3, 8, 8)])
def test_images_without_a_grid_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        small().sample(torch.arange(1), shape)


# From the command line

OPTIONS = [
    "--config=configs/spiking_diffusion_mnist.yaml",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=2",
    *(f"--model.{name}={value}" for name, value in SIZE.items()),
    "--model.num_inference_steps=null",
    "--model.autoencoder_epochs=2",
    "--model.denoiser_epochs=2",
    "--data=Digits",
    "--data.image_size=8",
    "--data.batch_size=400",
    "--data.val_size=100",
    "--data.num_samples=30",
    "--data.sample_batch_size=30",
    "--monitor.every_n_epochs=1",
    "--evaluation.protocol=offline-v1",
]


def fit(folder: Path, *options: str) -> Path:
    main(["fit", *OPTIONS, f"--trainer.default_root_dir={folder}", *options])
    return newest_run(folder)


def weights(run: Path) -> dict[str, Tensor]:
    return torch.load(find_checkpoint(run), weights_only=True)["state_dict"]


def same(name: str, first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    keys = [key for key in first if key.startswith(f"network.{name}.")]
    assert keys
    return all(torch.equal(first[key], second[key]) for key in keys)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages, two epochs of three steps each."""
    return fit(tmp_path_factory.mktemp("both"))


def test_one_command_trains_both_stages(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    content = torch.load(find_checkpoint(run), weights_only=True)
    assert content["global_step"] == 12
    assert content["in_stage_two"]
    steps = [{int(s["step"]) for s in o["state"].values()} for o in content["optimizer_states"]]
    assert steps == [{6}, {6}]
    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/stage", "val/loss", "codebook/perplexity", "codebook/dead_codes"} <= set(
        tags["scalars"]
    )
    assert [s.value for s in events.Scalars("train/stage")] == [1, 1, 1, 2, 2, 2]
    for layer in ("autoencoder.encoder.0.2", "autoencoder.generator.2", "denoiser.layers.4.2"):
        assert f"firing_rate/{layer}" in tags["scalars"]
    assert len(events.Scalars("codebook/perplexity")) == 4
    assert {"samples", "denoising", "reconstructions", "codebook"} <= set(tags["images"])
    assert len(events.Images("samples")) == 2  # none before stage two
    assert len(events.Images("reconstructions")) == 4
    losses = [s.value for s in events.Scalars("val/loss")]
    assert losses[-1] < losses[0]


def test_record_contains_reconstruction_and_generation_metrics(run: Path) -> None:
    checkpoint = find_checkpoint(run)
    main(["test", "--draft", f"--ckpt_path={checkpoint}", "--model.temperature=0.5", "--model.num_inference_steps=3"])
    record = read_record(sorted((run / "records").glob("*.json"))[-1])
    assert (record.method, record.num_steps, record.nfe) == ("spiking-diffusion", 2, 3)
    assert record.solver == "absorbing(temperature=0.5)"
    assert record.metrics["fd_digits"].num_samples == 30
    assert 0 < record.metrics["reconstruction_mse"].value < 0.5
    assert -1 < record.metrics["reconstruction_ssim"].value < 1
    assert record.metrics["reconstruction_mse"].uncertainty > 0
    assert not any("encoder.encoder" in name for name in record.cost.firing_rates)


def test_released_measures_of_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the released formula: unclipped outputs, images in [-0.5, 0.5], zero padding."""
    monkeypatch.setattr(SpikingDiffusion, "_image_shape", (1, 28, 28))
    system = small().eval()
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = images / 2
    with torch.no_grad():
        y = system.autoencoder(x).images
    places = torch.arange(11.0) - 5
    line = torch.exp(-places.square() / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window, padding=5)

    variances = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    similar = (2 * mean(x) * mean(y) + 1e-4) * (2 * covariance + 9e-4)
    similar /= (mean(x) ** 2 + mean(y) ** 2 + 1e-4) * (variances + 9e-4)
    found = system.reconstruction_metrics(images.split(3))
    assert found["reconstruction_mse_released"][0] == pytest.approx(float((x - y).square().mean()), rel=1e-5)
    assert found["reconstruction_dssim_released"][0] == pytest.approx(float(1 - similar.mean()), rel=1e-4)
    assert found["reconstruction_ssim"][0] != pytest.approx(1 - found["reconstruction_dssim_released"][0], rel=1e-2)


def test_validate_and_predict(run: Path) -> None:
    main(["validate", f"--ckpt_path={find_checkpoint(run)}"])
    main(["predict", f"--ckpt_path={find_checkpoint(run)}", "--data.num_samples=3"])
    assert len(list((run / "samples").glob("0*.png"))) == 3


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_killed_run_resumes_in_its_stage(epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = SpikingDiffusion.on_train_epoch_start

    def killed(system: SpikingDiffusion) -> None:
        if system.current_epoch == epochs:
            raise RuntimeError("killed")
        start(system)

    monkeypatch.setattr(SpikingDiffusion, "on_train_epoch_start", killed)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, "--monitor.every_n_epochs=0")
    monkeypatch.setattr(SpikingDiffusion, "on_train_epoch_start", start)
    run = newest_run(tmp_path)
    before = torch.load(find_checkpoint(run), weights_only=True)
    assert before["global_step"] == 3 * epochs
    assert before["in_stage_two"] == (epochs == 3)
    main(["fit", f"--config={run / 'config.yaml'}", f"--ckpt_path={find_checkpoint(run)}"])
    assert newest_run(tmp_path) == run
    ended = torch.load(find_checkpoint(run), weights_only=True)
    assert ended["global_step"] == 12
    assert [{int(s["step"]) for s in o["state"].values()} for o in ended["optimizer_states"]] == [{6}, {6}]
    assert same("autoencoder", before["state_dict"], ended["state_dict"]) == (epochs == 3)
    assert not same("denoiser", before["state_dict"], ended["state_dict"])


def test_each_stage_has_its_own_schedule_and_gradients_are_clipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = SpikingDiffusion.on_train_epoch_start

    def killed(system: SpikingDiffusion) -> None:
        if system.current_epoch == 3:
            raise RuntimeError("killed")
        start(system)

    schedule = ["--model.lr_scheduler=StepLR", "--model.lr_scheduler.step_size=2", "--model.lr_scheduler.gamma=0.5"]
    monkeypatch.setattr(SpikingDiffusion, "on_train_epoch_start", killed)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, "--monitor.every_n_epochs=0", *schedule, "--model.gradient_clip_val=0.001")
    monkeypatch.setattr(SpikingDiffusion, "on_train_epoch_start", start)
    run = newest_run(tmp_path)
    before = torch.load(find_checkpoint(run), weights_only=True)
    assert [state["last_epoch"] for state in before["lr_schedulers"]] == [6, 3]  # steps of each stage
    norms: list[float] = []
    clip = SpikingDiffusion.clip_gradients

    def watched(system: SpikingDiffusion, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        clip(system, optimizer, *args)
        gradients = [p.grad.flatten() for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))

    monkeypatch.setattr(SpikingDiffusion, "clip_gradients", watched)
    main(["fit", f"--ckpt_path={find_checkpoint(run)}"])
    ended = torch.load(find_checkpoint(run), weights_only=True)
    assert [state["last_epoch"] for state in ended["lr_schedulers"]] == [6, 6]
    rates = [group["lr"] for state in ended["optimizer_states"] for group in state["param_groups"]]
    assert rates == pytest.approx([0.001 / 8] * 2)
    assert norms == pytest.approx([0.001] * 3, rel=1e-3)


def test_gradients_are_clipped_in_half_precision_unless_they_are_scaled(tmp_path: Path) -> None:
    options = ["--monitor.every_n_epochs=0", "--model.gradient_clip_val=0.001", "--trainer.max_epochs=1"]
    fit(tmp_path / "bf16", *options, "--trainer.precision=bf16-mixed")
    assert find_checkpoint(newest_run(tmp_path / "bf16")).is_file()
    system = SpikingDiffusion(**SIZE, gradient_clip_val=1.0, data_variance=1.0)
    system.trainer = Trainer(accelerator="cpu", logger=False, max_epochs=1)
    system.trainer.strategy.precision_plugin.precision = "16-mixed"  # which needs a GPU
    with pytest.raises(ValueError, match="would clip the scaled gradients"):
        system.setup("fit")


def test_stage_two_continues_from_a_separate_stage_one(tmp_path: Path) -> None:
    first = fit(tmp_path / "one", "--model.denoiser_epochs=0", "--data.val_size=0")
    assert (first / "plots" / "reconstructions.png").is_file()  # although there are no validation images
    assert torch.load(find_checkpoint(first), weights_only=True)["global_step"] == 6
    with pytest.warns(UserWarning, match="this checkpoint is of stage one"):
        main(["test", "--draft", f"--ckpt_path={find_checkpoint(first)}"])
    content = torch.load(find_checkpoint(first), weights_only=True)
    torch.save(content | {"training_data": [{"name": "unknown"}]}, find_checkpoint(first))
    second = fit(tmp_path / "two", f"--model.init_from={find_checkpoint(first)}", "--model.denoiser_epochs=1")
    ended = torch.load(find_checkpoint(second), weights_only=True)
    assert (ended["global_step"], [data["name"] for data in ended["training_data"]]) == (3, ["unknown", "digits"])
    assert same("autoencoder", weights(first), weights(second))
    assert not same("denoiser", weights(first), weights(second))
    more = ["--model.denoiser_epochs=1", "--monitor.every_n_epochs=0"]  # or in the same run
    main(["fit", f"--config={first / 'config.yaml'}", f"--ckpt_path={find_checkpoint(first)}", *more])
    ended = torch.load(find_checkpoint(first), weights_only=True)
    assert (ended["global_step"], ended["in_stage_two"]) == (9, True)


def test_stage_two_needs_stage_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage two needs the codes of stage one; give --model\.init_from"):
        fit(tmp_path, "--model.autoencoder_epochs=0")
    with pytest.raises(ValueError, match="nothing to train"):
        fit(tmp_path, "--model.autoencoder_epochs=0", "--model.denoiser_epochs=0")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        fit(tmp_path, "--model.init_from=nowhere.ckpt")
    with pytest.raises(CheckpointMismatchError, match="does not fit the configured network"):
        fit(tmp_path, f"--model.init_from={find_checkpoint(run)}", "--model.num_codes=16")
    other = torch.load(find_checkpoint(run), weights_only=True) | {"method": "sddpm"}
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointMismatchError, match="is of method 'sddpm', expected 'spiking-diffusion'"):
        fit(tmp_path, f"--model.init_from={tmp_path / 'other.ckpt'}")


@pytest.mark.parametrize("option", ["--model.num_train_timesteps=3", "--model.mask_id=0"])
def test_other_processes_are_refused(option: str, run: Path) -> None:
    with pytest.raises(CheckpointMismatchError, match="was trained with"):
        main(["test", "--draft", f"--ckpt_path={find_checkpoint(run)}", option])


def test_collapse_warns_once_with_its_numbers() -> None:
    system = small(num_codes=32)
    system._usage = torch.tensor([100] + 31 * [0])
    system._trainer = None
    with pytest.warns(UserWarning, match=r"codebook collapse: 1 of 32 codes .* perplexity 1\.0"):
        system._warn_of_collapse()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        system._warn_of_collapse()
    assert set(system.figures()) == {"codebook"}


def test_batches_of_stage_two_are_shuffled_unless_fixed(tmp_path: Path) -> None:
    orders: dict[bool, list[Tensor]] = {}
    for fixed in (False, True):
        seen = orders[fixed] = []
        system = small(fixed_batches=fixed)
        system._codes = torch.zeros(20, 2, 2, dtype=torch.uint8)
        system.autoencoder_epochs = 0
        system._trainer = type("Trainer", (), {"world_size": 1, "global_rank": 0, "current_epoch": 0})()  # type: ignore[assignment]
        for epoch in range(2):
            system._trainer.current_epoch = epoch  # type: ignore[union-attr, misc]
            system.on_train_epoch_start()
            seen.append(copy.deepcopy(system._order))
    assert not torch.equal(*orders[False])
    assert torch.equal(*orders[True])
    assert orders[True][0].sort().values.tolist() == list(range(20))
