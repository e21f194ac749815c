"""Drawing a graph of versions: boxes with text that fits, in light and in dark, everything escaped."""

import html
from collections.abc import Mapping

from baton.registry.history.graph import Edge, Graph, Node, number, numbers_of
from baton.registry.history.layout import Box, Drawing, draw
from baton.registry.history.plain import cells, plain

# Widths of a character of the monospaced fonts below, in pixels; a little more than they are.
_BOLD, _PLAIN = 8.1, 7.0
_FONTS = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace"
_PAD, _LINE, _CHIP = 12.0, 17.0, 18.0
_MOST_CELLS = 38
_MOST_METRICS, _MOST_ALIASES = 3, 4
_MARGIN = 18.0

# kind: (light fill, light line, dark fill, dark line)
_COLOURS = {
    "base": ("#eaf1fb", "#3b6fb6", "#16243a", "#6ea3e8"),
    "adapter": ("#e5f5f1", "#1c7f6c", "#10302a", "#4fc0a8"),
    "reward": ("#fdf1dc", "#a86a05", "#37280d", "#e2a94a"),
    "value": ("#f3ecfb", "#7a4fb5", "#281c3b", "#b592ea"),
    "merged": ("#eaf5e3", "#4c7f2a", "#1d3012", "#8fc468"),
}
_INK = {  # class: (property, light, dark)
    "paper": ("fill", "#ffffff", "#0d1117"),
    "ink": ("fill", "#1b2027", "#e8edf3"),
    "faint": ("fill", "#57606b", "#9aa5b1"),
    "gone": ("fill", "#b3261e", "#ff8a80"),
    "line": ("stroke", "#7b8591", "#7d8894"),
    "head": ("fill", "#7b8591", "#7d8894"),
    "halo": ("stroke", "#ffffff", "#0d1117"),
}


def draw_svg(graph: Graph, links: Mapping[str, str]) -> str:
    """See `graph.to_svg`."""
    name = "g" + graph.subject[-12:]  # two pictures on one page must not share a style
    sizes = {node.digest: _size(node, sum(edge.child == node.digest for edge in graph.edges)) for node in graph.nodes}
    drawing = draw(
        dict(reversed(sizes.items())),  # ancestors first
        [(edge.parent, edge.child) for edge in graph.edges],
        {(edge.parent, edge.child): cells(_roles(edge)) * _PLAIN for edge in graph.edges},
    )
    width, height = drawing.width + 2 * _MARGIN, drawing.height + 2 * _MARGIN
    subject = next(node for node in graph.nodes if node.digest == graph.subject)
    boxes = [_node(node, drawing.boxes[node.digest], graph, links, name) for node in graph.nodes]
    shown = [_edge_lines(graph, drawing), *boxes]
    role = "group" if links else "img"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" id="{name}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="{role}" aria-labelledby="{name}-title {name}-desc">\n'
        f'<title id="{name}-title">Lineage of {escape(subject.name)}</title>\n'
        f'<desc id="{name}-desc">{escape(_description(graph))}</desc>\n'
        f"<style>{_style(name)}</style>\n"
        f'<rect class="paper" width="100%" height="100%"/>\n'
        f'<g transform="translate({_MARGIN:.0f} {_MARGIN:.0f})">\n' + "\n".join(shown) + "\n</g>\n</svg>\n"
    )


def escape(text: str) -> str:
    """For XML text and attributes: marks escaped; what XML forbids, and what turns the reading direction, replaced."""
    return html.escape(plain(text), quote=True)


def fit(text: str, most: int, keep_end: int = 0) -> str:
    """The text, or as much of it as `most` cells hold, with an ellipsis; its last `keep_end` characters stay."""
    if cells(text) <= most:
        return text
    end = text[-keep_end:] if keep_end else ""
    start = text[: len(text) - keep_end] if keep_end else text
    while start and cells(start) + 1 + cells(end) > most:
        start = start[:-1]
    return start + "…" + end


def _title(node: Node) -> str:
    if node.name == node.digest:
        return node.digest[:19] + "…"
    return fit(node.name, _MOST_CELLS, keep_end=min(8, len(node.name.rpartition(":")[2]) + 1))


def _chips(node: Node) -> list[tuple[str, str]]:
    """(class, text) of the badges of the second line: kind, and that it was deleted."""
    return [(f"chip k-{node.kind}", node.kind)] + ([("gone-chip", "deleted")] if node.is_deleted else [])


