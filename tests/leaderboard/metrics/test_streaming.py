from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from leaderboard.metrics.streaming import FeatureTable, FrechetDistance, jackknife_estimate, kept_images

WIDTH = 8


def gaussian(count: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)


def measured(real: Tensor, fake: Tensor, **options: bool) -> Tensor:
    """Distance, error, unbiased distance, distance at infinity and its error."""
    metric = FrechetDistance(WIDTH, **options)
    metric.update(real, torch.arange(len(real)), real=True)
    metric.update(fake, torch.arange(len(fake)), real=False)
    return metric.compute()[0]


def test_unbiased_distance_is_the_jackknife_estimate() -> None:
    real, fake = gaussian(300, 0), gaussian(200, 1, 0.3)
    found = measured(real, fake)
    parts = torch.stack([measured(real, fake[torch.arange(200) % 10 != group])[0] for group in range(10)])
    assert float(found[2]) == pytest.approx(float(10 * found[0] - 9 * parts.mean()), rel=1e-9)
    assert float(found[2]) == pytest.approx(float(jackknife_estimate(found[0], parts)), rel=1e-9)
    assert found[3:].isnan().all()


def test_distance_at_infinity_is_the_intercept_of_a_straight_line() -> None:
    real, fake = gaussian(300, 0), gaussian(200, 1, 0.3)
    found = measured(real, fake, at_infinity=True)

    def intercept(groups: list[int]) -> float:
        inverse, means = [], []
        for size in range((len(groups) + 1) // 2, len(groups) + 1):
            runs = [[groups[(start + i) % len(groups)] for i in range(size)] for start in range(len(groups))]
            members = [torch.isin(torch.arange(200) % 10, torch.tensor(run)) for run in runs]
            inverse.append(1 / int(members[0].sum()))
            means.append(np.mean([float(measured(real, fake[m])[0]) for m in members]))
        return float(np.polyfit(inverse, means, 1)[1])

    assert float(found[3]) == pytest.approx(intercept(list(range(10))), rel=1e-9)
    parts = np.array([intercept([k for k in range(10) if k != group]) for group in range(10)])
    assert float(found[4]) == pytest.approx(float(np.sqrt(9 * parts.var())), rel=1e-8)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.4, 1.2)])
def test_corrections_remove_the_bias_and_errors_are_the_spread(shift: float, scale: float) -> None:
    """Of 30 sets of 200 images each, against the distance of the distributions."""
    real = gaussian(100_000, 0)
    covariance, mean = real.T.cov(), real.mean(0)
    roots = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt() * scale
    exact = float((mean - shift).square().sum() + covariance.trace() + WIDTH * scale**2 - 2 * roots.sum())
    found = torch.stack([measured(real, gaussian(200, seed, shift, scale), at_infinity=True) for seed in range(1, 31)])
    plain, _, unbiased, infinity, _ = (found.mean(0) - exact).tolist()
    standard = found.std(0) / 30**0.5
    assert plain > 0.1
    assert abs(unbiased) < max(0.1 * plain, 3 * float(standard[2]))
    assert abs(infinity) < max(0.1 * plain, 3 * float(standard[3]))
    errors = found[:, [1, 1, 4]].square().mean(0).sqrt() / found[:, [0, 2, 3]].std(0)
    assert ((errors > 0.6) & (errors < 1.7)).all(), errors


def test_few_and_many_images_compare_once_the_bias_is_removed() -> None:
    real = gaussian(50_000, 0)

    def mean(count: int, column: int) -> float:
        return float(torch.stack([measured(real, gaussian(count, s, 0.2))[column] for s in range(1, 31)]).mean())

    assert mean(100, 0) > 1.3 * mean(400, 0)
    assert mean(100, 2) == pytest.approx(mean(400, 2), rel=0.1)


def test_the_iterated_root_has_no_correction() -> None:
    """Its errors use another root, so the jackknife estimate would mix two."""
    metric = FrechetDistance(WIDTH, roots=("exact", "newton_schulz"))
    for count, real in ((300, True), (200, False)):
        metric.update(gaussian(count, int(real)), torch.arange(count), real)
    assert metric.compute()[:, 2].isnan().tolist() == [False, True]


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("order", [torch.arange, torch.randperm])
def test_a_table_of_the_whole_reference(order: Callable[[int], Tensor], seed: int | None) -> None:
    real = gaussian(70, 1).float()
    table = FeatureTable(WIDTH, num_images=20, num_reference=70, whole_reference=True, seed=seed)
    partial = FeatureTable(WIDTH, num_images=20, num_reference=70, seed=seed)
    for index in order(70).split(16):
        for kept in (table, partial):
            kept.update(real[index], index, real=True)
            kept.update(real[index], index, real=False)
    assert torch.equal(table.compute()[0], real.double())
    assert torch.equal(real.double()[kept_images(70, 20, seed)], partial.compute()[0])
    assert len(table.compute()[1]) == 20
    for count in (7, 20):
        expected = real.double()[kept_images(70, count, seed)] if seed is not None or count == 20 else None
        assert expected is None or torch.equal(table.real(table.compute()[0], count), expected)
        assert expected is None or torch.equal(partial.real(partial.compute()[0], count), expected)
    assert torch.equal(table.real(real, 100), real)


def test_drawn_images_are_always_the_same_and_represent_both_kinds_of_an_alternating_split() -> None:
    drawn = kept_images(60_000, 10_000, 0)
    assert drawn[:5].tolist() == [17, 18, 24, 28, 50]
    assert drawn.unique().tolist() == drawn.tolist()
    assert 0.48 < (drawn % 2).double().mean() < 0.52
    assert not (kept_images(60_000, 10_000, None) % 2).any()  # which on MNIST are all of one kind
    assert set(kept_images(60_000, 5_000, 0).tolist()) < set(drawn.tolist())
    assert kept_images(10, 20, 0).tolist() == list(range(10))
