"""The contract of all datamodules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from dataset_layouts import (
    letter_splits,
    random_splits,
    write_celeba,
    write_cifar,
    write_folder,
    write_idx,
    write_parquet,
)
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from datamodules import CIFAR10, FMNIST, KMNIST, MNIST, CelebA, Digits, ImageDataModule, Letters


class DataModuleContract:
    """Inherited by one class for each dataset, which writes its source."""

    kind: type[ImageDataModule]
    options: ClassVar[dict[str, object]] = {}
    train, test = 40, 12

    def write(self, root: Path) -> None:
        raise NotImplementedError

    @pytest.fixture
    def data(self, tmp_path: Path) -> ImageDataModule:
        return self.make(tmp_path)

    def make(self, tmp_path: Path, **options: object) -> ImageDataModule:
        root = tmp_path / "source"
        if not root.exists():
            root.mkdir()
            self.write(root)
        defaults = {"root": str(root), "batch_size": 8, "cache_dir": str(tmp_path / "cache"), "sample_batch_size": 5}
        data = self.kind(**(defaults | self.options | options))
        data.prepare_data()
        data.setup("fit")
        return data

    def test_training_batches_are_floats_from_minus_one_to_one(self, data: ImageDataModule) -> None:
        batches = list(data.train_dataloader())
        assert len(batches) == self.train // 8
        for batch in batches:
            assert batch.dtype == torch.float32
            assert batch.shape == (8, *data.image_shape)
            assert batch.min() >= -1
            assert batch.max() <= 1

    def test_training_data_are_described_by_plain_values(self, data: ImageDataModule) -> None:
        geometry = {"image_size": data.image_size} | data.geometry
        expected = {"name": data.name, "fingerprint": data.fingerprint, "geometry": geometry, "images": self.train}
        assert json.loads(json.dumps(data.training_data)) == expected

    def test_reference_is_the_whole_split_in_bytes(self, data: ImageDataModule) -> None:
        for split, count in {"train": self.train, "test": self.test}.items():
            batches = list(data.reference_batches(split))
            assert {batch.dtype for batch in batches} == {torch.uint8}
            assert sum(len(batch) for batch in batches) == count == data.num_reference(split)
            assert batches[0].shape[1] == data.num_channels

    def test_training_images_become_the_reference_again(self, tmp_path: Path) -> None:
        data = self.make(tmp_path, val_size=9, flip=False)
        seen = torch.cat([*data.val_dataloader(), *data.train_dataloader()])
        back = {image.numpy().tobytes() for image in data.to_uint8(seen)}
        reference = {image.numpy().tobytes() for batch in data.reference_batches() for image in batch}
        assert back <= reference
        assert len(back) == 9 + (self.train - 9) // 8 * 8

    def test_held_out_images_are_fixed_and_not_trained_on(self, tmp_path: Path) -> None:
        data = self.make(tmp_path, val_size=9, batch_size=1, flip=False)
        held_out = {image.numpy().tobytes() for image in torch.cat(list(data.val_dataloader()))}
        trained = {image.numpy().tobytes() for image in torch.cat(list(data.train_dataloader()))}
        assert len(held_out) == 9
        assert len(trained) == self.train - 9
        assert not held_out & trained
        again = self.make(tmp_path, val_size=9, batch_size=1, flip=False)
        assert {image.numpy().tobytes() for image in torch.cat(list(again.val_dataloader()))} == held_out

    def test_test_and_predict_name_the_images_by_seed(self, tmp_path: Path) -> None:
        data = self.make(tmp_path, num_samples=12, sample_seed=100)
        for loader in (data.test_dataloader(), data.predict_dataloader()):
            batches = list(loader)
            assert [len(batch) for batch in batches] == [5, 5, 2]
            assert torch.cat(batches).tolist() == list(range(100, 112))
            assert batches[0].dtype == torch.int64

    def test_cached_images_are_not_read_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.make(tmp_path)
        monkeypatch.setattr(ImageDataModule, "_build", lambda *_: pytest.fail("read again"))
        second = self.make(tmp_path)
        assert second.fingerprint == first.fingerprint
        assert second.source == first.source

    def test_labels_belong_to_classes(self, data: ImageDataModule) -> None:
        images, labels = data.labelled("test")
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert len(images) == len(labels) == self.test
        assert labels.min() >= (-1 if data.num_classes is None else 0)
        assert labels.max() < (data.num_classes or 1)

    def test_command_line_knows_every_option(self) -> None:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(ImageDataModule, "data")
        config = parser.parse_args(["--data", f"datamodules.{self.kind.__name__}"]).data.init_args
        expected = {
            "batch_size",
            "image_size",
            "flip",
            "val_size",
            "num_workers",
            "cache_dir",
            "num_samples",
            "sample_batch_size",
            "sample_seed",
        }
        assert expected <= set(vars(config))
        assert config.flip is (self.kind in (CIFAR10, CelebA))

    def test_trainer_runs_every_stage(self, tmp_path: Path) -> None:
        data = self.make(tmp_path, num_samples=7)
        model = Recorder()
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=data)
        assert trainer.global_step == self.train // 8
        trainer.test(model, datamodule=data, verbose=False)
        assert torch.cat(model.seeds).tolist() == list(range(7))
        predicted = trainer.predict(model, datamodule=data)
        assert torch.cat(predicted).tolist() == list(range(7))


class Recorder(LightningModule):
    """Keeps the seeds it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seeds: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return (batch * self.weight).mean()

    def validation_step(self, batch: torch.Tensor) -> None:
        assert batch.dtype == torch.float32

    def test_step(self, batch: torch.Tensor) -> None:
        self.seeds.append(batch)

    def predict_step(self, batch: torch.Tensor) -> torch.Tensor:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TestMNIST(DataModuleContract):
    kind = MNIST
    options: ClassVar[dict[str, object]] = {"image_size": 32}

    def write(self, root: Path) -> None:
        write_parquet(root, random_splits())


class TestFMNIST(DataModuleContract):
    kind = FMNIST
    options: ClassVar[dict[str, object]] = {"image_size": 32, "fit": "resize"}

    def write(self, root: Path) -> None:
        write_idx(root / "FashionMNIST" / "raw", random_splits())


class TestKMNIST(DataModuleContract):
    kind = KMNIST

    def write(self, root: Path) -> None:
        write_folder(root, random_splits())


class TestLetters(DataModuleContract):
    kind = Letters
    options: ClassVar[dict[str, object]] = {"image_size": 36}
    train, test = 78, 78

    def write(self, root: Path) -> None:
        splits = letter_splits()
        for images, _ in splits.values():
            images[:, 0, 0] = range(78)  # all different
        write_parquet(root, splits)


class TestCIFAR10(DataModuleContract):
    kind = CIFAR10

    def write(self, root: Path) -> None:
        write_cifar(root / "cifar-10-batches-py", random_splits(32, 3))


class TestCelebA(DataModuleContract):
    kind = CelebA
    options: ClassVar[dict[str, object]] = {"image_size": 32}
    train, test = 30, 8

    def write(self, root: Path) -> None:
        write_celeba(root)


class TestDigits(DataModuleContract):
    kind = Digits
    options: ClassVar[dict[str, object]] = {"image_size": 16}
    train, test = 1500, 297

    def make(self, tmp_path: Path, **options: object) -> ImageDataModule:
        options: ClassVar[dict[str, object]] = (
            {"batch_size": 8, "cache_dir": str(tmp_path), "sample_batch_size": 5} | self.options | options
        )
        data = Digits(**options)
        data.prepare_data()
        data.setup("fit")
        return data
