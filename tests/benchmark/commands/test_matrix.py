"""A matrix skips finished runs, resumes killed ones, and continues after one fails."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import SDDPM

from benchmark.cli import main
from benchmark.commands import matrix
from benchmark.runs import find_checkpoint, newest_run
from leaderboard.record.records import find_records
from systems.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow

SMALL = [option.removeprefix("--") for option in SDDPM[1:]]


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    folder = tmp_path / "configs"
    folder.mkdir()
    good = yaml.safe_load(Path("configs/quickstart.yaml").read_text())
    (folder / "good_digits.yaml").write_text(yaml.safe_dump(good))
    good["data"]["init_args"]["batch_size"] = 10**6
    (folder / "bad_digits.yaml").write_text(yaml.safe_dump(good))
    return folder


def run(configs: Path, *options: str, methods: tuple[str, ...] = ("good",)) -> int:
    """Returns the exit code of a matrix."""
    small = [option for option in SMALL if "batch_size" not in option]
    command = ["matrix", "--methods", *methods, "--datasets", "digits", "--configs", str(configs)]
    try:
        main([*command, "--output", str(configs.parent / "out"), "--draft", "--set", *small, *options])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_one_failure_does_not_stop_the_rest_and_nothing_is_done_twice(
    configs: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(configs, methods=("bad", "good")) == 1
    assert [command[0] for command in in_process] == ["fit", "fit", "test"]
    shown = capsys.readouterr().out
    assert "bad_digits" in shown
    assert "batch_size=1000000" in shown
    records = find_records([configs.parent / "out"])
    assert len(records) == 1
    in_process.clear()
    assert run(configs) == 0
    assert in_process == []
    assert "done before" in capsys.readouterr().out
    assert find_records([configs.parent / "out"]) == records
    in_process.clear()
    assert run(configs, "--print", methods=("bad", "good")) == 0
    (line,) = capsys.readouterr().out.splitlines()  # the pending run
    assert shlex.split(line)[:8] == ["python", "-m", "benchmark", "matrix", "--methods", "bad", "--datasets", "digits"]


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_test_is_repeated_where_asked_for(
    configs: Path, in_process: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(configs.parent)
    assert run(configs) == 0
    in_process.clear()
    assert run(configs, "--verify", "--print") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("--draft --verify")
    assert run(configs, "--verify") == 0
    (record,) = find_records([configs.parent / "out"])
    assert in_process == [["leaderboard", "verify", str(record), "--keep=true"]]
    assert (record.parent.parent / "repetitions" / record.name).is_file()
    assert ", repeated" in capsys.readouterr().out
    assert run(configs, "--verify") == 0
    assert len(in_process) == 1


def test_a_repetition_is_told_where_files_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "good_digits.yaml"
    config.write_text("{}")
    paths = ("--data.root=d", "--data.cache_dir=c", "--evaluation.fad_dir=f")
    cell = matrix.Cell(config, 0, ("--model.num_steps=2",), tmp_path, draft=False, verify=True, paths=paths)
    entry = matrix.Entry(tmp_path / "records" / "r.json", None)  # type: ignore[arg-type]
    monkeypatch.setattr(matrix.Cell, "entry", entry)
    assert list(cell.stages()) == [["leaderboard", "verify", str(entry.path), "--keep=true", "--root=d", "--fad_dir=f"]]


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_run_starts_from_that_of_another_method(
    configs: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = yaml.safe_load((configs / "good_digits.yaml").read_text())
    tuned["model"]["class_path"] = "SDM"
    (configs / "tuned_digits.yaml").write_text(yaml.safe_dump(tuned))
    both = {"methods": ("good", "tuned")}
    assert run(configs, "--start", "tuned=good", "--print", **both) == 0
    (line,) = capsys.readouterr().out.splitlines()  # one command trains the two in order
    assert "--methods good tuned --datasets digits --start tuned=good" in line
    assert run(configs, "--start", "tuned=good", **both) == 0
    start = next(option for option in in_process[2] if option.startswith("--model.init_from="))
    assert "good_digits-seed42-" in start
    assert len(find_records([configs.parent / "out"])) == 2


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_run_without_its_start_fails_alone(
    configs: Path, in_process: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(configs, "--start", "good=bad", methods=("bad", "good")) == 1
    assert "nothing to start from" in capsys.readouterr().out.replace("\n", " ")
    assert find_records([configs.parent / "out"]) == []


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_stopped_matrix_goes_on(
    configs: Path, in_process: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wait = matrix.Popen.wait

    def interrupted(process: object) -> int:
        while not list(tmp_path.glob("out/*/*/checkpoints/last.ckpt")):
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)  # to the matrix, as a cluster does
        return wait(process)  # type: ignore[arg-type]

    monkeypatch.setattr(matrix.Popen, "wait", interrupted)
    assert run(configs, "--seeds", "1", "2") == 143
    assert [command[0] for command in in_process] == ["fit"]  # neither its test nor the next one
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    steps = load_checkpoint(find_checkpoint(newest_run(folder)))["global_step"]
    assert steps >= 5
    monkeypatch.setattr(matrix.Popen, "wait", wait)
    in_process.clear()
    assert run(configs, "--seeds", "1") == 0
    assert in_process[0][:2] == ["fit", "--ckpt_path=last"]
    assert len(list(folder.glob("*/config.yaml"))) == 1  # the same run
    assert len(find_records([folder])) == 1


def test_another_configuration_is_another_run(configs: Path) -> None:
    def folder(*options: str) -> Path:
        return matrix.Cell(configs / "good_digits.yaml", 0, options, Path("out"), False).folder

    first = folder()
    assert folder() == first
    assert folder("--model.num_steps=3") != first
    config = configs / "good_digits.yaml"
    config.write_text(f"# a remark\n{config.read_text()}")
    assert folder() == first
    config.write_text(config.read_text().replace("seed_everything: 42", "seed_everything: 43"))
    assert folder() != first


def test_the_place_of_files_makes_no_other_run(configs: Path) -> None:
    def cell(*options: str) -> matrix.Cell:
        typed = ["--methods", "good", "--datasets", "digits", "--seeds", "1", "--configs", str(configs), *options]
        (found,) = matrix._cells(matrix._parser().parse_args(typed))
        return found

    moved = cell("--set", "data.root=D", "data.cache_dir=C", "evaluation.fad_dir=F")
    assert moved.folder == cell("--roots", "digits=E").folder == cell().folder
    assert moved.fit[-4:-1] == ["--data.root=D", "--data.cache_dir=C", "--evaluation.fad_dir=F"]
    assert cell("--set", "model.num_steps=3").folder != cell().folder


def test_commands_can_be_printed(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(configs, "--seeds", "1", "2", "--roots", "digits=a folder", "--print") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    words = shlex.split(lines[1])
    assert words[words.index("--seeds") + 1] == "2"
    assert "digits=a folder" in words
    python = configs.parent / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\necho\n")
    python.chmod(0o755)
    done = subprocess.run(
        "tr '\\n' '\\0' | xargs -0 -n 1 -P 2 sh -c",  # as in the README
        shell=True,
        input="\n".join(lines) + "\n",
        env=os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) == done.stdout.count("<--roots><digits=a folder>") == 2
    assert run(configs, "--seeds", "1", "2", "--slurm") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-1\n" in script
    last = script.splitlines()[-1].replace("srun --ntasks=1 bash -c", "echo")
    checked = subprocess.run(
        ["bash", "-c", "\n".join([*script.splitlines()[:-1], last])],
        env=os.environ | {"SLURM_ARRAY_TASK_ID": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert checked.stdout.startswith("exec python -m benchmark matrix --methods good --datasets digits --seeds 2 ")


def test_errors_name_the_way_out(configs: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no .*/worse_digits.yaml; .*/ has: bad_digits, good_digits"):
        run(configs, methods=("worse",))
    with pytest.raises(ValueError, match=r"--set max_steps has no name and value; give NAME=VALUE"):
        main(["matrix", "--methods", "sddpm", "--datasets", "mnist", "--set", "max_steps"])
    with pytest.raises(ValueError, match=r"--roots names fmnist, which --datasets does not"):
        main(["matrix", "--methods", "sddpm", "--datasets", "mnist", "--roots", "fmnist=x"])
    with pytest.raises(ValueError, match="sddpm before sdm"):
        main(["matrix", "--methods", "sdm", "sddpm", "--datasets", "mnist", "--start", "sdm=sddpm"])


def test_the_command_that_runs_is_this_package() -> None:
    done = subprocess.run([*matrix.BENCHMARK, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert matrix.BENCHMARK[0] == sys.executable
