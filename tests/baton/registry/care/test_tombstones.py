"""Deleting: the number stays taken, whoever asks is told why, descendants keep working."""

from typing import Any

import pytest

from baton.errors import UserError
from baton.models import base_folder
from baton.registry import Registry, records
from baton.registry.care import tombstones
from baton.registry.care.gc import collect
from baton.registry.care.repair import fsck
from baton.registry.stores import Store
from baton.registry.trust import policy, promotion
from tests.baton.registry.care import small_models
from tests.baton.registry.conftest import remove


def test_a_deleted_number_is_never_given_again(registry: Registry) -> None:
    first = small_models.publish(registry, "team/base", {"a": b"1"})
    second = small_models.publish(registry, "team/base", {"a": b"2"})
    deletion = tombstones.delete(registry, "team/base:2", "leaks names", "ann")
    assert (deletion.ref, deletion.digest, deletion.by) == ("team/base:2", second.digest, "ann")
    with pytest.raises(UserError, match="team/base:2 was deleted by ann: leaks names. Versions left: 1"):
        registry.resolve("team/base:2")
    with pytest.raises(UserError, match="team/base:2 was deleted by ann"):
        registry.resolve(f"team/base@{second.digest}")
    with pytest.raises(UserError, match="was deleted by ann"):
        tombstones.delete(registry, "team/base:2", "again")
    again = small_models.publish(registry, "team/base", {"a": b"2"})
    assert (again.number, again.digest) == (3, second.digest)
    assert registry.numbers("team/base") == [1, 3] and registry.all_numbers("team/base") == [1, 2, 3]
    assert collect(registry, 0).deleted == []
    assert fsck(registry).problems == [] and registry.versions("team/base") == [first, again]


def test_it_says_what_descends_from_it(registry: Registry) -> None:
    base = small_models.publish(registry, "team/base", {"a": b"1"})
    same = small_models.publish(registry, "other/base", {"a": b"1"})
    sft = small_models.publish(registry, "team/sft", {"a": b"2"}, base)
    small_models.publish(registry, "team/ppo", {"a": b"3"}, base, {"init": sft})
    small_models.publish(registry, "team/other", {"a": b"4"})
    assert same.digest == base.digest
    assert tombstones.delete(registry, sft.ref, "x").descendants == ["team/ppo:1"]
    # the deleted one in between does not hide what was made of it
    assert tombstones.delete(registry, base.ref, "x").descendants == ["other/base:1", "team/ppo:1"]


@pytest.mark.parametrize("why", ["", "  "])
def test_a_deletion_needs_a_reason(registry: Registry, why: str) -> None:
    small_models.publish(registry, "team/base", {"a": b"1"})
    with pytest.raises(UserError, match="needs a reason"):
        tombstones.delete(registry, "team/base:1", why)
    assert registry.numbers("team/base") == [1]