def _badges(node: Node) -> list[list[str]]:
    """The aliases, a list a line."""
    shown = [fit(alias, _MOST_CELLS - 4) for alias in node.aliases[:_MOST_ALIASES]]
    if len(node.aliases) > _MOST_ALIASES:
        shown.append(f"+{len(node.aliases) - _MOST_ALIASES}")
    lines: list[list[str]] = []
    for alias in shown:
        if not lines or sum(cells(text) + 3 for text in [*lines[-1], alias]) > _MOST_CELLS:
            lines.append([])
        lines[-1].append(alias)
    return lines


def _metrics(node: Node) -> list[str]:
    shown = []
    for key, value in list(numbers_of(node.metrics).items())[:_MOST_METRICS]:
        text = number(value)
        shown.append(f"{fit(key, _MOST_CELLS - 1 - cells(text))} {text}")
    return shown


def _licence(node: Node) -> str:
    return fit(node.licence or "licence unknown", _MOST_CELLS - sum(cells(text) + 3 for _, text in _chips(node)))


def _size(node: Node, num_parents: int) -> tuple[float, float]:
    second = sum(cells(text) * _PLAIN + 20 for _, text in _chips(node)) + cells(_licence(node)) * _PLAIN
    rows = [sum(cells(text) * _PLAIN + 20 for text in line) for line in _badges(node)]
    width = max([cells(_title(node)) * _BOLD, second, *rows, *(cells(text) * _PLAIN for text in _metrics(node)), 130.0])
    height = 2 * _LINE + (_CHIP + 6) * len(_badges(node)) + _LINE * len(_metrics(node)) + 2 * _PAD + 4
    return width + 2 * _PAD, max(height, num_parents * 16.0 + 10)


def _node(node: Node, box: Box, graph: Graph, links: Mapping[str, str], name: str) -> str:
    is_subject = node.digest == graph.subject
    classes = f"box k-{node.kind if node.kind in _COLOURS else 'base'}"
    classes += " subject" if is_subject else ""
    classes += " deleted" if node.is_deleted else ""
    x, y = box.x + _PAD, box.y + _PAD + 12
    clip = f"{name}-{node.digest[-12:]}"
    parts = [
        f"<title>{escape(_details(node))}</title>",
        f'<rect class="{classes}" x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
        'rx="9"/>',
        # The widths are estimates: with an unusual font, text ends at its box.
        f'<clipPath id="{clip}"><rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width - 4:.1f}" '
        f'height="{box.height:.1f}"/></clipPath><g clip-path="url(#{clip})">',
        f'<text class="ink name" x="{x:.1f}" y="{y:.1f}">{escape(_title(node))}</text>',
    ]
    y += _LINE + 5
    for style, text in _chips(node):
        parts.append(_chip(x, y, text, style, "gone" if "gone-chip" in style else "ink"))
        x += cells(text) * _PLAIN + 20
    parts.append(f'<text class="faint" x="{x:.1f}" y="{y:.1f}">{escape(_licence(node))}</text>')
    for line in _badges(node):
        x, y = box.x + _PAD, y + _CHIP + 6
        for alias in line:
            parts.append(_chip(x, y, alias, "alias", "ink"))
            x += cells(alias) * _PLAIN + 20
    y += 3
    for text in _metrics(node):
        y += _LINE
        parts.append(f'<text class="faint" x="{box.x + _PAD:.1f}" y="{y:.1f}">{escape(text)}</text>')
    parts.append("</g>")
    drawn = "<g>" + "".join(parts) + "</g>"
    if node.digest in links:
        return f'<a href="{escape(links[node.digest])}">{drawn}</a>'
    return drawn


def _chip(x: float, y: float, text: str, shape: str, ink: str) -> str:
    width = cells(text) * _PLAIN + 12
    return (
        f'<rect class="{shape}" x="{x:.1f}" y="{y - 13:.1f}" width="{width:.1f}" height="{_CHIP:.0f}" rx="9"/>'
        f'<text class="{ink} small" x="{x + width / 2:.1f}" y="{y:.1f}" '
        f'text-anchor="middle">{escape(text)}</text>'
    )


