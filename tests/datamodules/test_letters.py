"""EMNIST Letters stored upright or transposed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dataset_layouts import letter_splits, write_parquet

from datamodules import DatasetError, Letters

LETTERS = letter_splits()


def test_orientation_is_verified(tmp_path: Path) -> None:
    root, cache = str(write_parquet(tmp_path / "source", LETTERS)), str(tmp_path / "cache")
    upright = Letters(root=root, orientation="upright", cache_dir=cache)
    assert upright.fingerprint == Letters(root=root, cache_dir=cache).fingerprint
    with pytest.raises(DatasetError, match=r"stores its letters upright.*pass --data.orientation upright or auto"):
        Letters(root=root, orientation="transposed", cache_dir=cache).prepare_data()


def test_orientation_must_be_given_where_it_cannot_be_seen(tmp_path: Path) -> None:
    root, cache = str(write_parquet(tmp_path / "source", LETTERS, labelled=False)), str(tmp_path / "cache")
    with pytest.raises(
        DatasetError, match=r"cannot tell .* pass --data.orientation upright or --data.orientation trans"
    ):
        Letters(root=root, cache_dir=cache).prepare_data()
    transposed, _ = Letters(root=root, orientation="transposed", cache_dir=cache).labelled("train")
    assert torch.equal(transposed[:, 0].mT, torch.from_numpy(LETTERS["train"][0]))


def test_letters_numbered_both_ways(tmp_path: Path) -> None:
    images, labels = LETTERS["train"]
    write_parquet(tmp_path, LETTERS | {"train": (images, [26, *labels[1:]])})
    with pytest.raises(DatasetError, match="has labels from 0 to 26, expected 0 to 25 or 1 to 26"):
        Letters(root=str(tmp_path), cache_dir=str(tmp_path / "cache")).prepare_data()
