"""The graph of a version's ancestors as a page: the picture, the metrics side by side, and who published what."""

from collections.abc import Iterable, Sequence

from baton.registry.history.graph import Graph, Node, number
from baton.registry.history.layout import layers_of
from baton.registry.history.svg import draw_svg, escape

_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;padding:0 1.5rem;max-width:1400px}
h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.1rem;margin-top:2rem}
.wide{overflow-x:auto}svg{display:block;max-width:100%;height:auto;min-width:min(100%,640px)}
table{border-collapse:collapse}
th,td{padding:.3rem .8rem;text-align:left;vertical-align:top;border-bottom:1px solid #8885}
td{max-width:36rem;overflow-wrap:anywhere}td.number{text-align:right;font-variant-numeric:tabular-nums}
td:last-child{white-space:nowrap}
tbody th{font-weight:500;min-width:9rem;max-width:24rem;overflow-wrap:anywhere}
thead th{overflow-wrap:anywhere;min-width:6rem}
.key span{display:inline-block;margin-right:1.4rem;color:#808080}
"""


def draw_page(graph: Graph, title: str) -> str:
    """See `graph.to_html`."""
    layers = layers_of([node.digest for node in graph.nodes], [(edge.parent, edge.child) for edge in graph.edges])
    nodes = sorted(graph.nodes, key=lambda node: layers[node.digest])  # as in the picture, from left to right
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<div class="wide">{draw_svg(graph, {})}</div>\n'
        '<p class="key"><span>thick border: the version itself</span><span>dashed line: only the base that its adapter '
        "is loaded on</span><span>outlined badge: an alias</span></p>\n"
        + _section("Versions", _versions(nodes))
        + _section("Metrics", _metrics(nodes))
        + "</body>\n</html>\n"
    )


def _section(heading: str, table: str) -> str:
    return f'<h2>{heading}</h2>\n<div class="wide">{table}</div>\n' if table else ""


def _versions(nodes: Sequence[Node]) -> str:
    rows = []
    for node in nodes:
        facts = [node.kind + (" (deleted)" if node.is_deleted else ""), ", ".join(node.aliases)]
        facts += [node.licence or "unknown", "; ".join(node.data) or "–", node.by or "–", node.time or "–"]
        rows.append(_row(node.name, [(fact, False) for fact in facts]))
    return _table(["version", "kind", "aliases", "licence", "data", "by", "time"], rows)


def _metrics(nodes: Sequence[Node]) -> str:
    keys = sorted({key for node in nodes for key, value in node.metrics.items() if not isinstance(value, (dict, list))})
    if not keys:
        return ""
    rows = []
    for key in keys:
        values = [(node.metrics.get(key), key in node.metrics) for node in nodes]
        rows.append(_row(key, [_value(value) if is_there else ("", False) for value, is_there in values]))
    return _table(["metric", *(node.name for node in nodes)], rows)


def _value(value: object) -> tuple[str, bool]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value), True
    return ("" if isinstance(value, (dict, list)) else str(value)), False


def _row(name: str, values: Iterable[tuple[str, bool]]) -> str:
    found = "".join(
        f'<td class="number">{escape(text)}</td>' if is_number else f"<td>{escape(text)}</td>"
        for text, is_number in values
    )
    return f'<tr><th scope="row">{escape(name)}</th>{found}</tr>'


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
