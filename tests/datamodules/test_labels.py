from __future__ import annotations

import pytest
import torch
from torch import Tensor

from datamodules import Digits
from datamodules.errors import DatasetError


@pytest.fixture
def digits(tmp_path: object) -> Digits:
    data = Digits(batch_size=50, val_size=100, cache_dir=str(tmp_path))
    data.prepare_data()
    return data


def batches(loader: object) -> list[tuple[Tensor, Tensor]]:
    return list(loader)  # type: ignore[call-overload]


def test_images_alone_are_the_plain_case(digits: Digits) -> None:
    batch = next(iter(digits.train_dataloader()))
    assert isinstance(batch, Tensor)


@pytest.mark.parametrize("part", ["train", "val"])
def test_labels_belong_to_their_images(digits: Digits, part: str) -> None:
    digits.with_labels = True
    loader = digits.train_dataloader() if part == "train" else digits.val_dataloader()
    images, labels = digits.labelled()
    known = {
        image.numpy().tobytes(): int(label) for image, label in zip((images.float() / 127.5 - 1), labels, strict=True)
    }
    found = batches(loader)
    assert sum(len(labels) for _, labels in found) == {"train": 1400, "val": 100}[part]
    for images, labels in found:
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert [known[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_labels_follow_mirrored_images(tmp_path: object) -> None:
    plain = Digits(batch_size=50, cache_dir=str(tmp_path))
    mirrored = Digits(batch_size=50, flip=True, cache_dir=str(tmp_path))
    for data in (plain, mirrored):
        data.with_labels = True
    pairs = zip(batches(plain.train_dataloader()), batches(mirrored.train_dataloader()), strict=True)
    changed = 0
    for (images, labels), (flipped, same) in pairs:
        assert torch.equal(labels, same)
        either = (images == flipped).flatten(1).all(1) | (images.flip(-1) == flipped).flatten(1).all(1)
        assert either.all()
        changed += int((images != flipped).flatten(1).any(1).sum())
    assert changed > 400


def test_images_without_labels_have_one_message(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    digits.with_labels = True
    unknown = digits._entry.labels("train").clone()
    unknown[3:5] = -1
    monkeypatch.setattr(type(digits._entry), "labels", lambda self, split: unknown)
    with pytest.raises(DatasetError, match=r"2 of the 1,500 train images of .* have no label"):
        digits.train_dataloader()
