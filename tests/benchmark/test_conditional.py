"""SDiT from the command line: labels from the data, a record that says so, and runs of its former name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tiny import CALM, resume

from benchmark.cli import main
from benchmark.runs import find_checkpoint, load_run, newest_run, update_config
from leaderboard.record.records import find_records, read_record
from systems.sdit import SDiT
from systems.spiking_rwkv import SpikingRWKV

pytestmark = pytest.mark.usefixtures("uncompiled")
TINY = [*CALM, "--trainer.max_steps=2", "--model.embed_dim=8", "--model.num_inference_steps=2", "--data.batch_size=64"]


def fit(config: str, folder: Path, *options: str) -> Path:
    place = f"--trainer.default_root_dir={folder}"
    main(["fit", f"--config=configs/{config}.yaml", *TINY, place, *options])
    return newest_run(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SDiT on digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("systems.ops.compiled.COMPILE_FROM", 2**62)
        return fit("sdit_digits", tmp_path_factory.mktemp("runs"), "--monitor.every_n_epochs=1")


def test_classes_come_from_the_data(trained: Path) -> None:
    assert yaml.safe_load((trained / "config.yaml").read_text())["model"]["init_args"]["num_classes"] == 10
    system, _ = load_run(find_checkpoint(trained))
    assert isinstance(system, SDiT)
    assert len(system.network.y_embedder.embedding_table.weight) == 11


def test_the_record_says_conditional_and_the_grid_has_a_row_per_class(trained: Path) -> None:
    place = f"--trainer.default_root_dir={trained.parent}"
    main(["test", "--draft", place, "--data.num_samples=60"])
    path = find_records([trained])[-1]
    assert read_record(path).conditional == 1
    system, _ = load_run(find_checkpoint(trained))
    classes = len(system.labels(torch.arange(60)).unique())
    with Image.open((trained / "samples" / path.name).with_suffix(".png")) as page:
        assert page.height / page.width == pytest.approx(classes / 8, rel=0.02)
    main(["test", "--draft", place, "--data.num_samples=60", "--model.guidance=2"])
    guided = read_record(find_records([trained])[-1])
    assert {read_record(path).conditional for path in find_records([trained])} == {1, 2}
    assert guided.cost.acs == 0


def test_predict_generates_the_given_class(trained: Path) -> None:
    place = f"--trainer.default_root_dir={trained.parent}"
    main(["predict", place, "--data.num_samples=9", "--model.label=7", f"--png.folder={trained / 'sevens'}"])
    assert len(list((trained / "sevens").glob("0*.png"))) == 9
    with Image.open(trained / "sevens" / "grid.png") as page:
        assert page.width > 7 * page.height  # one row, of the one class


def test_training_resumes_with_labels(trained: Path) -> None:
    resume(trained.parent, "--trainer.max_steps=3")
    assert torch.load(find_checkpoint(trained), weights_only=True)["global_step"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.label=10"], "label=10; give a number from 0 to 9"),
        (["--model.num_classes=0", "--model.label=1"], "label=1, but the model is unconditional"),
        (["--model.num_classes=26"], "num_classes=26, but Digits has 10 classes"),
        (["--model.guidance=2", "--model.class_dropout=0"], "guidance=2.0 needs a network"),
        (["--model.image_size=9"], "image_size=9 is not a multiple of patch_size=2"),
    ],
)
def test_wrong_options_have_one_message(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as stop:
        fit("sdit_digits", tmp_path, *options)
    assert re.search(message, f"{stop.value}{capsys.readouterr().err}")


@pytest.mark.slow
def test_a_run_of_the_fully_spiking_design_by_its_former_name_is_read(tmp_path: Path) -> None:
    run = fit("spiking_rwkv_digits", tmp_path)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("class_path: systems.SpikingRWKV", "class_path: systems.SDiT"))
    checkpoint = torch.load(find_checkpoint(run), weights_only=True)
    torch.save(checkpoint | {"method": "sdit"}, find_checkpoint(run))
    before = config.read_text()
    assert "systems.SDiT" in before
    assert isinstance(load_run(find_checkpoint(run))[0], SpikingRWKV)
    main(["test", "--draft", f"--trainer.default_root_dir={tmp_path}", "--data.num_samples=24"])
    record = read_record(find_records([run])[-1])
    assert (record.method, record.config["model"]["class_path"]) == ("spiking-rwkv", "systems.SpikingRWKV")
    resume(tmp_path, "--trainer.max_steps=3")
    assert torch.load(find_checkpoint(run), weights_only=True)["method"] == "spiking-rwkv"


def test_only_configs_with_options_of_the_former_design_are_changed() -> None:
    old = "model:\n  class_path: systems.SDiT\n  init_args:\n    inner_norm: true\n"
    assert update_config(old) == old.replace("systems.SDiT", "systems.SpikingRWKV")
    short = old.replace("systems.SDiT", "SDiT")
    assert update_config(short) == old.replace("systems.SDiT", "systems.SpikingRWKV")
    for text in (old.replace("inner_norm", "class_dropout"), "class_path: SDiT\n", "a: [SDiT", "SDiT"):
        assert update_config(text) == text
