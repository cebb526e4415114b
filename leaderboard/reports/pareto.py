"""Layout of a plot of quality against energy: axes, ticks, Pareto front and labels that do not overlap.

The page draws it as SVG, so that its colours follow the page's theme and its points link to their rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from matplotlib.ticker import LogLocator, MaxNLocator

SHAPES = (
    "M-4.5 0A4.5 4.5 0 1 1 4.5 0A4.5 4.5 0 1 1 -4.5 0Z",
    "M-4 -4H4V4H-4Z",
    "M0 -5.6L5 3.6H-5Z",
    "M0 -5.8L5.8 0L0 5.8L-5.8 0Z",
    "M0 5.6L5 -3.6H-5Z",
    "M-1.7 -5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
)
"""SVG paths of the marks, centred at the origin."""
_COLOURS = 6
"""Colours of marks in the page's style sheet."""

_CHARACTER, _LINE = 6.6, 13.0
"""Width of a character and height of a line of a label."""
_RINGS = (26, 38, 52, 68)
"""Distances from its mark at which a label has a line that leads to it, if there is no room beside the mark."""
_OFFSETS = (
    (9, 4, "start"),
    (-9, 4, "end"),
    (7, 16, "start"),
    (-7, 16, "end"),
    (0, 19, "middle"),
    (7, -8, "start"),
    (-7, -8, "end"),
    (0, -10, "middle"),
)
"""Candidate positions `(dx, dy, text-anchor)` of a label relative to its mark, best first."""


@dataclass(frozen=True)
class Frame:
    """Size of a plot in units of its SVG view box.

    Args:
        width: Width of the view box.
        height: Height of the view box.
        longest: Maximum length of a label in characters; longer ones are cropped.
    """

    width: int
    height: int
    longest: int
    left: int = 56
    top: int = 10

    @property
    def right(self) -> int:
        """Right end of the axes."""
        return self.width - 8

    @property
    def bottom(self) -> int:
        """Lower end of the axes."""
        return self.height - 46


WIDE, NARROW = Frame(860, 420, 40), Frame(360, 380, 24)
"""Plots for screens and for phones."""


@dataclass(frozen=True)
class Point:
    """One result in the plot.

    Args:
        energy: Energy in mJ, above 0; its mark.
        quality: Distance, lower is better.
        uncertainty: Half of the 95 % interval of `quality`; 0 if unknown.
        method: Method; determines shape and colour of the mark.
        label: Name of the point.
        anchor: HTML id of its row in the page.
        ranked: Whether it may be on the Pareto front; False for what its table does not rank.
        band: Lower and upper bound of the energy; None if it has one value.
    """

    energy: float
    quality: float
    uncertainty: float
    method: str
    label: str
    anchor: str
    ranked: bool = True
    band: tuple[float, float] | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Ends of its horizontal bar, which are equal if it has none."""
        return self.band or (self.energy, self.energy)


class Style(NamedTuple):
    """Colour of a mark, as a number in the page's style sheet, and its SVG path."""

    colour: int
    shape: str


class Mark(NamedTuple):
    """A point with its position, the ends of its bars and its style."""

    point: Point
    x: float
    y: float
    low: float
    high: float
    left: float
    right: float
    style: Style
    on_front: bool


class Label(NamedTuple):
    """A label with its position; `anchor` is SVG's `text-anchor`, `line` the path of a line to its mark, or empty."""

    text: str
    x: float
    y: float
    anchor: str
    line: str = ""


class Tick(NamedTuple):
    """A labelled position on an axis."""

    position: float
    text: str


@dataclass(frozen=True)
class Plot:
    """Everything that the page draws, in units of the frame."""

    frame: Frame
    quality_name: str
    energy_name: str
    marks: list[Mark]
    labels: list[Label]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    front: str
    legend: list[tuple[str, Style]]


@dataclass(frozen=True)
class _Axis:
    """A linear or logarithmic axis that maps values in `low..high` to positions in `start..stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.stop - self.start), 2)

    def ticks(self) -> list[Tick]:
        decades = math.log10(self.high / self.low) if self.log else 0.0
        subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 3.0, 5.0)
        values = (
            LogLocator(subs=subs, numticks=20).tick_values(self.low, self.high)
            if decades > 0.5
            else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        )
        return [Tick(self(v), f"{v:g}") for v in map(float, values) if self.low <= v <= self.high]


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Returns the ranked points that no other point dominates in energy and quality, by increasing energy."""
    front: list[Point] = []
    for point in sorted((p for p in points if p.ranked), key=lambda p: (p.energy, p.quality, p.anchor)):
        if not front or point.quality < front[-1].quality:
            front.append(point)
    return front


def plot(points: Sequence[Point], quality_name: str, energy_name: str, frame: Frame = WIDE) -> Plot | None:
    """Lays out a plot; returns None if there are fewer than two points."""
    points = [p for p in points if p.energy > 0 and math.isfinite(p.quality)]
    if len(points) < 2:
        return None
    styles = {method: _style(i) for i, method in enumerate(sorted({p.method for p in points}))}
    front = pareto_front(points)
    x, y = _energy_axis(points, frame), _quality_axis(points, frame)
    marks = [
        Mark(
            p,
            x(p.energy),
            y(p.quality),
            y(max(p.quality - p.uncertainty, y.low)),
            y(min(p.quality + p.uncertainty, y.high)),
            x(p.bounds[0]),
            x(p.bounds[1]),
            styles[p.method],
            p in front,
        )
        for p in points
    ]
    corners = _staircase([(m.x, m.y) for p in front for m in marks if m.point is p], frame)
    path = "M" + "L".join(f"{x} {y}" for x, y in corners) if corners else ""
    labels = _labels(marks, corners, frame)
    return Plot(frame, quality_name, energy_name, marks, labels, x.ticks(), y.ticks(), path, list(styles.items()))


