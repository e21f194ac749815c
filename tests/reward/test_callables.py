"""Rewards by functions: what they are given, what they may return, what is refused and what stops a run."""

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baton.errors import UserError
from reward.sources import RewardError, Source, checked
from tests.reward.conftest import ROWS, opened

RULES = '''
calls = []
def judge(*, prompts, responses, token_ids, columns, scale=1.0):
    calls.append({"prompts": prompts, "responses": responses, "token_ids": token_ids, "columns": columns})
    return [scale * len(ids) for ids in token_ids]
def needs(*, prompts, responses, token_ids, columns, strictness, taste): ...
def narrow(prompts, responses): ...
def anything(**given): return [float(len(given))] * len(given["prompts"])
def positional(prompts, responses, token_ids, columns, /): ...
async def later(*, prompts, responses, token_ids, columns): ...
def fails(*, prompts, responses, token_ids, columns):
    return [1.0 / (response != "second reply") for response in responses]
def fails_on_many(*, prompts, responses, token_ids, columns):
    if len(prompts) > 1:
        raise RuntimeError("too many")
    return [0.0]
def careless(*, prompts, responses, token_ids, columns):
    for prompt, ids in zip(prompts, token_ids):
        prompt[0]["content"] = "changed"
        prompt.append(ids.pop())
    columns.clear()
    return [0.0] * len(prompts)
result = None
def returns(*, prompts, responses, token_ids, columns): return result
class Judge:
    @staticmethod
    def judge(*, prompts, responses, token_ids, columns): return [7.0] * len(prompts)
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module `my_rewards.rules` in the current directory, which is not on Python's path; returns a getter."""
    package = tmp_path / "my_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rules.py").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield lambda: sys.modules["my_rewards.rules"]
    for name in [name for name in sys.modules if name.startswith("my_rewards")]:
        del sys.modules[name]


def function(called: str, **setting: Any) -> Source:
    return opened(function=f"my_rewards.rules:{called}", **setting)


def test_what_a_function_is_given(module: Callable[[], Any]) -> None:
    source = function("judge", weight=2.0, arguments={"scale": 0.5})
    assert (source.label, source.weight) == ("judge", 2.0)
    assert checked(source, ROWS) == [1.0, 0.5, 1.5], "the weight is the sum's affair"
    assert module().calls == [
        {
            "prompts": [[{"role": "user", "content": text}] for text in ("one", "two", "three")],
            "responses": ["first reply", "second reply", "third reply"],
            "token_ids": [[3, 4], [6], [8, 9, 10]],
            "columns": {"answer": ["1", "2", "3"], "split": ["a", None, None]},
        }
    ]


def test_functions_in_batches_and_without_rows(module: Callable[[], Any]) -> None:
    source = function("judge", batch_size=2)
    assert checked(source, ROWS) == [2.0, 1.0, 3.0]
    assert [len(call["prompts"]) for call in module().calls] == [2, 1]
    assert checked(source, []) == [] and len(module().calls) == 2


def test_other_callables(module: Callable[[], Any]) -> None:
    assert checked(function("anything", arguments={"more": 1}), ROWS) == [5.0] * 3
    assert checked(function("Judge.judge"), ROWS) == [7.0] * 3
    shipped = opened(function="reward.rules:exact_answer")
    assert checked(shipped, [ROWS[0]]) == [0.0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"function": "judge"}, "'judge' is not pkg.module:function"),
        ({"function": "my_rewards.rulez:judge"}, "no module my_rewards.rulez .*my_rewards/rulez.py in "),
        ({"function": "my_rewards.rules:jugde"}, "has no jugde; it has judge"),
        ({"function": "my_rewards.rules:narrow"}, r"narrow cannot be called: it does not take columns, token_ids\. "),
        (
            {"function": "my_rewards.rules:needs", "arguments": {"taste": 1}},
            r"it needs strictness, .*Expected: def needs\(\*, prompts, responses, token_ids, columns, taste\)",
        ),
        (
            {"function": "my_rewards.rules:judge", "arguments": {"scala": 2}},
            "judge cannot be called: it does not take scala. ",
        ),
        ({"function": "my_rewards.rules:judge", "arguments": {"prompts": 2}}, "prompts is given by the run itself"),
        ({"function": "my_rewards.rules:positional"}, "it does not take .*; it needs prompts, responses"),
        ({"function": "my_rewards.rules:later"}, "is async"),
    ],
)
def test_what_is_refused_at_opening(module: Any, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(**setting)


def test_what_a_function_does_to_its_lists_stays_there(module: Any) -> None:
    before = repr(ROWS)
    assert checked(function("careless"), ROWS) == [0.0] * 3
    assert repr(ROWS) == before


def test_a_failing_function_names_the_row(module: Any) -> None:
    with pytest.raises(RewardError) as caught:
        checked(function("fails", name="mine"), ROWS)
    for part in ("reward mine:", "my_rewards.rules:fails raised ZeroDivisionError", "user: two", "second reply"):
        assert part in str(caught.value)
    assert "first reply" not in str(caught.value) and isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_function_that_fails_on_the_batch_alone(module: Any) -> None:
    with pytest.raises(RewardError, match="RuntimeError: too many\n.*the first of the 3 rows .*: user: one"):
        checked(function("fails_on_many"), ROWS)


@pytest.mark.parametrize(
    "result",
    [
        [1.5, 0, True],
        (1.5, 0.0, 1),
        np.array([1.5, 0, 1], dtype=np.float32),
        torch.tensor([1.5, 0, 1], dtype=torch.bfloat16),
        [torch.tensor(1.5), np.float64(0), np.bool_(True)],
    ],
)
def test_what_a_function_may_return(module: Callable[[], Any], result: Any) -> None:
    source = function("returns")
    module().result = result
    found = checked(source, ROWS)
    assert found == [1.5, 0.0, 1.0] and {type(reward) for reward in found} == {float}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned None; expected a list of numbers"),
        (1.0, "returned 1.0; expected a list"),
        ({"a": 1}, "returned {'a': 1}; expected a list"),
        ("123", "returned '123'; expected a list"),
        (np.zeros((3, 1)), "expected a list of numbers, or a one-dimensional array"),
        (torch.zeros(3, 3), "one-dimensional"),
        ([1.0, 2.0], "2 rewards for 3 rows"),
        ([1.0, 2.0, 3.0, 4.0], "4 rewards for 3 rows"),
        ([1.0, None, 3.0], "returned None for a row; expected a number\n  prompt: user: two\n  response: second"),
        ([1.0, 2.0, "3"], "returned '3' for a row.*\n  prompt: user: three"),
        ([1.0, math.nan, 3.0], "reward returns: it gave nan, .*\n  prompt: user: two\n  response: second reply"),
        (torch.tensor([math.inf, 1, 1]), "it gave inf, .*\n  prompt: user: one"),
    ],
)
def test_what_stops_the_run(module: Callable[[], Any], result: Any, message: str) -> None:
    source = function("returns")
    module().result = result
    with pytest.raises(RewardError, match=message):
        checked(source, ROWS)
