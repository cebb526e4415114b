from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leaderboard.protocols import PROTOCOLS
from leaderboard.record.records import MetricValue
from leaderboard.validation.anchors import (
    FOLDER,
    Anchor,
    Anchors,
    anchors,
    describe,
    is_better_higher,
    orders,
    read_anchors,
    summary,
)
from leaderboard.validation.battery import REAL, SEVERITIES


def made(key: str, values: dict[tuple[str, float], float], error: float = 0.1) -> tuple[Anchor, ...]:
    return tuple(
        Anchor(kind, severity, 100, {key: MetricValue(value, error, 100)}) for (kind, severity), value in values.items()
    )


def perfect(key: str, sign: float = 1) -> dict[tuple[str, float], float]:
    """Values that get worse with the severity, and gross sets worse than all others."""
    values = {(REAL, 0.0): 0.0}
    for kind, severities in SEVERITIES.items():
        for step, severity in enumerate(severities, 1):
            values[kind, severity] = sign * step * (10 if kind in ("overlays", "few classes") else 1)
    return values


@pytest.mark.parametrize(
    ("key", "sign", "count"),
    [
        ("fd_unbiased_digits_ae", 1, 21),
        ("kid_mean", 1, 21),
        ("fad_eval", 1, 21),
        ("coverage", -1, 21),
        ("recall_digits", -1, 21),
        ("density_digits", -1, 15),
        ("precision", -1, 15),
        ("authenticity_digits_ae", -1, 3),
    ],
)
def test_a_perfect_metric_keeps_every_order(key: str, sign: float, count: int) -> None:
    found = orders(made(key, perfect(key, sign)))
    assert summary(found) == {key: {"kept": count, "cannot tell": 0, "violated": 0}}
    assert is_better_higher(key) == (sign < 0)


def test_a_swapped_pair_is_violated_and_an_unclear_one_is_not() -> None:
    values = perfect("fd")
    values["shifted", 2.0], values["shifted", 3.0] = values["shifted", 3.0], values["shifted", 2.0]
    values["noised", 0.2] = values["noised", 0.1] + 0.2  # less than two errors of a difference, 0.28
    found = orders(made("fd_digits", values))
    (violated,) = (order for order in found if order.verdict == "violated")
    assert describe(violated) == "fd_digits: shifted, 2 px (3), shifted, 3 px (2)"
    (unclear,) = (order for order in found if order.verdict == "cannot tell")
    assert (unclear.better.severity, unclear.worse.severity) == (0.1, 0.2)


def test_preferring_overlays_to_shifted_images_is_a_violation() -> None:
    """As the classifier's distance did on Fashion-MNIST when 3 pixels were compared with overlays."""
    values = perfect("fd") | {("shifted", 1.0): 40.0, ("shifted", 2.0): 41.0, ("shifted", 3.0): 42.0}
    violated = {
        (order.better.title, order.worse.title)
        for order in orders(made("fd_fmnist", values))
        if order.verdict == "violated"
    }
    assert violated == {("shifted, 1 px", "overlays, 100%"), ("shifted, 1 px", "90% of classes missing")}


def test_sets_and_metrics_that_were_not_measured_are_left_out() -> None:
    values = {key: value for key, value in perfect("fd").items() if key[0] != "few classes"}
    assert len(orders(made("fd_celeba", values))) == 15
    assert orders(made("is_mean", perfect("is"))) == []


def result() -> Anchors:
    sets = made("fd_digits", perfect("fd"))
    return Anchors("digits", "f" * 64, "offline-v2", "a" * 64, ("digits b",), {"torch": "2.8"}, 1.5, 10**9, sets)


def test_files_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "digits-offline-v2.json"
    path.write_text(result().text())
    assert read_anchors(path) == result()
    assert anchors("digits", "offline-v2", tmp_path) == result().sets
    assert anchors("digits", "offline-v1", tmp_path) == ()


def test_a_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "digits-offline-v2.json"
    path.write_text(result().text().replace('"kind"', '"sort"', 1))
    with pytest.raises(ValueError, match=r"digits-offline-v2\.json has no anchors .*write it again with validate-"):
        anchors("digits", "offline-v2", tmp_path)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_committed_anchors_belong_to_their_protocol(path: Path) -> None:
    found = read_anchors(path)
    assert path.stem == f"{found.dataset}-{found.protocol}"
    assert found.protocol_sha256 == PROTOCOLS[found.protocol].sha256
    assert found.sets[0].kind == REAL
    assert path.with_suffix(".png").is_file()
    leading = f"fd_unbiased_{found.dataset}_ae"
    assert [order for order in orders(found.sets) if order.key == leading and order.verdict == "violated"] == []
    assert replace(found, sets=()).text() != found.text()
