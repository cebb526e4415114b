from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recordings import check_firing_rates, check_gradients_and_statistics
from torch import Tensor, nn

from benchmark.cli import main
from benchmark.runs import find_checkpoint, newest_run
from systems import SDDPM, SDM
from systems.checkpoints import CheckpointMismatchError
from systems.networks.spiking_unet import SpikingUNet, TemporalConv2d
from systems.sdm import from_sddpm, read_official, temporal_factors
from systems.spiking.neurons import scale_thresholds

pytestmark = pytest.mark.slow

SIZE = dict(in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_steps=3)


@pytest.fixture(scope="module")
def recorded(reference: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    return reference("sdm_tsm_small.safetensors")


@pytest.fixture
def network(recorded: dict[str, Tensor]) -> SpikingUNet:
    state = {key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}
    tensors, arguments = read_official(state)
    assert arguments == dict(in_channels=1, base_channels=32, channel_mult=[1, 2], num_res_blocks=1, num_steps=4)
    network = SpikingUNet(**arguments, temporal_scaling=True)
    network.load_state_dict(tensors)
    return network


@pytest.mark.parametrize(
    ("key", "training", "threshold"),
    [("output.eval", False, 1.0), ("output.eval_threshold_0.997", False, 0.997), ("output.train", True, 1.0)],
)
def test_reproduces_released_network(
    key: str, training: bool, threshold: float, network: SpikingUNet, recorded: dict[str, Tensor]
) -> None:
    network.train(training)
    scale_thresholds(network, threshold)
    output = network(recorded["input.x"], recorded["input.t"])
    torch.testing.assert_close(output, recorded[key], rtol=0, atol=1e-5)


def test_reproduces_gradients_and_statistics(network: SpikingUNet, recorded: dict[str, Tensor]) -> None:
    assert any(key.startswith("grad.param_train.") for key in recorded)
    check_gradients_and_statistics(network, recorded)


def test_reproduces_firing_rates(network: SpikingUNet, recorded: dict[str, Tensor]) -> None:
    assert any(key.startswith("rate.eval.") for key in recorded)
    check_firing_rates(network, recorded)


@pytest.mark.parametrize("num_steps", [4, 8])
def test_full_size_counts(num_steps: int) -> None:
    with torch.device("meta"):
        network = SpikingUNet(num_steps=num_steps, temporal_scaling=True)
    assert sum(p.numel() for p in network.parameters()) == 66_696_413 + 67 * num_steps
    assert len(network.state_dict()) == 522
    assert (
        len(temporal_factors(SpikingUNet(**SIZE, temporal_scaling=True)))
        == sum(isinstance(m, nn.Conv2d) for m in SpikingUNet(**SIZE).modules()) - 1
    )  # all but T_output_layer


def test_before_training_equals_its_sddpm_exactly() -> None:
    torch.manual_seed(0)
    sddpm = SpikingUNet(**SIZE)
    sdm = SpikingUNet(**SIZE, temporal_scaling=True)
    sdm.load_state_dict(from_sddpm(sddpm.state_dict(), sdm))
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    for training in (True, False):
        assert torch.equal(sdm.train(training)(x, t), sddpm.train(training)(x, t))


def test_factor_scales_the_current_of_its_step() -> None:
    conv = TemporalConv2d(2, 1, 1, 1)
    nn.init.constant_(conv.tsmconv.weight, 2.0)
    nn.init.constant_(conv.tsmconv.bias, 1.0)  # type: ignore[arg-type]
    conv.tsmp.data = torch.tensor([0.5, 3.0]).view(2, 1, 1, 1, 1)
    out = conv(torch.ones(2, 1, 1, 1))  # T = 2, B = 1
    assert out.flatten().tolist() == [1.5, 9.0]  # the bias is scaled too


def test_training_from_scratch_initialises_every_convolution_alike() -> None:
    torch.manual_seed(0)
    network = SpikingUNet(**SIZE, temporal_scaling=True)
    assert network.tail_conv.tsmconv.weight.abs().max() > 0.05
    assert network.conv_identity.tsmconv.bias.abs().max() == 0
    assert network.T_output_layer.bias.abs().max() > 0


OPTIONS = [
    "--config=configs/quickstart.yaml",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--model.base_channels=8",
    "--model.num_inference_steps=3",
    "--data.batch_size=256",
    "--data.num_samples=30",
    "--monitor.num_inference_steps=2",
]


@pytest.fixture(scope="module")
def sddpm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sddpm")
    main(
        ["fit", *OPTIONS, f"--trainer.default_root_dir={folder}", "--trainer.max_steps=3", "--monitor.every_n_epochs=0"]
    )
    return newest_run(folder)


def test_fine_tuning_starts_from_the_sddpm(sddpm_run: Path, tmp_path: Path) -> None:
    source = find_checkpoint(sddpm_run)
    content = torch.load(source, weights_only=True)
    assert [data["name"] for data in content["training_data"]] == ["digits"]
    torch.save(content | {"training_data": [{"name": "fmnist", "fingerprint": "f" * 64}]}, source)
    options = [*OPTIONS, "--model=SDM", f"--model.init_from={source}", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *options, "--trainer.max_steps=2", "--model.optimizer.lr=1e-12", "--monitor.every_n_epochs=1"])
    run = newest_run(tmp_path)
    assert run.name.startswith("digits-sdm-")
    tuned = torch.load(find_checkpoint(run), weights_only=True)
    first = torch.load(source, weights_only=True)["state_dict"]
    assert tuned["method"] == "sdm"
    assert [data["name"] for data in tuned["training_data"]] == ["fmnist", "digits"]
    name = "network.downblocks.0.conv1"
    torch.testing.assert_close(tuned["state_dict"][f"{name}.tsmconv.weight"], first[f"{name}.weight"])
    assert tuned["state_dict"][f"{name}.tsmp"].shape == (2, 1, 1, 1, 1)
    assert (run / "plots" / "temporal_factors.png").stat().st_size > 10_000
    source.rename(tmp_path / "moved.ckpt")  # needed neither for testing nor for resuming
    try:
        main(["test", "--draft", f"--trainer.default_root_dir={tmp_path}"])
        main(["fit", f"--config={run / 'config.yaml'}", f"--ckpt_path={find_checkpoint(run)}", "--trainer.max_steps=3"])
    finally:
        (tmp_path / "moved.ckpt").rename(source)
    assert torch.load(find_checkpoint(run), weights_only=True)["global_step"] == 3
    assert list((run / "records").glob("*-sdm-digits-*.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.base_channels=16"], "does not fit the configured network"),
        (["--model.scheduler.prediction_type=epsilon"], "trained with prediction_type=sample"),
    ],
)
def test_other_sizes_and_processes_are_refused(
    options: list[str], message: str, sddpm_run: Path, tmp_path: Path
) -> None:
    source = find_checkpoint(sddpm_run)
    given = [*OPTIONS, "--model=SDM", f"--model.init_from={source}", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(CheckpointMismatchError, match=message):
        main(["fit", *given, *options, "--trainer.max_steps=1"])


def test_other_methods_are_refused(sddpm_run: Path, tmp_path: Path) -> None:
    content = torch.load(find_checkpoint(sddpm_run), weights_only=True) | {"method": "fsddim"}
    torch.save(content, tmp_path / "other.ckpt")
    given = [*OPTIONS, "--model=SDM", f"--trainer.default_root_dir={tmp_path}"]
    with pytest.raises(CheckpointMismatchError, match="is of method 'fsddim', expected 'sddpm'"):
        main(["fit", *given, f"--model.init_from={tmp_path / 'other.ckpt'}"])
    with pytest.raises(FileNotFoundError, match="is not a file"):
        main(["fit", *given, "--model.init_from=nowhere.ckpt"])
    torch.save({"net_model": {}}, tmp_path / "official.pt")
    with pytest.raises(CheckpointMismatchError, match="python -m benchmark import"):
        main(["fit", *given, f"--model.init_from={tmp_path / 'official.pt'}"])
    with pytest.raises(CheckpointMismatchError, match="is of method 'sddpm', expected 'sdm'"):
        main(["test", "--draft", *given, f"--ckpt_path={find_checkpoint(sddpm_run)}"])


def test_threshold_must_be_positive() -> None:
    with pytest.raises(ValueError, match="threshold=0"):
        SDM(**SIZE, threshold=0)
    assert SDDPM(**SIZE, threshold=0.997).threshold == 0.997
