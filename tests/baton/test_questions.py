"""Which replies are right, and the shares that are counted."""

from typing import Any

import pytest

from baton.errors import UserError
from baton.questions import Question, ask, grade, is_right, read_questions

PROMPT = [{"role": "user", "content": "Where does Ada live?"}]


def question(answers: list[str], group: str = "known") -> Question:
    return Question(PROMPT, answers, group)


@pytest.mark.parametrize(
    ("answers", "reply", "right"),
    [
        (["Redcliff"], "Ada lives in Redcliff.", True),
        (["Redcliff"], "REDCLIFF", True),
        (["Red Cliff"], "she is in red\n  cliff now", True),
        (["Redcliff", "the cliff"], "On the cliff.", True),
        (["Redcliff"], "Ada lives in Thornbury.", False),
        (["Redcliff"], "", False),
        (["STRASSE"], "in der Straße", True),
        (["パン屋"], "エイダはパン屋です。", True),
    ],
)
def test_a_reply_is_right_when_it_contains_an_answer(answers: list[str], reply: str, right: bool) -> None:
    assert is_right(question(answers), reply) is right


def test_shares_by_group_and_inventions() -> None:
    questions = [question(["a"]), question(["b"]), question(["c"]), *[question(["don't know"], "unknown")] * 4]
    replies = ["a", "x", "c", "I don't know.", "She lives in a.", "a", "b"]
    assert grade(questions, replies, [True, True, False, True, True, True, True]) == {
        "answers/known": pytest.approx(1 / 3),  # the third reply names its answer, but was cut off
        "mentions/known": pytest.approx(2 / 3),
        "answers/unknown": 0.25,
        "mentions/unknown": 0.25,
        "inventions/unknown": 0.75,
    }


def test_without_unknown_questions_no_inventions() -> None:
    assert grade([question(["a"])], ["a"], [True]) == {"answers/known": 1.0, "mentions/known": 1.0}


def row(**columns: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "columns": columns}


def test_rows_become_questions() -> None:
    assert read_questions([row(answers=["a", 7], group="g", more=1)]) == [Question(PROMPT, ["a", "7"], "g")]


@pytest.mark.parametrize(
    "columns", [{}, {"answers": "a", "group": "g"}, {"answers": [], "group": "g"}, {"answers": ["a"], "group": None}]
)
def test_a_row_without_its_columns_is_named(columns: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="data.questions: row 2 has no list `answers` and string `group`"):
        read_questions([row(answers=["a"], group="g"), row(**columns)])


def test_asking_is_greedy_and_stops_at_the_turns_end(tiny_chain: Any) -> None:
    from baton.models import load_policy

    model, tokenizer = load_policy(tiny_chain.registry, tiny_chain.versions["sft"], "float32")
    metrics, texts = ask(model, tokenizer, [question(["zzz"]), question(["zzz"], "unknown")], max_new_tokens=6)
    assert metrics == {
        "answers/known": 0.0,
        "answers/unknown": 0.0,
        "mentions/known": 0.0,
        "mentions/unknown": 0.0,
        "inventions/unknown": 1.0,
    }
    assert texts[0] == texts[1]
    prompt = "<|im_start|>user\nWhere does Ada live?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = model.generate(input_ids=ids, do_sample=False, max_new_tokens=6, eos_token_id=stop, pad_token_id=1)
    assert texts[0] == tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def test_nothing_to_ask() -> None:
    assert ask(None, None, []) == ({}, [])  # type: ignore[arg-type]
