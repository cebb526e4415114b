from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmark import load, sample
from benchmark.cli import main
from benchmark.commands.export import model_card
from benchmark.runs import find_checkpoint, newest_run
from leaderboard.record.records import find_records, read_record
from systems.checkpoints import CheckpointMismatchError

OFFLINE = ["--draft", "--evaluation.protocol=offline-v1", "--data.num_samples=40"]


@pytest.fixture(scope="module")
def run(trained: Path, uncompiled: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tested run."""
    runs = shutil.copytree(trained, tmp_path_factory.mktemp("exported") / "runs")
    main(["test", *OFFLINE, f"--trainer.default_root_dir={runs}"])
    return newest_run(runs)


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share") / "model"
    main(["export", str(run), str(folder)])
    return folder


def test_an_exported_folder_contains_weights_config_card_and_samples(run: Path, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.yaml", "README.md", "samples.png"}
    weights = torch.load(find_checkpoint(run), weights_only=True)["state_dict"]
    exported = load_file(folder / "model.safetensors")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["init_args"]["cache_dir"] is None


def test_the_card_is_written_from_the_record(run: Path, folder: Path) -> None:
    (path,) = find_records([run])
    record = read_record(path)
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "spiking-diffusion-benchmark"
    assert header["tags"][0] == "spiking-neural-network"
    (shown,) = re.findall(r"\| fd_digits \| ([\d.]+)", card)
    assert float(shown) == pytest.approx(record.metrics["fd_digits"].value, abs=record.metrics["fd_digits"].uncertainty)
    assert f"{record.cost.energy_strict_mj:.3g} mJ" in card
    assert "a draft" in card
    assert (header["pipeline_tag"], "classes |" in card) == ("unconditional-image-generation", False)


def test_the_card_of_a_conditional_model_names_its_classes() -> None:
    configuration = {"model": {"class_path": "systems.SDiT", "init_args": {"num_classes": 10}}}
    card = model_card({"method": "sdit", "state_dict": {}}, configuration, [], False, "zoo:x")
    header = yaml.safe_load(card.split("---")[1])
    assert header["tags"] == ["diffusion", "class-conditional", "sdit"]  # untested
    assert "pipeline_tag" not in header
    assert "| classes | 10; " in card


def test_an_exported_folder_repeats_the_samples_and_the_test(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert torch.equal(sample(*load(folder), 6), sample(*load(run), 6))
    monkeypatch.setattr("benchmark.stages.fastest_precision", lambda _: "bf16-mixed")  # a processor with bfloat16
    main(["test", f"--ckpt_path={folder}", *OFFLINE, f"--trainer.default_root_dir={tmp_path}", "--data.batch_size=64"])
    (first,), (second,) = find_records([run]), find_records([tmp_path])
    assert read_record(first).metrics == read_record(second).metrics
    assert read_record(first).seeds == read_record(second).seeds
    assert not (folder / "records").exists()


@pytest.mark.parametrize("prefix", ["network.", ""])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_bare_weights_with_a_config_are_tested(
    run: Path, tmp_path: Path, prefix: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(find_checkpoint(run), weights_only=True)["state_dict"]
    state = {name.replace("network.", prefix, 1): tensor.contiguous() for name, tensor in state.items()}
    bare = tmp_path / f"bare.{suffix}"
    save_file(state, bare) if suffix == "safetensors" else torch.save(state, bare)
    options = [f"--config={run / 'config.yaml'}", f"--ckpt_path={bare}", f"--trainer.default_root_dir={tmp_path}"]
    main(["test", *options, *OFFLINE])
    (first,), (second,) = find_records([run]), find_records([tmp_path])
    assert read_record(first).metrics == read_record(second).metrics
    with pytest.raises(ValueError, match="contains no configuration; name its config too: `--config CONFIG`"):
        main(["test", f"--ckpt_path={bare}", *OFFLINE])


def test_weights_of_another_network_are_refused(run: Path, tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointMismatchError, match="does not fit the configured network"):
        main(["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={tmp_path / 'other.safetensors'}", *OFFLINE])


def test_nothing_is_overwritten(run: Path, folder: Path) -> None:
    before = (folder / "README.md").read_bytes()
    with pytest.raises(FileExistsError, match="name a new folder"):
        main(["export", str(run), str(folder)])
    assert (folder / "README.md").read_bytes() == before


def test_a_stopped_export_leaves_no_incomplete_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("benchmark.commands.export.write_atomic", stopped)
        with pytest.raises(KeyboardInterrupt):
            main(["export", str(run), str(tmp_path / "model")])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "model").mkdir()  # an empty folder is filled
    (tmp_path / ".model.part").mkdir()
    (tmp_path / ".model.part" / "README.md").touch()  # of a killed command
    main(["export", str(run), str(tmp_path / "model")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert "model.safetensors" in {path.name for path in (tmp_path / "model").iterdir()}


def test_an_exported_folder_is_uploaded(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, exist_ok: calls.append(name))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda self, repo_id, folder_path: calls.append((repo_id, folder_path))
    )
    main(["export", str(run), str(tmp_path / "model"), "--push_to_hub=user/model"])
    assert calls == ["user/model", ("user/model", tmp_path / "model")]
