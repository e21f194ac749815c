"""What each page shows: (template, context), read afresh at every request."""

from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry import records, reference
from baton.registry.history.lineage import ancestors
from baton.registry.history.names import first_names
from baton.registry.travel.card import card, flatten, measured
from baton.registry.ui import comparison, reading
from baton.registry.ui.reading import Problems
from baton.registry.ui.rendering import markdown
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

PAGE = 50
MOST_COMPARED = 8
Page = tuple[str, dict[str, Any]]


class NotFoundError(Exception):
    """There is no such thing; the message says what there is."""


def models(registry: "Registry", query: str, page: int) -> Page:
    """The models, or those whose name holds `query`; a reference or digest in it gives versions as well."""
    query = query.strip()
    problems = Problems()
    names = problems.attempt("the list of models", registry.models) or []
    hits = problems.attempt("the search", lambda: _hits(registry, names, query)) or []
    chosen = [name for name in names if query.lower() in name]
    shown, pager = _paged(chosen, page)
    lines = []
    for name in shown:
        aliases = reading.aliases(registry, name, problems)
        numbers = registry.numbers(name)
        (latest,) = reading.rows(registry, name, numbers[-1:], aliases)
        lines.append({"name": name, "count": len(numbers), "latest": latest, "aliases": aliases})
    context = {"lines": lines, "query": query, "hits": hits, "pager": pager, "problems": problems}
    return "models.html", {**context, "total": len(names)}


def model(registry: "Registry", name: str, page: int) -> Page:
    """One model: its aliases with their histories, and its versions, newest first."""
    numbers = _numbers(registry, name)
    problems = Problems()
    aliases = reading.alias_histories(registry, name, problems)
    meant = {alias.name: alias.to for alias in aliases if alias.to is not None}
    shown, pager = _paged(numbers[::-1], page)
    rows = reading.rows(registry, name, shown, meant)
    context = {"name": name, "aliases": aliases, "rows": rows, "pager": pager, "problems": problems}
    return "model.html", {**context, "count": len(numbers)}


def version(registry: "Registry", name: str, number: int) -> Page:
    """One version: all that its manifest says and what was said of it since."""
    if number not in _numbers(registry, name):
        raise NotFoundError(f"{name} has no version {number}.")
    problems = Problems()
    aliases = reading.aliases(registry, name, problems)
    (row,) = reading.rows(registry, name, [number], aliases)
    context: dict[str, Any] = {"name": name, "number": number, "row": row, "problems": problems}
    if row.note:
        problems.append(row.note)
    if row.is_deleted:
        record = problems.attempt("its record", lambda: reading.version_record(registry, name, number))
    else:
        record = row.record
    found = record and problems.attempt("its manifest", lambda: registry.manifest(record["digest"]))
    if not record or not found:
        return "version.html", {**context, "record": record, "manifest": None}
    this = Version(name, number, record["digest"], registry)
    said = problems.attempt("what was said of it", lambda: reading.said(registry, this.digest, problems)) or []
    return "version.html", {
        **context,
        "record": record,
        "manifest": found,
        "parents": problems.attempt("its parents", lambda: _parents(registry, found)) or [],
        "metrics": problems.attempt("its metrics", lambda: measured(found, said)) or [],
        "said": said,
        "total_bytes": sum(entry["size"] for entry in found["files"]),
        "facts": problems.attempt("its architecture", lambda: flatten(found["architecture"], ".")) or {},
        "card": problems.attempt("its model card", lambda: markdown(card(registry, this))),
    }


def lineage_svg(registry: "Registry", name: str, number: int) -> str:
    """The picture of a version's ancestors; raises UserError for damaged ones."""
    from baton.registry.history.graph import graph, to_svg

    if number not in _numbers(registry, name):
        raise NotFoundError(f"{name} has no version {number}.")
    digest = reading.version_record(registry, name, number)["digest"]
    return to_svg(graph(registry, Version(name, number, digest, registry)))


