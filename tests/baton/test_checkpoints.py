"""Checkpoints as files: whole or not at all, verified, pruned; the writer's failures."""

import threading
from pathlib import Path

import pytest
import torch

from baton.checkpoints import Writer, complete_checkpoints, copied, prune, verify, write_checkpoint
from baton.errors import UserError

FILES = {"w.safetensors": {"a": torch.arange(3.0)}, "s.json": {"at": [0.1, float("inf")]}, "o.pt": {"b": torch.ones(2)}}


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file

    write_checkpoint(tmp_path, 4, FILES, keep=2)
    checkpoint = tmp_path / "checkpoint-4"
    assert sorted(path.name for path in checkpoint.iterdir()) == ["complete", "o.pt", "s.json", "w.safetensors"]
    assert load_file(checkpoint / "w.safetensors")["a"].tolist() == [0, 1, 2]
    assert json.loads((checkpoint / "s.json").read_text()) == FILES["s.json"]
    assert torch.load(checkpoint / "o.pt", weights_only=True)["b"].tolist() == [1, 1]
    verify(checkpoint)


@pytest.mark.parametrize("name", list(FILES))
def test_a_flipped_bit_and_a_missing_file_are_found(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, 4, FILES, keep=2)
    path = tmp_path / "checkpoint-4" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged.*delete .*checkpoint-4 and run the same command"):
        verify(tmp_path / "checkpoint-4")
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        verify(tmp_path / "checkpoint-4")


def test_the_last_are_kept_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100, 11):
        write_checkpoint(tmp_path, step, FILES, keep=3)
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-11",
        "checkpoint-100",
    ]
    prune(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-100"]


def test_a_failure_leaves_the_one_before_and_nothing_half(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, FILES, keep=1)
    with pytest.raises(UserError, match=r"writing checkpoint .*checkpoint-2 failed"):
        write_checkpoint(tmp_path, 2, {**FILES, "bad.json": {"x": object()}}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    verify(tmp_path / "checkpoint-1")


def test_copies_do_not_follow_their_originals() -> None:
    original = {"a": torch.zeros(2, 3).T, "list": [torch.zeros(1), 5], "pair": (1, "x")}
    found = copied(original)
    original["a"] += 1
    original["list"][0] += 1
    assert float(found["a"].sum()) == 0 and float(found["list"][0]) == 0
    assert found["a"].is_contiguous() and found["list"][1] == 5 and found["pair"] == (1, "x")


def test_the_writer_does_one_thing_at_a_time_and_keeps_a_failure() -> None:
    writer, gate, order = Writer(), threading.Event(), []
    writer.start(lambda: (gate.wait(30), order.append("first")))
    threading.Timer(0.05, gate.set).start()
    writer.start(lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"] and writer.failure is None

    def fail() -> None:
        raise OSError("full")

    writer.start(fail)
    writer.wait()
    assert str(writer.failure) == "full"
