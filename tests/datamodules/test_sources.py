"""Every layout gives the same data, and a missing source one clear error."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from dataset_layouts import (
    Splits,
    encode,
    letter_splits,
    random_splits,
    write_cifar,
    write_folder,
    write_idx,
    write_parquet,
)

from datamodules import CIFAR10, FMNIST, KMNIST, MNIST, CelebA, DatasetNotFoundError, Letters

GREY = random_splits()
COLOUR = random_splits(32, 3)
LETTERS = letter_splits()


def hub_copy(splits: Splits, column: str = "image") -> datasets.DatasetDict:
    """Returns the result of `load_dataset` for these images."""

    def split(images: np.ndarray, labels: list[int]) -> datasets.Dataset:
        rows = {column: [{"bytes": encode(image), "path": None} for image in images], "label": labels}
        return datasets.Dataset.from_dict(rows).cast_column(column, datasets.Image())

    return datasets.DatasetDict({name: split(*content) for name, content in splits.items()})


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[object, ...]]]:
    """Makes the hub return the given splits; returns the list of its calls."""

    def install(splits: Splits, column: str = "image") -> list[tuple[object, ...]]:
        asked: list[tuple[object, ...]] = []

        def load_dataset(*args: object, **kwargs: object) -> object:
            asked.append((*args, kwargs))
            return hub_copy(splits, column)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
        return asked

    return install


GREY_LAYOUTS = {
    "parquet": lambda root, folder: write_parquet(root, GREY),
    "parquet shards below": lambda root, folder: write_parquet(root / "data", GREY, "{split}-00000-of-00001.parquet"),
    "parquet without schema": lambda root, folder: write_parquet(root, GREY, schema=False),
    "image folder": lambda root, folder: write_folder(root, GREY),
    "torchvision": lambda root, folder: write_idx(root / folder / "raw", GREY),
    "torchvision beside another dataset": lambda root, folder: (
        write_idx(root / "QMNIST-not-ours" / "MNIST" if folder != "MNIST" else root / "KMNIST" / "raw", COLOUR_AS_GREY),
        write_idx(root / folder / "raw", GREY),
    ),
    "plain and gzipped": lambda root, folder: (
        write_idx(root / "raw", GREY),
        write_idx(root / "raw", GREY, zipped=True),
    ),
    "gzipped in one folder": lambda root, folder: write_idx(root, GREY, zipped=True),
}
COLOUR_AS_GREY = random_splits(train=7, test=3)


@pytest.mark.parametrize("layout", GREY_LAYOUTS)
@pytest.mark.parametrize(("kind", "folder"), [(MNIST, "MNIST"), (FMNIST, "FashionMNIST"), (KMNIST, "KMNIST")])
def test_every_layout_of_the_mnist_family_gives_the_same_data(
    kind: type[MNIST], folder: str, layout: str, tmp_path: Path
) -> None:
    GREY_LAYOUTS[layout](tmp_path / "source", folder)
    data = kind(str(tmp_path / "source"), cache_dir=str(tmp_path / "cache"))
    expected = FMNIST(str(write_idx(tmp_path / "expected", GREY)), cache_dir=str(tmp_path / "cache"))
    if layout != "image folder":  # ordered by class, as the folders are
        assert data.fingerprint == expected.fingerprint
        assert torch.equal(data.labelled("test")[0], torch.from_numpy(GREY["test"][0])[:, None])
        assert data.labelled("train")[1].tolist() == GREY["train"][1]
    pixels = sorted(image.numpy().tobytes() for image in data.labelled("train")[0])
    assert pixels == sorted(image.tobytes() for image in GREY["train"][0])
    assert str(tmp_path / "source") in data.source


def test_every_layout_of_cifar10_gives_the_same_data(tmp_path: Path, fake_hub: Callable[..., object]) -> None:
    cache = str(tmp_path / "cache")
    fingerprints = {
        CIFAR10(root=str(root), cache_dir=cache).fingerprint
        for root in (
            write_parquet(tmp_path / "img", COLOUR, column="img"),
            write_parquet(tmp_path / "image", COLOUR),
            write_cifar(tmp_path / "torchvision" / "cifar-10-batches-py", COLOUR),
        )
    }
    asked = fake_hub(COLOUR, "img")
    fingerprints.add(CIFAR10(cache_dir=cache).fingerprint)
    assert len(fingerprints) == 1
    assert asked == [("uoft-cs/cifar10", None, {"revision": None})]


def test_every_layout_of_letters_gives_the_same_data(tmp_path: Path, fake_hub: Callable[..., object]) -> None:
    cache = str(tmp_path / "cache")
    transposed = {split: (images.transpose(0, 2, 1), labels) for split, (images, labels) in LETTERS.items()}
    from_one = {split: (images, [label + 1 for label in labels]) for split, (images, labels) in transposed.items()}
    names = {"train": "emnist-letters-train", "test": "emnist-letters-test"}
    sources = [
        Letters(root=str(write_parquet(tmp_path / "a" / "emnist-letters", LETTERS)), cache_dir=cache),
        Letters(root=str(write_parquet(tmp_path / "b", from_one)), cache_dir=cache),
        Letters(root=str(write_idx(tmp_path / "c" / "EMNIST" / "raw", from_one, **names)), cache_dir=cache),
        Letters(root=str(write_idx(tmp_path / "d", from_one, **names, zipped=True)), cache_dir=cache),
    ]
    fake_hub(transposed)
    sources.append(Letters(cache_dir=cache))
    assert len({data.fingerprint for data in sources}) == 1
    for data in sources:
        assert data.labelled("train")[1].tolist() == LETTERS["train"][1]


def test_labels_are_optional(tmp_path: Path) -> None:
    data = MNIST(str(write_parquet(tmp_path, GREY, labelled=False)), cache_dir=str(tmp_path / "cache"))
    assert set(data.labelled("test")[1].tolist()) == {-1}


def test_grey_images_stored_in_colour_are_read(tmp_path: Path) -> None:
    colour = {split: (np.repeat(images[..., None], 3, -1), labels) for split, (images, labels) in GREY.items()}
    cache = str(tmp_path / "cache")
    stored_in_colour = MNIST(str(write_parquet(tmp_path / "rgb", colour)), cache_dir=cache)
    assert stored_in_colour.fingerprint == MNIST(str(write_parquet(tmp_path / "l", GREY)), cache_dir=cache).fingerprint


def test_images_without_class_folder_have_no_label(tmp_path: Path) -> None:
    for split, (images, _) in GREY.items():
        (tmp_path / split).mkdir()
        for index, image in enumerate(images):
            (tmp_path / split / f"{index:03}.PNG").write_bytes(encode(image))
    data = MNIST(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert set(data.labelled("train")[1].tolist()) == {-1}
    assert torch.equal(data.labelled("train")[0][:, 0], torch.from_numpy(GREY["train"][0]))


def test_a_validation_split_of_the_source_is_used_unless_val_size_is_given(tmp_path: Path) -> None:
    splits = GREY | {"validation": GREY["test"]}
    root = str(write_parquet(tmp_path / "source", splits, "{split}-0.parquet"))
    data = MNIST(root, batch_size=5, cache_dir=str(tmp_path / "cache"))
    assert torch.equal(data.to_uint8(torch.cat(list(data.val_dataloader()))), data.labelled("test")[0])
    held_out = MNIST(root, batch_size=5, val_size=3, cache_dir=str(tmp_path / "cache"))
    assert sum(map(len, held_out.val_dataloader())) == 3


def test_the_hub_is_asked_for_celeba_at_the_pinned_revision(tmp_path: Path, fake_hub: Callable[..., object]) -> None:
    faces = random_splits(160, 3, train=4, test=3)
    asked = fake_hub(faces | {"valid": faces["test"]})
    data = CelebA(batch_size=2, cache_dir=str(tmp_path))
    assert "revision 2d738f56e0e7f925ea36ae7c808ea925264aacec" in data.source
    assert sum(map(len, data.val_dataloader())) == 3
    revision = {"revision": "2d738f56e0e7f925ea36ae7c808ea925264aacec"}
    assert asked == [("flwrlabs/celeba", "img_align+identity+attr", revision)]


def test_a_revision_can_be_chosen(tmp_path: Path, fake_hub: Callable[..., object]) -> None:
    asked = fake_hub(GREY)
    assert "none pinned" in MNIST(cache_dir=str(tmp_path)).source
    assert "revision abc" in MNIST(revision="abc", cache_dir=str(tmp_path)).source
    assert [request[-1] for request in asked] == [{"revision": None}, {"revision": "abc"}]


# Nothing found


@pytest.mark.slow
def test_offline_without_root_is_one_error_that_names_the_ways_out(tmp_path: Path) -> None:
    code = f"from datamodules import FMNIST\nFMNIST(cache_dir={str(tmp_path)!r}).prepare_data()"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    error = run.stderr[run.stderr.rindex("DatasetNotFoundError") :]
    for part in ("FashionMNIST", "zalando-datasets/fashion_mnist", "OfflineMode", "--data.root FOLDER", "network"):
        assert part in error


def test_a_dead_network_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("asked again"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    start = time.monotonic()
    with pytest.raises(
        DatasetNotFoundError, match=r"latest \(ConnectionError: Name or service not known\), and no folder"
    ):
        KMNIST(cache_dir=str(tmp_path)).prepare_data()
    assert time.monotonic() - start < 5


def test_a_copy_in_the_hugging_face_cache_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_hub: Callable[..., object]
) -> None:
    fake_hub(GREY)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: pytest.fail("asked the network"))
    (tmp_path / "ylecun___mnist").mkdir()
    assert MNIST(cache_dir=str(tmp_path)).num_reference("test") == 12


def test_a_folder_without_the_dataset_is_an_error_that_names_the_layouts(tmp_path: Path) -> None:
    write_idx(tmp_path / "KMNIST" / "raw", GREY)  # torchvision's root, but of another dataset
    with pytest.raises(
        DatasetNotFoundError, match=r"MNIST was not found: --data.root .* holds none .*MNIST/raw/train-im"
    ):
        MNIST(str(tmp_path)).prepare_data()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"--data.root .*/nowhere is not a folder"):
        MNIST(str(tmp_path / "nowhere")).prepare_data()
