"""Small generated datasets, and writers for every supported layout."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from numpy.typing import NDArray
from PIL import Image

Split = tuple[NDArray[np.uint8], list[int]]
Splits = dict[str, Split]
"""Images `(N, H, W)` or `(N, H, W, 3)` with their labels, by split."""


def random_splits(size: int = 28, channels: int = 1, train: int = 40, test: int = 12, classes: int = 10) -> Splits:
    random = np.random.default_rng(0)
    shape = (size, size) if channels == 1 else (size, size, channels)
    return {
        split: (random.integers(0, 256, (count, *shape), dtype=np.uint8), [i % classes for i in range(count)])
        for split, count in {"train": train, "test": test}.items()
    }


def letter_splits(per_class: int = 3) -> Splits:
    """Noise for most letters; I, J and L are vertical strokes, J and L with a hook."""
    random = np.random.default_rng(0)
    labels = [i % 26 for i in range(26 * per_class)]
    images = random.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        if chr(ord("A") + label) in "IJL":
            image[:] = 0
            image[3:25, 12:15] = 200
            image[22:25, 8:12] = 90 if label == 9 else 0
            image[22:25, 15:19] = 90 if label == 11 else 0
    return {"train": (images, labels), "test": (images[::-1].copy(), labels[::-1])}


def encode(image: NDArray[np.uint8], suffix: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return buffer.getvalue()


def write_parquet(
    root: Path,
    splits: Splits,
    name: str = "{split}.parquet",
    column: str = "image",
    labelled: bool = True,
    schema: bool = True,
) -> Path:
    """Writes the Hugging Face layout; without `schema`, columns of bytes and numbers."""
    for split, (images, labels) in splits.items():
        rows: dict[str, list[object]] = {column: [{"bytes": encode(image), "path": None} for image in images]}
        struct_ = {"bytes": Value("binary"), "path": Value("string")}
        features = Features({column: ImageFeature() if schema else struct_})
        if labelled:
            rows["label"] = list(labels)
            names = [str(i) for i in range(max(labels) + 1)]
            features["label"] = ClassLabel(names=names) if schema else Value("int64")
        file = root / name.format(split=split)
        file.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(str(file))
    return root


def write_folder(root: Path, splits: Splits, names: str = "0123456789", suffix: str = "png") -> Path:
    for split, (images, labels) in splits.items():
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = root / split / names[label] / f"{index:05}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(image, suffix))
    return root


def write_idx(folder: Path, splits: Splits, train: str = "train", test: str = "t10k", zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix in {"train": train, "test": test}.items():
        for what, array in zip(("images-idx3", "labels-idx1"), splits[split], strict=True):
            values = np.asarray(array, dtype=np.uint8)
            data = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
            file = folder / f"{prefix}-{what}-ubyte{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(data) if zipped else data)
    return folder


def write_cifar(folder: Path, splits: Splits) -> Path:
    """Writes the python batches of CIFAR-10, with the training images in five files."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = splits["train"]
    fifths = np.array_split(np.arange(len(images)), 5)
    batches = {f"data_batch_{i + 1}": (images[part], [labels[k] for k in part]) for i, part in enumerate(fifths)}
    for name, (pixels, numbers) in (batches | {"test_batch": splits["test"]}).items():
        batch = {b"data": pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1), b"labels": numbers}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=3))
    return folder


def write_celeba(root: Path, counts: tuple[int, int, int] = (30, 6, 8), size: tuple[int, int] = (178, 218)) -> Path:
    """Writes CelebA in its original layout, with images of coloured noise."""
    random = np.random.default_rng(0)
    folder = root / "img_align_celeba"
    folder.mkdir(parents=True)
    parts = [part for part, count in enumerate(counts) for _ in range(count)]
    for number in range(1, len(parts) + 1):
        small = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size).save(folder / f"{number:06}.jpg")
    lines = [f"{number:06}.jpg {part}\n" for number, part in enumerate(parts, start=1)]
    (root / "list_eval_partition.txt").write_text("".join(lines))
    return root