def test_a_promotion_that_comes_in_between_wins(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    small_models.publish(registry, "team/base", {"a": b"1"})
    write = tombstones.records.write

    def promoted_just_before(*arguments):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(tombstones.records, "write", write)
        registry.promote("team/base:1", "prod", "quick")
        return write(*arguments)

    monkeypatch.setattr(tombstones.records, "write", promoted_just_before)
    with pytest.raises(UserError, match="is what team/base:prod means now.*baton promote team/base:N prod"):
        tombstones.delete(registry, "team/base:1", "x")
    assert registry.resolve("team/base:prod").number == 1


def test_of_a_deletion_and_a_promotion_at_once_one_takes_back_its_own(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole deletion lies between the promotion's look at the version and its record."""
    small_models.publish(registry, "team/base", {"a": b"1"})
    small_models.publish(registry, "team/base", {"a": b"2"})
    small_models.publish(registry, "team/base", {"a": b"3"})
    registry.promote("team/base:1", "prod", "x")
    registry.promote("team/base:3", "prod", "x")

    def delete_before(step: str, *refs: str) -> None:
        pending = list(refs)

        def reached(command: str, name: str) -> None:
            while (command, name) == ("promote", step) and pending:
                tombstones.delete(Registry(registry.location), pending.pop(), "bad", "ann")

        monkeypatch.setattr(promotion.failpoints, "step", reached)

    delete_before("1-gate-passed", "team/base:2")
    with pytest.raises(
        UserError, match="team/base:2 was deleted, or nearly.*team/base:prod means team/base:3 as before"
    ):
        registry.promote("team/base:2", "prod", "go")
    history = registry.alias_history("team/base", "prod")
    assert [(move["to"], move["previous"]) for move in history] == [(1, None), (3, 1), (2, 3), (3, 2)]
    assert history[-1]["undoes"] == 3 and fsck(registry).problems == []
    assert registry.resolve("team/base:prod").number == 3
    # what was undone counts for nothing
    assert registry.rollback("team/base:prod", "x")["to"] == 1
    assert fsck(registry).problems == []


def test_an_alias_of_which_nothing_is_left_means_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        small_models.publish(registry, "team/base", {"a": str(number).encode()})
    registry.promote("team/base:1", "prod", "x")

    def reached(command: str, name: str) -> None:
        if name == "1-gate-passed":
            tombstones.delete(Registry(registry.location), "team/base:2", "bad", "ann")
        if name == "2-alias-recorded":  # prod means 2 now, and so 1 can go
            tombstones.delete(Registry(registry.location), "team/base:1", "bad", "ann")

    with monkeypatch.context() as patch:
        patch.setattr(promotion.failpoints, "step", reached)
        with pytest.raises(UserError, match="team/base:prod means nothing, for what it meant was deleted too"):
            registry.promote("team/base:2", "prod", "go")
    assert registry.aliases("team/base") == {} and fsck(registry).problems == []
    with pytest.raises(UserError, match="team/base has no alias 'prod'; aliases: none; versions: 3"):
        registry.resolve("team/base:prod")
    with pytest.raises(UserError, match="means nothing, and before it nothing"):
        registry.rollback("team/base:prod", "x")
    collect(registry, 0)
    assert registry.promote("team/base:3", "prod", "x")["previous"] is None
    assert registry.resolve("team/base:prod").number == 3 and fsck(registry).problems == []


def test_a_rollback_to_what_is_being_deleted_is_undone(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        small_models.publish(registry, "team/base", {"a": str(number).encode()})
        registry.promote(f"team/base:{number}", "prod", "x")
    write = records.write

    def late(store: Store, folder: str, number: int, record: dict[str, Any]) -> bool:
        monkeypatch.setattr(records, "write", write)
        tombstones.delete(Registry(registry.location), "team/base:1", "bad", "ann")
        return write(store, folder, number, record)

    monkeypatch.setattr(records, "write", late)
    with pytest.raises(UserError, match="team/base:1 was deleted.*prod means team/base:2 as before"):
        registry.rollback("team/base:prod", "x")
    assert registry.resolve("team/base:prod").number == 2 and fsck(registry).problems == []


def test_adapters_outlive_the_last_version_of_their_bases_model(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_models.publish(registry, "team/base", {"a": b"base"})
    small_models.publish(registry, "team/child", {"adapter_config.json": b"{}"}, base)
    tombstones.delete(registry, base.ref, "superseded")
    opened = Registry(registry.location)
    assert opened.by_digest(base.digest) == base
    folder = base_folder(opened, opened.resolve("team/child:1"))
    assert (folder / "a").read_bytes() == b"base"
    held: list[str] = []
    with monkeypatch.context() as patch:  # a policy is asked about the base, too
        patch.setenv("BATON_POLICY", "x")
        patch.setattr(policy, "check_loading", lambda registry, version: held.append(version.ref))
        base_folder(opened, opened.resolve("team/child:1"))
    assert held == ["team/child:1", "team/base:1"]
    again = small_models.publish(registry, "team/new", {"a": b"base"})
    assert again.digest == base.digest and Registry(registry.location).by_digest(base.digest) == again


def test_an_alias_whose_history_has_a_gap_can_be_moved(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2):
        small_models.publish(registry, "team/base", {"a": str(number).encode()})
    for number in (1, 2, 1):
        registry.promote(f"team/base:{number}", "prod", "x")
    lost = "models/team/base/aliases/prod/0000001.json"
    remove(registry, lost)
    with pytest.raises(UserError, match=f"{lost} is missing, so that nobody can tell.*fsck --from.*baton promote"):
        registry.rollback("team/base:prod", "x")
    record = registry.promote("team/base:2", "prod", "x")
    assert (record["to"], record["previous"]) == (2, 1) and f"{lost} is missing" in caplog.text
    assert registry.store.exists("models/team/base/aliases/prod/0000004.json")
    assert registry.resolve("team/base:prod").number == 2
    (problem,) = fsck(registry).problems
    assert problem.path == lost


def test_a_promotion_reads_one_record_of_a_long_history(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        small_models.publish(registry, "team/base", {"a": str(number).encode()})
    for number in range(9):
        registry.promote(f"team/base:{1 + number % 2}", "prod", "x")
    read: list[str] = []
    get = registry.store.get
    monkeypatch.setattr(registry.store, "get", lambda path: (read.append(path), get(path))[1])
    registry.promote("team/base:2", "prod", "x")
    assert [path for path in read if "/aliases/" in path] == ["models/team/base/aliases/prod/0000009.json"]


def test_a_name_is_found_by_one_listing_however_many_models(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [small_models.manifest({"a": bytes([number])}, "base", None, {}) for number in range(12)]
    for number, content in enumerate(contents):
        version = small_models.record(registry, f"team{number % 3}/m{number}", content)
    small_models.record(registry, "team0/m0", contents[1])
    opened = Registry(registry.location)
    asked: list[str] = []
    for name in ("list", "walk", "paths", "get", "get_many", "stat"):
        method = getattr(opened.store, name)
        counted = lambda *arguments, method=method, name=name: (asked.append(name), method(*arguments))[1]  # noqa: E731
        monkeypatch.setattr(opened.store, name, counted)
    assert opened.by_digest(version.digest) == version
    # a store gets what it is asked for many at a time one by one, and lists by walking
    assert [name for name in asked if name not in ("get", "walk")] == ["paths", "get_many"]
    asked.clear()
    assert len(opened.models()) == 12 and set(asked) <= {"paths", "walk"} and asked.count("paths") == 1
    asked.clear()
    assert opened.references()[version.digest] == [version.ref]
    assert asked.count("paths") == 1 and "list" not in asked
