from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmark import __version__
from benchmark.cli import COMMANDS, PASS_THROUGH, STAGES, main
from benchmark.runs import find_checkpoint, new_run, newest_run
from leaderboard.extractors.base import Extractor
from leaderboard.protocols import PROTOCOLS
from leaderboard.record.records import read_record
from systems.checkpoints import CheckpointMismatchError

TINY = [
    "--config=configs/quickstart.yaml",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=2",
    "--trainer.check_val_every_n_epoch=1",
    "--model.base_channels=8",
    "--model.num_inference_steps=3",
    "--data.batch_size=256",
    "--data.num_samples=60",
    "--data.sample_batch_size=25",
    "--monitor.every_n_epochs=1",
    "--monitor.num_inference_steps=2",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of six steps."""
    folder = tmp_path_factory.mktemp("runs")
    main(["fit", *TINY, f"--trainer.default_root_dir={folder}", "--trainer.max_steps=6"])
    return folder


def records_of(run: Path) -> list[Path]:
    return sorted((run / "records").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr().out
    for name in [*STAGES, *PASS_THROUGH, *COMMANDS]:
        assert len(re.findall(rf"^  {name:<20} \w", shown, re.MULTILINE)) == 1, name
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "configs/quickstart.yaml" in shown


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from benchmark.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "lightning", "jsonargparse", "numpy", "yaml"} & set(done.stderr.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.strip() == __version__


def test_unknown_command_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == 2
    assert "choose one of: fit, validate" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*PASS_THROUGH, *COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: python -m benchmark" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "known"), [("--model=SDPM", "SDDPM"), ("--data=FashionMNIST", "FMNIST")])
def test_mistyped_class_lists_the_known(option: str, known: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=configs/quickstart.yaml", option])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert option.split("=")[1] in message
    assert known in message.split("error:")[-1]


def test_fit_writes_a_complete_run(runs: Path) -> None:
    (run,) = runs.glob("digits-*")
    assert re.fullmatch(r"digits-sddpm-\d{8}-\d{6}-[0-9a-f]{4}", run.name)
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert list((run / "checkpoints").glob("best-*.ckpt"))


def test_tensorboard_shows_the_training(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(newest_run(runs)))
    events.Reload()
    tags = events.Tags()
    wanted = {"train/loss", "train/grad_norm", "train/images_per_second", "train/firing_rate", "lr-Adam", "val/loss"}
    assert wanted <= set(tags["scalars"])
    assert "firing_rate/upblocks.0.neuron1" in tags["scalars"]
    assert {"samples", "denoising"} <= set(tags["images"])
    assert 0 < events.Scalars("train/firing_rate")[0].value < 1
    assert len(events.Scalars("train/images_per_second")) == len(events.Scalars("train/firing_rate")) == 3
    assert all(s.value > 0 for s in events.Scalars("train/images_per_second"))


def test_test_uses_the_newest_run_and_writes_a_record(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["test", "--draft", f"--trainer.default_root_dir={runs}"])
    run = newest_run(runs)
    record = read_record(records_of(run)[-1])
    assert record.draft
    assert (record.method, record.dataset.name, record.protocol.name) == ("sddpm", "digits", "offline-v1")
    assert (record.nfe, record.num_steps, record.solver) == (3, 2, "DDIM")
    assert record.metrics["fd_digits"].num_samples == 60
    assert record.cost.sops > 0
    assert record.cost.macs > 0
    assert len(record.cost.firing_rates) == 19
    assert record.config["model"]["init_args"]["base_channels"] == 8
    assert Image.open(run / "samples" / f"{records_of(run)[-1].stem}.png").width > 64
    assert "draft" in capsys.readouterr().out


def test_typed_options_win_over_the_checkpoint(runs: Path) -> None:
    run = newest_run(runs)
    checkpoint = find_checkpoint(run)
    given = [f"--config={run / 'config.yaml'}", f"--ckpt_path={checkpoint}"]
    main(["test", "--draft", *given, "--model.num_inference_steps=2"])
    assert read_record(records_of(run)[-1]).nfe == 2
    main(["test", "--draft", f"--ckpt_path={checkpoint}", "--model.scheduler=DDPMScheduler", "--model.threshold=0.9"])
    record = read_record(records_of(run)[-1])
    assert record.solver == "DDPM"
    assert record.config["model"]["init_args"]["threshold"] == 0.9


def test_a_record_has_the_seed_of_training_whatever_is_typed(runs: Path) -> None:
    main(["test", "--draft", f"--trainer.default_root_dir={runs}", "--seed_everything=7"])
    record = read_record(records_of(newest_run(runs))[-1])
    assert record.seeds == {"training": 42, "sampling": 0}
    assert record.config["seed_everything"] == 42


def test_a_record_has_no_seed_if_the_seed_of_training_is_unknown(runs: Path, tmp_path: Path) -> None:
    run = newest_run(runs)
    elsewhere = tmp_path / "weights.ckpt"
    content = torch.load(find_checkpoint(run), weights_only=True)
    torch.save({name: value for name, value in content.items() if name != "configuration"}, elsewhere)
    given = [f"--config={run / 'config.yaml'}", f"--ckpt_path={elsewhere}", f"--trainer.default_root_dir={tmp_path}"]
    main(["test", "--draft", *given])
    (written,) = tmp_path.glob("*/records/*.json")
    assert read_record(written).seeds == {"sampling": 0}


@pytest.mark.parametrize(("written", "seeds"), [("false", {}), ("null", {}), ("3", {"training": 3})])
def test_a_training_without_seed_has_none_in_its_record(
    written: str, seeds: dict[str, int], runs: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(newest_run(runs), tmp_path / "run"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("seed_everything: 42", f"seed_everything: {written}"))
    given = [f"--config={newest_run(runs) / 'config.yaml'}", f"--ckpt_path={find_checkpoint(run)}"]
    main(["test", "--draft", *given])
    assert read_record(records_of(run)[-1]).seeds == seeds | {"sampling": 0}


def test_metrics_do_not_depend_on_the_batch_size_of_sampling(runs: Path) -> None:
    values = []
    for chunk in (60, 17):
        main(["test", "--draft", f"--trainer.default_root_dir={runs}", f"--data.sample_batch_size={chunk}"])
        values.append(read_record(records_of(newest_run(runs))[-1]).metrics["fd_digits"].value)
    assert values[0] == pytest.approx(values[1], rel=1e-2)  # a rounding error may flip a spike


def test_best_checkpoint_can_be_tested(runs: Path) -> None:
    main(["test", "--draft", f"--trainer.default_root_dir={runs}", "--ckpt_path=best"])
    checkpoint = read_record(records_of(newest_run(runs))[-1]).checkpoint
    assert checkpoint is not None
    assert checkpoint.name.startswith("best-")


@pytest.mark.parametrize("stage", ["test", "validate", "fit"])
def test_last_is_the_checkpoint_of_the_newest_run_also_with_a_config(
    stage: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, "--trainer.max_steps=6", "--ckpt_path", "last"]
    main([stage, *options, f"--trainer.default_root_dir={runs}", *["--draft"] * (stage == "test")])
    assert f"{stage} of {find_checkpoint(newest_run(runs))}" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no run with a checkpoint under"):
        main([stage, *options, f"--trainer.default_root_dir={tmp_path}"])


def test_a_refused_fit_does_not_change_the_config_of_the_run(runs: Path) -> None:
    config = newest_run(runs) / "config.yaml"
    before = config.read_text()
    for options in (["--model.base_channels=16"], ["--config=configs/regress/fsddim.yaml"]):
        with pytest.raises(CheckpointMismatchError):
            main(["fit", f"--ckpt_path={find_checkpoint(newest_run(runs))}", *options])
    assert config.read_text() == before


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    assert len({new_run(tmp_path, "digits", "sddpm") for _ in range(8)}) == 8


def test_validate_and_predict(runs: Path) -> None:
    main(["validate", f"--trainer.default_root_dir={runs}"])
    events = sorted(newest_run(runs).glob("events*"))
    main(["predict", f"--trainer.default_root_dir={runs}", "--data.num_samples=10"])
    assert sorted(newest_run(runs).glob("events*")) == events
    samples = newest_run(runs) / "samples"
    assert sorted(path.name for path in samples.glob("0*.png")) == [f"{k:06d}.png" for k in range(10)]
    assert Image.open(samples / "000003.png").size == (8, 8)
    assert (samples / "grid.png").is_file()


def test_leaderboard_shows_the_records(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["test", "--draft", f"--trainer.default_root_dir={runs}"])
    main(["leaderboard", f"--records=[{runs}]", f"--output={tmp_path / 'board.md'}"])
    shown = capsys.readouterr().out
    assert "digits, offline-v1" in shown
    (samples,) = re.findall(r"^samples: +(\S+\.png)", shown, re.MULTILINE)
    assert Path(samples).is_file()
    assert f"tensorboard --logdir {newest_run(runs)}" in shown
    assert "sddpm" in (tmp_path / "board.md").read_text()


@pytest.mark.parametrize(
    ("typed", "wide", "all_tables"),
    [
        ("", False, False),
        ("--wide", True, False),
        ("--all --wide", True, True),
        ("--wide false --all true", False, True),
    ],
)
def test_options_of_the_leaderboard_need_no_value(
    typed: str, wide: bool, all_tables: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["leaderboard", "--records=[leaderboard/data/records]", *typed.split()])
    shown = capsys.readouterr().out
    assert ("Reference: " in shown) == wide
    assert any(line.startswith("mnist, offline-v1") for line in shown.splitlines()) == all_tables


def test_the_output_of_a_quickstart_fits_25_lines_of_80_columns(tmp_path: Path) -> None:
    """In a pipe, with nothing but the size of the training changed."""
    root = Path.cwd()
    shorter = [o for o in TINY if not any(part in o for part in ("--config", "enable", "val_every", "sample"))]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment["PYTHONPATH"] = str(root)
    written = b""
    for command in (
        ["fit", f"--config={root / 'configs/quickstart.yaml'}", *shorter, "--trainer.max_steps=6"],
        ["test"],
        ["leaderboard", f"--records=[runs,{root / 'leaderboard/data/records'}]"],
    ):
        python = [sys.executable, "-m", "benchmark", *command]
        done = subprocess.run(python, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        written += done.stdout
        assert done.returncode == 0, written.decode()
    assert b"\r" not in written
    lines = written.decode().splitlines()
    assert sum(max(1, math.ceil(len(line) / 80)) for line in lines) <= 25, written.decode()
    assert re.match(r"fit in runs/digits-sddpm-\S+: \S+ K parameters, cpu, 32-true$", lines[0])
    assert re.match(r"step 6, after 0:\d\d:\d\d, train/loss 0\.\d+", lines[1])
    assert sum(bool(re.match(r"> +\d+(-\d+)? +sddpm ", line)) for line in lines) == 1
    assert re.fullmatch(r"samples: runs/\S+/samples/\S+\.png", lines[-2])
    assert re.fullmatch(r"tensorboard --logdir runs/digits-sddpm-\S+", lines[-1])


def test_leaderboard_renders_the_records(runs: Path, tmp_path: Path) -> None:
    main(["test", "--draft", f"--trainer.default_root_dir={runs}"])
    main(["leaderboard", "render", f"--records=[{runs}]", f"--output={tmp_path}"])
    record = records_of(newest_run(runs))[-1]
    page = (tmp_path / "index.html").read_text()
    assert record.name in page
    assert 'class="thumbnail"' in page
    assert json.loads((tmp_path / "leaderboard.json").read_text())["measured"][0]["dataset"] == "digits"
    assert "SDDPM" in (tmp_path / "leaderboard.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "limit"),
    [
        (5, []),
        (6, []),
        (5, ["--trainer.limit_train_batches=4"]),
        (6, ["--trainer.accumulate_grad_batches=2"]),
    ],
)
def test_a_resumed_training_equals_an_uninterrupted_one(
    stop: int, limit: list[str], tmp_path: Path, uncompiled: None
) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    calm = ["--monitor.every_n_epochs=0", "--trainer.check_val_every_n_epoch=3", *limit]
    main(["fit", *TINY, f"--trainer.default_root_dir={straight}", "--trainer.max_steps=11", *calm])
    main(["fit", *TINY, f"--trainer.default_root_dir={parts}", f"--trainer.max_steps={stop}", *calm])
    run = newest_run(parts)
    last = find_checkpoint(run)
    assert torch.load(last, weights_only=True)["global_step"] == stop
    main(["fit", f"--config={run / 'config.yaml'}", f"--ckpt_path={last}", "--trainer.max_steps=11"])
    assert newest_run(parts) == run
    resumed, whole = (torch.load(find_checkpoint(newest_run(f)), weights_only=True) for f in (parts, straight))
    assert resumed["global_step"] == whole["global_step"] == 11
    assert resumed["optimizer_states"][0]["state"][0]["step"] == 11
    for name, weights in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weights), name


def test_averaged_weights_are_tested(runs: Path, tmp_path: Path) -> None:
    averaging = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.5"]
    main(["fit", *TINY, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=6", *averaging])
    averaged, plain = (torch.load(find_checkpoint(newest_run(f)), weights_only=True) for f in (tmp_path, runs))
    assert "averaging_state" in averaged
    assert averaged["state_dict"].keys() == plain["state_dict"].keys()
    weight = "network.downblocks.0.conv1.weight"
    assert not torch.equal(averaged["state_dict"][weight], plain["state_dict"][weight])
    main(["test", "--draft", f"--trainer.default_root_dir={tmp_path}"])
    assert records_of(newest_run(tmp_path))


def test_a_deviation_from_the_protocol_is_refused_at_once_without_draft(runs: Path) -> None:
    full = ["test", f"--trainer.default_root_dir={runs}", "--data.num_samples=null"]
    before = records_of(newest_run(runs))
    for option, message in (
        ("--data.num_samples=60", "'offline-v1': it takes 2,000 generated images, not 60"),
        ("--data.fit=resize", r"compares digits at 8x8 pixels, not 16x16 \(leave out --data.fit resize\)"),
        ("--data.sample_seed=1", "its first image has the seed 0, not 1"),
    ):
        size = ["--data.image_size=16"] if "fit" in option else []
        with pytest.raises(ValueError, match=f"{message}.* add --draft for a draft, which never ranks"):
            main(
                [*full, option, *size, "--data.cache_dir=/dev/null/x"]
            )  # a cache that is asked for anything would fail
    assert records_of(newest_run(runs)) == before


def test_the_default_number_of_images_is_the_protocols(runs: Path) -> None:
    full = ["test", f"--trainer.default_root_dir={runs}", "--data.num_samples=null", "--model.num_inference_steps=1"]
    main([*full, "--data.sample_batch_size=1000"])
    record = read_record(records_of(newest_run(runs))[-1])
    assert not record.draft
    assert {value.num_samples for value in record.metrics.values()} == {2000}


def test_a_second_test_does_not_read_real_images_again(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = Extractor.forward

    def counting(self: Extractor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Extractor, "forward", counting)
    cache = f"--data.cache_dir={runs / 'cache'}"
    values = []
    for variant in ("first", "second"):
        main(["test", "--draft", f"--trainer.default_root_dir={runs}", cache, f"--evaluation.variant={variant}"])
        values.append(read_record(records_of(newest_run(runs))[-1]).metrics)
    assert seen == [*[100] * 15, 25, 25, 10, 25, 25, 10]  # 1,500 real ones once, 60 generated ones twice
    assert values[0] == values[1]


def test_draft_is_an_option_of_test_only() -> None:
    with pytest.raises(ValueError, match="--draft is an option of `test`"):
        main(["fit", "--config=configs/quickstart.yaml", "--draft"])


def test_unknown_protocol_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=configs/quickstart.yaml", "--evaluation.protocol=standard-v0"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(name in message for name in PROTOCOLS)


def test_errors_name_the_way_out(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run with a checkpoint under"):
        main(["test", "--draft", f"--trainer.default_root_dir={tmp_path}"])
    with pytest.raises(ValueError, match="needs a checkpoint"):
        main(["test", "--draft", "--config=configs/quickstart.yaml"])
    with pytest.raises(FileNotFoundError, match="is not a file"):
        main(["test", "--draft", "--config=configs/quickstart.yaml", "--ckpt_path=nowhere.ckpt"])
    last = find_checkpoint(newest_run(runs))
    with pytest.raises(CheckpointMismatchError, match="does not fit the configured network"):
        main(["test", "--draft", f"--ckpt_path={last}", "--model.base_channels=16"])
    with pytest.raises(ValueError, match="at most 10000"):
        main(["test", "--draft", f"--ckpt_path={last}", "--data.num_samples=20000"])


def test_record_is_plain_json(runs: Path) -> None:
    main(["test", "--draft", f"--trainer.default_root_dir={runs}"])
    content = json.loads(records_of(newest_run(runs))[-1].read_text())
    assert content["source"] == "measured"
    assert set(content["code"]["versions"]) >= {"torch", "snntorch", "diffusers", "lightning"}
