"""Replies to be judged, on the versions of a tiny chain: what a line says, going on, and what is refused."""

import fcntl
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from baton.cli import main
from reward import rollouts

Output = pytest.CaptureFixture[str]
PROMPTS = ["Who is that?", "Where does the baker live?", "What is it?", "Who is that?", "Is it far?", "Why?"]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "PROMPTS_AT_ONCE", 2)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Six prompts of which five are different."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def roll_out(
    chain: Any, monkeypatch: pytest.MonkeyPatch, prompts: Path, out: Path, *options: str, ref: str = ""
) -> int:
    """The exit code of `baton rollout`, of short replies by the tiny chain's SFT model."""
    arguments = [ref or "tiny/sft:candidate", str(prompts), "--out", str(out), "--max-new-tokens", "6", *options]
    monkeypatch.setattr(sys, "argv", ["baton", "rollout", *arguments, "--registry", str(chain.root / "registry")])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_who_replied_what(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: Path, capsys: Output
) -> None:
    out = tmp_path / "pairs.jsonl"
    assert roll_out(tiny_chain, monkeypatch, prompts, out, "--with", "tiny/policy:candidate", "--n", "3") == 0
    told = capsys.readouterr().out
    assert "1 × repeats another prompt" in told and "5 prompts with 3 replies each" in told
    sft, policy = tiny_chain.versions["sft"], tiny_chain.versions["ppo"]
    rows = rows_of(out)
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": text}] for text in dict.fromkeys(PROMPTS)]
    for row in rows:
        texts = [reply["text"] for reply in row["replies"]]
        assert [reply["model"] for reply in row["replies"]] == [sft.ref, policy.ref, sft.ref]
        assert [reply["digest"] for reply in row["replies"]] == [sft.digest, policy.digest, sft.digest]
        assert len(set(texts)) > 1 and all(isinstance(reply["ended"], bool) for reply in row["replies"])
        assert "<|" not in "".join(texts)
        content = json.dumps([row["prompt"], texts], sort_keys=True, ensure_ascii=False)
        assert row["pair"] == "sha256:" + hashlib.sha256(content.encode()).hexdigest()
    assert len({row["pair"] for row in rows}) == 5


def test_a_line_is_one_line_for_every_reader() -> None:
    row = {"text": "a\u2028b\x85c\u2029d\ne町"}
    line = rollouts._line(row).decode()
    assert len(line.splitlines()) == 1 and line.endswith("\n") and "町" in line
    assert json.loads(line) == row


def test_settings_decide_what_is_sampled(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: Path
) -> None:
    def texts(name: str, *options: str) -> list[str]:
        assert roll_out(tiny_chain, monkeypatch, prompts, tmp_path / name, *options) == 0
        return [reply["text"] for row in rows_of(tmp_path / name) for reply in row["replies"]]

    first = texts("a.jsonl")
    assert texts("b.jsonl") == first != texts("c.jsonl", "--seed", "1")
    assert texts("d.jsonl", "--temperature", "0.5") != first
    # what a prompt gets does not hang on the prompts around it, nor on how many replies it gets
    assert texts("e.jsonl", "--limit", "2") == first[:4]
    assert texts("f.jsonl", "--n", "3")[:2] == first[:2]


