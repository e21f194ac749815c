"""A layered drawing of a graph without cycles: from left to right, few crossings, straight long edges.

Sugiyama, Tagawa and Toda 1981: layers by longest path, long edges through invisible nodes, order by barycentres.
"""

from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_SWEEPS = 12
_TRACK = 22.0  # height that an edge takes where it passes a layer


class Box(NamedTuple):
    """A node's place: its left upper corner and its size."""

    x: float
    y: float
    width: float
    height: float


class Drawing(NamedTuple):
    """Boxes by node, and for each edge the points that it passes between its ends; all from (0, 0)."""

    boxes: dict[str, Box]
    ways: dict[tuple[str, str], list[tuple[float, float]]]
    width: float
    height: float


def draw(
    sizes: Mapping[str, tuple[float, float]],
    edges: Sequence[tuple[str, str]],
    label_widths: Mapping[tuple[str, str], float],
    row_gap: float = 22.0,
    column_gap: float = 80.0,
) -> Drawing:
    """Place nodes of the given sizes (width, height); edges go from left to right, each with room for its label.

    sizes: every node, in the order that breaks ties. label_widths: beside the right end of an edge.
    """
    layers = layers_of(list(sizes), edges)
    last = max(layers.values(), default=0)
    columns: list[list[str]] = [[node for node in sizes if layers[node] == at] for at in range(last + 1)]
    heights = {node: height for node, (_, height) in sizes.items()}
    steps: dict[tuple[str, str], list[str]] = {}
    for left, right in edges:
        # Edges out of one node share their way through the layers: one line that branches, instead of a sheaf.
        between = [f"{left} > {at}" for at in range(layers[left] + 1, layers[right])]
        for at, track in enumerate(between, layers[left] + 1):
            if track not in heights:
                heights[track] = _TRACK
                columns[at].append(track)
        steps[left, right] = [left, *between, right]
    segments = {pair for way in steps.values() for pair in zip(way, way[1:], strict=False)}
    neighbours = _Neighbours(segments)
    columns = _order(columns, neighbours)
    middles = _heights(columns, heights, neighbours, row_gap)
    widths = [max((sizes[node][0] for node in column if node in sizes), default=0.0) for column in columns]
    room = [0.0] * (last + 2)
    for (_, right), width in label_widths.items():
        room[layers[right]] = max(room[layers[right]], width)
    lefts, x = [], 0.0
    for at, width in enumerate(widths):
        x += column_gap + room[at] if at else 0.0
        lefts.append(x)
        x += width
    boxes = {
        # as wide as the column: a line out of a narrow box would run into its neighbours
        node: Box(lefts[layers[node]], middles[node] - height / 2, widths[layers[node]], height)
        for node, (_, height) in sizes.items()
    }
    ways: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (left, right), way in steps.items():
        ways[left, right] = []
        for at, track in enumerate(way[1:-1], layers[left] + 1):
            ways[left, right] += [(lefts[at], middles[track]), (lefts[at] + widths[at], middles[track])]
    bottom = max((middles[node] + heights[node] / 2 for node in heights), default=0.0)
    return Drawing(boxes, ways, x, bottom)


def layers_of(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The length of the longest way to each node, 0 for those that no edge leads to."""
    waits = dict.fromkeys(nodes, 0)
    after: dict[str, list[str]] = {}
    for left, right in edges:
        waits[right] += 1
        after.setdefault(left, []).append(right)
    layers = dict.fromkeys(nodes, 0)
    ready = [node for node in nodes if not waits[node]]
    done = 0
    while ready:
        node = ready.pop()
        done += 1
        for right in after.get(node, []):
            layers[right] = max(layers[right], layers[node] + 1)
            waits[right] -= 1
            if not waits[right]:
                ready.append(right)
    assert done == len(layers), "a cycle"
    return layers


class _Neighbours:
    """Who is joined with whom, by direction."""

    def __init__(self, segments: set[tuple[str, str]]) -> None:
        self.left: dict[str, list[str]] = {}
        self.right: dict[str, list[str]] = {}
        for left, right in sorted(segments):
            self.left.setdefault(right, []).append(left)
            self.right.setdefault(left, []).append(right)


def _order(columns: list[list[str]], neighbours: _Neighbours) -> list[list[str]]:
    """Each column sorted by the mean place of its neighbours, to and fro; the order with the fewest crossings."""
    best, fewest = columns, _crossings(columns, neighbours)
    current = columns
    for sweep in range(_SWEEPS):
        if not fewest:
            break
        forward = sweep % 2 == 0
        side = neighbours.left if forward else neighbours.right
        sorted_columns: list[list[str]] = []
        for column in current if forward else reversed(current):
            before = {node: at for at, node in enumerate(sorted_columns[-1])} if sorted_columns else {}
            here = {node: at for at, node in enumerate(column)}
            means = {
                node: sum(before[other] for other in side[node]) / len(side[node]) if side.get(node) else here[node]
                for node in column
            }
            sorted_columns.append(sorted(column, key=lambda node, means=means: means[node]))  # type: ignore[misc]
        current = sorted_columns if forward else sorted_columns[::-1]
        found = _crossings(current, neighbours)
        if found < fewest:
            best, fewest = current, found
    return best


def _crossings(columns: list[list[str]], neighbours: _Neighbours) -> int:
    """Pairs of edges between adjacent columns whose ends are in opposite order."""
    count = 0
    for left, right in zip(columns, columns[1:], strict=False):
        place = {node: at for at, node in enumerate(right)}
        seen: list[int] = []
        for node in left:
            ends = sorted(place[other] for other in neighbours.right.get(node, []))
            count += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return count


def _heights(
    columns: list[list[str]], heights: Mapping[str, float], neighbours: _Neighbours, gap: float
) -> dict[str, float]:
    """The middle of each node: as near to its neighbours' as the others in its column leave room."""
    middles: dict[str, float] = {}
    for column in columns:
        y = 0.0
        for node in column:
            middles[node] = y + heights[node] / 2
            y += heights[node] + gap
    for sweep in range(2 * _SWEEPS):
        for column in columns if sweep % 2 else columns[::-1]:
            wanted = []
            for node in column:
                # At the last, both sides: a node between two others lies between them.
                sides = [neighbours.left, neighbours.right] if sweep >= _SWEEPS else []
                sides = sides or [neighbours.left if sweep % 2 else neighbours.right]
                around = [middles[other] for side in sides for other in side.get(node, [])]
                wanted.append(sum(around) / len(around) if around else middles[node])
            middles |= dict(zip(column, _apart(wanted, [heights[node] for node in column], gap), strict=True))
    top = min((middles[node] - heights[node] / 2 for node in middles), default=0.0)
    return {node: middle - top for node, middle in middles.items()}


def _apart(wanted: list[float], heights: list[float], gap: float) -> list[float]:
    """The middles nearest to `wanted` (least squares) that keep the order and `gap` between the boxes.

    With what the boxes before it take subtracted, each must not be above the one before: isotonic regression, by
    pooling adjacent violators.
    """
    taken, offsets = 0.0, []
    for at, height in enumerate(heights):
        taken += (heights[at - 1] + height) / 2 + gap if at else 0.0
        offsets.append(taken)
    pools: list[tuple[float, int]] = []  # mean, size
    for target, offset in zip(wanted, offsets, strict=True):
        mean, size = target - offset, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    placed = [mean for mean, size in pools for _ in range(size)]
    return [place + offset for place, offset in zip(placed, offsets, strict=True)]
