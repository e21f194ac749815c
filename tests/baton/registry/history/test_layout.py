"""The layered drawing: nothing overlaps, edges go right, few cross."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.registry.history.layout import Box, Drawing, _apart, draw, layers_of

Edges = list[tuple[str, str]]


def overlap(one: Box, other: Box) -> bool:
    return (
        one.x < other.x + other.width
        and other.x < one.x + one.width
        and one.y < other.y + other.height - 1e-6
        and other.y < one.y + one.height - 1e-6
    )


def check(drawing: Drawing, edges: Edges) -> None:
    boxes = list(drawing.boxes.values())
    assert not any(overlap(one, other) for at, one in enumerate(boxes) for other in boxes[:at])
    for box in boxes:
        assert box.x >= 0 and box.y >= -1e-6
        assert box.x + box.width <= drawing.width + 1e-6 and box.y + box.height <= drawing.height + 1e-6
    for left, right in edges:
        xs = [drawing.boxes[left].x + drawing.boxes[left].width]
        xs += [x for x, _ in drawing.ways[left, right]] + [drawing.boxes[right].x]
        assert all(a <= b for a, b in pairwise(xs)), "an edge never turns back"
        for x, y in drawing.ways[left, right]:
            assert not any(b.x < x < b.x + b.width and b.y < y < b.y + b.height for b in boxes), "through a box"


def test_layers_are_longest_ways() -> None:
    edges = [("base", "sft"), ("sft", "reward"), ("base", "ppo"), ("sft", "ppo"), ("reward", "ppo")]
    expected = {"base": 0, "sft": 1, "reward": 2, "ppo": 3, "alone": 0}
    assert layers_of(["ppo", "reward", "alone", "sft", "base"], edges) == expected
    with pytest.raises(AssertionError, match="a cycle"):
        layers_of(["a", "b"], [("a", "b"), ("b", "a")])


def test_a_chain_is_a_straight_row_with_room_for_its_labels() -> None:
    edges = [("a", "b"), ("b", "c")]
    drawing = draw(dict.fromkeys("abc", (100.0, 50.0)), edges, {("a", "b"): 30.0, ("b", "c"): 70.0}, column_gap=20.0)
    assert [drawing.boxes[node] for node in "abc"] == [
        Box(0.0, 0.0, 100.0, 50.0),
        Box(150.0, 0.0, 100.0, 50.0),
        Box(340.0, 0.0, 100.0, 50.0),
    ]
    assert (drawing.width, drawing.height) == (440.0, 50.0)


def test_pairs_that_were_crossed_are_untangled() -> None:
    """Three pairs in opposite orders: as given, all three edges cross each other."""
    edges = [("a", "z"), ("b", "y"), ("c", "x")]
    drawing = draw(dict.fromkeys("abcxyz", (10.0, 10.0)), edges, {})
    for left, right in edges:
        assert drawing.boxes[left].y == pytest.approx(drawing.boxes[right].y)


def test_a_shared_base_lies_in_the_middle() -> None:
    children = [f"c{at}" for at in range(11)]
    edges = [("base", child) for child in children]
    drawing = draw(dict.fromkeys(["base", *children], (10.0, 10.0)), edges, {}, row_gap=5.0)
    check(drawing, edges)
    # 11 boxes of 10 with 10 gaps of 5: 160 high, the middle one at 80
    assert drawing.height == pytest.approx(160.0)
    assert drawing.boxes["base"].y + 5 == pytest.approx(80.0)


def test_edges_out_of_one_node_share_their_way() -> None:
    edges = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "c"), ("a", "d")]
    drawing = draw(dict.fromkeys("abcd", (10.0, 10.0)), edges, {})
    check(drawing, edges)
    assert drawing.ways["a", "d"][:2] == drawing.ways["a", "c"] and drawing.ways["a", "b"] == []


def test_boxes_are_moved_apart_as_little_as_possible() -> None:
    # both want to be at 10; 20 high with a gap of 2, they end 11 to either side
    assert _apart([10.0, 10.0], [20.0, 20.0], 2.0) == pytest.approx([-1.0, 21.0])
    assert _apart([0.0, 100.0, 100.0], [10.0, 10.0, 10.0], 0.0) == pytest.approx([0.0, 95.0, 105.0])
    assert _apart([], [], 1.0) == []


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_graph(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 14))
    nodes = [f"n{at}" for at in range(count)]
    pairs = [(left, right) for at, right in enumerate(nodes) for left in nodes[:at]]
    edges: Edges = data.draw(st.lists(st.sampled_from(pairs), unique=True, max_size=30)) if pairs else []
    order = data.draw(st.permutations(nodes))
    sizes = {node: (float(data.draw(st.integers(20, 300))), float(data.draw(st.integers(20, 200)))) for node in order}
    check(draw(sizes, edges, dict.fromkeys(edges, 40.0)), edges)
