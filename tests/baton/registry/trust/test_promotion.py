"""Promotion with gates, rollback, and promoters at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry, records
from baton.registry.care.tombstones import delete
from baton.registry.stores.local import LocalStore
from tests.baton.registry.conftest import in_processes
from tests.baton.registry.trust.made_up import variant


def fill(registry: Registry, count: int = 3) -> None:
    """team/base gets versions up to `count`, of win 0.1, 0.2, … each, but the first has no metric."""
    for number in range(2, count + 1):
        variant(registry, {"metrics": {"win": number / 10}})


def moves(registry: Registry) -> list[tuple[int, int | None]]:
    return [(move["to"], move["previous"]) for move in registry.alias_history("team/base", "prod")]


def test_a_gate_that_holds_is_recorded(filled: Registry, tmp_path: Path) -> None:
    fill(filled)
    gate = tmp_path / "GATE.yaml"
    gate.write_text("metrics: [win >= 0.2, win > current]")
    record = filled.promote("team/base:3", "prod", "better", by="ann", gate=gate)
    (kept,) = filled.alias_history("team/base", "prod")
    assert {key: kept[key] for key in record} == record and set(kept) == {*record, "nonce"}
    (judged,) = record["gates"]
    assert judged["source"] == "GATE.yaml" and judged["digest"].startswith("sha256:")
    assert judged["outcomes"] == [
        {"condition": "win >= 0.2", "holds": True, "found": "0.3 by the publisher"},
        {
            "condition": "win > current",
            "holds": True,
            "found": "0.3 by the publisher; team/base:prod means nothing yet",
        },
    ]
    # the same command again: nothing new, although prod means that version now
    assert filled.promote("team/base:3", "prod", "better", by="ann", gate=gate) == kept
    assert moves(filled) == [(3, None)] and filled.verify_all() == []


def test_a_gate_that_fails_names_every_condition_that_does(filled: Registry, tmp_path: Path) -> None:
    fill(filled)
    gate = tmp_path / "GATE.yaml"
    gate.write_text("metrics: [win >= 0.25, win <= 0.5, los < 1]\napprovals: {at_least: 1}")
    with pytest.raises(UserError) as caught:
        filled.promote("team/base:2", "prod", "hope", gate=gate)
    assert str(caught.value) == (
        "team/base:2 may not become team/base:prod; 3 of 4 conditions fail:\n"
        "  win >= 0.25: 0.2 by the publisher\n"
        "  los < 1: team/base:2 has no metric los; it has win\n"
        "  approvals: at least 1: 0"
    )
    assert moves(filled) == []
    gate.write_text("metrics: [win > current]")
    filled.promote("team/base:3", "prod", "first", gate=gate)
    with pytest.raises(UserError, match="1 of 1 conditions fail"):
        filled.promote("team/base:2", "prod", "worse", gate=gate)
    # a gate is asked even where nothing would move
    gate.write_text("metrics: [win > 1]")
    with pytest.raises(UserError, match="1 of 1 conditions fail"):
        filled.promote("team/base:3", "prod", "again", gate=gate)


def test_rollback_goes_back_and_never_forward(filled: Registry) -> None:
    fill(filled)
    for number in (1, 2, 3):
        filled.promote(f"team/base:{number}", "prod", "newer")
    record = filled.rollback("team/base:prod", "3 swears", by="ann")
    assert (record["to"], record["previous"], record["rolled_back_from"], record["reason"]) == (2, 3, 3, "3 swears")
    assert filled.resolve("team/base:prod").number == 2
    assert filled.rollback("team/base:prod", "2 does too")["to"] == 1  # not 3, which was found bad
    with pytest.raises(UserError, match="before it nothing that was not rolled back. Promote another version"):
        filled.rollback("team/base:prod", "and 1")
    filled.promote("team/base:3", "prod", "mended its data")
    assert filled.rollback("team/base:prod", "no")["to"] == 1
    assert moves(filled) == [(1, None), (2, 1), (3, 2), (2, 3), (1, 2), (3, 1), (1, 3)]
    assert filled.verify_all() == []


def test_rolling_back_to_a_version_that_was_promoted_twice(filled: Registry) -> None:
    fill(filled, 2)
    for number in (1, 2, 1):
        filled.promote(f"team/base:{number}", "prod", "x")
    assert [filled.rollback("team/base:prod", "x")["to"] for _ in range(2)] == [2, 1]


def test_what_cannot_be_rolled_back(filled: Registry) -> None:
    fill(filled, 2)
    filled.promote("team/base:1", "prod", "x")
    for target, reason, message in (
        ("team/base:prod", "x", "means team/base:1, and before it nothing"),
        ("team/base:prod", " ", "a rollback needs a reason"),
        ("team/base:1", "x", "is a version, which never changes; a rollback needs NAME:ALIAS"),
        ("team/base:prd", "x", "no alias 'prd'; aliases: team/base:prod.*: nothing to roll back"),
        ("team/bas:prod", "x", "no model 'team/bas'; nearest: team/base.*: nothing to roll back"),
        ("team/base", "x", "says no version"),
    ):
        with pytest.raises(UserError, match=message):
            filled.rollback(target, reason)
    filled.promote("team/base:2", "prod", "x")
    delete(filled, "team/base:1", "leaked", "ann")
    with pytest.raises(UserError, match="would go back to team/base:1, which was deleted. Promote another"):
        filled.rollback("team/base:prod", "x")
    assert moves(filled) == [(1, None), (2, 1)]


def test_a_lost_answer_is_recognised(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store writes the record but its answer is lost: the same bytes, sent again, are its own."""
    fill(filled, 2)
    put = filled.store.put_if_absent
    monkeypatch.setattr(filled.store, "put_if_absent", lambda path, data: put(path, data) and put(path, data))
    expected_record = filled.promote("team/base:2", "prod", "x")
    assert moves(filled) == [(expected_record["to"], None)]


