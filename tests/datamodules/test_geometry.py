"""Sizes, padding, mirroring and the arguments that ask for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_layouts import random_splits, write_idx
from PIL import Image

from datamodules import CIFAR10, MNIST, CelebA, DatasetError, Digits, Letters

SPLITS = random_splits()


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(write_idx(tmp_path / "source", SPLITS))


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def test_padding_is_black_and_undone_losslessly(root: str, cache: str) -> None:
    data = MNIST(root, batch_size=40, image_size=32, cache_dir=cache)
    (batch,) = data.train_dataloader()
    assert data.image_shape == (1, 32, 32)
    inner = torch.zeros(32, 32, dtype=torch.bool)
    inner[2:-2, 2:-2] = True
    assert (batch[..., ~inner] == -1).all()
    pixels = {image.tobytes() for image in SPLITS["train"][0]}
    assert {image.numpy().tobytes() for image in data.to_uint8(batch)} == pixels


def test_resizing_is_pillows_antialiased_bilinear(root: str, cache: str) -> None:
    for size in (32, 14):
        data = MNIST(root, image_size=size, fit="resize", cache_dir=cache)
        expected = [
            Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR) for image in SPLITS["test"][0]
        ]
        assert torch.equal(data.labelled("test")[0][:, 0], torch.from_numpy(np.stack(expected)))
        assert data.to_uint8(torch.zeros(1, 1, size, size)).shape == (1, 1, size, size)


def test_the_fingerprint_does_not_depend_on_the_geometry(root: str, cache: str) -> None:
    native = MNIST(root, cache_dir=cache)
    assert native.fingerprint == MNIST(root, image_size=64, fit="resize", cache_dir=cache).fingerprint
    assert len(native.fingerprint) == 64


def test_padded_sizes_share_one_cache_entry(root: str, cache: str) -> None:
    for size in (28, 32, 64):
        MNIST(root, image_size=size, cache_dir=cache).prepare_data()
    assert len([path for path in Path(cache).iterdir() if path.is_dir()]) == 1


def test_generated_images_are_clamped_and_rounded(root: str, cache: str) -> None:
    data = MNIST(root, cache_dir=cache)
    every_byte = torch.arange(256).repeat(4)[: 28 * 28].view(1, 1, 28, 28).to(torch.uint8)
    for precision in (torch.float32, torch.float64):
        assert torch.equal(data.to_uint8(every_byte.to(precision) / 127.5 - 1), every_byte)
    assert data.to_uint8(torch.full((1, 1, 28, 28), 7.0)).unique().tolist() == [255]
    assert data.to_uint8(torch.full((1, 1, 28, 28), -7.0, dtype=torch.bfloat16)).unique().tolist() == [0]


def test_generated_images_of_another_shape_are_refused(root: str, cache: str) -> None:
    data = MNIST(root, image_size=32, cache_dir=cache)
    with pytest.raises(ValueError, match=r"have the shape \(2, 1, 28, 28\), expected \(B, 1, 32, 32\)"):
        data.to_uint8(torch.zeros(2, 1, 28, 28))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_generated_images_that_are_not_finite_are_refused(value: float, root: str, cache: str) -> None:
    images = torch.zeros(1, 1, 28, 28)
    images[0, 0, 5, 5] = value
    with pytest.raises(ValueError, match="generated images contain NaN or infinite values"):
        MNIST(root, cache_dir=cache).to_uint8(images)


def test_about_half_of_the_images_are_mirrored(root: str, cache: str) -> None:
    data = MNIST(root, batch_size=40, flip=True, cache_dir=cache)
    originals = {image.tobytes() for image in SPLITS["train"][0]}
    mirrored = {image[:, ::-1].tobytes() for image in SPLITS["train"][0]}
    loader, flips = data.train_dataloader(), 0
    for epoch in range(25):
        loader.sampler.set_epoch(epoch)
        (batch,) = loader
        seen = {image.numpy().tobytes() for image in data.to_uint8(batch)}
        assert seen <= originals | mirrored
        flips += len(seen & mirrored)
    assert 450 < flips < 550  # of 1,000; 3 standard deviations are 47


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_same_images_are_mirrored_whatever_was_drawn_before(root: str, cache: str, num_workers: int) -> None:
    passes = []
    for seed in range(2):
        torch.manual_seed(seed)
        data = MNIST(root, batch_size=10, flip=True, num_workers=seed * num_workers, cache_dir=cache)
        passes.append(torch.cat(list(data.train_dataloader())))
    assert torch.equal(*passes)


def test_validation_and_reference_images_are_not_mirrored(root: str, cache: str) -> None:
    data = MNIST(root, batch_size=40, flip=True, val_size=20, cache_dir=cache)
    originals = {image.tobytes() for image in SPLITS["train"][0]}
    (batch,) = data.val_dataloader()
    assert {image.numpy().tobytes() for image in data.to_uint8(batch)} <= originals
    assert torch.equal(torch.cat(list(data.reference_batches()))[:, 0], torch.from_numpy(SPLITS["train"][0]))


def test_worker_processes_serve_the_same_images(root: str, cache: str) -> None:
    data = MNIST(root, batch_size=10, num_workers=2, cache_dir=cache)
    seen = {image.numpy().tobytes() for batch in data.train_dataloader() for image in data.to_uint8(batch)}
    assert seen == {image.tobytes() for image in SPLITS["train"][0]}


def test_digits_are_scikit_learns(cache: str) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    data = Digits(cache_dir=cache)
    images, labels = data.labelled("test")
    assert labels.tolist() == digits.target[1500:].tolist()
    assert np.abs(images[:, 0].numpy() / 255 * 16 - digits.images[1500:]).max() < 0.04
    assert int(images.max()) == 255


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 24}, r"image_size=24 cannot be reached by padding MNIST's 28 pixels .* or --data.fit resize"),
        (
            {"image_size": 31},
            r"image_size=31 cannot be reached by padding .* equally on both sides; give 28 plus an even",
        ),
        ({"image_size": 0}, r"image_size=0 is too small; give --data.image_size 1 or more"),
        ({"batch_size": 0}, r"batch_size=0 is too small; give --data.batch_size 1 or more"),
        ({"num_samples": 0}, r"num_samples=0 is too small"),
        ({"sample_batch_size": 0}, r"sample_batch_size=0 is too small"),
        ({"val_size": -1}, r"val_size=-1 is too small; give --data.val_size 0 or more"),
        ({"num_workers": -1}, r"num_workers=-1 is too small"),
        ({"sample_seed": -1}, r"sample_seed=-1 is too small"),
        ({"fit": "crop"}, r"fit='crop' is unknown; choose 'pad' or 'resize'"),
        (
            {"root": "a", "revision": "b"},
            r"revision='b' belongs to the hub, but root='a' is a folder; give one of the two",
        ),
    ],
)
def test_impossible_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MNIST(**options)


def test_impossible_arguments_of_single_datasets() -> None:
    with pytest.raises(ValueError, match=r"center_crop=0 is too small; give 148, or null"):
        CelebA(center_crop=0)
    with pytest.raises(
        ValueError, match=r"orientation='sideways' is unknown; choose 'auto', 'upright' or 'transposed'"
    ):
        Letters(orientation="sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"CIFAR-10's 32 pixels"):
        CIFAR10(image_size=28)


def test_too_many_images_held_out(root: str, cache: str) -> None:
    with pytest.raises(ValueError, match=r"val_size=40 leaves none of the 40 training images; give less"):
        MNIST(root, val_size=40, cache_dir=cache).setup("fit")


def test_batch_larger_than_the_dataset(root: str, cache: str) -> None:
    with pytest.raises(
        ValueError, match=r"batch_size=50 exceeds the 40 training images .* --data.batch_size 40 or less"
    ):
        MNIST(root, batch_size=50, cache_dir=cache).train_dataloader()


def test_split_that_the_source_lacks(root: str, cache: str) -> None:
    data = MNIST(root, cache_dir=cache)
    with pytest.raises(DatasetError, match=r"MNIST from .* no valid split \(it has: test, train\), .* give a source"):
        data.num_reference("valid")


def test_number_of_images_to_generate_may_be_left_open(root: str, cache: str) -> None:
    with pytest.raises(ValueError, match=r"num_samples is not given; .* --data\.num_samples 64"):
        MNIST(root, cache_dir=cache).test_dataloader()


def test_comparison_leaves_floats_alone(root: str, cache: str) -> None:
    data = MNIST(root, image_size=32, cache_dir=cache)
    x = torch.linspace(-2, 2, 32 * 32).view(1, 1, 32, 32)
    assert torch.equal(data.compared(x), x[..., 2:-2, 2:-2])
    assert (data.compared_size, data.geometry) == (28, {"size": 28})
