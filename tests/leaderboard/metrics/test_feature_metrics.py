from __future__ import annotations

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as clean_frechet_distance
from cleanfid.fid import kernel_distance as clean_kernel_distance
from torch import Tensor
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from leaderboard.metrics.feature_metrics import (
    authenticity,
    density_coverage,
    precision_recall,
    unbiased_kernel_distance,
)
from leaderboard.metrics.streaming import FrechetDistance


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


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] - b).square().sum(2)


def brute_force_density_coverage(reference: Tensor, generated: Tensor, neighbours: int) -> tuple[float, float]:
    """The definition of Naeem et al., word by word."""
    to_real = squared_distances(reference, reference).sqrt()
    radii = to_real.sort(1).values[:, neighbours]  # the first one is the image itself
    inside = squared_distances(reference, generated).sqrt() < radii[:, None]
    density = float(inside.double().sum(0).mean()) / neighbours
    return density, float(inside.any(1).double().mean())


@pytest.mark.parametrize("neighbours", [1, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 0.5, 2.5])
def test_density_and_coverage_are_those_of_the_definition_and_of_prdc(neighbours: int, shift: float) -> None:
    reference, generated = points(300, 1), points(200, 2, shift)
    density, coverage = density_coverage(reference, generated, torch.arange(200) % 10, neighbours)
    found = float(density[0]), float(coverage[0])
    assert found == pytest.approx(brute_force_density_coverage(reference, generated, neighbours), abs=1e-12)
    prdc = pytest.importorskip("prdc", reason="prdc is not installed: pip install -e '.[dev]'")
    expected = prdc.compute_prdc(reference.numpy(), generated.numpy(), neighbours)
    assert found == pytest.approx((expected["density"], expected["coverage"]), abs=1e-12)


def test_density_and_coverage_of_equal_distributions() -> None:
    """`1` and `1 - 2^-k` for as many generated as real images."""
    density, coverage = density_coverage(points(1500, 1), points(1500, 2), torch.arange(1500) % 10, neighbours=3)
    assert float(density[0]) == pytest.approx(1, abs=0.05)
    assert float(coverage[0]) == pytest.approx(1 - 2**-3, abs=0.02)


def test_coverage_sees_missing_modes_and_not_outliers() -> None:
    reference = torch.cat([points(200, 1), points(200, 2, 50.0)])
    one_mode = points(400, 3)
    with_outliers = torch.cat([one_mode[:395], 25 + 60 * points(5, 4)])
    groups = torch.arange(400) % 10
    (_, one), (_, more) = (density_coverage(reference, x, groups) for x in (one_mode, with_outliers))
    assert 0.45 < float(one[0]) <= 0.5
    assert float(more[0]) == pytest.approx(float(one[0]), abs=0.01)


def test_too_few_real_images_for_coverage() -> None:
    with pytest.raises(ValueError, match="5 images are too few for 5 nearest neighbours"):
        density_coverage(points(5, 1), points(50, 2), torch.arange(50) % 10)


def test_kernel_distance_is_the_u_statistic() -> None:
    reference, generated = points(60, 1), points(40, 2, 0.5)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 5 + 1) ** 3

    def statistic(fake: Tensor) -> Tensor:
        value = -2 * kernel(reference, fake).mean()
        for x in (reference, fake):
            value += kernel(x, x).fill_diagonal_(0).sum() / (len(x) * (len(x) - 1))
        return value

    value, error = unbiased_kernel_distance(reference, generated)
    assert float(value) == pytest.approx(float(statistic(generated)), rel=1e-10)
    parts = torch.stack([statistic(generated[torch.arange(40) != i]) for i in range(40)])
    assert float(error) == pytest.approx(float((39 / 40 * (parts - parts.mean()).square().sum()).sqrt()), rel=1e-9)


def test_kernel_distance_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, generated = points(230, 1), points(210, 2, 1.0)
    expected = unbiased_kernel_distance(reference, generated)
    monkeypatch.setattr("leaderboard.metrics.feature_metrics._SMALL_BLOCK", 64)
    assert torch.stack(unbiased_kernel_distance(reference, generated)).tolist() == pytest.approx(
        torch.stack(expected).tolist(), rel=1e-10
    )


