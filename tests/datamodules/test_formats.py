"""Tables, saved datasets, NumPy and CSV files, archives: the same data from each, or an error that names the fault."""

from __future__ import annotations

import csv
import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

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

from datamodules import (
    CIFAR10,
    FMNIST,
    KMNIST,
    MNIST,
    CelebA,
    DatasetError,
    DatasetNotFoundError,
    ImageDataModule,
    Letters,
)

GREY = random_splits()
COLOUR = random_splits(32, 3)
LETTERS = letter_splits(1)
VALID = GREY | {"valid": random_splits(train=5)["train"]}


def make(root: Path, kind: type[ImageDataModule] = MNIST) -> ImageDataModule:
    return kind(root=str(root), cache_dir=str(root.parent / "cache"))


def check(data: ImageDataModule, splits: Splits) -> None:
    for split, (images, labels) in splits.items():
        found, numbers = data.labelled(split)
        assert np.array_equal(found.permute(0, 2, 3, 1).squeeze(-1).numpy(), images)
        assert numbers.tolist() == labels


# Parquet


def shards(root: Path, splits: Splits, names: str, count: int = 2) -> Path:
    """Writes each split in `count` files."""
    for split, (images, labels) in splits.items():
        for k, part in enumerate(np.array_split(np.arange(len(images)), count)):
            content = {split: (images[part], [labels[i] for i in part])}
            write_parquet(root, content, names.format(split="{split}", k=k, count=count))
    return root


