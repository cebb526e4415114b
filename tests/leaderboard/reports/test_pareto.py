from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest

from leaderboard.reports.pareto import NARROW, WIDE, Frame, Label, Point, pareto_front, plot


def point(energy: float, quality: float, label: str = "a", **fields: bool) -> Point:
    return Point(energy, quality, 0.1, "SDDPM", label, f"record-{label}", **fields)


def box(label: Label) -> tuple[float, float, float]:
    """Returns left end, right end and baseline of a label with 6 units per character."""
    width = 6 * len(label.text)
    left = label.x - {"start": 0.0, "end": width, "middle": width / 2}[label.anchor]
    return left, left + width, label.y


def test_front_contains_points_that_no_other_dominates() -> None:
    points = [point(1, 9, "a"), point(2, 5, "b"), point(3, 6, "beaten"), point(9, 1, "c"), point(9, 2, "dearer")]
    assert [p.label for p in pareto_front(points)] == ["a", "b", "c"]


def test_drafts_are_not_part_of_the_front() -> None:
    points = [point(1, 1, "draft", ranked=False), point(2, 5, "b")]
    assert [p.label for p in pareto_front(points)] == ["b"]
    drawn = plot(points, "FD", "mJ")
    assert drawn is not None
    assert {m.point.label: m.on_front for m in drawn.marks} == {"draft": False, "b": True}


def test_equal_energy_and_quality_count_once() -> None:
    assert [p.label for p in pareto_front([point(1, 2, "b"), point(1, 2, "a"), point(1, 3, "c")])] == ["a"]


def test_energy_is_on_a_logarithmic_scale() -> None:
    drawn = plot([point(1, 3, "a"), point(10, 2, "b"), point(100, 1, "c")], "FD", "mJ")
    assert drawn is not None
    a, b, c = (m.x for m in drawn.marks)
    assert b - a == pytest.approx(c - b, abs=0.02)
    assert {"1", "10", "100"} <= {t.text for t in drawn.x_ticks}
    assert [m.y for m in drawn.marks] == sorted(m.y for m in drawn.marks)  # SVG's y grows downwards


def test_nothing_is_drawn_without_two_points() -> None:
    assert plot([], "FD", "mJ") is None
    assert plot([point(1, 3)], "FD", "mJ") is None
    assert plot([point(1, 3), point(0, 2), point(2, math.inf)], "FD", "mJ") is None


@pytest.mark.parametrize("frame", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize(
    "points",
    [
        [point(5, 2, "a"), point(5, 2, "b")],
        [point(1e-4, 1e3, "a"), point(1e6, 1e-3, "b"), point(1, 1, "c")],
        [point(1 + i / 97, 5 + (i * 31 % 17) / 9, f"variant number {i} with a long name") for i in range(60)],
    ],
    ids=["equal", "far apart", "crowded"],
)
def test_everything_is_inside_and_labels_do_not_overlap(points: list[Point], frame: Frame) -> None:
    drawn = plot(points, "FD", "mJ", frame)
    assert drawn is not None
    for mark in drawn.marks:
        assert frame.left <= mark.x <= frame.right
        assert frame.top <= mark.high <= mark.y <= mark.low <= frame.bottom
    assert drawn.x_ticks
    assert drawn.y_ticks
    assert all(frame.left <= t.position <= frame.right for t in drawn.x_ticks)
    assert all(frame.top <= t.position <= frame.bottom for t in drawn.y_ticks)
    assert all(len(label.text) <= frame.longest for label in drawn.labels)
    boxes = [box(label) for label in drawn.labels]
    assert not [(a, b) for a, b in combinations(boxes, 2) if a[0] < b[1] and b[0] < a[1] and abs(a[2] - b[2]) < 12]
    marks = [(m.x - 4, m.x + 4, m.y + 4) for m in drawn.marks]
    assert not [(a, b) for a in boxes for b in marks if a[0] < b[1] and b[0] < a[1] and abs(a[2] - b[2]) < 7]


def test_a_label_without_room_beside_its_mark_has_a_line_to_it() -> None:
    names = [f"method {i}" for i in range(8)]
    drawn = plot([point(1 + i / 50, 5 + i % 3 / 50, name) for i, name in enumerate(names)], "FD", "mJ")
    assert drawn is not None
    assert {label.text for label in drawn.labels} == set(names)
    assert any(label.line for label in drawn.labels)
    assert not all(label.line for label in drawn.labels)


def test_a_long_interval_does_not_squeeze_the_others() -> None:
    points = [point(1, 3, "a"), point(2, 4, "b"), replace(point(3, 6, "few seeds"), uncertainty=60.0)]
    drawn = plot(points, "FD", "mJ")
    assert drawn is not None
    a, b, few = drawn.marks
    assert a.y - b.y > (WIDE.bottom - WIDE.top) / 10
    assert (few.high, few.low) == (WIDE.top, WIDE.bottom)  # cut off at the axes


def test_methods_share_a_style_and_layout_does_not_depend_on_order() -> None:
    points = [point(1, 3, "a"), replace(point(2, 2, "b"), method="FSDDIM"), point(3, 1, "c")]
    first, second = plot(points, "FD", "mJ"), plot(points[::-1], "FD", "mJ")
    assert first is not None
    assert second is not None
    assert first.legend == second.legend == [("FSDDIM", first.marks[1].style), ("SDDPM", first.marks[0].style)]
    assert first.marks == second.marks[::-1]
    assert first.front == second.front


def test_no_two_of_36_methods_have_the_same_style() -> None:
    drawn = plot([replace(point(1 + i, 1 + i, str(i)), method=f"method {i:02}") for i in range(36)], "FD", "mJ")
    assert drawn is not None
    assert len({style for _, style in drawn.legend}) == 36
    assert len({style.colour for _, style in drawn.legend[:6]}) == 6
