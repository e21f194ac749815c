"""Opening, resolving, aliases with history, verifying, lineage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry, Version
from baton.registry.catalogue import _span
from baton.registry.manifest import manifest_path
from baton.registry.stores import blob_path
from tests.baton.registry.conftest import Folders, flip, in_processes, overwrite, paths, remove


def test_opening(new_location: Callable[[str], str], store_kind: str) -> None:
    location = new_location(store_kind) + "/deep/new"
    with pytest.raises(UserError, match=f"there is no registry at {location}"):
        Registry(location)
    made = Registry(location, create=True)
    assert made.location == location
    assert paths(made) == ["registry.json"]
    identity = made.store.get("registry.json")
    Registry(location, create=True)
    assert made.store.get("registry.json") == identity and made.models() == []
    made.store.delete("registry.json")
    made.store.put_if_absent("photos/a.jpg", b"x")
    for create in (False, True):
        with pytest.raises(UserError, match="not a registry: it holds files but no registry.json"):
            Registry(location, create=create)


def test_opening_an_absent_or_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no registry"):
        Registry(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no registry"):
        Registry(tmp_path / "empty")
    Registry(tmp_path / "empty", create=True)


def test_opening_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    for create in (False, True):
        with pytest.raises(UserError, match="not a registry"):
            Registry(tmp_path / "photos", create=create)
        with pytest.raises(UserError, match="not a registry"):
            Registry(tmp_path / "photos" / "a.jpg", create=create)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "baton.registry/9"}'])
def test_a_damaged_or_newer_registry_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "registry.json").write_text(text)
    with pytest.raises(UserError, match="not a registry|this Baton reads"):
        Registry(tmp_path, create=True)


def test_resolving(filled: Registry) -> None:
    version = filled.resolve("team/base:1")
    assert (version.name, version.number, version.ref, version.kind) == (
        "team/base",
        1,
        "team/base:1",
        "base",
    )
    assert filled.models() == ["team/adapter", "team/base", "team/other", "team/reward", "team/value"]
    assert filled.versions("team/base") == [version]
    filled.promote("team/base:1", "main", "first")
    assert filled.resolve("team/base:main") == version
    for ref, message in (
        ("team/bose:1", "no model 'team/bose'; nearest: team/base"),
        ("team/base:2", "no version 2; versions: 1"),
        ("team/base:0", "no version 0"),
        ("team/base:mian", "no alias 'mian'; aliases: team/base:main"),
        ("team/other:main", "no alias 'main'; aliases: none"),
        ("team/base@sha256:" + "0" * 64, "no version of team/base has the digest"),
        (f"team/other@{version.digest}", "no version of team/other has the digest"),
    ):
        with pytest.raises(UserError, match=message):
            filled.resolve(ref)
    with pytest.raises(UserError, match="no version in"):
        filled.by_digest("sha256:" + "0" * 64)


def test_an_alias_keeps_its_history(filled: Registry, tmp_path: Path) -> None:
    second = publish_variant(filled, "mit")
    first_move = filled.promote("team/base:1", "prod", "the first", by="ann")
    assert first_move["previous"] is None and first_move["by"] == "ann"
    filled.promote(second.ref, "prod", "better", by="bob")
    filled.promote("team/base:1", "prod", "worse after all", by="ann")
    history = filled.alias_history("team/base", "prod")
    assert [(move["to"], move["previous"], move["reason"], move["by"]) for move in history] == [
        (1, None, "the first", "ann"),
        (2, 1, "better", "bob"),
        (1, 2, "worse after all", "ann"),
    ]
    assert set(history[0]) == {"to", "previous", "reason", "by", "time", "nonce"}
    assert filled.aliases("team/base") == {"prod": 1}
    filled.promote("team/base:prod", "prod", "again")
    assert len(filled.alias_history("team/base", "prod")) == 3
    assert filled.verify_all() == []
    for alias, reason, message in (("7", "x", "bad alias"), ("prod", " ", "needs a reason")):
        with pytest.raises(UserError, match=message):
            filled.promote("team/base:1", alias, reason)


def publish_variant(registry: Registry, licence: str) -> Version:
    """A second version of team/base, with the first's files and another licence."""
    from baton.registry.publish import _commit

    content = registry.resolve("team/base:1").manifest | {"licence": licence}
    return _commit(registry, "team/base", content)