def _style(method: int) -> Style:
    """Returns the style of the n-th method: methods of one colour have different shapes, up to 36 methods."""
    return Style(method % _COLOURS, SHAPES[(method + method // _COLOURS) % len(SHAPES)])


def _energy_axis(points: Sequence[Point], frame: Frame) -> _Axis:
    low, high = min(p.bounds[0] for p in points), max(p.bounds[1] for p in points)
    pad = max(0.08 * math.log10(high / low), 0.15)
    return _Axis(low / 10**pad, high * 10**pad, frame.left, frame.right, log=True)


def _quality_axis(points: Sequence[Point], frame: Frame) -> _Axis:
    values = [p.quality for p in points]
    low, high = min(values), max(values)
    if low > 0 and high / low > 10:  # intervals that reach 0 or far beyond the points are cut off at the axes
        low = max(low / 2, min(p.quality - p.uncertainty for p in points))
        high = min(high * 2, max(p.quality + p.uncertainty for p in points))
        pad = 10 ** (0.08 * math.log10(high / low))
        return _Axis(low / pad, high * pad, frame.bottom, frame.top, log=True)
    span = high - low or 0.1 * abs(high) or 1.0
    low = max(low - span, min(p.quality - p.uncertainty for p in points))
    high = min(high + span / 2, max(p.quality + p.uncertainty for p in points))
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    start = low - pad if low - pad > 0 else min(0.0, *values)
    return _Axis(start, high + pad, frame.bottom, frame.top, log=False)


def _staircase(front: Sequence[tuple[float, float]], frame: Frame) -> list[tuple[float, float]]:
    """Returns the corners of the stepped line along the front; points above and right of it are dominated."""
    if not front:
        return []
    corners = [(front[0][0], float(frame.top)), front[0]]
    for (_, y), point in pairwise(front):
        corners += [(point[0], y), point]
    return [*corners, (float(frame.right), front[-1][1])]


def _labels(marks: Sequence[Mark], corners: Sequence[tuple[float, float]], frame: Frame) -> list[Label]:
    """Places labels near their marks, the front first; labels without room are omitted (the tooltip shows them)."""
    taken = [(m.x - 1, m.high, m.x + 1, m.low) for m in marks]
    taken += [(m.left, m.y - 1, m.right, m.y + 1) for m in marks if m.point.band]
    taken += [(min(a, c), min(b, d), max(a, c), max(b, d)) for (a, b), (c, d) in pairwise(corners)]
    labels: list[Label] = []
    texts: list[tuple[float, float, float, float]] = []
    lines: list[tuple[float, float]] = []  # points of the lines that lead to labels
    for mark in sorted(marks, key=lambda m: (not m.on_front, not m.point.ranked)):
        name = mark.point.label
        text = name if len(name) <= frame.longest else name[: frame.longest - 1] + "…"
        width = _CHARACTER * len(text)
        starts = {"start": 0.0, "end": -width, "middle": -width / 2}
        for dx, dy, anchor in (*_OFFSETS, *_ring_offsets()):
            x, y = mark.x + dx, mark.y + dy
            box = (x + starts[anchor], y - _LINE + 3, x + starts[anchor] + width, y + 3)
            inside = (
                box[0] >= frame.left + 2 and box[2] <= frame.right and box[1] >= frame.top and box[3] <= frame.bottom
            )
            others = [(m.x - 11, m.y - 11, m.x + 11, m.y + 11) for m in marks if m is not mark]  # keep off other marks
            points = [] if (dx, dy, anchor) in _OFFSETS else _leader(mark, box)
            crosses = any(_contains(text, p) for text in texts for p in points) or any(_contains(box, p) for p in lines)
            if inside and not crosses and not any(_overlap(box, other) for other in taken + others):
                taken.append(box)
                texts.append(box)
                lines += points
                line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (points[0], points[-1])) if points else ""
                labels.append(Label(text, round(x, 2), round(y, 2), anchor, line))
                break
    return labels


def _ring_offsets() -> Iterator[tuple[float, float, str]]:
    """Yields positions around a mark, the nearest first."""
    for radius in _RINGS:
        for angle in range(0, 360, 30):
            dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
            yield dx, dy + 4, "middle" if abs(dx) < radius / 2 else "start" if dx > 0 else "end"


def _leader(mark: Mark, box: tuple[float, float, float, float]) -> list[tuple[float, float]]:
    """Returns points of a line from the edge of a mark to the nearest point of its label."""
    x, y = min(max(mark.x, box[0]), box[2]), min(max(mark.y, box[1] + 2), box[3])
    length = math.hypot(x - mark.x, y - mark.y)
    steps = [7 / length + (1 - 7 / length) * i / 8 for i in range(9)]
    return [(mark.x + step * (x - mark.x), mark.y + step * (y - mark.y)) for step in steps]


def _contains(box: tuple[float, float, float, float], point: tuple[float, float]) -> bool:
    return box[0] < point[0] < box[2] and box[1] < point[1] < box[3]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
