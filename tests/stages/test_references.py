"""The reference's scores by prompt: each answered once, by whichever rank, and known to all."""

from types import SimpleNamespace
from typing import Any

import pytest

from stages import references as module
from stages.prompts import PromptRow
from stages.references import References, prompt_key

ROWS = [PromptRow([{"role": "user", "content": str(at)}], [at, 7], {"answer": at}) for at in range(5)]


class Ranks:
    """A scorer of every rank; what they collect is what all of them would have sent."""

    def __init__(self, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.answered = world, list[list[int]]()
        self.sent: list[Any] = []
        monkeypatch.setattr(module, "_answer", lambda scorer, tokenizer, rows: self.answer(rows))
        monkeypatch.setattr(module, "_score", self.score)

    def answer(self, rows: Any) -> list[Any]:
        self.answered.append([row.ids[0] for row in rows])
        return [SimpleNamespace(reply=SimpleNamespace(ids=[1] * row.ids[0])) for row in rows]

    def score(self, scorer: Any, episodes: Any, rows: Any, labels: Any) -> list[Any]:
        return [{label: [row.ids[0] / 3, row.ids[0] / 7] for label in labels} for row in rows]

    def prepare(self, rows: Any, labels: list[str], known: References | None = None) -> tuple[References, list[str]]:
        """As every rank in turn: first to see what each sends, then with all of it."""
        said: list[str] = []
        for collecting in (True, False):
            sent: list[list[Any]] = []
            for rank in range(self.world):
                references = References()
                references.scores = dict(known.scores) if known else {}
                mine: list[Any] = []
                sent.append(mine)

                def collect(item: Any, mine: list[Any] = mine, collecting: bool = collecting) -> list[Any]:
                    mine.append(item)
                    return [item] if collecting else [theirs[len(mine) - 1] for theirs in self.sent]

                spread = SimpleNamespace(world=self.world, rank=rank, collect=collect)
                scorer: Any = SimpleNamespace(spread=spread)
                tokenizer: Any = None
                references.prepare(scorer, tokenizer, rows, labels, said.append)
            self.sent = sent
        return references, said[-1:]


@pytest.mark.parametrize("world", [1, 2, 7])
def test_the_scores_do_not_depend_on_the_number_of_ranks(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more ranks than prompts, those without one take the first, so that all make the same passes."""
    ranks = Ranks(world, monkeypatch)
    found, said = ranks.prepare([*ROWS, ROWS[2]], ["r"])
    assert found.scores == {prompt_key(row): {"r": [at / 3, at / 7]} for at, row in enumerate(ROWS)}
    assert "answered 5 prompts with 10 tokens, scored by r" in said[0]
    assert found.of("r", [ROWS[3], ROWS[1]]) == [[1.0, 1 / 3], [3 / 7, 1 / 7]]
    assert all(ranks.answered), "no rank is idle"


def test_only_what_is_not_known_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(1, monkeypatch)
    known, _ = ranks.prepare(ROWS[:3], ["r"])
    ranks.answered.clear()
    more, _ = ranks.prepare(ROWS, ["r"], known)
    assert ranks.answered[0] == [3, 4] and len(more.scores) == 5
    ranks.answered.clear()
    assert ranks.prepare(ROWS, [], known)[1] == [] and ranks.prepare(ROWS[:3], ["r"], known)[1] == []
    assert not ranks.answered
    both, _ = ranks.prepare(ROWS[:1], ["gold"], known)
    assert set(both.scores[prompt_key(ROWS[0])]) == {"r", "gold"}


def test_a_prompt_with_other_columns_is_another_prompt() -> None:
    """A function may score by them."""
    other = PromptRow(ROWS[0].messages, ROWS[0].ids, {"answer": "b"})
    assert prompt_key(ROWS[0]) != prompt_key(other)
    assert prompt_key(ROWS[0]) == prompt_key(PromptRow(ROWS[0].messages, ROWS[0].ids, {"answer": 0}))
