"""A malformed source raises one error that names the file."""

from __future__ import annotations

import gzip
import pickle
import struct
import zlib
from pathlib import Path
from string import ascii_uppercase

import datasets
import numpy as np
import pytest
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

from datamodules import CIFAR10, MNIST, DatasetError, Letters

GREY = random_splits()
COLOUR = random_splits(32, 3)


def fail(data: MNIST | CIFAR10, match: str) -> None:
    with pytest.raises(DatasetError, match=match):
        data.prepare_data()
    assert not any(path.is_dir() for path in data.cache_dir.glob("*"))  # nothing half-built is left


def mnist(tmp_path: Path) -> MNIST:
    return MNIST(str(tmp_path), cache_dir=str(tmp_path / "cache"))


def test_several_datasets_below_root(tmp_path: Path) -> None:
    write_parquet(tmp_path / "mnist", GREY)
    write_parquet(tmp_path / "fmnist", GREY)
    fail(mnist(tmp_path), match=r"holds parquet files of the train split in several folders: .*/fmnist, .*/mnist; exp")


def test_idx_files_of_several_datasets_below_root(tmp_path: Path) -> None:
    write_idx(tmp_path / "a", GREY)
    write_idx(tmp_path / "b", GREY)
    fail(mnist(tmp_path), match="holds train-images-idx3-ubyte in several folders")


def test_missing_split(tmp_path: Path) -> None:
    write_parquet(tmp_path, {"train": GREY["train"]})
    fail(mnist(tmp_path), match="no test split in the parquet files below")


def test_image_folder_without_training_split(tmp_path: Path) -> None:
    write_folder(tmp_path, {"test": GREY["test"]})
    fail(mnist(tmp_path), match="no train split in the image folder")


def test_class_that_is_not_trained_on(tmp_path: Path) -> None:
    write_folder(tmp_path, GREY)
    (tmp_path / "test" / "9").rename(tmp_path / "test" / "nine")
    fail(mnist(tmp_path), match=r"the class folders below .* are named nine; expected numbers, or 0, 1, 2")


def test_columns_without_images(tmp_path: Path) -> None:
    write_parquet(tmp_path, GREY, column="picture", schema=False)
    fail(
        mnist(tmp_path), match=r"train.parquet has the columns \['picture', 'label'\], expected one named image or img"
    )


def test_damaged_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path, GREY)
    file = tmp_path / "test.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    fail(mnist(tmp_path), match=r"test.parquet cannot be read \(.*; fetch it again")


def test_empty_parquet_row(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": encode(GREY["train"][0][0]), "path": None}, {"bytes": None, "path": "0.png"}]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{split}.parquet"))
    fail(mnist(tmp_path), match=r"test.parquet, row 1, holds no image bytes")


def test_empty_split(tmp_path: Path) -> None:
    write_parquet(tmp_path, GREY)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": [], "label": []}, features=features).to_parquet(str(tmp_path / "test.parquet"))
    fail(mnist(tmp_path), match="holds no images in its test split")


def test_damaged_image(tmp_path: Path) -> None:
    write_folder(tmp_path, GREY)
    file = tmp_path / "train" / "3" / "00003.png"
    file.write_bytes(file.read_bytes()[:-300])
    fail(mnist(tmp_path), match=r"train/3/00003.png is a damaged image")
    file.write_bytes(b"no image")
    fail(mnist(tmp_path), match=r"train/3/00003.png is not a readable image")


def test_wrong_size(tmp_path: Path) -> None:
    write_parquet(tmp_path, random_splits(32))
    fail(mnist(tmp_path), match=r"test.parquet, row 0, has 32x32 pixels, expected 28x28; is this MNIST\?")


def test_colour_where_grey_is_expected(tmp_path: Path) -> None:
    write_parquet(tmp_path, random_splits(28, 3))
    fail(mnist(tmp_path), match=r"row 0, is an image of mode RGB with colours, expected grey")


def test_label_of_no_class(tmp_path: Path) -> None:
    write_parquet(tmp_path, random_splits(classes=11))
    fail(mnist(tmp_path), match=r"row 10, has the label 10, expected 0 to 9; is this MNIST\?")


