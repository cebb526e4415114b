from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from leaderboard.reports.statistics import LEVEL, Group, difference, half_width, holm, rank_intervals

TABLES = 1000
"""Simulated comparisons or tables; four standard errors of a rate of 5 % are 2.8 %."""
TOLERANCE = 4 * math.sqrt(LEVEL * (1 - LEVEL) / TABLES)


def group(values: object, first: int = 0) -> dict[int, float]:
    return dict(enumerate(map(float, np.asarray(values)), first))


def test_interval_is_students() -> None:
    assert half_width([1.0, 2.0, 6.0]) == pytest.approx(4.302653 * math.sqrt(7 / 3))
    low, high = stats.t.interval(0.95, 2, loc=3.0, scale=stats.sem([1.0, 2.0, 6.0]))
    assert half_width([1.0, 2.0, 6.0]) == pytest.approx((high - low) / 2)
    assert half_width([1.0]) is None


def test_shared_seeds_are_paired() -> None:
    a, b = [3.2, 3.1, 3.4], [2.9, 2.7, 2.8]
    found = difference(group(a), group(b))
    assert found is not None
    assert (found.paired, found.trainings) == (True, (3,))
    assert found.p == pytest.approx(stats.ttest_rel(b, a).pvalue)
    interval = stats.ttest_rel(b, a).confidence_interval()
    assert found.value - found.half_width == pytest.approx(interval.low)
    backwards = difference(group(a), dict(reversed(group(b).items())))
    assert backwards is not None
    assert backwards.p == pytest.approx(found.p)  # paired by seed, not by position
    assert difference(group(a), group([2.9, 2.7, 2.8, 99.0])) == found  # a seed without a partner plays no part


def test_other_seeds_are_compared_by_means_with_the_smaller_groups_freedom() -> None:
    a, b = [3.2, 3.1, 3.4], [2.9, 2.7, 2.8, 3.0]
    found = difference(group(a), group(b, first=2))
    welch = stats.ttest_ind(b, a, equal_var=False)
    assert found is not None
    assert (found.paired, found.trainings) == (False, (3, 4))
    assert found.value == pytest.approx(np.mean(b) - np.mean(a))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(welch.statistic), df=2))
    assert found.p > welch.pvalue


def test_a_single_training_cannot_be_told_apart() -> None:
    assert difference(group([1.0]), group([100.0])) is None
    assert difference(group([1.0]), group([100.0, 100.1, 100.2])) is None
    assert rank_intervals([group([1.0]), group([50.0, 50.1, 50.2]), group([100.0])]) == [(1, 3)] * 3


def test_equal_values_do_not_differ() -> None:
    same = difference(group([1.0, 2.0]), group([1.0, 2.0]))
    assert same is not None
    assert (same.value, same.half_width, same.p) == (0.0, 0.0, 1.0)


def test_holm_corrects_in_steps() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_clear_differences_are_ranked_and_others_share_ranks() -> None:
    noise = np.array([-0.02, 0.01, 0.0, 0.02, -0.01])
    best, twin, worst = group(1 + noise), group(1 + noise[::-1]), group(9 + 2 * noise)
    single = {0: 5.0}
    assert rank_intervals([best, twin, worst]) == [(1, 2), (1, 2), (3, 3)]
    assert rank_intervals([best, twin, worst, single]) == [(1, 3), (1, 3), (3, 4), (1, 4)]


@pytest.mark.parametrize(
    ("sizes", "spreads", "shared"),
    [
        ((3, 3), (1.0, 1.0), True),
        ((3, 3), (1.0, 6.0), True),
        ((2, 2), (1.0, 3.0), False),
        ((3, 3), (1.0, 6.0), False),
        ((2, 5), (1.0, 0.25), False),  # Welch's own degrees of freedom: 10 %
        ((3, 8), (1.0, 0.2), False),
    ],
)
def test_false_positives_stay_below_the_level(
    sizes: tuple[int, int], spreads: tuple[float, float], shared: bool
) -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=(TABLES, max(sizes))) * shared  # what a seed does to both methods
    found = 0
    for k in range(TABLES):
        a, b = (s * rng.normal(size=n) + common[k, :n] for n, s in zip(sizes, spreads, strict=True))
        result = difference(group(a), group(b, first=0 if shared else 100))
        assert result is not None
        assert result.paired == shared
        found += result.p <= LEVEL
    assert found / TABLES <= LEVEL + TOLERANCE
    assert not shared or found / TABLES >= LEVEL - TOLERANCE  # the paired test is exact


def test_a_table_of_equal_methods_is_rarely_ranked() -> None:
    """The probability of any wrong rank in a whole table is at most 5 %, whatever the spreads of its rows."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(TABLES // 5):
        rows: list[Group] = [group(spread * rng.normal(size=3)) for spread in (0.1, 0.2, 0.2, 0.5, 1.0, 4.0)]
        wrong += any(interval != (1, 6) for interval in rank_intervals(rows))
    assert wrong / (TABLES // 5) <= LEVEL + math.sqrt(5) * TOLERANCE


def test_five_seeds_find_a_large_difference() -> None:
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(200):
        rows: list[Group] = [group(mean + 0.2 * rng.normal(size=5)) for mean in (0.7, 3.0, 3.1, 3.2, 4.3)]
        found += rank_intervals(rows)[0] == (1, 1)
    assert found > 150
