"""The command that measures the speed of the train loader."""

from __future__ import annotations

import pytest
from jsonargparse import auto_cli

from benchmark.speed import loader as loader_speed


def test_command_shows_speeds_and_their_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader_speed, "SYNTHETIC_IMAGES", {"train": 500, "t10k": 2})
    auto_cli(loader_speed.loader_speed, args=["--batch_size", "50", "--epochs", "1"])
    shown = capsys.readouterr().out
    for part in ("500 images of 28x28, batches of 50", "train_dataloader()", "ratio"):
        assert part in shown


def test_no_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="epochs=0 is too small; use 1 or more"):
        loader_speed.loader_speed(epochs=0)
