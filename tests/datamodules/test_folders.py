"""Class folders: labels follow numbers or the dataset's classes, links are followed, and what is left out is said."""

from __future__ import annotations

import io
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import pytest
from dataset_layouts import encode, letter_splits, random_splits, write_folder
from PIL import Image

from datamodules import CIFAR10, FMNIST, KMNIST, MNIST, DatasetError, ImageDataModule, Letters
from datamodules.files import class_labels
from datamodules.sources import image_suffixes

GREY = random_splits()
COLOUR = random_splits(32, 3)


def make(tmp_path: Path, kind: type[ImageDataModule] = MNIST) -> ImageDataModule:
    return kind(root=str(tmp_path / "source"), cache_dir=str(tmp_path / "cache"))


def labels_by_image(data: ImageDataModule, split: str) -> dict[bytes, int]:
    images, labels = data.labelled(split)
    pixels = images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)
    return {image.numpy().tobytes(): int(label) for image, label in zip(pixels, labels, strict=True)}


def expected(splits: object, split: str) -> dict[bytes, int]:
    images, labels = splits[split]
    return {image.tobytes(): label for image, label in zip(images, labels, strict=True)}


FASHION = ["T-shirt_top", "trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
OBJECTS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.mark.parametrize(
    ("kind", "splits", "names"),
    [
        (MNIST, GREY, list("0123456789")),
        (MNIST, GREY, [f"{i:02}" for i in range(10)]),
        (MNIST, GREY, [f"digit {i}" for i in range(10)]),
        (MNIST, GREY, [f"{i} - {'abcdefghij'[i]}" for i in range(10)]),
        (FMNIST, GREY, FASHION),
        (KMNIST, GREY, ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]),
        (CIFAR10, COLOUR, OBJECTS),
        (CIFAR10, COLOUR, [f"class{i}" for i in range(10)]),
        (Letters, letter_splits(1), list(ascii_uppercase)),
        (Letters, letter_splits(1), list(ascii_uppercase.lower())),
        (Letters, letter_splits(1), [str(i) for i in range(26)]),
        (Letters, letter_splits(1), [str(i + 1) for i in range(26)]),
    ],
)
def test_labels_follow_numbers_or_the_classes_of_the_dataset(
    kind: type[ImageDataModule], splits: object, names: list[str], tmp_path: Path
) -> None:
    write_folder(tmp_path / "source", splits, names)
    data = make(tmp_path, kind)
    for split in ("train", "test"):
        assert labels_by_image(data, split) == expected(splits, split)


