from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leaderboard.validation.battery import REAL, SEVERITIES, KnownSet, blurred, known_sets, shifted


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor, Tensor]:
    """200 test images, their labels and 300 training images."""
    generator = torch.Generator().manual_seed(0)
    test = torch.randint(256, (200, 1, 12, 12), generator=generator, dtype=torch.uint8)
    train = torch.randint(256, (300, 1, 12, 12), generator=generator, dtype=torch.uint8)
    return test, torch.arange(200) % 10, train


@pytest.fixture(scope="module")
def sets(images: tuple[Tensor, Tensor, Tensor]) -> dict[tuple[str, float], Tensor]:
    return {(known.kind, known.severity): known.images for known in known_sets(*images)}


def test_every_kind_and_severity_occurs_once(images: tuple[Tensor, Tensor, Tensor]) -> None:
    found = [(known.kind, known.severity) for known in known_sets(*images)]
    assert found == [(REAL, 0), *((kind, s) for kind, severities in SEVERITIES.items() for s in severities)]
    assert len({known.title for known in known_sets(*images)}) == len(found)
    without_labels = known_sets(images[0], torch.full((200,), -1), images[2])
    assert {known.kind for known in without_labels} == {REAL, *SEVERITIES} - {"few classes"}


def test_sets_are_equal_whenever_they_are_made(images: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.manual_seed(1)
    for a, b in zip(known_sets(*images), known_sets(*images), strict=True):
        assert torch.equal(a.images, b.images)


def test_shares_of_overlays_copies_and_classes(
    images: tuple[Tensor, Tensor, Tensor], sets: dict[tuple[str, float], Tensor]
) -> None:
    test, labels, train = images
    for share in SEVERITIES["overlays"]:
        changed = (sets["overlays", share] != test).flatten(1).any(1)
        assert int(changed.sum()) == round(share * 200)  # each meets another image
        assert bool((sets["overlays", share] >= test).all())
    known = {image.numpy().tobytes() for image in train}
    for share in SEVERITIES["copied"]:
        assert sum(image.numpy().tobytes() in known for image in sets["copied", share]) == round(share * 200)
    for share, kept in zip(SEVERITIES["few classes"], (5, 2, 1), strict=True):
        assert torch.equal(sets["few classes", share], test[labels < kept])


def test_more_severe_sets_are_farther_from_the_real_images(
    images: tuple[Tensor, Tensor, Tensor], sets: dict[tuple[str, float], Tensor]
) -> None:
    test = images[0].float()
    for kind in ("blurred", "noised", "overlays"):
        errors = [float((sets[kind, s].float() - test).square().mean()) for s in SEVERITIES[kind]]
        assert 0 < errors[0] < errors[1] < errors[2]


def test_noise_has_the_stated_deviation() -> None:
    grey = torch.full((50, 1, 20, 20), 128, dtype=torch.uint8)
    for known in known_sets(grey, torch.zeros(50, dtype=torch.long), grey):
        if known.kind == "noised":
            assert float(known.images.float().std()) / 255 == pytest.approx(known.severity, rel=0.05)


def test_blur_is_a_gaussian_filter() -> None:
    dot = torch.zeros(1, 1, 15, 15, dtype=torch.uint8)
    dot[0, 0, 7, 7] = 255
    found = blurred(dot, 1.0)[0, 0].double()
    offsets = torch.arange(-7, 8).double()
    kernel = torch.exp(-offsets.square() / 2)
    expected = 255 * torch.outer(kernel, kernel) / kernel.sum() ** 2
    assert float((found - expected).abs().max()) < 1
    flat = torch.full((2, 3, 9, 9), 77, dtype=torch.uint8)
    assert torch.equal(blurred(flat, 2.0), flat)


def test_shift_moves_and_repeats_the_border() -> None:
    column = torch.arange(5, dtype=torch.uint8)[:, None].expand(5, 5)
    images = torch.stack([column, column, column.T, column.T])[:, None].contiguous()
    found = shifted(images, 2, torch.arange(4))
    assert found[0, 0, :, 0].tolist() == [0, 0, 0, 1, 2]  # down
    assert found[1, 0, :, 0].tolist() == [2, 3, 4, 4, 4]  # up
    assert found[2, 0, 0].tolist() == [0, 0, 0, 1, 2]  # right
    assert found[3, 0, 0].tolist() == [2, 3, 4, 4, 4]  # left


@pytest.mark.parametrize(
    ("kind", "severity", "title"),
    [
        (REAL, 0, "real test images"),
        ("shifted", 3, "shifted, 3 px"),
        ("few classes", 0.9, "90% of classes missing"),
        ("copied", 1, "training images, 100%"),
    ],
)
def test_titles(kind: str, severity: float, title: str) -> None:
    assert KnownSet(kind, severity, torch.empty(0)).title == title