def test_missing_idx_file(tmp_path: Path) -> None:
    write_idx(tmp_path, GREY)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    fail(mnist(tmp_path), match=r"lacks t10k-labels-idx1-ubyte \(plain or .gz\); all four files are needed")


def test_idx_file_of_something_else(tmp_path: Path) -> None:
    write_idx(tmp_path, GREY)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"<html>not found</html>")
    fail(mnist(tmp_path), match=r"t10k-images-idx3-ubyte begins with 3c68746d, expected 00000803")


def test_truncated_idx_file(tmp_path: Path) -> None:
    write_idx(tmp_path, GREY)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    fail(mnist(tmp_path), match=r"train-images-idx3-ubyte announces 40 x 28 x 28 bytes but holds 31359")


def test_truncated_gzip(tmp_path: Path) -> None:
    write_idx(tmp_path, GREY, zipped=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-20])
    fail(mnist(tmp_path), match=r"train-images-idx3-ubyte.gz is damaged")
    file.write_bytes(gzip.compress(b""))
    fail(mnist(tmp_path), match=r"train-images-idx3-ubyte.gz begins with , expected")


def test_more_images_than_labels(tmp_path: Path) -> None:
    write_idx(tmp_path, GREY | {"train": (GREY["train"][0], GREY["train"][1][:-1])})
    fail(mnist(tmp_path), match=r"train-images-idx3-ubyte holds 40 images, but .*train-labels-idx1-ubyte 39 labels")


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header announces a size, with almost no data."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rest = b"IDAT" + zlib.compress(b"")
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, rest)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.filterwarnings("ignore:.*decompression bomb.*")
@pytest.mark.parametrize(
    "size", [9_000, 11_000, 60_000]
)  # below and above the limits at which Pillow warns and refuses
@pytest.mark.parametrize(
    ("make", "splits", "names"), [(MNIST, GREY, "0123456789"), (Letters, letter_splits(), ascii_uppercase)]
)
def test_an_enormous_image_is_not_unpacked(
    size: int, make: type[MNIST], splits: Splits, names: str, tmp_path: Path
) -> None:
    write_folder(tmp_path, splits, names)
    (tmp_path / "train" / names[8] / "00008.png").write_bytes(png_header(size, size))
    data = make(root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    fail(data, match=rf"/00008.png (has {size}x{size} pixels, expected 28x28|is not a readable image .*bomb)")


def test_an_idx_file_that_unpacks_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path, GREY, zipped=True)
    monkeypatch.setattr("datamodules.idx.MAX_BYTES", 30_000)
    fail(mnist(tmp_path), match=r"-ubyte.gz holds more than 30,000 bytes, as no dataset of this family does")


def test_an_idx_file_that_announces_billions(tmp_path: Path) -> None:
    write_idx(tmp_path, GREY)
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(bytes((0, 0, 8, 3)) + b"\xff" * 12 + bytes(100))
    fail(mnist(tmp_path), match=r"announces 4294967295 x 4294967295 x 4294967295 bytes but holds 100")


@pytest.mark.parametrize("content", [b"", b"PAR1", png_header(28, 28), b"PAR1" + b"\xff" * 2000 + b"PAR1"])
def test_a_parquet_file_of_something_else(content: bytes, tmp_path: Path) -> None:
    write_parquet(tmp_path, GREY)
    (tmp_path / "test.parquet").write_bytes(content)
    fail(mnist(tmp_path), match=r"test.parquet cannot be read \(.*; fetch it again")


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1 / 0",)


def test_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path, COLOUR)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": _Harmful(), b"labels": [0]}))
    data = CIFAR10(root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    fail(data, match=r"test_batch is not a CIFAR-10 batch \(UnpicklingError: it asks for builtins.eval, refused")


def test_faulty_cifar_batches(tmp_path: Path) -> None:
    write_cifar(tmp_path, COLOUR)
    data = CIFAR10(root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, 3))
    fail(data, match="test_batch holds float64, expected uint8")
    (tmp_path / "test_batch").write_bytes(b"")
    fail(data, match=r"test_batch is not a CIFAR-10 batch \(EOFError")
    (tmp_path / "test_batch").unlink()
    fail(CIFAR10(root=str(tmp_path), cache_dir=str(tmp_path / "cache")), match="lacks test_batch; all six")