def test_a_promoter_who_comes_too_late_is_told(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_variant(filled, "mit")
    late = Registry(filled.location)
    listed = late.store.list  # as it was before the other promoter came
    monkeypatch.setattr(late.store, "list", lambda folder: [] if "/aliases" in folder else listed(folder))
    filled.promote("team/base:1", "prod", "mine")
    with pytest.raises(UserError, match="someone moved team/base:prod meanwhile; look again"):
        late.promote("team/base:2", "prod", "no, mine")
    assert filled.aliases("team/base") == {"prod": 1}


def _promote_often(path: str, writer: int) -> None:
    registry = Registry(path)
    for number in range(8):
        try:
            registry.promote(f"team/base:{1 + (writer + number) % 2}", "prod", f"{writer}-{number}")
        except UserError as error:
            assert "look again" in str(error)


def test_promoters_at_once_leave_a_history_without_forks(filled: Registry) -> None:
    publish_variant(filled, "mit")
    in_processes(filled, _promote_often, [(filled.location, writer) for writer in range(4)])
    history = filled.alias_history("team/base", "prod")
    assert [move["previous"] for move in history] == [None, *(move["to"] for move in history[:-1])]
    assert filled.verify_all() == []


def test_every_flipped_bit_is_found(filled: Registry) -> None:
    filled.promote("team/base:1", "prod", "x")
    assert filled.verify_all() == []
    for path in paths(filled):
        if path == "registry.json":
            continue
        whole = filled.store.get(path)
        if path.startswith("models/"):  # records are small: cut them instead, a bit may be in free text
            overwrite(filled, path, whole[:-1])
        else:
            flip(filled, path)
        problems = filled.verify_all()
        assert problems and any(path in problem for problem in problems), path
        overwrite(filled, path, whole)
    assert filled.verify_all() == []


def test_verify_follows_base_and_parents(filled: Registry) -> None:
    base, value = filled.resolve("team/base:1"), filled.resolve("team/value:1")
    assert filled.verify(value) == []
    entry = next(e for e in base.manifest["files"] if e["path"] == "model.safetensors")
    blob = blob_path(entry["sha256"])
    flip(filled, blob)
    (problem,) = filled.verify(value)
    assert "model.safetensors" in problem and f"expected sha256:{entry['sha256']}, found sha256:" in problem
    assert filled.verify(filled.resolve("team/other:1")) == []
    remove(filled, blob)
    (problem,) = filled.verify(value)
    assert "is missing" in problem
    remove(filled, manifest_path(filled.resolve("team/adapter:1").digest))
    assert any("init of init of team/value:1" in problem for problem in filled.verify(value))


def test_verify_all_finds_gaps_and_strays(filled: Registry) -> None:
    publish_variant(filled, "mit")
    filled.promote("team/base:2", "prod", "x")
    versions = "models/team/base/versions"
    remove(filled, f"{versions}/0000001.json")
    overwrite(filled, f"{versions}/notes.txt", b"x")
    problems = "\n".join(filled.verify_all())
    assert "0000001.json is missing" in problems and "'notes.txt' is not a record" in problems
    remove(filled, f"{versions}/0000002.json")
    assert "prod, record 1: no version 2" in "\n".join(filled.verify_all())


def test_deep_verification_replays_the_probe(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from baton.registry import probe

    version = filled.resolve("team/reward:1")
    assert filled.verify(version, deep=True) == []
    outputs = probe.outputs
    monkeypatch.setattr(probe, "outputs", lambda model, p: [[x + 1 for x in row] for row in outputs(model, p)])
    (problem,) = filled.verify(version, deep=True)
    assert "from the probe by up to 1" in problem


def test_lineage(filled: Registry) -> None:
    tree = filled.lineage(filled.resolve("team/reward:1"))
    assert tree["ref"] == "team/reward:1" and tree["metrics"] == {"accuracy": 0.75}
    assert list(tree["parents"]) == ["base", "init"]
    sft = tree["parents"]["init"]
    # The base is also SFT's parent "pretrain", and shown once under that role.
    assert sft["ref"] == "team/adapter:1" and list(sft["parents"]) == ["pretrain"]
    assert sft["parents"]["pretrain"]["ref"] == "team/base:1"
    assert sft["parents"]["pretrain"]["parents"] == {}


def test_bases_and_parents_may_be_references(filled: Registry, folders: Folders) -> None:
    given: Any = {"name": "team/again", "kind": "adapter"}
    first = filled.publish(folders.adapter, base="team/base:1", parents={"init": "team/reward:1"}, **given)
    as_versions = {"init": filled.resolve("team/reward:1")}
    base = filled.resolve("team/base:1")
    assert filled.publish(folders.adapter, base=base, parents=as_versions, **given) == first
    with pytest.raises(UserError, match="details has licnce; expected build_key, code, data, licence"):
        filled.publish(folders.adapter, base=base, details={"licnce": "mit"}, **given)


def test_a_registry_of_an_earlier_baton_is_named(tmp_path: Path) -> None:
    (tmp_path / "registry.json").write_text('{"format":"baton.registry/1","id":"ab"}')
    with pytest.raises(UserError, match="made by an earlier Baton.*publish them in a new registry"):
        Registry(tmp_path, create=True)


def test_numbers_are_told_by_their_runs() -> None:
    assert [_span(numbers) for numbers in ([3], [1, 2, 3], [1, 3, 4, 9], [])] == ["3", "1 to 3", "1, 3 to 4, 9", ""]
    assert _span(list(range(1, 40, 2))) == "…, 25, 27, 29, 31, 33, 35, 37, 39"
