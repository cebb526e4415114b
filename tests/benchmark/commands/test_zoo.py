"""Models of the zoo are listed, loaded by name, and their records repeated without a run folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmark import load, sample, zoo
from benchmark.cli import main
from benchmark.commands.zoo import add_to_zoo
from benchmark.runs import WEIGHTS, find_checkpoint, newest_run
from datamodules import ImageDataModule
from leaderboard.files import file_sha256
from leaderboard.record.entries import RECORDS, Entry
from leaderboard.record.records import find_records, read_record
from systems.checkpoints import load_checkpoint, save_safetensors

LARGEST = 2.5e6
"""Bytes of a model."""
TOGETHER = 40e6
"""Bytes of all models."""
OFFLINE = ["--draft", "--evaluation.protocol=offline-v2", "--data.num_samples=40"]


@pytest.fixture(scope="module")
def model(trained: Path, uncompiled: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder `zoo/tiny_digits` and, beside `zoo`, the record of these weights."""
    folder = tmp_path_factory.mktemp("models")
    runs = shutil.copytree(trained, folder / "runs")
    exported = newest_run(runs) / "half-last"
    main(["export", str(newest_run(runs)), str(exported), "--half"])
    main(["test", f"--ckpt_path={exported}", *OFFLINE])
    (path,) = find_records([runs])
    add_to_zoo(exported, find_checkpoint(newest_run(runs)), Entry(path, read_record(path)), folder / "zoo/tiny_digits")
    shutil.copy(path, folder / "record.json")
    shutil.rmtree(runs)
    return folder / "zoo" / "tiny_digits"


@pytest.fixture
def in_zoo(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The same, found by its name from an empty folder."""
    monkeypatch.setattr(zoo, "ZOO", model.parent)
    monkeypatch.chdir(tmp_path)
    return model


def test_weights_are_of_16_bits_and_loaded_with_32(model: Path) -> None:
    stored = {tensor.dtype for tensor in load_file(model / WEIGHTS).values()}
    assert torch.float16 in stored
    assert torch.float32 not in stored
    loaded = load_checkpoint(model / WEIGHTS)["state_dict"]
    assert not any(tensor.dtype == torch.float16 for tensor in loaded.values())
    system, _ = load(model)
    assert {parameter.dtype for parameter in system.parameters()} == {torch.float32}
    assert not list(model.glob("*.ckpt"))


def test_too_large_numbers_are_refused(tmp_path: Path) -> None:
    content = {"state_dict": {"small": torch.ones(2), "large": torch.tensor([7e4])}}
    with pytest.raises(ValueError, match="large has numbers beyond 65504"):
        save_safetensors(content, tmp_path / WEIGHTS, half=True)
    assert not list(tmp_path.iterdir())


def test_a_model_is_found_by_name(in_zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert torch.equal(sample(*load("zoo:tiny_digits"), 3), sample(*load(in_zoo), 3))
    main(["predict", "--ckpt_path=zoo:tiny_digits", "--data.num_samples=2", "--png.folder=images"])
    assert len(list(Path("images").glob("*.png"))) >= 2
    main(["activity", "--ckpt_path=zoo:tiny_digits", "--num_images=2"])
    assert Path("runs/tiny_digits/activity/spikes.png").is_file()
    capsys.readouterr()
    main(["zoo"])
    assert re.search(r"zoo:tiny_digits .*Digits", capsys.readouterr().out)
    with pytest.raises(FileNotFoundError, match="no model 'tiny_digit'; did you mean zoo:tiny_digits"):
        load("zoo:tiny_digit")
    with pytest.raises(FileNotFoundError, match="no model 'other'; it has: tiny_digits"):
        main(["test", "--ckpt_path", "zoo:other"])


def test_a_record_is_repeated_from_the_zoo(in_zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = in_zoo.parents[1] / "record.json"
    main(["leaderboard", "verify", str(record)])
    assert "verified: " in capsys.readouterr().out


def test_a_card_belongs_to_its_record(model: Path, tmp_path: Path) -> None:
    record = model.parents[1] / "record.json"
    entry = Entry(record, read_record(record))
    card = (model / "README.md").read_text()
    assert "--ckpt_path zoo:tiny_digits" in card
    assert re.search(r"training steps \| 6 ", card)
    other = shutil.copytree(model, tmp_path / "other")
    content = load_checkpoint(other / WEIGHTS)
    content["state_dict"] = {name: tensor + 1 for name, tensor in content["state_dict"].items()}
    save_safetensors(content, other / WEIGHTS, half=True)
    with pytest.raises(ValueError, match="is not the record of"):
        add_to_zoo(other, other / WEIGHTS, entry, tmp_path / "zoo" / "other")
    with pytest.raises(FileExistsError, match="contains other weights"):
        add_to_zoo(model, model / WEIGHTS, entry, other)


def test_the_models_of_the_suite_are_small_and_have_records() -> None:
    folders = zoo.zoo_folders()
    sizes = {folder.name: sum(path.stat().st_size for path in folder.iterdir()) for folder in folders}
    assert {name: size for name, size in sizes.items() if size > LARGEST} == {}
    assert sum(sizes.values()) <= TOGETHER
    checkpoints = {read_record(path).checkpoint for path in find_records([RECORDS])}
    measured = {checkpoint.sha256 for checkpoint in checkpoints if checkpoint is not None}
    assert [folder.name for folder in folders if file_sha256(folder / WEIGHTS) not in measured] == []


@pytest.mark.parametrize("folder", zoo.zoo_folders(), ids=lambda folder: folder.name)
def test_a_model_of_the_suite_draws_samples_where_its_dataset_is_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncompiled: None
) -> None:
    def read(data: ImageDataModule) -> None:
        raise AssertionError("prediction needs no images")

    monkeypatch.setattr(ImageDataModule, "find_source", read)
    monkeypatch.chdir(tmp_path)
    main(["predict", f"--ckpt_path=zoo:{folder.name}", "--data.num_samples=2", "--png.folder=images"])
    assert len(list(Path("images").glob("*.png"))) == 3  # and their grid
