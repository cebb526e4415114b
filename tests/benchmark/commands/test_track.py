"""A study searches, trains and measures; what is among the results is not repeated, on any machine."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from benchmark.cli import main
from benchmark.commands import matrix, study_jobs
from benchmark.studies import read_study
from leaderboard.files import file_sha256
from leaderboard.record.records import find_records, read_record
from systems.checkpoints import save_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fork.*")]

DESIGN: dict[str, Any] = {
    "name": "tiny-v1",
    "steps": 8,
    "batch_size": 64,
    "decay": 0.5,
    "search": {
        "dataset": "digits",
        "seed": 0,
        "learning_rates": [0.01, 1e20],
        "decay": 0.5,
        "options": {"trainer.max_steps": 4, "model.lr_scheduler.init_args.total_steps": 4},
    },
    "measurements": {
        "final": {"steps": [8], "seeds": [0, 1], "draft": True, "half": True},
        "curve": {"steps": [4], "seeds": [0], "draft": True, "options": {"data.num_samples": 24}},
        "chain": {"steps": [8], "seeds": [0], "draft": True, "options": {"model.num_inference_steps": 3}},
    },
    "datasets": {"digits": [0]},
    "zoo": ["digits"],
    "methods": {
        "good": {},
        "good_t1": {
            "config": "good",
            "options": {"model.num_steps": 1, "evaluation.variant": "T = 1"},
            "without": ["curve"],
        },
    },
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Design of a study of two tiny trainings."""
    config = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    config["trainer"] |= {
        "max_steps": 8,
        "limit_train_batches": 4,
        "log_every_n_steps": 2,
        "check_val_every_n_epoch": 1,
        "precision": "32-true",
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
        "callbacks": [
            {
                "class_path": "ModelCheckpoint",
                "init_args": {"every_n_train_steps": 4, "save_top_k": -1, "filename": "{step}"},
            }
        ],
    }
    config["model"]["init_args"] |= {"base_channels": 4, "channel_mult": [1], "num_steps": 2, "num_inference_steps": 2}
    config["model"]["init_args"]["lr_scheduler"] = {
        "class_path": "torch.optim.lr_scheduler.OneCycleLR",
        "init_args": {"max_lr": 0.01, "total_steps": 8, "cycle_momentum": False},
    }
    config["data"]["init_args"] |= {"batch_size": 64, "num_samples": 20, "val_size": 64}
    config["monitor"] = {"every_n_epochs": 0}
    config["evaluation"] = {"protocol": "offline-v2"}
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "good_digits.yaml").write_text(yaml.safe_dump(config))
    (folder / "design.yaml").write_text(yaml.safe_dump(DESIGN, sort_keys=False))
    return folder / "design.yaml"


def run(study: Path, *options: str) -> int:
    """Returns the exit code."""
    folders = [f"--output={study.parents[1] / 'runs'}", f"--results={study.parents[1] / 'results'}"]
    try:
        main(["matrix", "--design", str(study), *folders, *options])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def read(study: Path, name: str) -> Any:
    """Returns a file of the results."""
    return json.loads((study.parents[1] / "results" / "curves" / "tiny-v1" / name).read_text())


