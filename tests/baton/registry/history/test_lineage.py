"""Lineage and children: nested, each ancestor once, named by what is left of it."""

from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry, records
from baton.registry.history.children import children, survey
from baton.registry.history.lineage import lineage
from baton.registry.history.names import aliases_of, all_names, first_names
from baton.registry.manifest import manifest_path


@pytest.fixture
def chain(plant: Any) -> dict[str, Any]:
    """base -> sft -> reward, and ppo of sft and reward; other stands alone."""
    base = plant("team/base", licence="mit", metrics={"loss": 2.5})
    sft = plant("team/sft", "adapter", base, {"pretrain": base})
    reward = plant("team/reward", "reward", base, {"sft": sft})
    ppo = plant("team/ppo", "adapter", base, {"sft": sft, "reward": reward})
    return {"base": base, "sft": sft, "reward": reward, "ppo": ppo, "other": plant("team/other", licence="cc0-1.0")}


def delete(registry: Registry, name: str, number: int) -> None:
    folder = records.tombstones_folder(name)
    assert records.write(registry.store, folder, number, {"why": "bad data", "by": "ada", "time": "2026-02-01"})


def test_lineage_shows_an_ancestor_once(registry: Registry, chain: dict[str, Any]) -> None:
    tree = lineage(registry, chain["ppo"])
    assert tree["ref"] == "team/ppo:1" and tree["by"] == "ada" and tree["time"] == "2026-01-01T00:00:00Z"
    # a manifest's parents are in alphabetical order
    assert list(tree["parents"]) == ["base", "reward", "sft"]
    base, reward, sft = tree["parents"].values()
    assert not base["is_above"] and base["metrics"] == {"loss": 2.5} and base["licence"] == "mit"
    assert list(reward["parents"]) == ["base", "sft"]
    assert reward["parents"]["base"]["is_above"]
    assert list(reward["parents"]["sft"]["parents"]) == ["pretrain"], "the base is the pretrain parent already"
    assert sft["is_above"] and sft["parents"] == {} and sft["ref"] == "team/sft:1"
    assert tree["licences"] == {"models": ["MIT", "unknown"], "data": []}


def test_lineage_names_the_version_asked_for_and_deleted_ancestors(
    registry: Registry, chain: dict[str, Any], plant: Any
) -> None:
    again = plant("aaa/copy", licence="mit", metrics={"loss": 2.5})
    assert again.digest == chain["base"].digest
    assert lineage(registry, chain["base"])["ref"] == "team/base:1"
    assert lineage(registry, chain["sft"])["parents"]["pretrain"]["ref"] == "aaa/copy:1", "the first by name"
    delete(registry, "aaa/copy", 1)
    assert lineage(registry, chain["sft"])["parents"]["pretrain"]["ref"] == "team/base:1"
    delete(registry, "team/base", 1)
    (parent,) = lineage(registry, chain["sft"])["parents"].values()
    assert (parent["ref"], parent["is_deleted"]) == ("aaa/copy:1", True)
    assert first_names(registry, [chain["base"].digest])[chain["base"].digest].is_deleted


def test_a_base_is_kept_apart_from_a_parent_called_base(registry: Registry, plant: Any) -> None:
    first, second = plant("team/a", licence="mit"), plant("team/b", licence="cc0-1.0")
    child = plant("team/c", "adapter", first, {"base": second})
    parents = lineage(registry, child)["parents"]
    assert {role: node["ref"] for role, node in parents.items()} == {
        "base (loaded on)": "team/a:1",
        "base": "team/b:1",
    }


def test_a_long_chain_of_pairs_is_not_shown_twice_over(registry: Registry, plant: Any) -> None:
    """Every version has its predecessor twice: shown in full each time, 2^40 nodes."""
    version = plant("team/m", licence="mit")
    for _ in range(40):
        version = plant("team/m", "merged", None, {"a": version, "b": version})
    node, length = lineage(registry, version), 0
    while node["parents"]:
        node, length = node["parents"]["a"], length + 1
    assert length == 40


def test_children_at_any_depth(registry: Registry, chain: dict[str, Any]) -> None:
    registry.promote("team/ppo:1", "prod", "x")
    found = {child.ref: child for child in children(registry, chain["base"])}
    assert {ref: (child.depth, child.roles) for ref, child in found.items()} == {
        "team/ppo:1": (1, ("base", "reward", "sft")),
        "team/reward:1": (1, ("base", "sft")),
        "team/sft:1": (1, ("base", "pretrain")),
    }
    assert found["team/ppo:1"].aliases == ("team/ppo:prod",) and found["team/sft:1"].aliases == ()
    assert [child.ref for child in children(registry, chain["sft"])] == ["team/ppo:1", "team/reward:1"]
    assert children(registry, chain["ppo"]) == [] == children(registry, chain["other"])


def test_children_of_children_and_copies(registry: Registry, plant: Any) -> None:
    a = plant("team/a", licence="mit")
    b = plant("team/b", "merged", None, {"init": a})
    c = plant("team/c", "merged", None, {"init": b})
    assert plant("team/copy", "merged", None, {"init": b}).digest == c.digest
    delete(registry, "team/b", 1)
    first, second = children(registry, a)
    assert (first.ref, first.depth, first.is_deleted) == ("team/b:1", 1, True)
    assert (second.refs, second.depth, second.is_deleted) == (("team/c:1", "team/copy:1"), 2, False)
    delete(registry, "team/c", 1)
    assert children(registry, a)[1].ref == "team/copy:1", "a version that is left comes first"


def test_damage_elsewhere_hides_no_child(registry: Registry, chain: dict[str, Any]) -> None:
    registry.store.delete(manifest_path(chain["other"].digest))
    found = survey(registry, chain["base"])
    assert len(found.children) == 3 and len(found.unreadable) == 1
    assert manifest_path(chain["other"].digest) in found.unreadable[0] and "is missing" in found.unreadable[0]
    with pytest.raises(UserError, match="is missing"):
        children(registry, chain["base"])


def test_names_and_aliases(registry: Registry, chain: dict[str, Any]) -> None:
    registry.promote("team/base:1", "main", "x")
    registry.promote("team/base:1", "best", "x")
    assert aliases_of(registry, ["team/base:1", "team/sft:1"]) == {"team/base:1": ["best", "main"], "team/sft:1": []}
    names = all_names(registry)
    assert [named.ref for named in names[chain["ppo"].digest]] == ["team/ppo:1"] and len(names) == 5