def _edge_lines(graph: Graph, drawing: Drawing) -> str:
    """All edges, below the boxes; each ends at a place of its own, so that no two roles lie on each other."""
    lines, labels = [], []
    for child in dict.fromkeys(edge.child for edge in graph.edges):
        edges = [edge for edge in graph.edges if edge.child == child]
        origin = {edge: _origin(edge, drawing) for edge in edges}
        edges.sort(key=lambda edge: origin[edge][-1][1])  # noqa: B023 - used at once
        box = drawing.boxes[child]
        step = min(26.0, (box.height - 8) / len(edges))
        for at, edge in enumerate(edges):
            end = (box.x - 7, box.y + box.height / 2 + (at - (len(edges) - 1) / 2) * step)
            dashed = " dashed" if edge.roles == ("base",) else ""
            x, y = end
            turn = (x - cells(_roles(edge)) * _PLAIN - 8, y)  # straight below its role
            lines.append(f'<path class="line{dashed}" d="{_path([*origin[edge], turn])}L{x:.1f} {y:.1f}"/>')
            lines.append(f'<path class="head" d="M{x:.1f} {y - 4:.1f}L{x + 7:.1f} {y:.1f}L{x:.1f} {y + 4:.1f}Z"/>')
            labels.append(
                f'<text class="faint halo small" x="{x - 4:.1f}" y="{y - 4:.1f}" text-anchor="end">'
                f"{escape(_roles(edge))}</text>"
            )
    return "\n".join([*lines, *labels])


def _origin(edge: Edge, drawing: Drawing) -> list[tuple[float, float]]:
    box = drawing.boxes[edge.parent]
    return [(box.x + box.width, box.y + box.height / 2), *drawing.ways[edge.parent, edge.child]]


def _path(points: list[tuple[float, float]]) -> str:
    """Smooth between columns, straight where a long edge passes one."""
    (x, y), *rest = points
    text = f"M{x:.1f} {y:.1f}"
    for to_x, to_y in rest:
        bend = min(60.0, abs(to_x - x) / 2)
        text += f"C{x + bend:.1f} {y:.1f} {to_x - bend:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
        x, y = to_x, to_y
    return text


def _roles(edge: Edge) -> str:
    return fit(", ".join(edge.roles), 24)


def _details(node: Node) -> str:
    lines = [node.name, f"{node.kind}, {node.licence or 'licence unknown'}", node.digest]
    if node.aliases:
        lines.append("aliases: " + ", ".join(node.aliases))
    if node.by or node.time:
        lines.append(f"published by {node.by} at {node.time}")
    # escape() shows a line break as damage
    return "; ".join([*lines, *(f"data {line}" for line in node.data)])


def _description(graph: Graph) -> str:
    names = {node.digest: node.name for node in graph.nodes}
    made = [f"{names[e.child]} was made from {names[e.parent]} ({', '.join(e.roles)})" for e in graph.edges]
    return "; ".join(made) or f"{names[graph.subject]} has no ancestors"


def _style(name: str) -> str:
    """Every rule is bound to this picture; the second half applies where the reader's system is dark."""
    rules = [
        f"#{name}{{color-scheme:light dark}}#{name} text{{font:12px {_FONTS}}}",
        f"#{name} .name{{font-size:13px;font-weight:700}}",
        f"#{name} .small{{font-size:11px}}",
        f"#{name} .box{{stroke-width:1.3}}#{name} .subject{{stroke-width:3}}#{name} .deleted{{stroke-dasharray:5 4}}",
        f"#{name} .line{{fill:none;stroke-width:1.5}}#{name} .dashed{{stroke-dasharray:5 4}}",
        f"#{name} .halo{{paint-order:stroke;stroke-width:4px;stroke-linejoin:round}}",
        f"#{name} .alias{{fill:none;stroke-width:1.2}}#{name} .gone-chip{{fill:none}}",
    ]
    for dark in (False, True):
        half = [f"#{name} .{style}{{{kind}:{colours[dark]}}}" for style, (kind, *colours) in _INK.items()]
        for kind, colours in _COLOURS.items():
            fill, line = colours[2:] if dark else colours[:2]
            half.append(f"#{name} .box.k-{kind}{{fill:{fill};stroke:{line}}}")
            half.append(f"#{name} .chip.k-{kind}{{fill:{line};fill-opacity:.25}}")
        half.append(f"#{name} .alias{{stroke:{_INK['ink'][1 + dark]}}}")
        half.append(f"#{name} .gone-chip{{stroke:{_INK['gone'][1 + dark]}}}")
        rules += ["@media (prefers-color-scheme:dark){", *half, "}"] if dark else half
    return "".join(rules)
