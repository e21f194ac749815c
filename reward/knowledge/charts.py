"""The report's plots as SVG drawn with the page's own colours, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from reward.knowledge.evenly import evenly
from reward.knowledge.markup import Markup, element

WIDTH, HEIGHT = 520.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 16.0, 14.0, 44.0
MOST_POINTS = 1500
"""A scatter shows at most so many of a group, evenly taken."""

Range = tuple[float, float]


class Group(NamedTuple):
    """Values drawn in one colour: `style` is a class of the page's style sheet (one, two, three)."""

    name: str
    style: str
    xs: Sequence[float]
    ys: Sequence[float]


class Row(NamedTuple):
    """One line of a chart of shares or changes."""

    name: str
    value: float
    low: float
    high: float
    note: str


class Plane:
    """Two linear axes, and what is drawn between them."""

    def __init__(self, label: str, xs: Range, ys: Range, titles: tuple[str, str], percent: str = "") -> None:
        """label: what a reader who cannot see it is told; percent: "x", "y" or "xy", the axes shown in percent."""
        self._label, self._xs, self._ys = label, xs, ys
        self._parts: list[Markup] = []
        self._axes(titles, percent)

    def x(self, value: float) -> float:
        """Pixels from the left, kept within the plane."""
        return LEFT + _part(value, self._xs) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top, kept within the plane."""
        return HEIGHT - BOTTOM - _part(value, self._ys) * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """A line through points."""
        shown = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self._parts.append(element("polyline", {"points": shown, "class": f"line {style}"}))

    def dot(self, x: float, y: float, style: str, radius: float = 3.5) -> None:
        """A point."""
        self._parts.append(element("circle", {"cx": self.x(x), "cy": self.y(y), "r": radius, "class": style}))

    def bar(self, left: float, right: float, top: float, style: str, title: str = "") -> None:
        """A bar from the bottom to `top`, with a hint for the pointer."""
        width = max(self.x(right) - self.x(left) - 1, 0.5)
        size = {"x": self.x(left) + 0.5, "y": self.y(top), "width": width, "height": self.y(self._ys[0]) - self.y(top)}
        hint = [element("title", {}, title)] if title else []
        self._parts.append(element("rect", {**size, "class": f"bar {style}"}, *hint))

    def text(self, x: float, y: float, words: str, anchor: str = "start") -> None:
        """Words at a point."""
        place: dict[str, str | float] = {"x": self.x(x), "y": self.y(y), "text-anchor": anchor}
        self._parts.append(element("text", place, words))

    def svg(self) -> Markup:
        """The whole drawing."""
        return _svg(self._label, WIDTH, HEIGHT, self._parts)

    def _axes(self, titles: tuple[str, str], percent: str) -> None:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for tick in ticks(self._ys):
            at = self.y(tick)
            self._parts.append(element("line", {"x1": LEFT, "x2": right, "y1": at, "y2": at, "class": "grid"}))
            place: dict[str, str | float] = {"x": LEFT - 8, "y": at + 4, "text-anchor": "end"}
            self._parts.append(element("text", place, _tick_text(tick, "y" in percent)))
        for tick in ticks(self._xs, 6):
            place = {"x": self.x(tick), "y": bottom + 18, "text-anchor": "middle"}
            self._parts.append(element("text", place, _tick_text(tick, "x" in percent)))
        self._parts.append(element("line", {"x1": LEFT, "x2": right, "y1": bottom, "y2": bottom, "class": "axis"}))
        place = {"x": (LEFT + right) / 2, "y": HEIGHT - 6, "text-anchor": "middle", "class": "title"}
        self._parts.append(element("text", place, titles[0]))
        middle = (TOP + bottom) / 2
        turned: dict[str, str | float] = {"transform": f"translate(13 {middle:.0f}) rotate(-90)"}
        self._parts.append(element("text", {**turned, "text-anchor": "middle", "class": "title"}, titles[1]))


def histogram(label: str, groups: Sequence[tuple[str, str, Sequence[float]]], title: str, num_bins: int = 30) -> Markup:
    """Shares of each group's (name, style, values) by value, as outlines over one another."""
    everything = [value for _, _, values in groups for value in values]
    low, high = padded((min(everything), max(everything)))
    width = (high - low) / num_bins
    shares = []
    for _, _, values in groups:
        counts = [0] * num_bins
        for value in values:
            counts[min(int((value - low) / width), num_bins - 1)] += 1
        shares.append([count / len(values) for count in counts])
    most = max(max(found) for found in shares)
    plane = Plane(label, (low, high), (0, most * 1.08), (title, "share"), percent="y")
    for (_, style, _), found in zip(groups, shares, strict=True):
        steps = [(low, 0.0)]
        for at, height in enumerate(found):
            steps += [(low + at * width, height), (low + (at + 1) * width, height)]
        plane.line([*steps, (high, 0.0)], style)
    return plane.svg()


