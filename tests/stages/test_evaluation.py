"""Held-out figures, the win rate, the best step and samples; every expected value is worked by hand."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stages.evaluation import (
    Best,
    Judged,
    judge,
    sample_table,
    summarise,
    trim_samples,
    win_rate,
    write_samples,
)


def row(reward: float = 0.0, reply: str | None = None, prompt: str = "p", **changes: Any) -> Judged:
    fields: dict[str, Any] = {"rewards": {"helpful": reward}, "gold": None, "kl_nats": 0.0, "length": 1, "ended": True}
    return Judged(prompt, f"reply {reward}" if reply is None else reply, reward=reward, **(fields | changes))


def test_columns_become_rows_with_the_weighted_sum() -> None:
    rows = judge(
        ["p", "q"],
        ["a", "b"],
        {"helpful": [1.0, -2.0], "short": [0.5, 4.0]},
        {"helpful": 2.0, "short": -1.0},
        [0.25, 3.0],
        [3, 7],
        [True, False],
        gold=[9.0, 8.0],
    )
    assert rows == [
        Judged("p", "a", {"helpful": 1.0, "short": 0.5}, 1.5, 9.0, 0.25, 3, True),
        Judged("q", "b", {"helpful": -2.0, "short": 4.0}, -8.0, 8.0, 3.0, 7, False),
    ]


@pytest.mark.parametrize(("scores", "gold"), [([0.0, float("nan")], None), ([0.0, 1.0], [1.0, float("inf")])])
def test_a_reward_that_is_not_finite_stops_with_its_row(scores: list[float], gold: list[float] | None) -> None:
    with pytest.raises(FloatingPointError, match="prompt 'second', reply 'b'"):
        judge(["p", "second"], ["a", "b"], {"r": scores}, {"r": 1.0}, [0, 0], [1, 1], [True, True], gold)


def test_the_summary_holds_means() -> None:
    one = Judged("p", "a", {"x": 1.0, "y": 2.0}, 3.0, 5.0, 0.5, 4, True)
    two = Judged("q", "b", {"x": 2.0, "y": -4.0}, -2.0, 8.0, 2.5, 8, False)
    assert summarise([one, two]) == {
        "eval/reward": 0.5,
        "eval/reward/x": 1.5,
        "eval/reward/y": -1.0,
        "eval/gold": 6.5,
        "eval/gold_se": 1.5,  # deviations 1.5 and -1.5: variance 4.5, over 2 rows
        "eval/kl_nats": 1.5,
        "eval/length": 6.0,
        "eval/eos_rate": 0.5,
    }
    assert summarise([row(2.0)]) == {
        "eval/reward": 2.0, "eval/kl_nats": 0.0, "eval/length": 1.0, "eval/eos_rate": 1.0,
    }  # fmt: skip


def test_ties_count_half() -> None:
    ours = [row(2.0), row(1.0), row(0.0), row(5.0), row(1.0, "same")]
    theirs = [row(1.0), row(1.0, "other"), row(3.0), row(4.0), row(1.5, "same")]
    found = win_rate(ours, theirs)  # win, tie, loss, win, tie: the same reply, whatever rounding made of its score
    assert found["eval/win_rate"] == pytest.approx(0.6)
    assert found["eval/tie_rate"] == pytest.approx(0.4)
    swapped = win_rate(theirs, ours)
    assert swapped["eval/win_rate"] == pytest.approx(0.4)
    assert swapped["eval/win_rate_low"] == pytest.approx(1 - found["eval/win_rate_high"])


def test_other_prompts_cannot_be_compared() -> None:
    with pytest.raises(AssertionError):
        win_rate([row(prompt="p")], [row(prompt="q")])
    with pytest.raises(AssertionError):
        win_rate([row()], [row(), row()])


def offered(reward: float, kl: float) -> dict[str, float]:
    return {"eval/reward": reward, "eval/kl_nats": kl, "time/eval_s": 3.0}


def test_the_best_is_the_highest_within_the_budget_and_the_earlier_of_equals() -> None:
    best = Best(2.0)
    assert not best.offer(1, offered(9.0, 2.1))
    assert not best.offer(2, offered(1.0, float("nan")))
    assert best.step is None
    assert best.offer(3, offered(-1.0, 2.0))
    assert best.offer(4, offered(0.5, 1.0))
    assert not best.offer(5, offered(0.5, 0.5))
    assert not best.offer(6, offered(float("nan"), 0.5))
    assert (best.step, best.metrics) == (4, {"eval/reward": 0.5, "eval/kl_nats": 1.0})
    assert Best(None).offer(1, offered(0.0, 1e9))


def test_the_best_survives_a_checkpoint() -> None:
    best = Best(None)
    again = Best.from_state(json.loads(json.dumps(best.state())), None)
    assert again.offer(7, offered(1.0, 3.0)) and best.offer(7, offered(1.0, 3.0))
    again = Best.from_state(json.loads(json.dumps(best.state())), None)
    assert (again.step, again.metrics) == (7, best.metrics)
    assert not again.offer(8, offered(1.0, 0.0)) and again.offer(9, offered(1.5, 0.0))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_samples_hold_both_replies_and_what_they_got(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    write_samples(path, 5, [row(1.0, "old\u2028é", gold=3.0)], [row(2.0, "new", gold=4.0, ended=False, kl_nats=0.5)],
                  append=False)  # fmt: skip
    assert read(path) == [
        {
            "step": 5, "prompt": "p", "before": "old\u2028é", "after": "new",
            "reward_before": 1.0, "reward": 2.0, "rewards_before": {"helpful": 1.0}, "rewards": {"helpful": 2.0},
            "gold_before": 3.0, "gold": 4.0, "kl_nats": 0.5, "length_before": 1, "length": 1,
            "ended_before": True, "ended": False,
        }
    ]  # fmt: skip


def test_samples_are_not_doubled_by_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    before = [row(0.0, "old\u2028line"), row(0.0, prompt="q")]
    for step in (2, 4, 6):
        write_samples(path, step, before, [row(step), row(step, prompt="q")], append=True)
    with path.open("a") as file:
        file.write('{"step": 8, "prom')  # a killed run's last words
    trim_samples(path, 4)
    assert [(r["step"], r["prompt"]) for r in read(path)] == [(2, "p"), (2, "q"), (4, "p"), (4, "q")]
    write_samples(path, 4, before, [row(9.0), row(9.0, prompt="q")], append=True)  # measured again after the resume
    assert [(r["step"], r["reward"]) for r in read(path)] == [(2, 2), (2, 2), (4, 9), (4, 9)]
    write_samples(path, 1, before[:1], [row(1.0)], append=False)
    assert [r["step"] for r in read(path)] == [1]
    trim_samples(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_fits_and_shows_texts_as_they_are(width: int) -> None:
    long = "word " * 200
    before = [row(-0.25, "[red]not markup[/]"), row(0.0, long, prompt="q"), row(prompt="never shown")]
    after = [row(1.5, "\x1b[31mescape\x07 a\nb"), row(1.0, "x" * 500, prompt="q"), row(prompt="never shown")]
    screen = io.StringIO()
    Console(file=screen, width=width, color_system=None).print(sample_table(before, after, 2))
    text = screen.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text and "\x07" not in text and "never" not in text
    assert "-0.25 →" in text and "1.50" in text and "…" in text
    if width == 200:
        assert "[red]not markup[/]" in text and "[31mescape a b" in text


def test_a_shortened_prompt_keeps_its_end_and_a_cut_reply_says_so() -> None:
    screen = io.StringIO()
    prompt = "beginning " + "x " * 300 + "question"
    Console(file=screen, width=300).print(
        sample_table([row(prompt=prompt)], [row(prompt=prompt, reply="start", ended=False)], 1)
    )
    assert "question" in screen.getvalue() and "beginning" not in screen.getvalue()
    assert "start […]" in screen.getvalue()


def shaped_rows(scores: list[float], shaped: list[float], replies: list[str]) -> list[Judged]:
    columns: dict[str, Any] = {"shaped": {"r": shaped}, "details": {"r/shaped": shaped, "r/deviation": [0.5] * 3}}
    prompts = ["p", "q", "s"]
    return judge(prompts, replies, {"r": scores}, {"r": 2.0}, [0.0] * 3, [1] * 3, [True] * 3, **columns)


def test_raw_scores_and_shaped_ones_are_both_reported(tmp_path: Path) -> None:
    """The total, by which steps are chosen, is made of the shaped ones."""
    rows = shaped_rows([1.0, 2.0, 6.0], [0.5, 0.0, -2.0], ["a", "b", "c"])
    assert [row.reward for row in rows] == [1.0, 0.0, -4.0]
    found = summarise(rows)
    assert found["eval/reward"] == -1.0 and found["eval/reward/r"] == 3.0
    assert found["eval/reward/r/shaped"] == -0.5 and found["eval/reward/r/deviation"] == 0.5
    write_samples(tmp_path / "samples.jsonl", 1, rows, rows, append=False)
    line = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert line["rewards"] == {"r": 1.0} and line["details"] == {"r/shaped": 0.5, "r/deviation": 0.5}
    with pytest.raises(FloatingPointError, match="shaped reward of a held-out reply is inf; prompt 'q'"):
        shaped_rows([1.0, 2.0, 6.0], [0.5, float("inf"), -2.0], ["a", "b", "c"])


def test_what_maps_a_prompts_scores_alike_leaves_the_win_rate() -> None:
    """(score - 3) / 4, less another constant for each prompt: the scale of SFT's scores, and the reference's reply."""
    ours, theirs = [1.0, 5.0, 2.0], [0.0, 7.0, 2.0]

    def mapped(scores: list[float]) -> list[float]:
        return [(score - 3.0) / 4.0 - at for at, score in enumerate(scores)]

    plain = win_rate(shaped_rows(ours, ours, ["a", "b", "c"]), shaped_rows(theirs, theirs, ["d", "e", "f"]))
    after = win_rate(
        shaped_rows(ours, mapped(ours), ["a", "b", "c"]), shaped_rows(theirs, mapped(theirs), ["d", "e", "f"])
    )
    assert plain == after and plain["eval/win_rate"] == 0.5 and plain["eval/tie_rate"] == pytest.approx(1 / 3)