def _cross_check_features() -> tuple[Tensor, Tensor]:
    return points(120, 1), 1.2 * points(120, 2, 0.3)


def test_kernel_distance_is_that_of_torch_fidelity_and_clean_fid() -> None:
    reference, generated = _cross_check_features()
    value = float(unbiased_kernel_distance(reference, generated)[0])
    options = {"kid_subsets": 1, "kid_subset_size": 120, "kid_kernel": "poly", "kid_kernel_poly_degree": 3}
    options |= {"kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1, "rng_seed": 0, "verbose": False}
    found = kid_features_to_metric(generated, reference, **options)
    assert value == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-5)
    clean = clean_kernel_distance(generated.numpy(), reference.numpy(), num_subsets=1, max_subset_size=120)
    assert value == pytest.approx(clean, rel=1e-5)


def test_frechet_distance_is_that_of_torch_fidelity_and_clean_fid() -> None:
    reference, generated = _cross_check_features()
    metric = FrechetDistance(5)
    metric.update(reference, torch.arange(120), real=True)
    metric.update(generated, torch.arange(120), real=False)
    value = float(metric.compute()[0, 0])
    moments = [(x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)) for x in (reference, generated)]
    (mu, sigma), (own_mu, own_sigma) = moments
    statistics = [{"mu": mu, "sigma": sigma} for mu, sigma in moments]
    found = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert value == pytest.approx(found, rel=1e-6)
    assert value == pytest.approx(clean_frechet_distance(mu, sigma, own_mu, own_sigma), rel=1e-6)


def test_authenticity_by_hand_on_a_line() -> None:
    reference = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    generated = torch.tensor([[0.0], [1.9], [3.5], [20.0], [7.0], [2.1]], dtype=torch.float64)
    # distances to the nearest: 0, 0.9, 0.5, 13, 0, 0.9; of that one to its nearest other: 1, 1, 2, 4, 4, 2
    (share, error), nearest = authenticity(reference, generated, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert nearest.tolist() == [0, 1, 2, 3, 3, 2]
    assert float(share) == pytest.approx(1 / 6)
    assert float(error) == pytest.approx((0.5 * 2 * (1 / 6) ** 2) ** 0.5)  # 1/3 and 0 without one group


def test_authenticity_of_copies_new_points_and_far_ones() -> None:
    reference, groups = points(2500, 1), torch.arange(400) % 10

    def share(generated: Tensor) -> float:
        return float(authenticity(reference, generated, groups)[0][0])

    new = points(400, 2)
    fresh, half = share(new), share(torch.cat([reference[:200], new[200:]]))
    assert share(reference[:400]) == 0
    assert 0.3 < fresh < 0.8
    assert half == pytest.approx(fresh / 2, abs=0.05)
    assert share(new + 100) == 1
    (_, error), _ = authenticity(reference, new, groups)
    assert float(error) == pytest.approx((fresh * (1 - fresh) / 400) ** 0.5, rel=0.7)  # binomial


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_errors_are_about_the_spread_over_repetitions(shift: float) -> None:
    """Of many sets of one distribution; the jackknife of a degenerate kernel distance may be too large, by sqrt(2)."""
    reference, groups, found = points(400, 0), torch.arange(200) % 10, []
    for seed in range(1, 101):
        generated = points(200, seed, shift)
        pairs = [
            unbiased_kernel_distance(reference, generated),
            *density_coverage(reference, generated, groups),
            authenticity(reference, generated, groups)[0],
        ]
        found.append(torch.stack([torch.stack(pair) for pair in pairs]))
    values, errors = torch.stack(found)[..., 0], torch.stack(found)[..., 1]
    ratio = errors.square().mean(0).sqrt() / values.std(0)
    assert ((ratio > 0.8) & (ratio < 1.6)).all(), ratio


def test_kernel_distance_is_unbiased() -> None:
    """Its mean over pairs of equal distributions is 0, and over subsets of one set the value of the whole set."""
    values = torch.stack([unbiased_kernel_distance(points(40, s), points(30, s + 500))[0] for s in range(300)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 300**0.5
