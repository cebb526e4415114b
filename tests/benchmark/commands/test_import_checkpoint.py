from __future__ import annotations

import pickle
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmark.cli import main
from leaderboard.record.records import read_record
from systems import DDPM, FSDDIM, SDDPM, SDM
from systems.checkpoints import CheckpointMismatchError
from systems.networks.spiking_unet import SpikingUNet
from systems.sdit import SDiT

pytestmark = pytest.mark.slow


def official(**arguments: object) -> dict[str, Tensor]:
    """A state dict laid out as the released code does, of a tiny network."""
    torch.manual_seed(0)
    network = SpikingUNet(
        **({"in_channels": 1, "base_channels": 4, "channel_mult": (1, 2), "num_res_blocks": 2} | arguments)
    )
    state = network.state_dict()
    state["T_output_layer.weight"] = state["T_output_layer.weight"].unsqueeze(-1)
    return {f"module.{key}": value for key, value in state.items()}


def save(content: object, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def test_imported_checkpoint_is_tested_and_predicted(tmp_path: Path) -> None:
    source = save({"net_model": official(), "step": 7, "x_T": torch.zeros(1)}, tmp_path / "official.pt")
    output = tmp_path / "out.ckpt"
    main(["import", "--method=sddpm", source, str(output)])
    options = [
        "--config=configs/quickstart.yaml",
        f"--ckpt_path={output}",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
        "--trainer.enable_progress_bar=false",
        "--model.base_channels=4",
        "--model.num_res_blocks=2",
        "--model.num_inference_steps=2",
        "--data.num_samples=20",
    ]
    main(["test", "--draft", *options])
    main(["predict", *options])
    assert list(tmp_path.glob("runs/*/records/*.json"))
    assert list(tmp_path.glob("runs/*/samples/000019.png"))


@pytest.mark.parametrize(("method", "file"), [("sddpm", "sddpm_small"), ("sdm", "sdm_tsm_small")])
def test_reference_network_survives_the_import(
    method: str,
    file: str,
    tmp_path: Path,
    reference: Callable[[str], dict[str, Tensor]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorded = reference(f"{file}.safetensors")
    state = {key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}
    source, output = save({"net_model": state}, tmp_path / "official.pt"), tmp_path / "out.ckpt"
    main(["import", f"--method={method}", source, str(output)])
    assert "--model.base_channels 32 --model.channel_mult '[1, 2]'" in capsys.readouterr().out
    kind = {"sddpm": SDDPM, "sdm": SDM}[method]
    system = kind(in_channels=1, base_channels=32, channel_mult=(1, 2), num_res_blocks=1).eval()
    checkpoint = torch.load(output, weights_only=True)
    system.on_load_checkpoint(checkpoint)
    system.load_state_dict(checkpoint["state_dict"])
    with torch.no_grad():
        prediction = system.network(recorded["input.x"], recorded["input.t"])
    torch.testing.assert_close(prediction, recorded["output.eval"], rtol=0, atol=1e-5)
    other = {"sddpm": "sdm", "sdm": "sddpm"}[method]
    with pytest.raises(ValueError, match=f"is not a {other} network: 'conv"):
        main(["import", f"--method={other}", source, str(tmp_path / "other.ckpt")])


def test_reference_sdit_survives_the_import(
    tmp_path: Path, reference: Callable[[str], dict[str, Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = reference("sdit_released_small.safetensors")
    state = {key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}
    source, output = save({"model": state, "args": Namespace(lr=1e-4)}, tmp_path / "01599.pt"), tmp_path / "out.ckpt"
    main(["import", "--method=sdit", source, str(output)])
    assert "--model.embed_dim 32 --model.depth 4 --model.num_classes 10" in capsys.readouterr().out
    system = SDiT(image_size=8, embed_dim=32).eval()
    checkpoint = torch.load(output, weights_only=True)
    system.on_load_checkpoint(checkpoint)
    system.load_state_dict(checkpoint["state_dict"])
    with torch.no_grad():
        prediction = system.network(recorded["input.x"], recorded["input.t"], recorded["input.y"])
    torch.testing.assert_close(prediction, recorded["output.eval"], rtol=0, atol=1e-5)


def test_reference_fsddim_survives_the_import(tmp_path: Path, reference: Callable[[str], dict[str, Tensor]]) -> None:
    recorded = reference("fsddim_small.safetensors")
    state = {key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}
    source, output = save({"model_state_dict": state, "epoch": 3}, tmp_path / "official.pt"), tmp_path / "out.ckpt"
    main(["import", "--method=fsddim", source, str(output)])
    system = FSDDIM(in_channels=1, base_channels=32, channel_mult=(1, 2), num_steps=4, norm="tdbn").eval()
    checkpoint = torch.load(output, weights_only=True)
    system.on_load_checkpoint(checkpoint)
    system.load_state_dict(checkpoint["state_dict"])
    with torch.no_grad():
        prediction = system.network(recorded["input.x"].movedim(-1, 0), recorded["input.t"])
    torch.testing.assert_close(prediction.movedim(0, -1), recorded["output.eval"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["ddpm", "ann_snn"])
def test_imported_ann_and_its_conversion_are_tested(method: str, tmp_path: Path) -> None:
    state = DDPM(in_channels=1, base_channels=32, channel_mult=(1,), num_res_blocks=1).network.state_dict()
    if method == "ann_snn":
        state = {re.sub(r"\.(\d+\.\w+)$", r".block.\1", key): value for key, value in state.items()}
    output = tmp_path / "out.ckpt"
    main(["import", f"--method={method}", save({"ema_model": state, "net_model": {}}, tmp_path / "a.pt"), str(output)])
    options = [
        "--config=configs/ddpm_fmnist.yaml",
        *(["--model=ANNSNN"] if method == "ann_snn" else []),
        f"--ckpt_path={output}",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
        "--trainer.enable_progress_bar=false",
        "--model.base_channels=32",
        "--model.channel_mult=[1]",
        "--model.num_res_blocks=1",
        "--model.num_inference_steps=2",
        "--data=Digits",
        "--data.image_size=8",
        "--data.num_samples=20",
        "--evaluation.protocol=offline-v1",
    ]
    main(["test", "--draft", *options])
    (record,) = map(read_record, tmp_path.glob("runs/*/records/*.json"))
    assert record.method == method.replace("_", "-")
    assert record.num_steps == (1 if method == "ddpm" else 3)


def test_imported_pair_is_tested(
    tmp_path: Path, reference: Callable[[str], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("systems.ops.compiled.COMPILE_FROM", sys.maxsize)  # compilation takes longer than the test
    for name, path in (("vqsvae", tmp_path / "model.pth"), ("sdid", tmp_path / "diff_result" / "diff_model.pth")):
        recorded = reference(f"{name}_small.safetensors")
        path.parent.mkdir(exist_ok=True)
        save({key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}, path)
    output, given = tmp_path / "out.ckpt", ["--method=spiking_diffusion", str(tmp_path / "model.pth")]
    main(["import", *given, str(output)])
    main(
        [
            "test",
            "--draft",
            "--config=configs/spiking_diffusion_mnist.yaml",
            f"--ckpt_path={output}",
            f"--trainer.default_root_dir={tmp_path / 'runs'}",
            "--trainer.enable_progress_bar=false",
            "--model.base_channels=16",
            "--model.num_inference_steps=2",
            "--data=Digits",
            "--data.image_size=8",
            "--data.num_samples=20",
            "--evaluation.protocol=offline-v1",
        ]
    )
    (record,) = map(read_record, tmp_path.glob("runs/*/records/*.json"))
    assert record.method == "spiking-diffusion"
    assert record.num_steps == 16
    (tmp_path / "diff_result" / "diff_model.pth").rename(tmp_path / "moved.pth")
    with pytest.raises(FileNotFoundError, match=r"diff_result/diff_model\.pth is not a file"):
        main(["import", *given, str(tmp_path / "second.ckpt")])
    main(["import", *given, str(tmp_path / "second.ckpt"), f"--denoiser={tmp_path / 'moved.pth'}"])
    with pytest.raises(
        ValueError, match=r"model\.pth is not a spiking_diffusion network: 'conv1\.0\.weight' not found"
    ):
        main(["import", *given, str(tmp_path / "third.ckpt"), f"--denoiser={given[1]}"])
    with pytest.raises(ValueError, match="imported from one file"):
        main(["import", "--method=sddpm", given[1], str(tmp_path / "third.ckpt"), f"--denoiser={given[1]}"])


def test_unknown_and_missing_tensors_are_listed(tmp_path: Path) -> None:
    state = official()
    state["module.attention.weight"] = torch.zeros(1)
    del state["module.tail_bn.bias"]
    with pytest.raises(CheckpointMismatchError, match=r"1 missing: tail_bn\.bias; 1 unknown: attention\.weight"):
        main(["import", save(state, tmp_path / "official.pt"), str(tmp_path / "out.ckpt")])
    assert not (tmp_path / "out.ckpt").exists()


class Malicious:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("owned"),))


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("official.pt").write_bytes(pickle.dumps({"net_model": Malicious()}))
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of tensors"):
        main(["import", "official.pt", "out.ckpt"])
    assert not Path("owned").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    output = str(tmp_path / "out.ckpt")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        main(["import", str(tmp_path / "nothing.pt"), output])
    with pytest.raises(ValueError, match="is not a sddpm network"):
        main(["import", save({"weight": torch.zeros(2)}, tmp_path / "other.pt"), output])
    with pytest.raises(ValueError, match="contains no state dict"):
        main(["import", save([1, 2], tmp_path / "list.pt"), output])
    whole = (tmp_path / "other.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        main(["import", str(tmp_path / "cut.pt"), output])
