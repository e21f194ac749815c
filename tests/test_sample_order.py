"""Whole pretrainings, plain or interrupted and resized (1 -> 2 -> 1 processes): every step gets the same samples."""

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RECIPES, TinyChain, program_environment, run_stage, write_world

STEPS, ROWS = 6, 4
SETTINGS = ["train.save_every=2", "data.eval=[]", "data.questions=[]", "ngram_order=null"]

PROGRAM = """
from pathlib import Path

from baton.recipe import PretrainRecipe
from baton.run import program
from stages.pretrain import main
from tests.test_sample_order import asked_to_end, recorded

with recorded(Path({record!r}), {end_at}, asked_to_end):
    program(main, PretrainRecipe)
"""


class Crashed(Exception):
    """Stands for a power cut."""


def crash() -> None:
    raise Crashed


def asked_to_end() -> None:
    """As a cluster manager asks."""
    os.kill(os.getpid(), signal.SIGTERM)


def digest(ids: Any) -> str:
    """A row's identity: its tokens."""
    return hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest()[:16]


@contextmanager
def recorded(record: Path, end_at: int | None = None, end: Any = None) -> Iterator[None]:
    """Inside, each micro-batch that a Trainer trains on leaves a line in `record`; at step `end_at` there is an end."""
    from transformers import Trainer

    original = Trainer.training_step

    def step(trainer: Any, model: Any, inputs: dict[str, Any], *others: Any) -> Any:
        if trainer.state.global_step == end_at:
            end()
        line = {"step": trainer.state.global_step, "rows": [digest(ids) for ids in inputs["input_ids"]]}
        # one write of a short line: two processes share the file
        with record.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        return original(trainer, model, inputs, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", step)
        yield


def samples(record: Path) -> dict[int, list[str]]:
    """{step: its rows, sorted}."""
    found: dict[int, list[str]] = {}
    for line in record.read_text().splitlines():
        read = json.loads(line)
        found.setdefault(read["step"], []).extend(read["rows"])
    return {step: sorted(rows) for step, rows in sorted(found.items())}


def by_itself(chain: TinyChain) -> dict[int, list[str]]:
    """What `samples` would find, read from the prepared text by recipe, seed and step alone."""
    from baton.corpus.prepare import prepared_corpus
    from baton.corpus.rows import training_rows
    from baton.models import load_tokenizer

    recipe = chain.recipe("pretrain", *SETTINGS)
    corpus = prepared_corpus(recipe)
    pad_id = load_tokenizer(corpus.tokenizer_folder).pad_token_id
    assert isinstance(pad_id, int)
    rows = training_rows(corpus, recipe.data, recipe.train, pad_id)
    return {step: sorted(digest(rows[step * ROWS + at]["input_ids"]) for at in range(ROWS)) for step in range(STEPS)}


def run_recorded(chain: TinyChain, record: Path, *ending: Any) -> None:
    with recorded(record, *ending):
        run_stage("pretrain", chain.recipe("pretrain", *SETTINGS))


def run_as_two(chain: TinyChain, record: Path, end_at: int) -> None:
    """On two processes, both of which are asked to end in step `end_at`."""
    file = record.with_suffix(".py")
    file.write_text(PROGRAM.format(record=str(record), end_at=end_at))
    command = chain.launched("pretrain", "processes=2", *SETTINGS, processes=2)
    at = command.index("stages.pretrain")
    environment = program_environment("pretrain", 2) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command[: at - 1], str(file), *command[at + 1 :]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    status = json.loads((chain.run_dir("pretrain") / "status.json").read_text())
    assert status["state"] == "preempted", done.stdout + done.stderr


@pytest.fixture
def chains(tmp_path: Path, tiny_cache: Path) -> list[TinyChain]:
    """Two folders to pretrain in, with the same text."""
    found = []
    for name in ("plain", "cut"):
        root = tmp_path / name
        write_world(root / "world")
        (root / "pretrain.yaml").write_text(RECIPES["pretrain"].format(root=root))
        found.append(TinyChain(root, {}))
    return found


def test_every_step_gets_the_same_samples_however_it_was_reached(chains: list[TinyChain], tmp_path: Path) -> None:
    plain, cut = chains
    run_recorded(plain, tmp_path / "plain.jsonl")
    expected = samples(tmp_path / "plain.jsonl")
    assert expected == by_itself(plain)
    assert all(len(rows) == ROWS for rows in expected.values())
    assert len({row for rows in expected.values() for row in rows}) > ROWS * STEPS / 2, "the steps' samples differ"

    # alone until the power fails in step 3; checkpoint 2 is there
    with pytest.raises(Crashed):
        run_recorded(cut, tmp_path / "one.jsonl", 3, crash)
    # two go on from there, and are asked to end in step 3, after which they save
    run_as_two(cut, tmp_path / "two.jsonl", 3)
    # one goes on to the end
    run_recorded(cut, tmp_path / "three.jsonl")

    parts = [samples(tmp_path / f"{name}.jsonl") for name in ("one", "two", "three")]
    assert [list(part) for part in parts] == [[0, 1, 2], [2, 3], [4, 5]]
    for part in parts:
        assert part == {step: expected[step] for step in part}
