"""Images of one's own: any folder, any table, any dataset by its class path, and a class of one's own."""

from __future__ import annotations

import importlib
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from dataset_layouts import encode, random_splits, write_folder, write_parquet
from jsonargparse import ArgumentParser
from PIL import Image

from datamodules import DatasetError, DatasetNotFoundError, Digits, FromDataset, ImageDataModule, ImageFolder, Parquet
from datamodules.images import center_crop, resize
from datamodules.registry import data_module, find_data, make_data
from leaderboard.record.external import external_code

COLOUR = random_splits(20, 3)
PIXELS = torch.from_numpy(COLOUR["train"][0]).permute(0, 3, 1, 2)


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def folder(tmp_path: Path, names: list[str], splits: Any = COLOUR) -> str:
    return str(write_folder(tmp_path / "flowers", splits, names))


def bytes_of(images: torch.Tensor) -> Counter[bytes]:
    return Counter(image.numpy().tobytes() for image in images)


def test_a_folder_with_splits(tmp_path: Path, cache: str) -> None:
    data = ImageFolder(folder(tmp_path, [f"kind {i}" for i in range(10)]), image_size=20, cache_dir=cache)
    images, labels = data.labelled("train")
    assert (data.name, data.title, data.image_shape) == ("flowers", "flowers", (3, 20, 20))
    assert bytes_of(images) == bytes_of(PIXELS)
    known = {image.numpy().tobytes(): label for image, label in zip(PIXELS, COLOUR["train"][1], strict=True)}
    assert [known[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert data.num_reference("test") == 12
    assert "drawn" not in data.source


@pytest.mark.parametrize("wrapper", ["", "archive"])
def test_a_folder_without_splits_is_divided(wrapper: str, tmp_path: Path, cache: str) -> None:
    root = tmp_path / "flowers"
    write_folder(root / wrapper if wrapper else root, {"rose": COLOUR["train"]}, "0123456789")
    for number, name in enumerate(("daisy", "tulip")):
        write_folder(
            root / wrapper if wrapper else root, {name: random_splits(20, 3, train=40 + number)["train"]}, "0123456789"
        )
    data = ImageFolder(str(root), image_size=20, cache_dir=cache)
    train, test = data.labelled("train"), data.labelled("test")
    assert (len(train[0]), len(test[0])) == (109, 12)
    for _, labels in (train, test):
        assert set(labels.tolist()) == {0, 1, 2}
    assert data.source == f"image folder {root / wrapper}, test split drawn: 0.1 of the images"
    everything = ImageFolder(str(root), image_size=20, test_fraction=0.5, cache_dir=cache)
    assert len(everything.labelled("test")[0]) == pytest.approx(60, abs=1)
    assert bytes_of(torch.cat([everything.labelled(s)[0] for s in ("train", "test")])) == bytes_of(
        torch.cat([train[0], test[0]])
    )


def test_images_of_any_size_are_cropped_and_resized(tmp_path: Path, cache: str) -> None:
    (tmp_path / "pics").mkdir()
    originals = [
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (30 + k, 50 - k, 3), dtype=np.uint8))
        for k in range(20)
    ]
    for index, image in enumerate(originals):
        image.save(tmp_path / "pics" / f"{index:02}.png")
    data = ImageFolder(str(tmp_path / "pics"), image_size=16, test_fraction=0.1, cache_dir=cache)
    expected = [resize(center_crop(image, min(image.size)), 16) for image in originals]
    found = torch.cat([data.labelled(split)[0] for split in ("train", "test")])
    assert bytes_of(found) == Counter(np.asarray(image).transpose(2, 0, 1).tobytes() for image in expected)
    padded = ImageFolder(str(tmp_path / "pics"), image_size=16, native_size=12, cache_dir=cache)
    assert padded.image_shape == (3, 16, 16)
    assert next(padded.reference_batches()).shape[1:] == (3, 12, 12)
    grey = ImageFolder(str(tmp_path / "pics"), image_size=16, channels=1, cache_dir=cache)
    with pytest.raises(DatasetError, match="with colours, expected grey"):
        grey.prepare_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnist"}, r"name='mnist' is the suite's own dataset, .* give another --data.name"),
        ({"name": "My Data"}, "name='My Data' is .* not a name of up to 41"),
        ({"root": "somewhere/cifar10"}, "name='cifar10' is the suite's own dataset"),
        ({"channels": 4}, "channels=4 is unknown; give 1 for grey or 3 for colour"),
        ({"test_fraction": 0.0}, "test_fraction=0.0 is out of range"),
        ({"native_size": 0}, "native_size=0 is too small"),
        ({"native_size": 15}, r"image_size=16 cannot be reached by padding x's 15 pixels"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolder(**({"root": "x", "image_size": 16} | options))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda root: ImageFolder(f"{root}/gone", image_size=8), "--data.root .*/gone is not a folder"),
        (lambda root: ImageFolder(root, image_size=8), "--data.root .* holds no images that Pillow can read"),
        (lambda root: Parquet(root, image_size=8), "--data.root .* holds no parquet files"),
        (
            lambda root: FromDataset("torchvision.datasets.MNIST", {"root": root}, image_size=8, name="x"),
            r"torchvision.datasets.MNIST\(root='.*'\) failed: RuntimeError: Dataset not found",
        ),
    ],
)
def test_nothing_found(make: Any, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    monkeypatch.setenv("SPIKING_DIFFUSION_CACHE", cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetNotFoundError, match=match):
        make(str(tmp_path / "empty")).prepare_data()


def test_parquet_files_with_columns_of_any_name(tmp_path: Path, cache: str) -> None:
    rows = {
        "scan": [{"bytes": encode(image), "path": None} for image in COLOUR["train"][0]],
        "kind": [f"kind {label}" for label in COLOUR["train"][1]],
    }
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "scans.parquet"))
    for root in (tmp_path, tmp_path / "scans.parquet"):
        data = Parquet(
            str(root), image_size=20, name="scans", image_column="scan", label_column="kind", cache_dir=cache
        )
        train, test = data.labelled("train"), data.labelled("test")
        assert bytes_of(torch.cat([train[0], test[0]])) == bytes_of(PIXELS)
        assert Counter(torch.cat([train[1], test[1]]).tolist()) == Counter(COLOUR["train"][1])
    with pytest.raises(
        DatasetError, match=r"the columns \['scan', 'kind'\], but --data.label_column species was given"
    ):
        Parquet(
            str(tmp_path), image_size=20, image_column="scan", label_column="species", cache_dir=cache
        ).prepare_data()
    with pytest.raises(DatasetError, match=r"expected one named image or img; .* --data.image_column"):
        Parquet(str(tmp_path), image_size=20, cache_dir=cache).prepare_data()