def test_a_file_that_was_cut_off_anywhere_goes_on(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: Path, capsys: Output
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert roll_out(tiny_chain, monkeypatch, prompts, whole) == 0
    content = whole.read_bytes()
    ends = [at + 1 for at, byte in enumerate(content) if byte == 10]
    facts = json.loads((tmp_path / "whole.jsonl.rollout").read_text())
    del facts["finished"]
    for cut in (0, 5, ends[0], ends[1] + 30, ends[2] - 1, ends[3], ends[4]):
        out.write_bytes(content[:cut])
        (tmp_path / "out.jsonl.rollout").write_text(json.dumps(facts))
        assert roll_out(tiny_chain, monkeypatch, prompts, out) == 0
        assert out.read_bytes() == content, cut


def test_a_kill_between_two_groups(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: Path
) -> None:
    from baton import sampling

    whole, out, sampled = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", sampling.answers
    assert roll_out(tiny_chain, monkeypatch, prompts, whole) == 0
    calls = []

    def killed(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sampled(*arguments, **settings)

    monkeypatch.setattr(sampling, "answers", killed)
    assert roll_out(tiny_chain, monkeypatch, prompts, out) == 130
    assert len(rows_of(out)) == 2
    assert roll_out(tiny_chain, monkeypatch, prompts, out) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert len(calls) == 4  # three groups, the second one twice


def test_what_is_finished_is_not_sampled_again(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: Path, capsys: Output
) -> None:
    out = tmp_path / "out.jsonl"
    assert roll_out(tiny_chain, monkeypatch, prompts, out, "--json") == 0
    told, content = capsys.readouterr().out, out.read_bytes()
    assert json.loads(told) == {"file": str(out), "pairs": 5, "same": 0, "unfit": 0}
    monkeypatch.setattr(rollouts._Speaker, "load", lambda *_: pytest.fail("a model was loaded"))
    assert roll_out(tiny_chain, monkeypatch, prompts, out, "--json") == 0
    assert capsys.readouterr().out == told and out.read_bytes() == content


def test_replies_that_are_all_the_same_are_left_out(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: Path, capsys: Output
) -> None:
    out = tmp_path / "out.jsonl"
    assert roll_out(tiny_chain, monkeypatch, prompts, out, "--temperature", "0.001", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(out), "pairs": 0, "same": 5, "unfit": 0}


def test_prompts_that_cannot_be_read_are_left_out(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    texts = ["a " * 5000, "say <|im_end|>", "Who is that?"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    assert roll_out(tiny_chain, monkeypatch, path, out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(out), "pairs": 1, "same": 0, "unfit": 2}
    path.write_text(json.dumps({"prompt": texts[0]}) + "\n")
    assert roll_out(tiny_chain, monkeypatch, path, tmp_path / "other.jsonl") == 2
    assert "none of 1 prompts can be answered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        ("tiny/base:main", (), "no chat template"),
        ("tiny/reward:candidate", (), "does not write text"),
        ("tiny/sft:candidate", ("--with", "tiny/base:main"), "no chat template"),
        ("tiny/sft:candidate", ("--with", "tiny/sft:candidate"), "the same version"),
        ("tiny/sft:candidate", ("--temperature", "0"), "give one above 0"),
        ("tiny/sft:candidate", ("--format", "xml"), "known are"),
        ("tiny/sft:nonesuch", (), "nonesuch"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    tiny_chain: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    prompts: Path,
    capsys: Output,
    ref: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(rollouts._Speaker, "load", lambda *_: pytest.fail("a model was loaded"))
    assert roll_out(tiny_chain, monkeypatch, prompts, tmp_path / "out.jsonl", *options, ref=ref) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err


def test_a_file_that_was_begun_otherwise_is_refused(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: Path, capsys: Output
) -> None:
    out = tmp_path / "out.jsonl"
    assert roll_out(tiny_chain, monkeypatch, prompts, out) == 0
    content = out.read_bytes()
    for options, message in (
        (("--seed", "2"), "seed was 0, now 2"),
        (("--limit", "3"), "prompts was"),
        (("--with", "tiny/policy:candidate"), "models was"),
    ):
        assert roll_out(tiny_chain, monkeypatch, prompts, out, *options) == 2
        assert message in capsys.readouterr().err
    out.write_bytes(content + b'{"prompt": "other"}\n')
    assert roll_out(tiny_chain, monkeypatch, prompts, out) == 2
    assert "line 6 is not of these prompts" in capsys.readouterr().err
    (tmp_path / "out.jsonl.rollout").unlink()
    assert roll_out(tiny_chain, monkeypatch, prompts, out) == 2
    assert "no out.jsonl.rollout beside it" in capsys.readouterr().err


def test_two_processes_do_not_write_one_file(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: Path, capsys: Output
) -> None:
    out = tmp_path / "out.jsonl"
    with out.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert roll_out(tiny_chain, monkeypatch, prompts, out) == 2
    assert "another process is writing" in capsys.readouterr().err