def scatter(label: str, groups: Sequence[Group], titles: tuple[str, str], slope: tuple[float, float, float]) -> Markup:
    """Points of each group, and the line of `slope` through a point: (slope, x, y)."""
    xs = padded(trimmed([x for group in groups for x in group.xs]))
    ys = padded(trimmed([y for group in groups for y in group.ys]))
    plane = Plane(label, (max(xs[0], 0.0), xs[1]), ys, titles)
    for group in groups:
        for x, y in evenly(list(zip(group.xs, group.ys, strict=True)), MOST_POINTS):
            plane.dot(x, y, f"dot {group.style}", 2.2)
    steepness, x, y = slope
    ends = _clipped(steepness, x, y, (max(xs[0], 0.0), xs[1]), ys)
    if len(ends) == 2:
        plane.line(ends, "ink")
    return plane.svg()


def rows_chart(
    label: str, rows: Sequence[Row], bounds: Range, level: tuple[float, str], percent: bool = True
) -> Markup:
    """A dot with its interval for each row, and a level to compare with (value, its name), dashed."""
    name_width, note_width, line, top = 168.0, 118.0, 30.0, 26.0
    height, width = top + line * len(rows) + 26, 620.0
    right = width - note_width

    def x(value: float) -> float:
        return name_width + _part(value, bounds) * (right - name_width)

    bottom, parts = top + line * len(rows), []
    for tick in ticks(bounds):
        parts.append(element("line", {"x1": x(tick), "x2": x(tick), "y1": top, "y2": bottom, "class": "grid"}))
        place: dict[str, str | float] = {"x": x(tick), "y": bottom + 18, "text-anchor": "middle"}
        parts.append(element("text", place, _tick_text(tick, percent)))
    value, name = level
    parts.append(element("line", {"x1": x(value), "x2": x(value), "y1": top - 4, "y2": bottom, "class": "level"}))
    parts.append(element("text", {"x": x(value), "y": 14, "text-anchor": "middle", "class": "title"}, name))
    for at, row in enumerate(rows):
        middle = top + line * (at + 0.5)
        place = {"x": name_width - 12, "y": middle + 4, "text-anchor": "end", "class": "name"}
        parts.append(element("text", place, element("title", {}, row.name), shortened(row.name, 22)))
        ends: dict[str, str | float] = {
            "x1": x(row.low),
            "x2": x(row.high),
            "y1": middle,
            "y2": middle,
            "class": "interval",
        }
        parts.append(element("line", ends))
        parts.append(element("circle", {"cx": x(row.value), "cy": middle, "r": 4.5, "class": "mark"}))
        parts.append(element("text", {"x": right + 12, "y": middle + 4}, row.note))
    return _svg(label, width, height, parts)


def ticks(bounds: Range, count: int = 5) -> list[float]:
    """Some `count` round numbers within bounds."""
    span = bounds[1] - bounds[0]
    rough = span / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(bounds[0] / step - 1e-9)
    last = math.floor(bounds[1] / step + 1e-9)
    return [round(number * step, 12) + 0.0 for number in range(first, last + 1)]


def padded(bounds: Range, by: float = 0.04) -> Range:
    """Bounds with some room at either end, never empty."""
    span = bounds[1] - bounds[0] or 1.0
    return bounds[0] - by * span, bounds[1] + by * span


def shortened(text: str, most: int) -> str:
    """A long path by its last part, and what is still too long by its beginning."""
    if len(text) > most:
        text = text.rpartition("/")[2] or text
    return text if len(text) <= most else f"{text[: most - 1]}…"


def trimmed(values: Sequence[float]) -> Range:
    """All but the outermost half per cent at either end: one long reply must not flatten the rest."""
    ordered = sorted(values)
    cut = len(ordered) // 200
    return ordered[cut], ordered[-1 - cut]


def _clipped(slope: float, x: float, y: float, xs: Range, ys: Range) -> list[tuple[float, float]]:
    """The ends of a line within the plane, 40 steps along it."""
    grid = [xs[0] + (xs[1] - xs[0]) * at / 40 for at in range(41)]
    inside = [(at, y + slope * (at - x)) for at in grid if ys[0] <= y + slope * (at - x) <= ys[1]]
    return [inside[0], inside[-1]] if len(inside) > 1 else []


def _part(value: float, bounds: Range) -> float:
    return min(max((value - bounds[0]) / (bounds[1] - bounds[0]), 0.0), 1.0)


def _tick_text(value: float, percent: bool) -> str:
    return f"{100 * value:.3g}%" if percent else f"{value:.4g}"


def _svg(label: str, width: float, height: float, parts: Sequence[Markup]) -> Markup:
    size: dict[str, str | float] = {"viewBox": f"0 0 {width:.0f} {height:.0f}", "role": "img", "aria-label": label}
    return element("svg", size, *parts)