def test_a_study_is_run_in_stages_and_nothing_twice(
    study: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(study, "--stage", "search") == 0
    search = read(study, "search/good.json")
    tried = [(entry["learning_rate"], entry["averaged"]) for entry in search["tried"]]
    assert tried == [(0.01, False), (0.01, True), (1e20, False), (1e20, True)]
    losses = [entry["validation_loss"] for entry in search["tried"]]
    assert losses[2:] == [None, None]  # diverged
    assert losses[0] != losses[1]
    best = search["tried"][losses.index(min(losses[:2]))]
    assert search["chosen"] == {name: best[name] for name in ("learning_rate", "averaged")}
    assert search["cpu_seconds"] > 0

    assert run(study, "--stage", "train") == 0
    training = read(study, "trainings/good_digits-seed0.json")
    assert training["images"] == 8 * 64
    assert training["epochs"] == pytest.approx(8 * 64 / (1497 - 64), abs=1e-3)
    assert [step for step, _ in training["train_loss"]] == [2, 4, 6, 8]
    assert [step for step, _ in training["validation_loss"]] == [4, 8]
    assert training["records"] == {}
    assert not find_records([study.parents[1] / "runs"])

    assert run(study, "--stage", "measure", "--measurements", "final") == 0
    assert run(study, "--stage", "measure", "--measurements", "curve") == 0
    training = read(study, "trainings/good_digits-seed0.json")
    assert sorted(training["records"]) == ["curve-4", "final-8"]
    results = study.parents[1] / "results/curves/tiny-v1/records"
    weights = study.parents[1] / "zoo" / "good_digits" / "model.safetensors"  # the final ones were rounded before
    for key, sha256 in (("curve-4", training["checkpoints"]["4"]), ("final-8", file_sha256(weights))):
        record = read_record(results / training["records"][key])
        assert record.checkpoint is not None
        assert record.checkpoint.sha256 == sha256
        assert record.design is not None
        assert {"name": record.design.name, "sha256": record.design.sha256} == training["design"]
    assert "zoo:good_digits" in (weights.parent / "README.md").read_text()
    variant = read(study, "trainings/good_t1_digits-seed0.json")
    record = read_record(results / variant["records"]["final-8"])
    assert (record.num_steps, record.variant) == (1, "T = 1")
    assert list(variant["records"]) == ["final-8"]

    shutil.rmtree(study.parents[1] / "runs")  # another machine, which has the weights from the zoo
    assert run(study, "--stage", "measure") == 0
    for name, num_steps in (("good", 2), ("good_t1", 1)):
        training = read(study, f"trainings/{name}_digits-seed0.json")
        record = read_record(results / training["records"]["chain-8"])
        assert record.checkpoint is not None
        assert record.checkpoint.sha256 == file_sha256(study.parents[1] / f"zoo/{name}_digits/model.safetensors")
        assert record.design is not None
        assert {"name": record.design.name, "sha256": record.design.sha256} == training["design"]
        assert (record.num_steps, record.nfe, record.seeds["training"]) == (num_steps, 3, 0)

    in_process.clear()
    assert run(study) == 0
    assert in_process == []
    capsys.readouterr()
    assert run(study, "--print") == 0
    assert capsys.readouterr().out == ""

    path = study.parents[1] / "results/curves/tiny-v1/trainings/good_digits-seed0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"records": {}}))
    assert run(study, "--only", "good", "--measurements", "chain") == 1  # no record says whose weights the zoo has
    assert "is neither under" in " ".join(capsys.readouterr().out.split())


def test_a_changed_design_needs_another_name(study: Path) -> None:
    design = {"name": "tiny-v1", "sha256": "0" * 64}
    path = study.parents[1] / "results/curves/tiny-v1/trainings/good_digits-seed0.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"design": design}))
    with pytest.raises(ValueError, match=r"seed0.json was made with other files of .*/study/ \(00000000, not "):
        run(study, "--print")
    study.write_text(study.read_text().replace("tiny-v1", "tiny-v2"))
    assert run(study, "--print") == 0


def test_each_pending_part_has_a_command_and_one_that_runs_elsewhere_is_skipped(
    study: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    steps = DESIGN["measurements"]["curve"] | {"steps": [2, 4]}  # of one command
    study.write_text(yaml.safe_dump(DESIGN | {"measurements": DESIGN["measurements"] | {"curve": steps}}))
    assert run(study, "--print", "--roots", "digits=a folder") == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[line.index("--stage") + 1] for line in lines] == ["search", "train", "train", *["measure"] * 5]
    assert all("digits=a folder" in line for line in lines)
    assert "--only good_t1 --datasets digits --seeds 0" in " ".join(lines[2])
    locks = study.parents[1] / "runs" / "locks"
    locks.mkdir(parents=True)
    with FileLock(locks / "search-good"):
        assert run(study, "--stage", "search") == 0
    assert "runs elsewhere" in capsys.readouterr().out
    assert in_process == []
    assert run(study, "--stage", "measure", "--only", "good") == 1
    assert "is not trained; run it with" in " ".join(capsys.readouterr().out.split())


def test_a_stopped_training_resumes(
    study: Path, in_process: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    design = read_study(study)
    sha = {"design": yaml.safe_load("{}"), "chosen": {"learning_rate": 0.01, "averaged": True}}
    from benchmark.configs import design_of

    path = tmp_path / "results" / "curves" / design.name / "search" / "good.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(sha | {"design": design_of(study)}))
    wait = matrix.Popen.wait

    def interrupted(process: object) -> int:
        while not list(tmp_path.glob("runs/trainings/*/*/checkpoints/last.ckpt")):
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)
        return wait(process)  # type: ignore[arg-type]

    monkeypatch.setattr(matrix.Popen, "wait", interrupted)
    assert run(study, "--stage", "train", "--only", "good") == 143
    assert not list(tmp_path.glob("results/curves/*/trainings/*"))
    monkeypatch.setattr(matrix.Popen, "wait", wait)
    (seconds,) = tmp_path.glob("runs/trainings/*/cpu_seconds.txt")
    seconds.write_text("1000000.0\n")
    in_process.clear()
    assert run(study, "--stage", "train", "--only", "good", "--roots", "digits=elsewhere") == 1  # digits have no root
    assert in_process[0][:3] == ["fit", "--ckpt_path=last", "--data.root=elsewhere"]  # the same training
    assert run(study, "--stage", "train", "--only", "good") == 0
    assert in_process[1][:2] == ["fit", "--ckpt_path=last"]
    training = read(study, "trainings/good_digits-seed0.json")
    assert 1_000_000 < training["cpu_seconds"] < 1_000_600
    assert training["chosen"]["averaged"]
    assert sorted(training["checkpoints"]) == ["4", "8"]


def test_cpu_time_of_a_killed_process_is_that_of_its_last_checkpoint(tmp_path: Path) -> None:
    cell = matrix.Cell(Path("configs/quickstart.yaml"), 0, (), tmp_path, draft=False)
    assert study_jobs._cpu_seconds(cell) == 0.0
    checkpoints = cell.folder / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints.parent / "config.yaml").write_text("{}")
    save_checkpoint({"state_dict": {}, "callbacks": {"CPUTime": {"seconds": 100.0}}}, checkpoints / "last.ckpt")
    assert study_jobs._cpu_seconds(cell) == 100.0
    (cell.folder / "cpu_seconds.txt").write_text("120.5\n")  # of processes that have ended
    assert study_jobs._cpu_seconds(cell) == 120.5