def compare(registry: "Registry", refs: list[str]) -> Page:
    """Versions side by side."""
    problems = Problems()
    # one field may hold several references, as a person types them
    wanted = list(dict.fromkeys(ref for text in refs for ref in text.replace(",", " ").split()))
    if len(wanted) > MOST_COMPARED:
        problems.append(f"{len(wanted)} versions were asked for; the first {MOST_COMPARED} are shown.")
    columns: list[dict[str, Any]] = []
    for ref in wanted[:MOST_COMPARED]:
        found = problems.attempt(ref, lambda r=ref: _column(registry, r, problems))  # type: ignore[misc]
        if found and found["ref"] not in [column["ref"] for column in columns]:
            columns.append(found)
    facts = [
        comparison.Line(key, None, [comparison.Cell(str(column["facts"][key])) for column in columns])
        for key in (columns[0]["facts"] if columns else ())
    ]
    return "compare.html", {
        "columns": columns,
        "facts": facts,
        "metrics": comparison.metric_lines([column["metrics"] for column in columns]),
        "recipes": comparison.differing_lines([column["recipe"] for column in columns]),
        "problems": problems,
    }


def _column(registry: "Registry", ref: str, problems: Problems) -> dict[str, Any]:
    found = registry.resolve(ref)
    manifest = found.manifest
    facts = {"kind": manifest["kind"], "licence": manifest["licence"] or "unknown", "digest": manifest_short(found)}
    facts["base"] = (manifest["base"] or "–").removeprefix("sha256:")[:12]
    metrics = comparison.metrics_of(manifest, reading.said(registry, found.digest, problems))
    named = {"ref": found.ref, "name": found.name, "number": found.number}
    return {**named, "facts": facts, "metrics": metrics, "recipe": manifest["recipe"]}


def manifest_short(version: Version) -> str:
    """The beginning of a version's digest."""
    return version.digest.removeprefix("sha256:")[:12]


def _numbers(registry: "Registry", name: str) -> list[int]:
    try:
        reference.check_name(name)
    except UserError as error:
        raise NotFoundError(str(error)) from error
    # with those that were deleted: they are shown as such
    numbers = sorted({*registry.all_numbers(name), *registry.deleted_numbers(name)})
    if not numbers:
        raise NotFoundError(f"{registry.location} has no model {name}.")
    return numbers


def _parents(registry: "Registry", manifest: dict[str, Any]) -> list[dict[str, Any]]:
    roles = ancestors(manifest)
    names = first_names(registry, roles.values())
    found = []
    for role, digest in roles.items():
        named = names.get(digest)
        parsed = reference.parse(named.ref) if named else None
        facts = {"role": role, "digest": digest, "ref": parsed, "is_base": digest == manifest["base"]}
        found.append({**facts, "is_deleted": bool(named and named.is_deleted)})
    return found


def _hits(registry: "Registry", names: list[str], query: str) -> list[Version]:
    """The versions that `query` names: by a reference, or by eight or more first digits of a digest."""
    digits = query.lower().removeprefix("sha256:")
    if len(digits) >= 8 and all(digit in "0123456789abcdef" for digit in digits):
        found = []
        for name in names:
            numbers = registry.numbers(name)
            stored = records.read_all(registry.store, records.versions_folder(name), numbers, "digest")
            for number, record in stored.items():
                if record["digest"].removeprefix("sha256:").startswith(digits):
                    found.append(Version(name, number, record["digest"], registry))
        return found[:PAGE]
    if reference.is_reference(query) and reference.parse(query).name in names:
        return [registry.resolve(query)]
    return []


def _paged(items: list[Any], page: int) -> tuple[list[Any], dict[str, int]]:
    pages = max(1, -(-len(items) // PAGE))
    page = min(max(page, 1), pages)
    first = (page - 1) * PAGE
    shown = items[first : first + PAGE]
    return shown, {"page": page, "pages": pages, "first": first + 1, "last": first + len(shown), "all": len(items)}