def test_parquet_files_with_splits(tmp_path: Path, cache: str) -> None:
    data = Parquet(str(write_parquet(tmp_path / "own", COLOUR)), image_size=20, cache_dir=cache)
    assert torch.equal(data.labelled("train")[0], PIXELS)
    assert data.num_reference("test") == 12


MODULE = '''
"""Datasets of various kinds."""
import numpy as np
import torch
from PIL import Image

COUNT = 30

class Pairs(torch.utils.data.Dataset):
    def __init__(self, shift=0): self.shift = shift
    def __len__(self): return COUNT
    def __getitem__(self, k): return self.image(k), k % 3
    def pixels(self, k): return np.full((9, 9, 3), k + self.shift, np.uint8)
    def image(self, k): return Image.fromarray(self.pixels(k))

class OnlyImages(Pairs):
    def __getitem__(self, k): return self.image(k)

class Arrays(Pairs):
    def __getitem__(self, k): return self.pixels(k), torch.tensor(k % 3)

class Tensors(Pairs):
    def __getitem__(self, k): return torch.from_numpy(self.pixels(k)).permute(2, 0, 1), k % 3

class Stream(torch.utils.data.IterableDataset):
    def __init__(self, shift=0): self.shift = shift
    def __iter__(self): return iter([Pairs(self.shift)[k] for k in range(COUNT)])

class Floats(Pairs):
    def __getitem__(self, k): return torch.zeros(3, 9, 9), 0

def table(shift=0):
    import datasets
    pairs = Pairs(shift)
    rows = {"img": [pairs[k][0] for k in range(COUNT)], "label": [k % 3 for k in range(COUNT)]}
    return datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image())

def splits():
    return {"train": table(), "test": table()}
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "ownpackage.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "ownpackage"
    sys.modules.pop("ownpackage", None)


@pytest.mark.parametrize("kind", ["Pairs", "OnlyImages", "Arrays", "Tensors", "Stream", "table"])
def test_any_dataset_by_its_path(kind: str, package: str, cache: str) -> None:
    data = FromDataset(f"{package}.{kind}", {}, {"shift": 100}, image_size=9, cache_dir=cache)
    for split, shift in {"train": 0, "test": 100}.items():
        images, labels = data.labelled(split)
        assert images[:, 0, 0, 0].tolist() == [shift + k for k in range(30)]
        assert labels.tolist() == [-1 if kind == "OnlyImages" else k % 3 for k in range(30)]
    drawn = FromDataset(f"{package}.{kind}", {"shift": 7}, image_size=9, cache_dir=cache)
    assert (drawn.num_reference("train"), drawn.num_reference("test")) == (27, 3)
    assert drawn.source == f'{package}.{kind} {{"train": {{"shift": 7}}}}, test split drawn: 0.1 of the images'


@pytest.mark.parametrize(
    ("path", "arguments", "error", "match"),
    [
        ("ownpackage.Floats", {}, DatasetError, "item 0, is an array of float32, expected .* leave out its transform"),
        (
            "ownpackage.splits",
            {},
            DatasetError,
            r"is a dictionary of splits \(train, test\); .* --data.train.split train",
        ),
        (
            "ownpackage.Gone",
            {},
            ValueError,
            r"'ownpackage.Gone' cannot be imported .* PYTHONPATH, or after `pip install -e",
        ),
        ("gone.Gone", {}, ValueError, "'gone.Gone' cannot be imported"),
        ("ownpackage.Pairs", {"size": 3}, DatasetNotFoundError, r"Pairs\(size=3\) failed: TypeError: .*size"),
    ],
)
def test_faulty_datasets(
    path: str, arguments: dict[str, Any], error: type[Exception], match: str, package: str, cache: str
) -> None:
    with pytest.raises(error, match=match):
        FromDataset(path, arguments, image_size=9, cache_dir=cache).prepare_data()


def test_datasets_of_torchvision_and_the_hub_by_their_path(tmp_path: Path, cache: str) -> None:
    root = folder(tmp_path, list("0123456789"))
    by_torchvision = FromDataset(
        "torchvision.datasets.ImageFolder",
        {"root": f"{root}/train"},
        {"root": f"{root}/test"},
        image_size=20,
        cache_dir=cache,
    )
    table = str(write_parquet(tmp_path / "table", COLOUR))
    arguments = {split: {"path": table, "split": split, "cache_dir": f"{cache}/hub"} for split in ("train", "test")}
    by_datasets = FromDataset("datasets.load_dataset", **arguments, image_size=20, cache_dir=cache)
    own = ImageFolder(root, image_size=20, cache_dir=cache)
    assert by_torchvision.fingerprint == own.fingerprint
    assert torch.equal(by_datasets.labelled("train")[0], PIXELS)
    assert by_datasets.labelled("train")[1].tolist() == COLOUR["train"][1]


def test_changed_files_of_a_dataset_are_read_again(tmp_path: Path, cache: str) -> None:
    root = folder(tmp_path, list("0123456789"))
    arguments = ("torchvision.datasets.ImageFolder", {"root": f"{root}/train"})
    first = FromDataset(*arguments, image_size=20, cache_dir=cache).fingerprint
    Image.new("RGB", (20, 20)).save(Path(root) / "train" / "0" / "new.png")
    assert FromDataset(*arguments, image_size=20, cache_dir=cache).fingerprint != first


def test_an_edited_dataset_is_read_again_and_named_in_records(package: str, tmp_path: Path, cache: str) -> None:
    data = FromDataset(f"{package}.Pairs", {}, image_size=9, cache_dir=cache)
    first = data.fingerprint
    assert list(external_code(torch.nn.Identity(), data)) == [package]
    code = tmp_path / f"{package}.py"
    code.write_text(code.read_text().replace("k + self.shift", "k + self.shift + 100"))
    sys.modules.pop(package)
    importlib.invalidate_caches()
    assert FromDataset(f"{package}.Pairs", {}, image_size=9, cache_dir=cache).fingerprint != first


def test_an_edited_module_of_a_package_is_read_again(package: str, tmp_path: Path, cache: str) -> None:
    folder = tmp_path / f"{package}_of_modules"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .pairs import Pairs\n")
    (tmp_path / f"{package}.py").rename(folder / "pairs.py")

    def fingerprint() -> str:
        for name in (folder.name, f"{folder.name}.pairs"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return FromDataset(f"{folder.name}.Pairs", {}, image_size=9, cache_dir=cache).fingerprint

    first = fingerprint()
    (folder / "pairs.py").write_text(
        (folder / "pairs.py").read_text().replace("k + self.shift", "k + self.shift + 100")
    )
    assert fingerprint() != first


def test_the_name_of_own_data_is_no_code() -> None:
    data = type("Flowers", (Digits,), {"dataset": "flowers"})()
    assert "flowers" not in external_code(torch.nn.Identity(), data)


@pytest.mark.parametrize(
    "options",
    [
        ["--data=ImageFolder", "--data.root=D", "--data.image_size=32", "--data.channels=1", "--data.val_size=3"],
        ["--data=Parquet", "--data.root=D", "--data.image_size=32", "--data.image_column=scan"],
        [
            "--data=FromDataset",
            "--data.dataset=torchvision.datasets.SVHN",
            "--data.train={root: D, split: train}",
            "--data.test={root: D, split: test}",
            "--data.image_size=32",
        ],
        [
            "--data=FromDataset",
            "--data.dataset=a.B",
            "--data.train.root=D",
            "--data.train.split=x",
            "--data.image_size=8",
        ],
    ],
)
def test_the_command_line_accepts_own_data(options: list[str], tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    parsed = parser.parse_args([*options, f"--data.cache_dir={tmp_path}"])
    data = parser.instantiate(parsed).data
    assert data.image_shape[1:] == (parsed.data.init_args.image_size,) * 2
    if isinstance(data, FromDataset):
        assert data.arguments["train"]["root"] == "D"


def readme_example() -> str:
    text = (Path(__file__).parents[2] / "datamodules" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def test_the_class_in_the_readme_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    (tmp_path / "squares.py").write_text(readme_example())
    monkeypatch.syspath_prepend(str(tmp_path))
    data = make_data("squares.Squares", {"cache_dir": cache, "batch_size": 50})
    data.prepare_data()
    assert next(iter(data.train_dataloader())).shape == (50, 1, 16, 16)
    assert set(data.labelled("test")[1].tolist()) == {0, 1}
    assert len(readme_example().splitlines()) < 30


def test_data_by_name_path_or_config(tmp_path: Path) -> None:
    assert data_module("imagefolder") is ImageFolder
    assert data_module("datamodules.Parquet") is Parquet
    config = tmp_path / "config.yaml"
    config.write_text("data:\n  class_path: ImageFolder\n  init_args: {root: D, image_size: 8}\n")
    assert find_data("", str(config), {"root": "E"}) == ("ImageFolder", {"root": "E", "image_size": 8})
    config.write_text("data: Digits\n")
    assert find_data("", str(config), {}) == ("Digits", {})


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("", None, "give either the name of a dataset, such as mnist, or the path of a class, or --config FILE"),
        ("mnist", "data: Digits", "give either the name"),
        ("", "model: SDDPM", "has no block `data` with a class_path"),
        ("", "a: [", r"config.yaml cannot be read"),
    ],
)
def test_data_that_is_not_given_clearly(name: str, content: str | None, match: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(content or "")
    with pytest.raises(ValueError, match=match):
        find_data(name, None if content is None else str(config), {})


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "sky",
            r"data='sky' is not a dataset of the suite; choose one of: .*ImageFolder.*, or give the path of a class",
        ),
        ("pathlib.Path", "data='pathlib.Path' is not a class of images; derive it from datamodules.ImageDataModule"),
        ("gone.Gone", "'gone.Gone' cannot be imported"),
    ],
)
def test_unknown_data(name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        data_module(name)
