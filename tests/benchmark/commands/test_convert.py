from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmark.cli import main
from benchmark.runs import find_checkpoint, newest_run
from leaderboard.record.records import Record, read_record
from systems import ANNSNN, DDPM
from systems.checkpoints import CheckpointMismatchError, load_checkpoint

TINY = [
    "--config=configs/quickstart.yaml",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.max_steps=6",
    "--trainer.log_every_n_steps=2",
    "--trainer.callbacks+=EMAWeightAveraging",
    "--trainer.callbacks.decay=0.5",
    "--model=DDPM",
    "--model.base_channels=32",
    "--model.channel_mult=[1]",
    "--model.num_inference_steps=3",
    "--data.batch_size=256",
    "--data.num_samples=60",
    "--data.sample_batch_size=30",
    "--monitor.every_n_epochs=0",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one DDPM of six steps."""
    folder = tmp_path_factory.mktemp("runs")
    main(["fit", *TINY, f"--trainer.default_root_dir={folder}"])
    return folder


def scalars(run: Path) -> set[str]:
    events = EventAccumulator(str(run))
    events.Reload()
    return set(events.Tags()["scalars"])


def evaluate(run: Path, *options: str) -> Record:
    before = set(run.glob("records/*.json"))
    main(["test", "--draft", f"--ckpt_path={find_checkpoint(run)}", *options])
    (path,) = set(run.glob("records/*.json")) - before
    return read_record(path)


def test_ann_converted_and_tuned_stand_side_by_side(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ddpm = newest_run(runs)
    ann = evaluate(ddpm)
    main(["convert", str(find_checkpoint(ddpm)), "--finetune_inputs=diffused"])
    run = newest_run(runs)
    assert re.fullmatch(r"digits-annsnn-\d{8}-\d{6}-[0-9a-f]{4}", run.name)
    shown = capsys.readouterr().out
    assert f"test --ckpt_path {find_checkpoint(run)}" in shown
    main(["test", "--draft", f"--trainer.default_root_dir={runs}"])  # the newest run is the conversion
    (path,) = run.glob("records/*.json")
    converted = read_record(path)
    content = torch.load(find_checkpoint(run), weights_only=True)
    before, trained = content["state_dict"], [data["name"] for data in content["training_data"]]
    assert trained == ["digits"]
    assert converted.training_data is not None
    assert [data.name for data in converted.training_data] == trained
    (tune,) = re.findall(r"fine-tune: python -m benchmark (.+)", shown)
    options = ["--model.finetune_steps=2", "--model.optimizer.lr=0.001", "--trainer.check_val_every_n_epoch=1"]
    main([*tune.split(), *options])
    assert newest_run(runs) == run
    checkpoint = torch.load(find_checkpoint(run), weights_only=True)
    assert checkpoint["global_step"] == 2 + 2 * 5  # 1 block down, 2 in the middle, 2 up
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.001
    assert checkpoint["state_dict"].keys() == before.keys()
    changed = {key for key, value in checkpoint["state_dict"].items() if not torch.equal(value, before[key])}
    assert {"network.head.weight", "network.upblocks.1.block2.3.weight"} <= changed
    assert not any("tail" in key or "act_alpha" in key for key in changed)
    assert {"train/block", "train/loss", "train/firing_rate", "val/loss"} <= scalars(run)
    assert "train/images_per_second" in scalars(ddpm)
    assert "train/firing_rate" not in scalars(ddpm)
    tuned = evaluate(run, "--evaluation.variant=fine-tuned")

    assert [r.method for r in (ann, converted, tuned)] == ["ddpm", "ann-snn", "ann-snn"]
    assert [r.num_steps for r in (ann, converted, tuned)] == [1, 3, 3]
    assert (ann.cost.firing_rate, ann.cost.sops) == (None, 0)
    assert ann.cost.energy_paper_mj == pytest.approx(ann.cost.energy_strict_mj)
    assert ann.cost.macs > 0
    for record in (converted, tuned):
        assert record.cost.firing_rate
        assert 0 < record.cost.firing_rate < 1
        assert len(record.cost.firing_rates) == 2 + 3 * 5
        assert record.cost.sops > 0
        assert record.cost.macs < 3 * ann.cost.macs
    capsys.readouterr()
    main(["leaderboard", f"--records=[{runs}]"])
    assert len(re.findall(r"ann-snn", capsys.readouterr().out)) >= 2


def test_fine_tuning_starts_at_once(runs: Path, tmp_path: Path) -> None:
    ddpm = next(path for path in runs.iterdir() if "ddpm" in path.name)
    checkpoint = tmp_path / "other" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(find_checkpoint(ddpm).read_bytes())
    (tmp_path / "other" / "config.yaml").write_bytes((ddpm / "config.yaml").read_bytes())
    main(["convert", str(checkpoint), "--spikes=signed", "--finetune_steps=1"])
    run = newest_run(tmp_path)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    arguments = saved["model"]["init_args"]
    assert (arguments["spikes"], arguments["finetune_steps"]) == ("signed", 1)
    assert arguments["init_from"] == str(checkpoint)
    assert saved["trainer"]["callbacks"] is None
    assert torch.load(find_checkpoint(run), weights_only=True)["global_step"] == 7


def checkpoint_of(system: DDPM, path: Path) -> str:
    content: dict[str, Any] = {"state_dict": system.state_dict()}
    system.on_save_checkpoint(content)
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("bare", [False, True], ids=["checkpoint", "state-dict"])
def test_the_groups_of_the_norms_are_kept(bare: bool, tmp_path: Path) -> None:
    size = dict(in_channels=1, base_channels=16, channel_mult=[1], num_res_blocks=1, norm_groups=16)
    ddpm = DDPM(**size)
    checkpoint = checkpoint_of(ddpm, tmp_path / "ddpm.ckpt")
    if bare:
        torch.save(ddpm.state_dict(), checkpoint)
    content = yaml.safe_load(Path("configs/ddpm_fmnist.yaml").read_text())
    content["model"]["init_args"] |= size
    content["trainer"]["default_root_dir"] = str(tmp_path / "runs")
    (tmp_path / "ddpm.yaml").write_text(yaml.safe_dump(content))
    main(["convert", checkpoint, f"--ddpm_config={tmp_path / 'ddpm.yaml'}"])
    run = newest_run(tmp_path / "runs")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    converted = ANNSNN.from_configuration(saved["model"], load_checkpoint(find_checkpoint(run)))
    assert converted.network.norm_groups == 16
    assert torch.equal(converted.network.head.weight, ddpm.network.head.weight)


def test_errors_name_the_way_out(runs: Path, tmp_path: Path) -> None:
    size = dict(in_channels=1, base_channels=32, channel_mult=(1,), num_res_blocks=1)
    alone = checkpoint_of(DDPM(**size), tmp_path / "alone.ckpt")
    config = next(path for path in runs.iterdir() if "ddpm" in path.name) / "config.yaml"
    with pytest.raises(ValueError, match=r"is not in a run folder; name its config too: `--ddpm_config CONFIG`"):
        main(["convert", alone])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml is not a file"):
        main(["convert", alone, "--ddpm_config=nowhere.yaml"])
    with pytest.raises(ValueError, match="expected DDPM"):
        main(["convert", alone, "--ddpm_config=configs/quickstart.yaml"])
    plain = checkpoint_of(DDPM(**size, activation_bits=32), tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="has plain ReLUs"):
        main(["convert", plain, f"--ddpm_config={config}"])
    three = checkpoint_of(DDPM(**size, activation_bits=3), tmp_path / "three.ckpt")
    with pytest.raises(CheckpointMismatchError, match="trained with activation_bits=3"):
        main(["convert", three, f"--ddpm_config={config}"])
    fewer = checkpoint_of(DDPM(**size, norm_groups=16), tmp_path / "fewer.ckpt")
    with pytest.raises(CheckpointMismatchError, match="trained with norm_groups=16"):
        main(["convert", fewer, f"--ddpm_config={config}"])
    wide = checkpoint_of(DDPM(**(size | {"base_channels": 64})), tmp_path / "wide.ckpt")
    with pytest.raises(CheckpointMismatchError, match="does not fit the configured network"):
        main(["convert", wide, f"--ddpm_config={config}"])
    torch.save({"state_dict": {}, "method": "sddpm"}, tmp_path / "sddpm.ckpt")
    with pytest.raises(CheckpointMismatchError, match="is of method 'sddpm'"):
        main(["convert", str(tmp_path / "sddpm.ckpt")])
    with pytest.raises(ValueError, match="finetune_steps=-1"):
        main(["convert", alone, "--finetune_steps=-1"])
