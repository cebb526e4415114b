from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmark.cli import main
from benchmark.commands.ablate_sdit import _spread
from leaderboard.record.records import find_records, read_record

pytestmark = pytest.mark.slow

TINY = [
    "--trainer.max_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--model.embed_dim=8",
    "--model.num_inference_steps=2",
    "--data.batch_size=256",
    "--data.num_samples=24",
]


VARIANTS = ["full", "no reconstruction", "softmax attention", "spiking embedding"]


def ablate(folder: Path, *options: str) -> None:
    main(["ablate-sdit", "--draft", f"--config=configs/{folder.name}.yaml", f"--output={folder}", *options, *TINY])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every variant of SDiT with one seed."""
    folder = tmp_path_factory.mktemp("runs") / "sdit_digits"
    ablate(folder, "--seeds", "5")
    return folder


def test_every_variant_leaves_a_record(folder: Path) -> None:
    records = [read_record(path) for path in find_records([folder])]
    assert all(record.draft for record in records)
    assert sorted(r.variant for r in records) == sorted(f"{name}, seed 5" for name in VARIANTS)
    for record in records:
        name = record.variant.removesuffix(", seed 5")
        model = record.config["model"]["init_args"]
        assert (record.method, record.seeds["training"]) == ("sdit", 5)
        assert record.conditional == 1
        assert model["reconstruction"] == (name != "no reconstruction")
        assert model["attention"] == ("softmax" if name == "softmax attention" else "rwkv")
        assert model["embedding"] == ("spiking" if name == "spiking embedding" else "ann")


def test_finished_runs_are_skipped_and_missing_ones_made(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = find_records([folder])
    (lost,) = find_records([folder / "no-reconstruction-seed5"])
    lost.unlink()
    ablate(folder, "--seeds", "5", "6", "--variants", "full")
    ablate(folder, "--seeds", "5")
    assert len(find_records([folder])) == len(before) + 1
    shown = capsys.readouterr().out
    trained = [line for line in shown.splitlines() if line.endswith((", seed 5", ", seed 6"))]
    assert trained == ["full, seed 6", "no reconstruction, seed 5"]
    for name in VARIANTS:
        assert f"│ {name} " in shown
    assert "training" in shown
    assert Image.open(folder / "ablations.png").width > 600


def test_the_fully_spiking_design_has_the_same_ablations(tmp_path: Path) -> None:
    ablate(tmp_path / "spiking_rwkv_digits", "--seeds", "5", "--variants", "softmax attention")
    (path,) = find_records([tmp_path / "spiking_rwkv_digits"])
    record = read_record(path)
    assert (record.method, record.conditional) == ("spiking-rwkv", None)
    assert record.config["model"]["init_args"]["attention"] == "softmax"


def test_other_options_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"made with other options .* or another --output"):
        ablate(folder, "--seeds", "5", "--model.threshold=0.5")


def test_test_that_is_not_its_protocol_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"takes 5,000 generated images, not 24\. .* add --draft"):
        main(["ablate-sdit", f"--output={tmp_path / 'new'}", *TINY])
    assert not (tmp_path / "new").exists()


def test_spread_over_seeds() -> None:
    assert _spread([1.0, 2.0, 3.0]) == "2.00 ±2.48"
    assert _spread([1.0]) == "1.00"


def test_unknown_variant_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["ablate-sdit", f"--output={tmp_path}", "--variants", "no rwkv"])
    assert stop.value.code == 2
    assert "invalid choice: 'no rwkv'" in capsys.readouterr().err
