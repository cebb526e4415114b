"""The denoising autoencoder: architecture, training, and the views that use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmark.cli import main
from datamodules import Digits
from leaderboard.evaluation.reference import build_parts
from leaderboard.extractors.base import (
    DENOISING,
    EXTRACTORS,
    DenoisingEncoder,
    SmallExtractor,
    replaced_extractor,
    shipped_extractor,
)
from leaderboard.extractors.train import DENOISING_RECIPES, Autoencoder
from leaderboard.protocols import OFFLINE_V1, OFFLINE_V2

SHIPPED = sorted(EXTRACTORS.glob("*_ae.safetensors"))
NO_FILES = (None, None, None)


@pytest.mark.parametrize(
    ("size", "channels", "sizes"),
    [
        (8, (16, 32, 64), [8, 8, 8, 4]),
        (28, (16, 32, 64), [28, 14, 7, 4]),
        (32, (16, 32, 64), [32, 16, 8, 4]),
        (64, (16, 32, 64, 64), [64, 32, 16, 8, 4]),
    ],
)
def test_sizes_go_down_to_four_pixels_and_back(size: int, channels: tuple[int, ...], sizes: list[int]) -> None:
    network = Autoencoder(3, size, channels, num_features=24)
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    assert network.encoder.sizes == sizes
    features, logits = network.encoder(images)
    assert (features.shape, logits.shape) == ((2, 24), (2, 0))
    assert network(images).shape == images.shape


def test_features_depend_on_where_things_are() -> None:
    """Unlike those of the classifiers, which are means over all positions."""
    torch.manual_seed(0)
    encoder = DenoisingEncoder(1, 28)
    images = torch.zeros(1, 1, 28, 28)
    images[..., 4:9, 4:9] = 255
    here, there = (encoder(x)[0].detach() for x in (images, images.roll(12, 3)))
    assert float((here - there).norm()) > 0.1 * float(here.norm())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_autoencoders(path: Path) -> None:
    extractor = SmallExtractor(path)
    dataset = extractor.metadata["dataset"]
    assert path == shipped_extractor(dataset, DENOISING)
    assert path.stat().st_size < 1_000_000
    assert extractor.name == f"{dataset}_ae"
    assert replaced_extractor(path) == "suite-autoencoder"
    assert extractor.metadata["task"] == DENOISING
    assert 0.5 < extractor.metadata["explained_variance"] < 1
    recipe = DENOISING_RECIPES[dataset]
    command = f"python -m benchmark train-extractor {dataset} --task denoising --epochs {recipe.epochs} --seed 0"
    assert extractor.metadata["command"] == command
    size = extractor.metadata["architecture"]["size"]
    features, _ = extractor(torch.zeros(2, extractor.in_channels, size, size, dtype=torch.uint8))
    assert features.shape == (2, recipe.features)
    with pytest.raises(ValueError, match=rf"expects {extractor.in_channels} channel\(s\) of {size}x{size}"):
        extractor(torch.zeros(2, extractor.in_channels, size + 1, size + 1, dtype=torch.uint8))


def test_every_dataset_of_the_suite_has_one() -> None:
    assert {path.stem.removesuffix("_ae") for path in SHIPPED} == set(DENOISING_RECIPES)


def test_training_is_deterministic_and_explains_variance(tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for file in files:
        arguments = ["--task=denoising", "--epochs=2", f"--output={file}", f"--data_options.cache_dir={tmp_path}"]
        main(["train-extractor", "digits", *arguments])
    assert files[0].read_bytes() == files[1].read_bytes()
    extractor = SmallExtractor(files[0])
    assert extractor.metadata["explained_variance"] > 0.1
    assert json.dumps(extractor.metadata["architecture"]) == (
        '{"channels": [16, 32, 64], "in_channels": 1, "num_features": 32, "size": 8}'
    )


def test_a_file_replaces_the_extractor_of_its_kind(tmp_path: Path) -> None:
    data = Digits(cache_dir=str(tmp_path))
    data.prepare_data()
    encoder, classifier = (str(shipped_extractor("digits", task)) for task in (DENOISING, ""))
    for file in (encoder, classifier):
        parts = build_parts(OFFLINE_V2, data, (None, None, file), None)
        assert [part.identity for part in parts] == [
            part.identity for part in build_parts(OFFLINE_V2, data, NO_FILES, None)
        ]
    (part,) = build_parts(OFFLINE_V1, data, (None, None, classifier), None)
    assert part.identity.startswith("digits ")
    with pytest.raises(ValueError, match="is an autoencoder, which offline-v1 does not use on digits; leave out"):
        build_parts(OFFLINE_V1, data, (None, None, encoder), None)
