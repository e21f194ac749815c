"""The file of judgements: nothing lost, nothing doubled, whenever the process dies."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from reward.labelling.judgements import make_line
from reward.labelling.store import Store, StoreError
from tests.reward.labelling.conftest import question, rows_of


def line(number: int, annotator: str = "ann", choice: Any = "first") -> bytes:
    return make_line(question(number), annotator, choice, False)


def pairs_of(path: Path) -> list[tuple[str, str]]:
    return [(row["annotator"], row["pair"]) for row in rows_of(path)]


def test_lines_are_appended_and_read_again(out: Path) -> None:
    store = Store(out)
    assert store.add(line(1)) and store.add(line(2, "bo", "skip")) and store.add(line(2))
    assert not store.add(line(1, choice="second"))  # judged before: the first stands
    store.close()
    store = Store(out)
    assert [(j.annotator, j.pair, j.choice) for j in store.judgements()] == [
        ("ann", "p1", "first"),
        ("bo", "p2", "skip"),
        ("ann", "p2", "first"),
    ]
    assert [j.pair for j in store.of("ann")] == ["p1", "p2"] and not store.notes
    assert not store.add(line(1))
    store.close()
    assert pairs_of(out) == [("ann", "p1"), ("bo", "p2"), ("ann", "p2")]


def test_undo_takes_the_named_last_one_of_its_annotator(out: Path) -> None:
    store = Store(out)
    for number, annotator in ((1, "ann"), (1, "bo"), (2, "ann"), (2, "bo"), (3, "bo")):
        store.add(line(number, annotator))
    out.chmod(0o640)
    first, second = store.of("ann")
    assert not store.undo("ann", first.id)  # not the last
    assert store.undo("ann", second.id)
    assert not store.undo("ann", second.id)  # asked again, because the answer was lost
    assert not store.undo("bo", first.id) and not store.undo("eve", first.id)
    assert pairs_of(out) == [("ann", "p1"), ("bo", "p1"), ("bo", "p2"), ("bo", "p3")]
    assert store.add(line(2, "ann", "tie")) and store.undo("bo", store.of("bo")[-1].id)
    assert pairs_of(out) == [("ann", "p1"), ("bo", "p1"), ("bo", "p2"), ("ann", "p2")]
    assert out.stat().st_mode & 0o777 == 0o640
    store.close()
    assert [j.pair for j in Store(out).of("bo")] == ["p1", "p2"]


def test_one_person_whatever_the_capitals(out: Path) -> None:
    store = Store(out)
    store.add(line(1, "Ann"))
    assert not store.add(line(1, "ANN")) and store.spelling("ann") == "Ann" and len(store.of("aNN")) == 1
    store.close()


def test_a_second_process_is_told_who_has_the_file(out: Path, tmp_path: Path) -> None:
    store = Store(out)
    store.announce("http://127.0.0.1:1234/")
    with pytest.raises(UserError, match=rf"another `baton label` \(process {os.getpid()}, at http://127.0.0.1:1234/"):
        Store(out)
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    with pytest.raises(UserError, match="being written by another"):
        Store(link)
    store.close()
    through = Store(link)
    through.add(line(1))
    through.undo("ann", through.of("ann")[0].id)
    through.close()
    assert link.is_symlink() and out.read_bytes() == b""


def test_a_last_line_that_was_cut_off_is_set_aside(out: Path) -> None:
    whole, torn = line(1), line(2)[:-40]
    out.write_bytes(whole + torn)
    store = Store(out)
    assert "was cut off by a crash" in store.notes[0] and "judgements.jsonl.cut-off" in store.notes[0]
    assert out.read_bytes() == whole and (out.parent / "judgements.jsonl.cut-off").read_bytes() == torn + b"\n"
    assert store.add(line(2))
    store.close()
    assert pairs_of(out) == [("ann", "p1"), ("ann", "p2")]
    out.write_bytes(whole + line(2)[:-1])  # only its end is missing: a judgement all the same
    store = Store(out)
    assert not store.notes and len(store.judgements()) == 2 and out.read_bytes().endswith(b"}\n")
    store.close()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"chosen": "a", "rejected": "b"}\n', "line 1 has no `pair`"),
        (b"\n[]\n", "line 2 is no object"),
        (b"{not json}\n", "line 1 is not JSON"),
        (b"\xff\xfe\n", "line 1 is not JSON"),
    ],
)
def test_a_file_of_something_else_is_left_alone(out: Path, content: bytes, said: str) -> None:
    out.write_bytes(content)
    with pytest.raises(UserError, match=said):
        Store(out)
    assert out.read_bytes() == content
    with pytest.raises(UserError, match=said):  # and the lock was given back
        Store(out)


def test_a_pair_judged_twice_by_hand_is_said(out: Path) -> None:
    out.write_bytes(line(1) + line(1, choice="second"))
    store = Store(out)
    assert "line 2: ann judged the pair p1 before" in store.notes[0]
    assert [j.choice for j in store.judgements()] == ["second"]  # as training reads it
    store.close()


def test_a_file_that_another_program_changed_takes_nothing_more(out: Path) -> None:
    store = Store(out)
    store.add(line(1))
    content = out.read_bytes()
    out.write_bytes(content + b"\n")
    with pytest.raises(StoreError, match="changed by another program"):
        store.add(line(2))
    out.unlink()
    with pytest.raises(StoreError, match="cannot be found any more"):
        store.undo("ann", store.of("ann")[0].id)
    store.close()


def test_a_full_disk_leaves_no_part_of_a_line(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(out)
    store.add(line(1))
    store.add(line(2))
    before, write = out.read_bytes(), os.write
    for attempt in (lambda: store.add(line(3)), lambda: store.undo("ann", store.of("ann")[-1].id)):
        written = 0

        def until_full(descriptor: int, data: bytes) -> int:
            nonlocal written
            if written:
                raise OSError(28, "No space left on device")
            written = write(descriptor, data[:20])
            return written

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", until_full)
            with pytest.raises(StoreError, match="No space left"):
                attempt()
        assert written == 20 and out.read_bytes() == before
    assert store.add(line(3)) and store.undo("ann", store.of("ann")[-1].id) and store.add(line(4))
    store.close()
    assert pairs_of(out) == [("ann", "p1"), ("ann", "p2"), ("ann", "p4")]


class Killed(BaseException):
    """The process is gone; nothing of it runs any more."""


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """From the `moment`-th half step on, counted over all calls that change the disk, nothing happens any more."""
    passed = 0

    def step() -> None:
        nonlocal passed
        passed += 1
        if passed >= moment:
            raise Killed

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def either_side(*arguments: Any, **options: Any) -> Any:
            step()
            result = call(*arguments, **options)
            step()
            return result

        return either_side

    def half_written(descriptor: int, data: bytes) -> int:
        step()
        count = write(descriptor, data[: len(data) // 2])
        step()
        return count + write(descriptor, data[count:])

    write = os.write
    monkeypatch.setattr(os, "write", half_written)
    for name in ("fsync", "replace", "ftruncate", "unlink"):
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))


@pytest.mark.parametrize("what", ["add", "undo"])
def test_killed_between_any_two_steps(out: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    before = [("ann", "p1"), ("bo", "p1"), ("ann", "p2"), ("bo", "p2")]
    after = before + [("ann", "p3")] if what == "add" else [before[0], before[1], before[3]]
    seen = set()
    for moment in range(1, 100):
        out.unlink(missing_ok=True)
        store = Store(out)
        for annotator, pair in before:
            store.add(line(int(pair[1:]), annotator))
        with monkeypatch.context() as patched:
            kill_at(patched, moment)
            try:
                done = store.add(line(3)) if what == "add" else store.undo("ann", store.of("ann")[-1].id)
            except Killed:
                done = False
        store.close()  # what the system does when a process ends: its locks go
        again = Store(out)
        found = [(each.annotator, each.pair) for each in again.judgements()]
        again.close()
        assert found in (before, after) and pairs_of(out) == found, moment
        assert list(out.parent.glob(".*.partial")) == []
        seen.add(tuple(found))
        if done:
            assert found == after
            break
    else:
        raise AssertionError("it never came through")
    assert len(seen) == 2 and moment > 4


def test_many_threads_at_once(out: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    store = Store(out)
    lines = [line(number, name) for number in range(20) for name in ("ann", "bo", "cy")]
    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(store.add, lines * 2))
    store.close()
    assert sum(taken) == 60 and len(set(pairs_of(out))) == len(pairs_of(out)) == 60
