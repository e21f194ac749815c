"""PPO beside best-of-n: figures worked by hand, and the command on the versions of a tiny chain."""

import io
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baton.cli import main
from baton.sampling import best_of_kl, reply_logprobs
from reward.comparison import BestOf, Comparison, Mean, _point, reward_setting, tables

Output = pytest.CaptureFixture[str]


def test_means_and_their_intervals() -> None:
    # the deviation of 1, 2, 3 is 1
    assert Mean.of(np.array([1.0, 2.0, 3.0])) == Mean(2.0, pytest.approx(1.959964 / math.sqrt(3)))
    assert Mean.of(np.array([4.0])) == Mean(4.0, None)


CURVES = {"proxy": np.array([[0.0, 2.0], [1.0, 3.0]]), "gold": np.array([[5.0, 4.0], [5.0, 5.0]])}


def test_a_policy_at_the_kl_of_best_of_two() -> None:
    kl_nats = np.array([best_of_kl(2) - 0.1, best_of_kl(2) + 0.1])
    point = _point("a", kl_nats, {"proxy": np.array([2.5, 3.0]), "gold": np.array([5.0, 6.0])}, CURVES)
    assert point.n_at_equal_kl == pytest.approx(2) and not point.is_beyond
    assert point.difference["proxy"].value == pytest.approx((0.5 + 0.0) / 2)
    assert point.difference["gold"].value == pytest.approx((1.0 + 1.0) / 2)
    assert point.difference["gold"].margin == pytest.approx(0.0)  # prompt by prompt it is the same


def test_a_policy_that_spends_more_than_all_samples() -> None:
    point = _point("a", np.array([2.0, 4.0]), {"proxy": np.array([2.0, 3.0]), "gold": np.array([0.0, 0.0])}, CURVES)
    assert point.is_beyond and point.compared_kl_nats == best_of_kl(2)
    assert math.log(point.n_at_equal_kl) - 1 + 1 / point.n_at_equal_kl == pytest.approx(3.0)
    assert point.difference["proxy"].value == pytest.approx(0.0)


def test_a_policy_that_has_not_moved() -> None:
    point = _point("a", np.array([-0.1, 0.05]), {"proxy": np.array([0.0, 1.0]), "gold": np.array([5.0, 5.0])}, CURVES)
    assert point.n_at_equal_kl == 1 and not point.is_beyond
    assert point.difference["proxy"].value == point.difference["gold"].value == 0


def test_log_probabilities_of_replies(tiny_llama: Any) -> None:
    pairs = [([3, 4, 5], [6, 7]), ([8], [9, 10, 11, 12]), ([3, 4], [1])]
    expected = []
    for prompt, reply in pairs:
        with torch.no_grad():
            logits = tiny_llama(input_ids=torch.tensor([prompt + reply])).logits[0].double() / 0.7
        each = [logits[len(prompt) + at - 1].log_softmax(-1)[token] for at, token in enumerate(reply)]
        expected.append(float(sum(each)))
    assert reply_logprobs(tiny_llama, pairs, 0.7).tolist() == pytest.approx(expected, abs=1e-4)


def test_where_a_reward_comes_from() -> None:
    assert reward_setting("micro/reward:1").model == "micro/reward:1"
    assert reward_setting("micro/reward@sha256:12").model == "micro/reward@sha256:12"
    assert reward_setting("reward.rules:refusal").function == "reward.rules:refusal"
    assert reward_setting("http://127.0.0.1:1/score").url == "http://127.0.0.1:1/score"


def compared(chain: Any, monkeypatch: pytest.MonkeyPatch, *options: str, ref: str = "tiny/sft:candidate") -> int:
    """The exit code of `baton best-of` on the tiny chain."""
    arguments = [ref, "tiny/reward:candidate", str(chain.root / "world" / "prompts_eval.jsonl"), *options]
    arguments += ["--max-new-tokens", "6", "--registry", str(chain.root / "registry")]
    monkeypatch.setattr(sys, "argv", ["baton", "best-of", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command(tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output) -> None:
    options = (
        "--policy",
        "tiny/policy:candidate",
        "--policy",
        "tiny/sft:candidate",
        "--n",
        "4",
        "--policy-samples",
        "4",
    )
    gold = ("--gold", "reward.rules:repetition")
    assert compared(tiny_chain, monkeypatch, *options, *gold, "--json", "--out", str(tmp_path / "out")) == 0
    data = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == data
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    assert [row["n"] for row in data["best_of"]] == [1, 2, 3, 4]
    proxies = [row["rewards"]["proxy"]["value"] for row in data["best_of"]]
    assert proxies == sorted(proxies) and proxies[0] < proxies[-1]
    assert data["reward"] == tiny_chain.versions["reward"].ref
    assert data["prompts"] == 4 and data["gold"] == "reward.rules:repetition"
    moved, still = data["policies"]
    # the SFT model as a policy of its own: the same replies, no KL, and so best of one
    assert still["kl_nats"]["value"] == 0 and still["n_at_equal_kl"] == 1
    assert still["rewards"]["proxy"]["value"] == pytest.approx(proxies[0])
    assert still["difference"]["gold"]["value"] == pytest.approx(0, abs=1e-9)
    assert moved["kl_nats"]["value"] != 0 and moved["ref"] == tiny_chain.versions["ppo"].ref


def test_the_command_prints_tables(tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    assert compared(tiny_chain, monkeypatch, "--policy", "tiny/policy:candidate", "--n", "2", "--limit", "2") == 0
    shown = capsys.readouterr().out
    assert "first 2 of 4 prompts" in shown and "each of 2 prompts" in shown
    assert tiny_chain.versions["ppo"].ref in shown and f"{best_of_kl(2):.3f}" in shown


def test_a_table_says_where_a_policy_is_beyond_the_samples() -> None:
    from rich.console import Console

    point = _point("a/b:1", np.array([3.0, 3.0]), {"proxy": np.array([2.0, 3.0]), "gold": np.zeros(2)}, CURVES)
    curve = [BestOf(n, best_of_kl(n), {"proxy": Mean(1.0, None), "gold": Mean(5.0, None)}) for n in (1, 2)]
    found = Comparison("a/s:1", "a/r:1", None, 2, 2, 1, 1.0, 0, curve, [point])
    assert asdict(found)["policies"][0]["ref"] == "a/b:1"
    console = Console(width=200, record=True, file=io.StringIO())
    for table in tables(found):
        console.print(table)
    assert "2 (equal: 53.6)" in console.export_text()


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        ("tiny/base:main", (), "no chat template"),
        ("tiny/sft:candidate", ("--policy", "tiny/reward:candidate"), "does not write text"),
        ("tiny/sft:candidate", ("--gold", "tiny/sft:candidate"), "expected a version of the reward stage"),
        ("tiny/sft:candidate", ("--gold", "reward.rules:nonesuch"), "nonesuch"),
        ("tiny/sft:candidate", ("--temperature", "0"), "give one above 0"),
        ("tiny/sft:candidate", ("--format", "xml"), "known are"),
    ],
)
def test_mistakes(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output, ref: str, options: tuple[str, ...], message: str
) -> None:
    from reward import comparison

    monkeypatch.setattr(comparison, "_load", lambda *_: pytest.fail("a model was loaded"))
    assert compared(tiny_chain, monkeypatch, *options, ref=ref) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err
