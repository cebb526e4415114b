"""The package works from any folder: configurations and records come with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmark.cli import main
from benchmark.configs import CONFIGS, find_config, find_configs, locate_configs
from leaderboard.record.entries import PACKAGED, RECORDS, default_folders, read_records

ROOT = Path(__file__).parents[2]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fsddim_celeba", "fsddim_celeba.yaml"),
        ("fsddim_celeba.yaml", "fsddim_celeba.yaml"),
        ("configs/fsddim_celeba.yaml", "fsddim_celeba.yaml"),
        ("configs/small/sdit_digits", "small/sdit_digits.yaml"),
        ("small/sdit_digits", "small/sdit_digits.yaml"),
    ],
)
@pytest.mark.usefixtures("elsewhere")
def test_configurations_are_found_by_name(name: str, file: str) -> None:
    assert find_config(name) == CONFIGS / file
    assert locate_configs(["fit", f"--config={name}"]) == ["fit", f"--config={CONFIGS / file}"]
    assert locate_configs(["fit", "-c", name, "--x", name]) == ["fit", "-c", str(CONFIGS / file), "--x", name]


@pytest.mark.parametrize("name", ["nowhere", "../fsddim_celeba", "/fsddim_celeba", "README.md", "{a: 1}", "x" * 5000])
@pytest.mark.usefixtures("elsewhere")
def test_other_names_are_left_to_the_parser(name: str) -> None:
    assert find_config(name) == Path(name)
    assert locate_configs(["fit", f"--config={name}"]) == ["fit", f"--config={name}"]


def test_files_of_the_working_folder_have_precedence(elsewhere: Path) -> None:
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs" / "fsddim_celeba.yaml").write_text("")
    assert find_config("configs/fsddim_celeba.yaml") == Path("configs/fsddim_celeba.yaml")
    assert find_config("configs/fsddim_mnist.yaml") == CONFIGS / "fsddim_mnist.yaml"
    assert find_configs("configs") == Path("configs")
    assert find_configs("configs/small") == CONFIGS / "small"


@pytest.mark.usefixtures("elsewhere")
def test_a_mistyped_name_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config=sddpm_minst"])
    assert "did you mean sddpm_mnist or sddpm_kmnist or sddpm_fmnist? --config takes a file, or the name of a " in (
        capsys.readouterr().err
    )


def test_records_of_the_package_are_shown_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert default_folders() == ["runs", RECORDS]
    monkeypatch.chdir(tmp_path)
    assert default_folders() == ["runs", RECORDS, str(PACKAGED)]
    assert {path.parent for path, _ in read_records()[0]} == {PACKAGED}
    shutil.copytree(PACKAGED, tmp_path / RECORDS)
    assert len(read_records()[0]) == len(list(PACKAGED.glob("*.json")))


@pytest.mark.slow
def test_a_wheel_carries_configurations_and_records(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    source, site, folder = tmp_path / "source", tmp_path / "site", tmp_path / "folder"
    for name in listed:  # building writes into the source tree
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={tmp_path}", str(source)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name, kind in (("configs", "*.yaml"), ("leaderboard/data/records", "*"), ("leaderboard/data/samples", "*")):
        expected = {file.relative_to(ROOT) for file in (ROOT / name).rglob(kind) if file.is_file()}
        assert {file.relative_to(site) for file in (site / name).rglob(kind) if file.is_file()} == expected
    folder.mkdir()

    def run(*args: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, "-m", "benchmark", *args], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert ": best fd_" in run("leaderboard")
    assert "class_path: systems.FSDDIM" in run("fit", "--config", "fsddim_celeba", "--print_config")
    assert not list(folder.iterdir())
