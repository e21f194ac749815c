"""Licences: expressions, what a child inherits, and what an allow-list refuses."""

import re
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.history.licences import (
    UNKNOWN,
    check_allowed,
    conflicts,
    gather,
    is_allowed,
    licences_of,
    refuse,
    spelling,
)


@pytest.mark.parametrize(
    ("licence", "allowed", "expected"),
    [
        ("mit", ["MIT"], True),
        ("MIT", ["mit"], True),
        ("MIT", ["Apache-2.0"], False),
        ("MIT OR GPL-3.0-only", ["MIT"], True),
        ("GPL-3.0-only or mit", ["MIT"], True),
        ("MIT AND GPL-3.0-only", ["MIT"], False),
        ("MIT AND GPL-3.0-only", ["MIT", "gpl-3.0-only"], True),
        # AND binds more closely: MIT or (Apache-2.0 and BSD-3-Clause)
        ("MIT OR Apache-2.0 AND BSD-3-Clause", ["MIT"], True),
        ("MIT OR Apache-2.0 AND BSD-3-Clause", ["Apache-2.0"], False),
        ("(MIT OR Apache-2.0) AND BSD-3-Clause", ["MIT"], False),
        ("(MIT OR Apache-2.0) AND BSD-3-Clause", ["MIT", "BSD-3-Clause"], True),
        ("((MIT))", ["MIT"], True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", ["GPL-2.0-only"], False),
        ("GPL-2.0-only WITH Classpath-exception-2.0 OR MIT", ["MIT"], True),
        ("MIT OR GPL-2.0-only with classpath-exception-2.0 AND BSD-3-Clause", ["BSD-3-Clause"], False),
        ("gpl-2.0-only with classpath-exception-2.0", ["GPL-2.0-only WITH Classpath-exception-2.0"], True),
        # not SPDX's: compared as they are, capitals aside, and never taken apart
        ("Llama3.1", ["llama3.1"], True),
        ("ours OR MIT", ["MIT"], False),
        ("MIT OR", ["MIT"], False),
        (None, ["MIT"], False),
        ("", ["MIT"], False),
        (None, ["MIT", "unknown"], True),
        ("Unknown", ["unknown"], True),
        ("MIT", [], False),
        ("MIT OR " * 1000 + "MIT", ["MIT"], False),
        ("(" * 190 + "MIT" + ")" * 190, ["MIT"], True),
    ],
)
def test_is_allowed(licence: str | None, allowed: list[str], expected: bool) -> None:
    assert is_allowed(licence, allowed) is expected


def test_spelling() -> None:
    assert [spelling(text) for text in ("apache-2.0", " mit or cc0-1.0 ", "Llama3", None, "UNKNOWN")] == [
        "Apache-2.0",
        "MIT OR CC0-1.0",
        "Llama3",
        UNKNOWN,
        UNKNOWN,
    ]


def test_gather_joins_what_ancestors_gathered() -> None:
    parent = {"licences": {"models": ["Apache-2.0", "llama3"], "data": ["CC0-1.0"]}}
    base = {"licences": {"models": ["unknown"], "data": []}}
    data: list[Any] = [{"path": "a", "licence": "mit"}, {"path": "b", "licence": None}, {"path": "c", "licence": "MIT"}]
    assert gather("apache-2.0", [parent, base], data) == {
        "models": ["Apache-2.0", "llama3", "unknown"],
        "data": ["CC0-1.0", "MIT", "unknown"],
    }
    assert gather(None, [], []) == {"models": ["unknown"], "data": []}


def test_a_grandchild_lists_what_its_ancestors_state(registry: Registry, plant: Any) -> None:
    text = {"path": "text.jsonl", "use": "train", "licence": "cc-by-nc-4.0"}
    base = plant("team/base", licence="apache-2.0", data=[text])
    sft = plant("team/sft", "adapter", base, {"base": base}, data=[{"path": "d.jsonl", "use": "train"}], licence="mit")
    ppo = plant("team/ppo", "adapter", base, {"sft": sft}, licence="mit")
    expected = {"models": ["Apache-2.0", "MIT"], "data": ["CC-BY-NC-4.0", "unknown"]}
    assert ppo.manifest["licences"] == expected

    found = licences_of(registry, ppo.manifest)
    assert {holding.digest for holding in found.holdings} == {None, sft.digest, base.digest}
    assert conflicts(found, ["MIT", "Apache-2.0", "CC-BY-NC-4.0", "unknown"]) == []
    assert conflicts(found, ["mit", "apache-2.0"]) == [
        "data d.jsonl (train) of team/sft:1 states no licence",
        "data text.jsonl (train) of team/base:1 has cc-by-nc-4.0",
    ]


def test_refuse_names_the_source_and_what_to_do(registry: Registry, plant: Any) -> None:
    base = plant("team/base", licence="gpl-3.0-only")
    parts = {"licence": None, "data": [{"path": "new.jsonl", "use": "train", "licence": "ours"}], "parents": {}}
    found = licences_of(registry, parts | {"base": base.digest})
    with pytest.raises(UserError) as caught:
        refuse(found, ["MIT"])
    assert str(caught.value).splitlines() == [
        "licences outside the allowed ones (MIT):",
        "  the version itself states no licence",
        "  data new.jsonl (train) has ours",
        "  base team/base:1 has gpl-3.0-only",
        "Leave these out, or add their licence to allowed_licences if your use is permitted. Where none is stated, "
        "find out and state it: licence: in the recipe, on the data source, or --licence on publishing.",
    ]
    refuse(found, ["GPL-3.0-only", "ours", "unknown"])


def test_an_ancestor_is_named_once_and_by_digest_where_no_version_is_left(registry: Registry, plant: Any) -> None:
    base = plant("team/base", licence="ours")
    a = plant("team/a", "adapter", base, {"pretrain": base}, licence="mit")
    b = plant("team/b", "adapter", base, {"sft": a, "pretrain": base}, licence="mit")
    registry.store.delete("models/team/base/versions/0000001.json")
    assert conflicts(licences_of(registry, b.manifest), ["MIT"]) == [f"pretrain {base.digest} has ours"]


@pytest.mark.parametrize("entry", ["", " ", "MIT OR Apache-2.0", "mit and bsd-3-clause"])
def test_an_allow_list_has_one_licence_an_entry(entry: str) -> None:
    with pytest.raises(UserError, match=re.escape(repr(entry))):
        check_allowed(["MIT", entry])


def test_publishing_under_an_allow_list(filled: Registry, folders: Any) -> None:
    def publish(*allowed: str) -> Any:
        return filled.publish(
            folders.adapter,
            name="team/mine",
            kind="adapter",
            base=filled.resolve("team/base:1"),
            parents={"init": filled.resolve("team/adapter:1")},
            details={"licence": "mit", "data": [{"path": "d.jsonl", "use": "train", "licence": "cc0-1.0"}]},
            allowed_licences=list(allowed),
        )

    before = list(filled.store.walk(""))
    with pytest.raises(UserError, match="init team/adapter:1 states no licence"):
        publish("MIT", "CC0-1.0", "Apache-2.0")
    assert "team/mine" not in filled.models() and [e for e in filled.store.walk("models")] == [
        entry for entry in before if entry.path.startswith("models/")
    ]
    version = publish("MIT", "CC0-1.0", "Apache-2.0", "unknown")
    assert version.manifest["licences"] == {"models": ["Apache-2.0", "MIT", "unknown"], "data": ["CC0-1.0"]}