def test_a_part_that_fails_stops_no_other_and_keeps_its_reason(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(job: study_jobs.SearchJob | study_jobs.TrainJob) -> int:
        if isinstance(job, study_jobs.TrainJob) and job.method == "good":
            raise OSError("No space left on device")
        return 0

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(study_jobs.SearchJob, "run", fail)
    monkeypatch.setattr(study_jobs.TrainJob, "run", fail)
    assert run(study, "--seeds", "0") == 1
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    states = {row[0]: row[1:] for row in rows if len(row) == 3}
    assert states["search good"] == ["done", ""]
    assert states["train good_digits-seed0"] == ["failed", "OSError: No space left on device"]
    assert states["train good_t1_digits-seed0"] == ["done", ""]
    assert states["measure good_digits-seed0, final-8"] == ["failed", "needs: train good_digits-seed0"]
    assert states["measure good_t1_digits-seed0, final-8"][0] == "failed"  # is not trained


def test_a_failed_search_says_why(
    study: Path, in_process: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = study.with_name("good_digits.yaml")
    config.write_text(config.read_text().replace("base_channels: 4", "base_channels: 0"))
    monkeypatch.setenv("COLUMNS", "200")
    assert run(study, "--stage", "train", "--only", "good") == 1
    assert "its search failed: " in capsys.readouterr().out
    assert len(in_process) == 1


@pytest.mark.parametrize(("stop", "code", "state"), [(SystemExit(), 143, "stopped"), (SystemExit(1), 130, "stopped")])
def test_a_signal_during_a_validation_stops_the_study(
    stop: SystemExit,
    code: int,
    state: str,
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(job: study_jobs.SearchJob) -> int:
        raise stop  # as Lightning after SIGTERM and Ctrl-C

    monkeypatch.setattr(study_jobs.SearchJob, "run", stopped)
    assert run(study, "--stage", "train", "--only", "good") == code
    shown = capsys.readouterr().out
    assert state in shown
    assert "failed" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--roots", "digit=D"], "--roots digit: the study has digits"),
        (["--only", "god"], "--only god: the study has good, good_t1"),
        (["--datasets", "mnist"], "--datasets mnist: the study has digits"),
        (["--seeds", "7"], "--seeds 7: the study has 0"),
        (["--measurements", "last"], "--measurements last: the study has final, curve"),
    ],
)
def test_names_that_the_study_does_not_have_are_errors(study: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(study, "--print", *options)


def test_errors_of_a_design_name_the_field(study: Path) -> None:
    def rewrite(**changes: Any) -> None:
        study.write_text(yaml.safe_dump(DESIGN | changes))

    with pytest.raises(FileNotFoundError, match=r"--design .*nowhere\.yaml is not a file"):
        run(study.with_name("nowhere.yaml"))
    rewrite(steps="many")
    with pytest.raises(ValueError, match="steps: expected int, found 'many'"):
        run(study)
    rewrite(methods={"good": {"without": ["last"]}})
    with pytest.raises(ValueError, match=r"methods\.good names last; known: chain, curve, final, search"):
        run(study)
    rewrite(methods={"worse": {}})
    with pytest.raises(FileNotFoundError, match=r"methods.worse needs .*worse_digits.yaml, which does not exist"):
        run(study)