def test_of_two_threads_one_wins(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(filled, 9)
    together, found = threading.Barrier(8), list[Any]()
    write = records.write

    def write_together(*arguments: Any) -> bool:
        together.wait(10)  # all have looked at the same history
        return write(*arguments)

    monkeypatch.setattr(records, "write", write_together)

    def move(number: int) -> None:
        try:
            found.append(Registry(filled.location).promote(f"team/base:{number}", "prod", "mine")["to"])
        except UserError as error:
            found.append(str(error))

    threads = [threading.Thread(target=move, args=(number,)) for number in range(2, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [one for one in found if isinstance(one, int)]
    losers = [one for one in found if isinstance(one, str)]
    assert len(losers) == 7 and all("someone moved team/base:prod meanwhile; look again" in one for one in losers)
    assert moves(filled) == [(winner, None)]


def _promote_often(location: str, writer: int, rounds: int) -> None:
    registry, done = Registry(location), 0
    while done < rounds:
        try:
            if done == rounds - 1:
                registry.rollback("team/base:prod", f"{writer}")
            else:
                registry.promote(f"team/base:{1 + (writer + done) % 9}", "prod", f"{writer}")
            done += 1
        except UserError as error:
            assert "look again" in str(error) or "before it nothing" in str(error)
            done += "before it nothing" in str(error)


def test_eight_promoters_leave_a_history_without_forks(filled: Registry) -> None:
    fill(filled, 9)
    if isinstance(filled.store, LocalStore):
        in_processes(filled, _promote_often, [(filled.location, writer, 5) for writer in range(8)])
    else:  # the race is between requests: starting eight processes would only take long
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(_promote_often, filled.location, writer, 2) for writer in range(8)]:
                done.result()
    history = filled.alias_history("team/base", "prod")
    assert [move["previous"] for move in history] == [None, *(move["to"] for move in history[:-1])]
    assert {move["reason"] for move in history} == {str(writer) for writer in range(8)}
    assert filled.verify_all() == []
