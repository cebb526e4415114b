"""The configurations of the track are equal where its design says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from config_differences import differences, flatten

from benchmark.configs import design_of
from benchmark.studies import Place, Study, check_unchanged, read_study
from leaderboard.record.entries import RECORDS
from leaderboard.record.records import Record, find_records, read_record
from systems.base import DiffusionSystem

FOLDER = Path("configs/track")
CONFIGS = [path for path in sorted(FOLDER.glob("*.yaml")) if path.name != "design.yaml"]
MNIST = [path for path in CONFIGS if path.stem.endswith("_mnist")]
PARAMETERS = 300_000
TOLERANCE = 0.1
U_NETS = ("SDDPM", "SDM", "FSDDIM", "DDPM")
SEARCHED = ("optimizer", "lr_scheduler", "autoencoder_optimizer", "denoiser_optimizer")
"""Parts of a model's options that are of the recipe, not of the network."""


@pytest.fixture(scope="module")
def study() -> Study:
    return read_study(FOLDER / "design.yaml")


def options(config: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(config.read_text())
    return content


def test_every_configuration_is_of_a_method_of_the_design(study: Study) -> None:
    wanted = {
        f"{member.config or name}_{dataset}"
        for name, member in study.methods.items()
        for dataset in member.datasets or study.datasets
    }
    assert {path.stem for path in CONFIGS} == wanted


@pytest.mark.parametrize("config", MNIST, ids=lambda path: path.stem)
def test_networks_have_as_many_parameters(config: Path) -> None:
    model = options(config)["model"]
    if model["init_args"].get("num_classes", 0) is None:
        model["init_args"]["num_classes"] = 10
    with torch.device("meta"):
        network = DiffusionSystem.from_configuration(model).network
    count = sum(parameter.numel() for parameter in network.parameters())
    rows = re.findall(r"^\| `(\w+)[^|]*\| ([\d,]+) \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert dict(rows)[config.stem.removesuffix("_mnist")] == f"{count:,}"
    assert abs(count - PARAMETERS) <= TOLERANCE * PARAMETERS


def test_u_nets_have_the_same_width_at_full_resolution() -> None:
    models = [options(path)["model"] for path in MNIST]
    sizes = [model["init_args"] for model in models if model["class_path"] in U_NETS]
    assert len(sizes) >= 5
    widths = [size["base_channels"] * factor for size in sizes for factor in (1, size["channel_mult"][0])]
    assert max(widths) <= (1 + TOLERANCE) * min(widths)


def test_trainer_data_and_evaluation_are_the_same() -> None:
    found = {key for key in differences(CONFIGS) if not key.startswith("model.")}
    assert found == {"data.class_path", "evaluation.variant", "trainer.gradient_clip_val"}
    for path in CONFIGS:  # with several optimisers, a method clips by itself
        content = options(path)
        clip = content["trainer"]["gradient_clip_val"] or content["model"]["init_args"]["gradient_clip_val"]
        assert clip == 1.0


def test_optimiser_and_schedule_are_the_same(study: Study) -> None:
    recipes = []
    for path in CONFIGS:
        model = options(path)["model"]["init_args"]
        stages = 2 if "denoiser_optimizer" in model else 1
        parts = {key: dict(flatten(model[key])) for key in SEARCHED if key in model}
        schedule = parts.pop("lr_scheduler")
        assert schedule.pop("total_steps") * stages == study.steps
        recipes += [{"optimizer": part, "lr_scheduler": schedule} for part in parts.values()]
    assert len(recipes) > len(CONFIGS)
    assert all(recipe == recipes[0] for recipe in recipes)


def test_methods_differ_between_the_datasets_by_the_data_alone(study: Study) -> None:
    for path in MNIST:
        for dataset in study.datasets:
            found = differences([path, path.with_stem(path.stem.replace("_mnist", f"_{dataset}"))])
            assert found.keys() <= {"data.class_path"}


def test_every_method_sees_as_many_images(study: Study) -> None:
    assert study.steps * study.batch_size == 128_000
    for path in CONFIGS:
        content = options(path)
        assert content["trainer"]["max_steps"] == study.steps
        assert content["data"]["init_args"]["batch_size"] == study.batch_size
        model, epoch = content["model"]["init_args"], content["trainer"]["limit_train_batches"]
        if "denoiser_epochs" in model:
            assert model["denoiser_epochs"] == model["autoencoder_epochs"]
            assert (model["denoiser_epochs"] + model["autoencoder_epochs"]) * epoch == study.steps


def test_the_search_is_an_eighth_of_the_budget_for_every_method(study: Study) -> None:
    steps = study.steps // 8
    assert study.search.options["trainer.max_steps"] == steps
    memory = [1 / (1 - decay) for decay in (study.decay, study.search.decay)]
    assert memory[0] / study.steps == pytest.approx(memory[1] / steps)
    for name, member in study.methods.items():
        search = member.instead.get("search", study.search.options)
        assert search["trainer.max_steps"] == steps
        stages = 2 if "model.denoiser_epochs" in search else 1
        assert search["model.lr_scheduler.init_args.total_steps"] * stages == steps, name


def test_a_changed_file_changes_the_hash(tmp_path: Path) -> None:
    for path in FOLDER.glob("*.yaml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = design_of(FOLDER / "sddpm_mnist.yaml")
    assert before is not None
    assert design_of(tmp_path / "ddpm_mnist.yaml") == before
    (tmp_path / "sdm_mnist.yaml").write_text((tmp_path / "sdm_mnist.yaml").read_text() + "\n")
    changed = design_of(tmp_path / "ddpm_mnist.yaml")
    assert changed is not None
    assert changed["name"] == before["name"]
    assert changed["sha256"] != before["sha256"]
    assert design_of(Path("configs/sddpm_mnist.yaml")) is None


def test_committed_results_were_made_with_the_present_design() -> None:
    """Otherwise `configs/track` was edited after its first result: restore it, and put the change under a new name."""
    files = sorted(Path("configs").rglob("design.yaml"))
    designs = {found["name"]: found["sha256"] for path in files if (found := design_of(path)) is not None}
    records: list[Record] = [read_record(path) for path in find_records([RECORDS, Path(RECORDS).parent / "curves"])]
    for design in (record.design for record in records if record.design is not None):
        assert design.sha256 == designs[design.name]
    for path in files:
        check_unchanged(Place(path, read_study(path), {}, Path("runs"), Path(RECORDS).parent))