@pytest.mark.parametrize(("kind", "names"), [(MNIST, list("0123456789")), (FMNIST, FASHION)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_missing_from_a_split_renumbers_no_other(
    kind: type[ImageDataModule], names: list[str], split: str, tmp_path: Path
) -> None:
    without = {
        name: (
            [x for x, y in zip(*content, strict=True) if name != split or y != 2],
            [y for y in content[1] if name != split or y != 2],
        )
        for name, content in GREY.items()
    }
    write_folder(tmp_path / "source", without, names)
    data = make(tmp_path, kind)
    for each in ("train", "test"):
        assert labels_by_image(data, each) == expected(without, each)


@pytest.mark.parametrize(
    ("names", "classes", "found"),
    [
        (["10", "2", "1"], (), {"1": 1, "2": 2, "10": 10}),
        (["10", "2", "1"], ("a", "b"), {"1": 1, "2": 2, "10": 10}),
        (["dog", "cat"], (), {"cat": 0, "dog": 1}),
        (["class10", "class2"], (), {"class2": 0, "class10": 1}),
        (["dog"], ("cat", "Dog"), {"dog": 1}),
        (["c 3", "c 1"], ("x",), {"c 1": 1, "c 3": 3}),
    ],
)
def test_numbers_of_classes(names: list[str], classes: tuple[str, ...], found: dict[str, int]) -> None:
    assert class_labels(names, classes, "they") == found


@pytest.mark.parametrize(
    ("names", "match"),
    [(["cat", "fox"], "they are named fox; expected numbers, or cat, dog"), (["1", "01"], "two are the same number")],
)
def test_classes_that_cannot_be_numbered_are_refused(names: list[str], match: str) -> None:
    with pytest.raises(DatasetError, match=match):
        class_labels(names, ("cat", "dog"), "they")


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", GREY)
    for split in ("train", "test"):
        for number in range(10):
            folder = tmp_path / "source" / split / str(number)
            target = tmp_path / "elsewhere" / split / str(number)
            folder.parent.mkdir(parents=True, exist_ok=True)
            if number % 2:
                folder.symlink_to(target)
            else:
                folder.mkdir()
                for file in target.iterdir():
                    (folder / file.name).symlink_to(file)
    (tmp_path / "source" / "train" / "0" / "up").symlink_to(tmp_path / "source" / "train")
    data = make(tmp_path)
    assert (data.num_reference("train"), data.num_reference("test")) == (40, 12)
    assert labels_by_image(data, "train") == expected(GREY, "train")
    assert "1 link to a folder above" in data.summary


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "source", GREY)
    (tmp_path / "source" / "train" / "3" / "new.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DatasetError, match=r"train/3/new.png is a link to .*gone.png, which does not exist"):
        make(tmp_path).prepare_data()


HIDDEN = [
    "train/.ipynb_checkpoints/0-checkpoint.png",
    "train/3/._00003.png",
    "train/.DS_Store",
    "test/3/Thumbs.db",
    "__MACOSX/train/3/._00003.png",
]


def test_hidden_entries_are_ignored_and_the_rest_is_said(tmp_path: Path) -> None:
    write_folder(tmp_path / "source", GREY)
    for name in [*HIDDEN, "train/3/notes.txt", "test/labels.csv", "README.md"]:
        file = tmp_path / "source" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"not an image")
    (tmp_path / "source" / "extra").mkdir()
    (tmp_path / "source" / "extra" / "a.png").write_bytes(encode(GREY["train"][0][0]))
    data = make(tmp_path)
    assert labels_by_image(data, "train") == expected(GREY, "train")
    assert data.summary.endswith(
        "52 files; 40 train images, 12 test images; 10 classes; "
        "left out: 5 hidden entries, 2 other files (.csv, .txt), 1 image outside of the splits"
    )


def test_every_format_of_pillow_is_read(tmp_path: Path) -> None:
    suffixes = [".png", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".ppm", ".tga", ".PCX", ".JPG"]
    assert {suffix.lower() for suffix in suffixes} <= image_suffixes()
    for split in ("train", "test"):
        for index, suffix in enumerate(suffixes):
            file = tmp_path / "source" / split / str(index) / f"x{suffix}"
            file.parent.mkdir(parents=True)
            options = {"lossless": True} if suffix == ".webp" else {}
            Image.fromarray(np.full((28, 28), 20 * index, np.uint8)).save(file, **options)
    images, labels = make(tmp_path).labelled("train")
    assert labels.tolist() == list(range(10))
    assert images.flatten(1).float().mean(1).tolist() == [20.0 * index for index in range(10)]


def test_formats_that_pillow_cannot_decode_are_no_images() -> None:
    assert not image_suffixes() & {".h5", ".hdf", ".mpg", ".grib", ".bufr", ".txt", ".npz", ".pdf"}


def test_images_beside_class_folders_have_no_label_and_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path / "source", GREY)
    (tmp_path / "source" / "train" / "loose.png").write_bytes(encode(GREY["train"][0][0]))
    data = make(tmp_path)
    assert data.labelled("train")[1].min() == -1
    assert "1 image without a label" in data.summary


@pytest.mark.parametrize(
    "names",
    [
        {"train": "train", "test": "test", "valid": "val"},
        {"train": "train", "test": "test", "valid": "validation"},
        {"train": "training", "test": "testing"},
        {"train": "Train", "test": "Test", "valid": "valid"},
    ],
)
@pytest.mark.parametrize("wrapper", ["", "mnist_png"])
def test_names_of_split_folders(names: dict[str, str], wrapper: str, tmp_path: Path) -> None:
    splits = {"train": GREY["train"], "test": GREY["test"], "valid": random_splits(train=5)["train"]}
    write_folder(tmp_path / "source" / wrapper, {name: splits[split] for split, name in names.items()})
    data = make(tmp_path)
    for split in names:
        assert labels_by_image(data, split) == expected(splits, split)


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "source", GREY | {"val": GREY["test"], "valid": GREY["test"]})
    with pytest.raises(DatasetError, match="holds the valid split several times: val, valid; keep one"):
        make(tmp_path).prepare_data()


def test_a_folder_of_another_dataset_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "source", COLOUR, FASHION)
    with pytest.raises(DatasetError, match=r"are named Ankle boot, Bag, .* and 5 more; expected numbers, or airplane"):
        make(tmp_path, CIFAR10).prepare_data()


def test_16_bit_grey_and_orientation_in_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "source", GREY)
    exact = Image.fromarray(GREY["train"][0][0].astype(np.uint16) * 257)
    exact.save(tmp_path / "source" / "train" / "0" / "00000.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.rot90(GREY["train"][0][1])).save(buffer, "PNG", exif=exif)
    (tmp_path / "source" / "train" / "1" / "00001.png").write_bytes(buffer.getvalue())
    assert labels_by_image(make(tmp_path), "train") == expected(GREY, "train")


@pytest.mark.slow
def test_digits_as_16_bit_pngs_have_the_published_mean(shared_data: Path, real_cache: str, tmp_path: Path) -> None:
    real = MNIST(str(shared_data / "mnist"), cache_dir=real_cache)
    for split in ("train", "test"):
        images, labels = (part[:500] for part in real.labelled(split))
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = tmp_path / "source" / split / str(int(label)) / f"{index:05}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy().astype(np.uint16) * 257).save(file)
    stored = make(tmp_path)
    found = {image.numpy().tobytes() for image in stored.labelled("train")[0]}
    assert found == {image.numpy().tobytes() for image in real.labelled("train")[0][:500]}