TABLES: dict[str, Callable[[Path], object]] = {
    "two shards": lambda root: shards(root, GREY, "{split}-{k:05}-of-{count:05}.parquet"),
    "two shards with a hash": lambda root: shards(root, GREY, "data/{split}-{k:05}-of-{count:05}-ab{k}cd.parquet"),
    "conversion of the hub": lambda root: shards(root, GREY, "mnist/{split}/{k:04}.parquet"),
    "conversion of the hub, one file": lambda root: write_parquet(root, GREY, "mnist/{split}/0000.parquet"),
    "numbered from 1": lambda root: shards(root, GREY, "{split}_part{k}.parquet"),
    "named after the dataset": lambda root: write_parquet(root, GREY, "mnist-{split}.parquet"),
    "words with capitals": lambda root: write_parquet(root, GREY, "{split}ing-set.parquet"),
    "other files": lambda root: (write_parquet(root, GREY), (root / "extra.parquet").write_bytes(b"")),
    "linked": lambda root: (
        write_parquet(root.parent / "elsewhere", GREY),
        root.mkdir(),
        (root / "data").symlink_to(root.parent / "elsewhere"),
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_parquet_files_are_found_by_their_names(case: str, tmp_path: Path) -> None:
    TABLES[case](tmp_path / "source")
    check(make(tmp_path / "source"), GREY)


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_split_has_several_names(name: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "source", GREY | {name: VALID["valid"]}, "{split}-00000-of-00001.parquet")
    check(make(tmp_path / "source"), VALID)


def test_local_parquet_files_are_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def refuse(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise OSError("there is no network")

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write_parquet(tmp_path / "source", GREY)
    check(make(tmp_path / "source"), GREY)
    assert asked == []


def copy(name: str, other: str) -> Callable[[Path], object]:
    return lambda root: shutil.copy(root / name, root / other)


PARTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "one of two shards": (
        "{split}-{k:05}-of-{count:05}.parquet",
        lambda root: (root / "train-00001-of-00002.parquet").unlink(),
        r"train split in .* is incomplete: it has train-00000-of-00002.parquet, but lacks number 00001; fetch",
    ),
    "no first shard": (
        "{split}-{k:05}-of-{count:05}.parquet",
        lambda root: (root / "test-00000-of-00002.parquet").unlink(),
        "test split in .* is incomplete: .* lacks number 00000",
    ),
    "a gap in numbers": (
        "{split}/{k:04}.parquet",
        lambda root: (root / "train" / "0001.parquet").rename(root / "train" / "0002.parquet"),
        "train split in .* is incomplete: .* lacks number 00001",
    ),
    "no number 0000": (
        "{split}/{k:04}.parquet",
        lambda root: (root / "train" / "0000.parquet").unlink(),
        "train split in .* is incomplete: it has 0001.parquet, but lacks number 00000",
    ),
    "two sets of shards": (
        "{split}-{k:05}-of-{count:05}.parquet",
        copy("train-00000-of-00002.parquet", "train-00000-of-00001.parquet"),
        "several copies of the train split: train-00000-of-00001.parquet, train-00000-of-00002.parquet, .*; keep one",
    ),
    "a shard twice": (
        "{split}-{k:05}-of-{count:05}.parquet",
        copy("train-00000-of-00002.parquet", "train-00000-of-00002 (1).parquet"),
        r"several copies of the train split: train-00000-of-00002 \(1\).parquet, ",
    ),
    "a whole file and shards": (
        "{split}-{k:05}-of-{count:05}.parquet",
        copy("train-00000-of-00002.parquet", "train.parquet"),
        "several copies of the train split",
    ),
    "a copy": (
        "{split}.parquet",
        copy("train.parquet", "train (1).parquet"),
        r"several copies of the train split: train \(1\).parquet, train.parquet; keep one",
    ),
    "two copies": ("{split} (1).parquet", copy("test (1).parquet", "test copy.parquet"), "several copies of the test"),
    "a part of the hub's conversion": (
        "partial-{split}/{k:04}.parquet",
        lambda root: None,
        "partial-test is the hub's conversion of a part of a dataset",
    ),
    "splits of two datasets": (
        "{split}.parquet",
        lambda root: (
            [(root / s).mkdir() for s in "ab"]
            and [shutil.move(root / f"{s}.parquet", root / f) for s, f in (("train", "a"), ("test", "b"))]
        ),
        "holds parquet files in several folders: .*/a, .*/b",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_incomplete_shards_and_doubles_are_refused(case: str, tmp_path: Path) -> None:
    names, spoil, match = PARTS[case]
    shards(tmp_path / "source", GREY, names, 2 if "{k" in names else 1)
    spoil(tmp_path / "source")
    with pytest.raises(DatasetError, match=match):
        make(tmp_path / "source").prepare_data()


def table(root: Path, labels: dict[str, object], image: str = "image") -> Path:
    """Writes GREY with other columns beside the images: functions of the list of labels, or `(function, feature)`."""
    for split, (images, numbers) in GREY.items():
        rows: dict[str, list[object]] = {image: [{"bytes": encode(x), "path": None} for x in images]}
        features: dict[str, object] = {image: datasets.Image()}
        for name, made in labels.items():
            make_, feature = made if isinstance(made, tuple) else (made, datasets.Value("int64"))
            rows[name], features[name] = make_(numbers), feature
        root.mkdir(parents=True, exist_ok=True)
        content = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        content.to_parquet(str(root / f"{split}.parquet"))
    return root


AS_TEXT = sorted(map(str, range(10)), reverse=True)  # any order of names that is not that of the numbers
COLUMNS = {
    "labels": {"labels": list},
    "fine_label beside coarse_label": {"coarse_label": lambda y: [0] * len(y), "fine_label": list},
    "class": {"class": list},
    "Label": {"Label": list},
    "target": {"id": lambda y: list(range(len(y))), "target": list},
    "the only column of classes": {"digit": (list, datasets.ClassLabel(names=list("0123456789")))},
    "words": {"label": (lambda y: [str(i) for i in y], datasets.Value("string"))},
    "numbers of other names": {
        "label": (lambda y: [AS_TEXT.index(str(i)) for i in y], datasets.ClassLabel(names=AS_TEXT))
    },
    "floats": {"label": (lambda y: [float(i) for i in y], datasets.Value("float64"))},
}


@pytest.mark.parametrize("case", COLUMNS)
@pytest.mark.parametrize("image", ["image", "img", "Image", "picture"])
def test_columns_are_found_by_name_or_type(case: str, image: str, tmp_path: Path) -> None:
    check(make(table(tmp_path / "source", COLUMNS[case], image)), GREY)


def test_labels_that_are_names_follow_the_classes_of_the_dataset(tmp_path: Path) -> None:
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    words = {"label": (lambda y: [names[i].lower() for i in y], datasets.Value("string"))}
    check(make(table(tmp_path / "words", words), FMNIST), GREY)
    order = sorted(names)
    numbers = {"label": (lambda y: [order.index(names[i]) for i in y], datasets.ClassLabel(names=order))}
    check(make(table(tmp_path / "numbers", numbers), FMNIST), GREY)


@pytest.mark.parametrize("columns", [{}, {"digit": list}])
def test_missing_labels_are_said(columns: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = make(table(tmp_path / "source", columns))
    data.prepare_data()
    assert set(data.labelled("train")[1].tolist()) == {-1}
    assert (
        "12 test images; no labels (no class folders, no column label, labels, fine_label," in capsys.readouterr().err
    )


def test_several_labels_for_an_image_are_refused(tmp_path: Path) -> None:
    labels = {"labels": (lambda y: [[i, i] for i in y], datasets.Sequence(datasets.Value("int64")))}
    with pytest.raises(
        DatasetError, match=r"row 0, column labels, is \[0, 0\], expected the number or the name of one"
    ):
        make(table(tmp_path / "source", labels)).prepare_data()


def test_one_dataset_in_two_formats_is_refused(tmp_path: Path) -> None:
    write_folder(write_parquet(tmp_path / "source", GREY), GREY)
    match = "holds MNIST in several formats: parquet files below .*source, image folder .*source; keep one"
    with pytest.raises(DatasetError, match=match):
        make(tmp_path / "source").prepare_data()


# What was read, and subsets


def test_what_was_read_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = make(shards(tmp_path / "source", GREY, "{split}-{k:05}-of-{count:05}.parquet"))
    for _ in range(2):  # decoded, and from the cache
        data.prepare_data()
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"data: MNIST from parquet files below {tmp_path / 'source'} (a subset: 40 of 60,000 train, 12 of 10,000 "
            "test images): 4 files; 40 train images, 12 test images; 10 classes"
        )
        data = make(tmp_path / "source")


def test_a_subset_is_named_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(write_parquet(tmp_path / "source", GREY))
    assert data.source.endswith("(a subset: 40 of 60,000 train, 12 of 10,000 test images)")
    monkeypatch.setattr(MNIST, "sizes", {"train": 40, "test": 12})
    assert data.source == f"parquet files below {tmp_path / 'source'}"
    monkeypatch.setattr(MNIST, "sizes", {"train": 39, "test": 12})
    assert data.source.endswith("(not the published data: 40 of 39 train images)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "folder", "note"),
    [(FMNIST, "fmnist", ""), (KMNIST, "kmnist", " (a subset: 8,000 of 60,000 train, 2,000 of 10,000 test images)")],
)
def test_real_data_are_compared_with_the_published_numbers(
    kind: type[ImageDataModule], folder: str, note: str, shared_data: Path, real_cache: str
) -> None:
    data = kind(root=str(shared_data / folder), cache_dir=real_cache)
    assert data.source == f"parquet files below {shared_data / folder}{note}"


# Saved datasets


def saved(root: Path, splits: Splits) -> Path:
    parts = {}
    for split, (images, labels) in splits.items():
        rows = {"image": [{"bytes": encode(x), "path": None} for x in images], "label": labels}
        parts[split] = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(parts).save_to_disk(str(root))
    return root


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_saved_datasets_are_read(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "source" / "mnist", GREY | {name: VALID["valid"]})
    check(make(tmp_path / "source"), VALID)


def test_saved_datasets_without_splits_or_several_of_them_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "source", GREY)
    with pytest.raises(DatasetError, match=r"train is a saved dataset without splits; expected .* a DatasetDict"):
        make(tmp_path / "source" / "train").prepare_data()
    saved(tmp_path / "source" / "again", GREY)
    with pytest.raises(
        DatasetError, match=r"holds the (train|test) split of several saved datasets: .*; give the folder"
    ):
        make(tmp_path / "source").prepare_data()
    shutil.rmtree(tmp_path / "source" / "again")
    shutil.rmtree(tmp_path / "source" / "test")
    with pytest.raises(DatasetError, match=r"no test split in the saved dataset .* \(it has: train\)"):
        make(tmp_path / "source").prepare_data()


# Original files


def npz(folder: Path, splits: Splits, name: str = "kmnist") -> Path:
    folder.mkdir(parents=True)
    for split, (images, labels) in splits.items():
        np.savez_compressed(folder / f"{name}-{split}-imgs.npz", images)
        np.savez_compressed(folder / f"{name}-{split}-labels.npz", np.array(labels, np.uint8))
    return folder


def keras(folder: Path, splits: Splits) -> Path:
    folder.mkdir(parents=True)
    arrays = {
        f"{axis}_{s}": np.array(part) for s, content in splits.items() for axis, part in zip("xy", content, strict=True)
    }
    np.savez(folder / "mnist.npz", **arrays)
    return folder


def csv_files(
    folder: Path, splits: Splits, names: str, header: str | None, labelled: tuple[str, ...] = ("train", "test")
) -> Path:
    """Writes a row for each image; `header` is the name of a pixel with its number, row and column."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in splits.items():
        with (folder / names.format(split=split)).open("w", newline="") as file:
            rows = csv.writer(file)
            if header is not None:
                pixels = [header.format(k=k, row=k // 28 + 1, column=k % 28 + 1) for k in range(28 * 28)]
                rows.writerow(["label"] * (split in labelled) + pixels)
            for image, label in zip(images, labels, strict=True):
                rows.writerow([label] * (split in labelled) + image.reshape(-1).tolist())
    return folder


def transposed() -> Splits:
    return {split: (x.transpose(0, 2, 1), [y + 1 for y in labels]) for split, (x, labels) in LETTERS.items()}


def emnist(root: Path, copy_outside: bool = False) -> None:
    names = {"train": "emnist-letters-train", "test": "emnist-letters-test"}
    write_idx(root / "EMNIST" / "raw" / "gzip", transposed(), **names, zipped=True)
    write_idx(root / "EMNIST" / "raw" / "gzip", GREY, "emnist-digits-train", "emnist-digits-test", zipped=True)
    if copy_outside:
        write_idx(root / "EMNIST" / "raw", transposed(), **names)


def dotted(root: Path) -> None:
    for file in write_idx(root, GREY).iterdir():
        file.rename(file.with_name(file.name.replace("-idx", ".idx")))


def archive(root: Path) -> None:
    write_cifar(root.parent / "cifar-10-batches-py", COLOUR)
    root.mkdir()
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as opened:
        opened.add(root.parent / "cifar-10-batches-py", "cifar-10-batches-py")


FASHION_CSV = "fashion-mnist_{split}.csv"
ORIGINALS: dict[str, tuple[type[ImageDataModule], Splits, Callable[[Path], object]]] = {
    "KMNIST in NumPy files": (KMNIST, GREY, npz),
    "Keras' file": (MNIST, GREY, lambda root: keras(root, GREY)),
    "Kaggle's MNIST": (MNIST, GREY, lambda root: csv_files(root, GREY, "mnist_{split}.csv", "{row}x{column}")),
    "MNIST in CSV files without a header": (MNIST, GREY, lambda root: csv_files(root, GREY, "mnist_{split}.csv", None)),
    "Kaggle's Fashion-MNIST": (FMNIST, GREY, lambda root: csv_files(root / "archive", GREY, FASHION_CSV, "pixel{k}")),
    "Kaggle's Fashion-MNIST beside its IDX files": (
        FMNIST,
        GREY,
        lambda root: (csv_files(root, GREY, FASHION_CSV, "pixel{k}"), write_idx(root, GREY)),
    ),
    "Kaggle's EMNIST": (
        Letters,
        LETTERS,
        lambda root: csv_files(root, transposed(), "emnist-letters-{split}.csv", None),
    ),
    "EMNIST's gzip folder": (Letters, LETTERS, emnist),
    "EMNIST's gzip folder, unpacked": (Letters, LETTERS, lambda root: emnist(root, copy_outside=True)),
    "IDX files with a dot": (MNIST, GREY, dotted),
    "CIFAR-10's archive": (CIFAR10, COLOUR, archive),
    "CIFAR-10's archive, unpacked": (
        CIFAR10,
        COLOUR,
        lambda root: (archive(root), write_cifar(root / "cifar-10-batches-py", COLOUR)),
    ),
}


@pytest.mark.parametrize("case", ORIGINALS)
def test_original_files_are_read(case: str, tmp_path: Path) -> None:
    kind, splits, write = ORIGINALS[case]
    (write(tmp_path / "source", GREY) if write is npz else write(tmp_path / "source"))
    data = make(tmp_path / "source", kind)
    check(data, splits)
    assert data.fingerprint == make(write_parquet(tmp_path / "expected", splits), kind).fingerprint


def test_kaggles_digit_recognizer_has_no_labels_for_its_test_images(tmp_path: Path) -> None:
    data = make(csv_files(tmp_path / "source", GREY, "{split}.csv", "pixel{k}", labelled=("train",)))
    assert data.labelled("train")[1].tolist() == GREY["train"][1]
    assert set(data.labelled("test")[1].tolist()) == {-1}
    assert data.summary.endswith("2 files; 40 train images, 12 test images; 10 classes; 12 images without a label")


def test_celeba_as_kaggle_lays_it_out(tmp_path: Path) -> None:
    from dataset_layouts import write_celeba

    write_celeba(tmp_path / "source")
    lines = (tmp_path / "source" / "list_eval_partition.txt").read_text().replace(" ", ",")
    (tmp_path / "source" / "list_eval_partition.txt").unlink()
    (tmp_path / "source" / "list_eval_partition.csv").write_text(f"image_id,partition\n{lines}")
    nested = tmp_path / "source" / "img_align_celeba"
    nested.rename(tmp_path / "all")
    nested.mkdir()
    (tmp_path / "all").rename(nested / "img_align_celeba")
    data = make(tmp_path / "source", CelebA)
    assert [data.num_reference(split) for split in ("train", "valid", "test")] == [30, 6, 8]


def write_bytes(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda root: (root.mkdir(exist_ok=True), (root / name).write_bytes(content))


def bad_npz(root: Path, array: np.ndarray, name: str = "arr_0") -> None:
    np.savez(npz(root, GREY) / "kmnist-train-imgs.npz", **{name: array})


def bad_csv(root: Path, text: str) -> None:
    (csv_files(root, GREY, "mnist_{split}.csv", None) / "mnist_train.csv").write_text(text)


FAULTY: dict[str, tuple[type[ImageDataModule], Callable[[Path], object], str]] = {
    "no labels": (
        KMNIST,
        lambda root: (npz(root, GREY) / "kmnist-test-labels.npz").unlink(),
        "lacks kmnist-test-labels.npz; all four files are needed",
    ),
    "cut off": (
        KMNIST,
        lambda root: (npz(root, GREY) / "kmnist-train-imgs.npz").write_bytes(b"PK"),
        "kmnist-train-imgs.npz is damaged",
    ),
    "another array": (KMNIST, lambda root: bad_npz(root, np.zeros(1), "x"), "holds the arrays x, expected arr_0"),
    "floats": (
        KMNIST,
        lambda root: bad_npz(root, np.zeros((40, 28, 28))),
        r"float64 of shape \(40, 28, 28\) with labels",
    ),
    "objects": (KMNIST, lambda root: bad_npz(root, np.array([{}, None])), "imgs.npz is damaged .*allow_pickle"),
    "fewer images": (
        KMNIST,
        lambda root: bad_npz(root, np.zeros((3, 28, 28), np.uint8)),
        "holds 3 images, but .* 40 labels",
    ),
    "no test file": (
        FMNIST,
        lambda root: (csv_files(root, GREY, FASHION_CSV, "pixel{k}") / "fashion-mnist_test.csv").unlink(),
        "lacks fashion-mnist_test.csv; both CSV files are needed",
    ),
    "columns": (
        MNIST,
        lambda root: bad_csv(root, "1,2,3\n"),
        "mnist_train.csv has 3 columns, expected 784 pixels of 28x28",
    ),
    "text": (
        MNIST,
        lambda root: bad_csv(root, ",".join(["1"] * 785) + "\n" + ",".join(["x"] * 785)),
        "not a table of whole",
    ),
    "big numbers": (
        MNIST,
        lambda root: bad_csv(root, ",".join(["256"] * 785)),
        "holds pixels that are not from 0 to 255",
    ),
    "two CSV files": (
        MNIST,
        lambda root: [csv_files(root, GREY, name, "pixel{k}") for name in ("mnist_{split}.csv", "{split}.csv")],
        "several CSV files of the train split: .*mnist_train.csv, .*/train.csv; keep one",
    ),
    "archive cut off": (
        CIFAR10,
        lambda root: (archive(root), write_bytes("cifar-10-python.tar.gz", b"\x1f\x8b\x08")(root)),
        "cifar-10-python.tar.gz is damaged",
    ),
}


@pytest.mark.parametrize("case", FAULTY)
def test_faulty_files_are_named(case: str, tmp_path: Path) -> None:
    kind, write, match = FAULTY[case]
    write(tmp_path / "source")
    with pytest.raises(DatasetError, match=match):
        make(tmp_path / "source", kind).prepare_data()


@pytest.mark.parametrize("name", ["archive.zip", "gzip.zip", "images.tar.gz", "cifar-10-binary.tar.gz"])
def test_archives_that_are_not_read_are_named(name: str, tmp_path: Path) -> None:
    write_bytes(name, b"")(tmp_path / "source")
    with pytest.raises(DatasetNotFoundError, match=rf"holds none of its layouts \(unpack {name} first\)\. Looked for "):
        make(tmp_path / "source", CIFAR10).prepare_data()
