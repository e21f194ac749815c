"""Deleting: the number stays taken, whoever asks is told why, descendants keep working."""

import pytest

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.care import tombstones
from baton.registry.care.gc import collect
from baton.registry.care.repair import fsck
from tests.baton.registry.care import small_models


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


def test_it_says_what_descends_from_it(folder_registry: Registry) -> None:
    base = small_models.publish(folder_registry, "team/base", {"a": b"1"})
    same = small_models.publish(folder_registry, "other/base", {"a": b"1"})
    sft = small_models.publish(folder_registry, "team/sft", {"a": b"2"}, base)
    small_models.publish(folder_registry, "team/ppo", {"a": b"3"}, base, {"init": sft})
    small_models.publish(folder_registry, "team/other", {"a": b"4"})
    assert same.digest == base.digest
    assert tombstones.delete(folder_registry, sft.ref, "x").descendants == ["team/ppo:1"]
    # the deleted one in between does not hide what was made of it
    assert tombstones.delete(folder_registry, base.ref, "x").descendants == ["other/base:1", "team/ppo:1"]


@pytest.mark.parametrize("why", ["", "  "])
def test_a_deletion_needs_a_reason(folder_registry: Registry, why: str) -> None:
    small_models.publish(folder_registry, "team/base", {"a": b"1"})
    with pytest.raises(UserError, match="needs a reason"):
        tombstones.delete(folder_registry, "team/base:1", why)
    assert folder_registry.numbers("team/base") == [1]


def test_a_promotion_that_comes_in_between_wins(folder_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    small_models.publish(folder_registry, "team/base", {"a": b"1"})
    write = tombstones.records.write

    def promoted_just_before(*arguments):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(tombstones.records, "write", write)
        folder_registry.promote("team/base:1", "prod", "quick")
        return write(*arguments)

    monkeypatch.setattr(tombstones.records, "write", promoted_just_before)
    with pytest.raises(UserError, match="is what team/base:prod means now.*baton promote team/base:N prod"):
        tombstones.delete(folder_registry, "team/base:1", "x")
    assert folder_registry.resolve("team/base:prod").number == 1
