"""PPO's data as token ids: what is kept, cut, dropped and refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from baton.chat import encode_dialogue, encode_prompt
from baton.errors import UserError
from baton.models import load_tokenizer
from stages.prompts import Prompts, read_prompts

ROWS = [
    {"prompt": "Who is it?", "answer": 7, "level": "easy"},
    {"prompt": "Say <|im_end|> to me."},
    {"prompt": "long " * 200},
    {"prompt": [{"role": "user", "content": "And where?"}], "answer": None},
]


class Asked:
    """As much of a run as reading data needs."""

    def __init__(self, recipe: Any) -> None:
        self.recipe, self.said = recipe, []

    def say(self, text: str) -> None:
        self.said.append(text)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def read(tiny_chain: Any, tmp_path: Path) -> Any:
    """Prompts of the tiny chain's recipe with `overrides`, and what was said; files start at tmp_path."""
    tokenizer = load_tokenizer(tiny_chain.folder("sft"))

    def run(*overrides: str) -> tuple[Prompts, list[str], Any]:
        run: Any = Asked(tiny_chain.recipe("ppo", "data.eval=[]", "data.questions=[]", *overrides))
        return read_prompts(run, tokenizer, []), run.said, tokenizer

    return run


def test_prompts_keep_their_columns(read: Any, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    prompts, said, tokenizer = read(f"data.train=[{{path: {tmp_path}/rows.jsonl, format: prompts}}]")
    assert prompts.eval == prompts.ptx == []
    rows = sorted(prompts.train, key=lambda row: row.messages[0]["content"], reverse=True)
    assert [row.messages[-1]["content"] for row in rows] == ["Who is it?", "And where?"]
    assert rows[0].columns["answer"] == 7 and rows[0].columns["level"] == "easy"
    for row in rows:
        assert row.ids == encode_prompt(tokenizer, row.messages)
    assert "train: 1 prompts that spell out a special token dropped" in said
    assert "train: 1 prompts longer than 80 tokens dropped" in said


def test_text_and_dialogues_are_mixed_in_by_pieces_of_an_episodes_length(read: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A child asked the baker for bread and a stone for the road. " * 20)
    dialogue = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In the town."}]
    long = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "Never seen."}]
    write(tmp_path / "chat.jsonl", [{"messages": dialogue}, {"messages": long}])
    prompts, _, tokenizer = read(
        f"data.ptx=[{{path: {tmp_path}/text.txt}}, {{path: {tmp_path}/chat.jsonl}}]", "ppo.ptx_coefficient=0.1"
    )
    limit = 80 + 8
    texts, chats = prompts.ptx[:-1], prompts.ptx[-1]
    assert all(len(ids) <= limit and len(ids) == len(in_loss) and all(in_loss) for ids, in_loss in texts)
    assert [len(ids) for ids, _ in texts[:-1]] == [limit] * (len(texts) - 1) and len(texts) > 2
    joined = tokenizer.decode([token for ids, _ in texts for token in ids])
    assert joined.strip().startswith("A child asked") and joined.count("bread") == 20
    # the long one's reply lies beyond what an episode may have: nothing of it is in the loss
    assert chats == encode_dialogue(tokenizer, dialogue)
    spoken = tokenizer.decode([token for token, chosen in zip(*chats, strict=True) if chosen])
    assert "In the town." in spoken and "Where" not in spoken


def test_nothing_left_is_refused(read: Any, tmp_path: Path) -> None:
    long = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "Never seen."}]
    write(tmp_path / "chat.jsonl", [{"messages": long}])
    with pytest.raises(UserError, match=r"data.ptx: no row is left"):
        read(f"data.ptx=[{{path: {tmp_path}/chat.jsonl}}]", "ppo.ptx_coefficient=0.1")
    write(tmp_path / "rows.jsonl", ROWS[2:3])
    with pytest.raises(UserError, match=r"data.train: none of 1 prompts is left.*max_prompt_tokens = 80, which"):
        read(f"data.train=[{{path: {tmp_path}/rows.jsonl, format: prompts}}]")
