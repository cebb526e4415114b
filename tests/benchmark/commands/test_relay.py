from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import SDDPM
from torch import Tensor

from benchmark.cli import main
from benchmark.runs import find_checkpoint, newest_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("uncompiled")]
WIDE = [option for option in SDDPM if "base_channels" not in option] + ["--model.base_channels=32"]


def leg(folder: Path, *options: str) -> dict[str, Tensor]:
    """Trains a leg and returns all tensors that it left."""
    place = f"--trainer.default_root_dir={folder / 'runs'}"
    main(["relay", "--weights", str(folder / "weights"), "--minutes", "5", "--piece_mb", "1", *WIDE, place, *options])
    pieces = sorted((folder / "weights").glob("leg-*/*.safetensors"))
    return {name: tensor for piece in pieces for name, tensor in load_file(piece).items()}


@pytest.fixture(scope="module")
def folder(uncompiled: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("relay")
    leg(folder, "--trainer.max_epochs=1")
    return folder


def test_a_leg_leaves_averaged_weights_in_pieces(folder: Path) -> None:
    pieces = sorted((folder / "weights").glob("leg-*/*.safetensors"))
    left = {name: tensor for piece in pieces for name, tensor in load_file(piece).items()}
    assert all(piece.stat().st_size <= 1.1e6 for piece in pieces)
    checkpoint = torch.load(find_checkpoint(newest_run(folder / "runs")), weights_only=True)
    trained = {k.removeprefix("network."): v for k, v in checkpoint["state_dict"].items() if k.startswith("network.")}
    assert left.keys() == trained.keys()
    for name, tensor in left.items():
        assert tensor.dtype == (torch.half if trained[name].numel() >= 4096 else trained[name].dtype)
        torch.testing.assert_close(tensor.to(trained[name].dtype), trained[name], rtol=1e-3, atol=1e-6)
    progress = json.loads((folder / "weights" / "progress.json").read_text())
    assert [entry["steps"] for entry in progress["legs"]] == [5]


def test_the_next_leg_starts_from_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = leg(folder, "--trainer.max_epochs=0")
    after = leg(folder, "--trainer.max_steps=1", "--model.optimizer.lr=1e-9")
    for name, tensor in before.items():
        if "running" not in name and tensor.is_floating_point():
            torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-6)
    assert [path.name for path in (folder / "weights").glob("leg-*")] == ["leg-3"]
    assert "6 steps, 3 legs" in capsys.readouterr().out
    assert not torch.equal(before["bn.running_mean"], after["bn.running_mean"])


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has weights with network="):
        leg(folder, "--model.base_channels=16")
    with pytest.raises(ValueError, match="use numbers above 0"):
        main(["relay", "--weights", str(tmp_path), "--minutes", "0", *WIDE])
    piece = next((folder / "weights").glob("leg-*/*.safetensors"))
    kept = piece.rename(piece.with_suffix(".away"))
    with pytest.raises(FileNotFoundError, match=f"lacks leg-3/{piece.name}"):
        leg(folder)
    kept.rename(piece)
