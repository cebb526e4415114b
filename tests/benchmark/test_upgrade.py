"""Files of earlier versions stay readable: config, checkpoint and record of a run.

`upgrade/make.py` made them and says when to make them again.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from tiny import resume

from benchmark.cli import main
from benchmark.commands.convert import _settings
from benchmark.runs import MOVED, find_checkpoint, load_run, newest_run, update_config
from leaderboard.files import canonical_sha256
from leaderboard.record.records import find_records, read_record
from systems.checkpoints import load_checkpoint

UPGRADE = Path(__file__).with_name("upgrade")
sys.path.insert(0, str(UPGRADE))

from make import RECORD, numbers  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("uncompiled")]


def test_a_checkpoint_gives_the_recorded_numbers() -> None:
    recorded = json.loads((UPGRADE / "numbers.json").read_text())
    found = numbers(UPGRADE / "run")
    assert found["loss"] == pytest.approx(recorded["loss"], rel=1e-3)
    assert found["samples"] == pytest.approx(recorded["samples"], rel=5e-2)  # rounding may flip a spike


def test_a_training_resumes(tmp_path: Path) -> None:
    shutil.copytree(UPGRADE / "run", tmp_path / "run")
    resume(tmp_path, "--trainer.max_steps=8", "--data.num_samples=20")
    assert load_checkpoint(find_checkpoint(newest_run(tmp_path)))["global_step"] == 8


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in [RECORD, *UPGRADE.rglob("*.*")]) < 200_000


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run whose config has a class path and an option of version 0.1."""
    run = Path(shutil.copytree(UPGRADE / "run", tmp_path / "run"))
    config = run / "config.yaml"
    content = yaml.safe_load(config.read_text())
    scheduler = content["model"]["init_args"]["scheduler"]
    scheduler["class_path"] = "systems.analytic_dpm.StridedDDIMScheduler"
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    scheduler["init_args"] = {name: scheduler["init_args"][name] for name in names}
    config.write_text(yaml.safe_dump(content, sort_keys=False) + "graphs:\n  enabled: false\n")
    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*graphs")
def test_a_config_of_version_0_1_is_read_by_every_command_and_not_changed(old: Path) -> None:
    before = (old / "config.yaml").read_text()
    place = f"--trainer.default_root_dir={old.parent}"
    main(["test", "--draft", place])
    main(["test", "--draft", f"--config={old / 'config.yaml'}", f"--ckpt_path={find_checkpoint(old)}", place])
    main(["validate", place])
    main(["predict", place, "--data.num_samples=2"])
    system, _ = load_run(find_checkpoint(old))
    assert type(system.scheduler).__name__ == "StridedDDIMScheduler"
    assert "graphs" not in _settings(str(find_checkpoint(old)), None)[0]
    assert (old / "config.yaml").read_text() == before
    path = find_records([old])[-1]
    assert read_record(path).config["model"]["init_args"]["scheduler"]["class_path"] == "systems.StridedDDIMScheduler"
    record = json.loads(path.read_text())
    record["config"]["model"]["init_args"]["scheduler"]["class_path"] = "systems.analytic_dpm.StridedDDIMScheduler"
    path.write_text(json.dumps(record | {"config_sha256": canonical_sha256(record["config"])}))
    main(["leaderboard", "verify", str(path), f"--output={old.parent / 'verified'}"])
    resume(old.parent, "--trainer.max_steps=8", "--data.num_samples=20")
    assert load_checkpoint(find_checkpoint(old))["global_step"] == 8


def test_every_present_class_path_can_be_imported() -> None:
    for path in MOVED.values():
        module, name = path.rsplit(".", 1)
        assert hasattr(import_module(module), name), path


def test_only_whole_class_paths_are_replaced() -> None:
    old = "systems.dpm_solver.DPMSolverScheduler"
    assert update_config(f"class_path: {old}\n") == "class_path: systems.DPMSolverScheduler\n"
    for text in (f"my.{old}", f"{old}2", f"{old}.x"):
        assert update_config(text) == text


@pytest.mark.parametrize("block", ["graphs:\n  enabled: {}\n", "graphs: {{enabled: {}}}\n"])
def test_removed_graphs_are_dropped_with_a_warning_where_they_were_on(block: str) -> None:
    for text in ("a: 1\n{}b:\n  graphs: 2\n", "a: 1\n{}"):
        assert update_config(text.format(block.format("false"))) == text.format("")
        with pytest.warns(UserWarning, match="graphs was removed"):
            assert update_config(text.format(block.format("true"))) == text.format("")
