from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_prc import calculate_precision_recall_full

from leaderboard.metrics.feature_metrics import precision_recall


def points(count: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator, dtype=torch.float64) + shift


def measure(reference: Tensor, generated: Tensor, **options: int) -> tuple[float, float]:
    precision, recall = precision_recall(reference, generated, torch.arange(len(generated)) % 10, **options)
    return float(precision[0]), float(recall[0])


@pytest.mark.parametrize("neighbours", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_values_are_those_of_torch_fidelity(neighbours: int, shift: float) -> None:
    reference, generated = points(300, 1), points(200, 2, shift)
    expected = calculate_precision_recall_full(generated, reference, neighbours)
    assert measure(reference, generated, neighbours=neighbours) == pytest.approx(expected, abs=1e-7)


def test_values_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, generated = points(230, 1), points(210, 2, 1.0)
    groups = torch.arange(210) % 10
    expected = precision_recall(reference, generated, groups)
    monkeypatch.setattr("leaderboard.metrics.feature_metrics._BLOCK", 64)
    assert precision_recall(reference, generated, groups) == expected


def test_by_hand_on_a_line() -> None:
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]], dtype=torch.float64)
    generated = torch.tensor([[0.5], [1.5], [20.0], [21.0]], dtype=torch.float64)
    precision, recall = precision_recall(reference, generated, torch.tensor([0, 1, 2, 3]), neighbours=1)
    assert float(precision[0]) == 0.5  # two lie within 1 of a real one
    assert float(recall[0]) == 0.5  # 0, 1 and 2 lie within 1 of 0.5 or 1.5
    # left out in turn: 1/3, 1/3, 2/3, 2/3 of the others lie inside
    assert float(precision[1]) == pytest.approx((3 / 4 * 4 * (1 / 6) ** 2) ** 0.5)


def test_far_sets_and_equal_ones() -> None:
    assert measure(points(100, 1), points(100, 2, 100.0)) == (0, 0)
    assert measure(points(100, 1), points(100, 1)) == (1, 1)


def test_a_single_mode_is_precise_and_recalls_little() -> None:
    precision, recall = measure(points(400, 1), 0.1 * points(400, 2))
    assert precision > 0.95
    assert recall < 0.05


def test_jackknife_error_is_about_the_spread_over_repetitions() -> None:
    reference, found = points(500, 0), []
    for seed in range(1, 13):
        generated = points(300, seed, 0.7)
        found.append(
            torch.stack([torch.stack(m) for m in precision_recall(reference, generated, torch.arange(300) % 10)])
        )
    values, errors = torch.stack(found)[..., 0], torch.stack(found)[..., 1]
    ratio = errors.mean(0) / values.std(0)
    assert ((ratio > 0.4) & (ratio < 2.5)).all(), ratio


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match="2 images are too few for 3 nearest neighbours"):
        precision_recall(points(2, 1), points(50, 2), torch.arange(50) % 10)
