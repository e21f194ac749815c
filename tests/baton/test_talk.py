"""chat, generate and score on the versions of a tiny chain, from the command line to what is printed."""

import io
import json
import math
import re
import sys
from typing import Any

import pytest

from baton.cli import main

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")


def baton(chain: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `baton` with these arguments, on the chain's registry."""
    monkeypatch.setattr(sys, "argv", ["baton", *arguments, "--registry", str(chain.root / "registry")])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_generate_shows_the_candidates_that_it_reports(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    arguments = ("generate", "tiny/base:main", "The baker", "--max-new-tokens", "3", "--candidates", "4")
    assert baton(tiny_chain, monkeypatch, *arguments, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ref"] == tiny_chain.versions["pretrain"].ref
    assert [len(token["candidates"]) for token in data["tokens"]] == [4] * len(data["tokens"])
    for token in data["tokens"]:
        probabilities = [candidate["probability"] for candidate in token["candidates"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < sum(probabilities) <= 1
        assert token["token_id"] == token["candidates"][0]["token_id"]
    assert baton(tiny_chain, monkeypatch, *arguments) == 0
    text = capsys.readouterr().out
    for candidate in data["tokens"][0]["candidates"]:
        assert repr(candidate["text"]) in text and f"{candidate['probability']:.1%}" in text


def test_generate_prints_the_text_and_goes_on(tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    arguments = ("generate", "tiny/sft:candidate", "The baker", "--max-new-tokens", "6")
    assert baton(tiny_chain, monkeypatch, *arguments, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert "candidates" not in data["tokens"][0]
    assert baton(tiny_chain, monkeypatch, *arguments) == 0
    assert capsys.readouterr().out == f"The baker{data['continuation']}\n"


def test_options_change_what_is_generated(tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def continuation(*options: str) -> list[int]:
        assert baton(tiny_chain, monkeypatch, "generate", "tiny/base:main", "The", "--json", *options) == 0
        return [token["token_id"] for token in json.loads(capsys.readouterr().out)["tokens"]]

    short = ("--max-new-tokens", "5")
    hot = (*short, "--temperature", "2")
    assert len(continuation("--max-new-tokens", "1")) == 1
    assert continuation(*hot, "--seed", "1") == continuation(*hot, "--seed", "1")
    assert continuation(*hot, "--seed", "1") != continuation(*hot, "--seed", "2")
    assert continuation(*hot, "--seed", "1") != continuation(*short, "--seed", "1")


BEST_OF = (
    "generate",
    "tiny/sft:candidate",
    "Who is that?",
    "--max-new-tokens",
    "6",
    "--reward",
    "tiny/reward:candidate",
)


def test_the_best_of_several_replies_comes_first(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    assert baton(tiny_chain, monkeypatch, *BEST_OF, "--best-of", "5", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    rewards = [reply["reward"] for reply in data["replies"]]
    assert rewards == sorted(rewards, reverse=True) and sorted(reply["draw"] for reply in data["replies"]) == [
        *range(5)
    ]
    assert data["distinct"] == len({reply["text"] for reply in data["replies"]}) > 1
    assert data["kl_nats_at_most"] == pytest.approx(math.log(5) - 4 / 5)
    best = data["replies"][0]
    score = ("score", "tiny/reward:candidate", best["text"], "--prompt", "Who is that?", "--json")
    assert baton(tiny_chain, monkeypatch, *score) == 0
    assert json.loads(capsys.readouterr().out)["reward"] == pytest.approx(best["reward"], abs=1e-6)
    assert baton(tiny_chain, monkeypatch, *BEST_OF, "--best-of", "5") == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"{reward:.4f}") for reward in rewards]
    assert places == sorted(places) and f"at most {math.log(5) - 0.8:.2f} nats" in shown


def test_options_change_what_is_chosen_from(tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    def drawn(*options: str) -> list[str]:
        assert baton(tiny_chain, monkeypatch, *BEST_OF, "--json", *options) == 0
        replies = json.loads(capsys.readouterr().out)["replies"]
        return [reply["text"] for reply in sorted(replies, key=lambda reply: reply["draw"])]

    first = drawn("--best-of", "3")
    assert drawn("--best-of", "3") == first == drawn("--best-of", "4")[:3]
    assert drawn("--best-of", "3", "--seed", "1") != first
    assert len(set(drawn("--best-of", "3", "--temperature", "0.001"))) == 1


def test_score_adds_up(tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    text = "The baker 町"
    assert baton(tiny_chain, monkeypatch, "score", "tiny/base:main", text, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["bytes"] == 10 + 3
    assert data["bits"] == pytest.approx(sum(token["bits"] for token in data["tokens"]))
    assert data["bits_per_byte"] == pytest.approx(data["bits"] / 13)
    assert baton(tiny_chain, monkeypatch, "score", "tiny/base:main", text) == 0
    shown = capsys.readouterr().out
    assert f"{data['bits_per_byte']:.3f} bits per byte" in shown
    for token in data["tokens"]:
        assert repr(token["text"]) in shown and f"{token['bits']:.2f}" in shown


def test_score_by_a_reward_model(tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    arguments = ("score", "tiny/reward:candidate", "I do not know.", "--prompt", "Who is that?")
    assert baton(tiny_chain, monkeypatch, *arguments) == 0
    printed = float(re.fullmatch(r"reward (-?\d+\.\d{4})\n", capsys.readouterr().out)[1])  # type: ignore[index]
    assert baton(tiny_chain, monkeypatch, *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["reward"] == pytest.approx(printed, abs=1e-4)
    assert math.isfinite(printed)


def test_chat_once(tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    arguments = ("chat", "tiny/sft:candidate", "--once", "Who is that?", "--max-new-tokens", "8")
    assert baton(tiny_chain, monkeypatch, *arguments, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["prompt"] == "Who is that?"
    assert baton(tiny_chain, monkeypatch, *arguments) == 0
    assert capsys.readouterr().out == data["reply"] + "\n"


def chat(chain: Any, monkeypatch: pytest.MonkeyPatch, lines: str, *options: str) -> list[list[dict[str, Any]]]:
    """The messages that each reply was asked for, when `lines` are typed."""
    asked: list[list[dict[str, Any]]] = []
    from baton import chat as rendering

    encode = rendering.encode_prompt

    def record(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
        asked.append(messages)
        return encode(tokenizer, messages)

    monkeypatch.setattr(rendering, "encode_prompt", record)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert baton(chain, monkeypatch, "chat", "tiny/sft:candidate", "--max-new-tokens", "4", *options) == 0
    return asked


def test_chat_remembers_until_it_is_reset(tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    asked = chat(tiny_chain, monkeypatch, "one\n\ntwo\n/reset\nthree\n/quit\nfour\n", "--system", "Be brief.")
    replies = capsys.readouterr().out.splitlines()
    assert [[message["role"] for message in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert [messages[-1]["content"] for messages in asked] == ["one", "two", "three"]
    assert asked[1][2]["content"].splitlines() == replies[: len(asked[1][2]["content"].splitlines())]


def test_chat_ends_with_its_input(tiny_chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(chat(tiny_chain, monkeypatch, "one\ntwo")) == 2


def test_chat_goes_on_after_a_conversation_that_is_too_long(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    asked = chat(tiny_chain, monkeypatch, f"{'a ' * 2000}\nhello\n")
    assert "/reset forgets the conversation" in capsys.readouterr().err
    assert asked[1] == [{"role": "user", "content": "hello"}]


def test_ctrl_c_keeps_what_has_been_said(tiny_chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from baton import generate as generation

    whole = generation.generate

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        for count, step in enumerate(whole(*arguments, **settings)):
            if count == 2:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(generation, "generate", interrupted)
    asked = chat(tiny_chain, monkeypatch, "one\ntwo\n")
    assert [message["role"] for message in asked[1]] == ["user", "assistant", "user"]


MISTAKES = [
    (("chat", "tiny/base:main"), "no chat template"),
    (("chat", "tiny/sft:candidate", "--json"), "--once"),
    (("chat", "tiny/sft:candidte"), "tiny/sft:candidate"),
    (("chat", "tiny/sfd:candidate"), "tiny/sft"),
    (("chat", "tiny/reward:candidate", "--once", "a"), "reward"),
    (("generate", "tiny/reward:candidate", "a"), "which does not write text"),
    (("score", "tiny/reward:candidate", "a"), "--prompt PROMPT"),
    (("score", "tiny/base:main", "a", "--prompt", "b"), "no use for --prompt"),
    (("score", "tiny/base:main", ""), "no text to score"),
    ((*BEST_OF[:5], "--best-of", "4"), "go together"),
    (BEST_OF, "go together"),
    ((*BEST_OF, "--best-of", "1"), "2 and more"),
    ((*BEST_OF, "--best-of", "4", "--temperature", "0"), "above 0"),
    ((*BEST_OF, "--best-of", "4", "--candidates", "2"), "leave one out"),
    (("generate", "tiny/base:main", *BEST_OF[2:], "--best-of", "4"), "no chat template"),
    (("generate", "tiny/reward:candidate", *BEST_OF[2:], "--best-of", "4"), "does not write text"),
    ((*BEST_OF[:6], "tiny/sft:candidate", "--best-of", "4"), "expected a version of the reward stage"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(
    tiny_chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: Output, arguments: tuple[str, ...], message: str
) -> None:
    assert baton(tiny_chain, monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err
    assert captured.out == ""
