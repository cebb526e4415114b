"""Several processes: each training image and each seed goes to one of them only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_layouts import write_idx
from lightning.pytorch import LightningModule, Trainer

from datamodules import MNIST

pytestmark = pytest.mark.slow


class Recorder(LightningModule):
    """Writes the batches of each process to files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.folder = folder

    def keep(self, kind: str, values: torch.Tensor) -> None:
        with (self.folder / f"{kind}-{self.global_rank}").open("a") as file:
            file.writelines(f"{int(value)}\n" for value in values)

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.keep("train", self.trainer.datamodule.to_uint8(batch)[:, 0, 0, 0])
        return (batch * self.weight).mean()

    def test_step(self, batch: torch.Tensor) -> None:
        self.keep("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_two_processes_share_images_and_seeds(tmp_path: Path) -> None:
    counting = {
        split: (np.arange(count, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2), [0] * count)
        for split, count in {"train": 40, "test": 2}.items()
    }
    write_idx(tmp_path / "source", counting)
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests / "_helpers")])}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=True, timeout=200)
    seen = {name: numbers(tmp_path / name) for name in ("train-0", "train-1", "test-0", "test-1")}
    assert len(seen["train-0"]) == len(seen["train-1"]) == 20
    assert sorted(seen["train-0"] + seen["train-1"]) == list(range(40))
    assert seen["test-0"] == [0, 1, 2, 6, 7, 8]  # the batches of a single process, in turn
    assert seen["test-1"] == [3, 4, 5, 9, 10]


def main(folder: Path) -> None:
    """Runs in both processes of the test above."""
    data = MNIST(
        str(folder / "source"), batch_size=4, cache_dir=str(folder / "cache"), num_samples=11, sample_batch_size=3
    )
    trainer = Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    recorder = Recorder(folder)
    trainer.fit(recorder, datamodule=data)
    trainer.test(recorder, datamodule=data, verbose=False)


def numbers(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()]


@pytest.fixture
def four_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 3)


@pytest.mark.usefixtures("four_processes")
def test_the_last_of_four_processes_gets_its_share(tmp_path: Path) -> None:
    data = MNIST(num_samples=31, sample_batch_size=4, sample_seed=50)
    first, second = data.test_dataloader()
    assert first.tolist() == [62, 63, 64, 65]
    assert second.tolist() == [78, 79, 80]


@pytest.mark.usefixtures("four_processes")
def test_fewer_batches_than_processes() -> None:
    with pytest.raises(ValueError, match=r"num_samples=12 in batches of 4 cannot be shared by 4 processes; give 4"):
        MNIST(num_samples=12, sample_batch_size=4).test_dataloader()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
