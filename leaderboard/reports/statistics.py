"""Statistics over training seeds: intervals, tests and ranks.

The unit is a training. A group maps each training of a method, named by its seed, to the value of one metric.

- An interval is Student's, at 95 %: `mean ± t(0.975, n - 1) s / sqrt(n)`.
- Two groups that share at least two seeds are compared by the paired t-test over these seeds. Other groups are compared
  by the statistic of Welch, with `min(n_a, n_b) - 1` degrees of freedom, so that the false-positive rate never exceeds
  the level (Mickey and Brown, Annals of Mathematical Statistics 1966). Welch and Satterthwaite's degrees of freedom are
  too many for groups of this size: at a level of 5 %, 2 trainings against 5 with a quarter of the spread have 10 %.
- Several comparisons are corrected by Holm (Scandinavian Journal of Statistics 1979): the probability of one or more
  wrong statements is at most 5 %.
- Two groups of which one has a single training cannot be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.05
"""Probability of a wrong statement, per interval and per family of comparisons."""
OF_AN_EVALUATION = 1.96
"""Half of the 95 % interval of a single evaluation, in standard errors."""
Group = Mapping[Hashable, float]
"""Values of one metric by training seed."""


class Difference(NamedTuple):
    """Comparison of two groups, B - A.

    Args:
        value: Difference of the means; over the shared seeds if the test is paired.
        half_width: Half of its 95 % interval, not corrected for other comparisons.
        p: Two-sided p-value, not corrected for other comparisons.
        trainings: Number of pairs, or of trainings in A and B.
        paired: Whether the test is paired.
    """

    value: float
    half_width: float
    p: float
    trainings: tuple[int, ...]
    paired: bool


def half_width(values: Sequence[float]) -> float | None:
    """Returns half of the 95 % interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return _quantile(len(values) - 1) * _error(values)


def difference(a: Group, b: Group) -> Difference | None:
    """Compares two groups; returns None if they cannot be compared, because one has a single training."""
    shared = [seed for seed in a if seed in b]
    if len(shared) > 1:
        pairs = [b[seed] - a[seed] for seed in shared]
        return _difference(float(np.mean(pairs)), _error(pairs), len(pairs) - 1, (len(pairs),), paired=True)
    if min(len(a), len(b)) < 2:
        return None
    (x, y), counts = ([*group.values()] for group in (a, b)), (len(a), len(b))
    error = math.hypot(_error(x), _error(y))
    return _difference(float(np.mean(y) - np.mean(x)), error, min(counts) - 1, counts, paired=False)


def _error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _difference(value: float, error: float, df: int, trainings: tuple[int, ...], paired: bool) -> Difference:
    if error == 0:
        return Difference(value, 0.0, 1.0 if value == 0 else 0.0, trainings, paired)
    p = 2 * float(stdtr(df, -abs(value / error)))
    return Difference(value, _quantile(df) * error, p, trainings, paired)


def _quantile(df: int) -> float:
    return float(stdtrit(df, 1 - LEVEL / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values corrected for their number; those at most `LEVEL` are significant."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def rank_intervals(groups: Sequence[Group]) -> list[tuple[int, int]]:
    """Returns the first and last rank that each group may have; lower values rank first.

    All pairs are compared, corrected by Holm. The first rank of a group follows the groups that are lower, the last one
    precedes the groups that are higher; groups that cannot be told apart share a rank.
    """
    found = {pair: difference(groups[pair[0]], groups[pair[1]]) for pair in combinations(range(len(groups)), 2)}
    tested = {pair: result for pair, result in found.items() if result is not None}
    first, last = [1] * len(groups), [len(groups)] * len(groups)
    for ((i, j), result), p in zip(tested.items(), holm([r.p for r in tested.values()]), strict=True):
        if p <= LEVEL and result.value != 0:
            lower, higher = (i, j) if result.value > 0 else (j, i)
            first[higher] += 1
            last[lower] -= 1
    return list(zip(first, last, strict=True))
