"""The ladder in miniature: four sizes by the real pretrain program, in this process; prediction before outcome."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from baton.chain import Link, Options, plan
from baton.errors import UserError
from baton.preemption import EXIT_CODE, Preempted
from baton.recipe import LadderRecipe, load_recipe
from baton.registry import Registry
from baton.scaling import Point, predict
from stages import ladder
from tests.conftest import write_world

RECIPE = """
stage: ladder
publish: {{name: tiny/ladder, alias: main}}
registry: {root}/registry
run_dir: {root}/runs/ladder
dtype: float32
data: {{train: [{{path: {world}/text_train.jsonl}}], eval: [{{path: {world}/text_eval.jsonl}}]}}
tokenizer: {{vocab_size: 400}}
sizes:
  - {{name: a, model: {{hidden_size: 8, layers: 1, heads: 2, intermediate_size: 16, dtype: float32}}}}
  - {{name: b, model: {{hidden_size: 16, layers: 1, heads: 2, intermediate_size: 32, dtype: float32}}}}
  - {{name: c, model: {{hidden_size: 16, layers: 2, heads: 2, intermediate_size: 32, dtype: float32}}}}
  - {{name: d, model: {{hidden_size: 16, layers: 3, heads: 2, intermediate_size: 32, dtype: float32}}}}
tokens_per_parameter: 0.05
train: {{sequence_length: 64, learning_rate: 1.0e-2, tokens_per_batch: 128}}
"""


@dataclass
class Climb:
    """A ladder that was run, and what ran in it."""

    root: Path
    started: list[str] = field(default_factory=list)  # the sizes whose program was started, in order
    prediction_there: list[bool] = field(default_factory=list)  # when each was started

    @property
    def folder(self) -> Path:
        return self.root / "runs" / "ladder"

    def recipe(self, *overrides: str) -> LadderRecipe:
        return load_recipe(self.root / "ladder.yaml", list(overrides), LadderRecipe)

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def program(self, code_for: Callable[[str], int] = lambda size: 0) -> Callable[..., int]:
        """What stands for `baton.chain.run_stage`: the program in this process, or the exit code that is wanted."""

        def run_stage(link: Link, config_file: Path | None, console: Console) -> int:
            from baton.build import up_to_date
            from stages.pretrain import main

            if up_to_date(link.recipe) is not None:
                return 0
            size = Path(link.recipe.run_dir).name
            self.started.append(size)
            self.prediction_there.append((self.folder / "prediction.json").is_file())
            code = code_for(size)
            if code == 0:
                main(link.recipe)  # type: ignore[arg-type]
            return code

        return run_stage


@pytest.fixture(scope="module")
def climbed(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Climb:
    """A ladder that was stopped at its last size, and then run to its end."""
    climb = Climb(tmp_path_factory.mktemp("ladder"))
    write_world(climb.root / "world")
    (climb.root / "ladder.yaml").write_text(RECIPE.format(root=climb.root, world="world"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "run_stage", climb.program(lambda size: EXIT_CODE if size == "d" else 0))
        with pytest.raises(Preempted, match="size d was stopped"):
            ladder.main(climb.recipe())
        (climb.folder / "first.json").write_bytes((climb.folder / "prediction.json").read_bytes())
        time.sleep(1.1)  # a prediction made again would have another time
        patch.setattr(ladder, "run_stage", climb.program())
        ladder.main(climb.recipe())
    return climb


def test_each_size_once_and_the_last_after_the_prediction(climbed: Climb) -> None:
    assert climbed.started == ["a", "b", "c", "d", "d"]
    assert climbed.prediction_there == [False, False, False, True, True]


def test_the_prediction_stands(climbed: Climb) -> None:
    assert (climbed.folder / "prediction.json").read_bytes() == (climbed.folder / "first.json").read_bytes()
    assert climbed.read("prediction.json")["before_training"] is True
    assert climbed.read("ladder.json")["prediction"] == climbed.read("prediction.json")


def test_the_prediction_is_of_the_published_small_sizes(climbed: Climb) -> None:
    registry, record = Registry(climbed.root / "registry"), climbed.read("prediction.json")
    versions = [registry.resolve(f"tiny/ladder-{size}:main") for size in "abc"]
    assert [each["digest"] for each in record["based_on"]] == [version.digest for version in versions]
    assert [each["loss"] for each in record["based_on"]] == [
        version.manifest["metrics"]["eval/loss"] for version in versions
    ]
    points = [Point(each["flops"], each["loss"]) for each in record["based_on"]]
    assert record["loss"] == pytest.approx(predict(points, record["of"]["flops"]).loss)


def test_the_outcome_is_the_largest_model_s(climbed: Climb) -> None:
    outcome = climbed.read("ladder.json")
    version = Registry(climbed.root / "registry").resolve("tiny/ladder-d:main")
    loss = version.manifest["metrics"]["eval/loss"]
    assert outcome["outcome"] == loss
    assert outcome["error"] == pytest.approx((outcome["prediction"]["loss"] - loss) / loss)
    assert [size["size"] for size in outcome["sizes"]] == ["a", "b", "c", "d"]
    assert outcome["sizes"][3]["digest"] == version.digest
    assert (climbed.folder / "plots" / "ladder.png").stat().st_size > 5000
    status = climbed.read("status.json")
    assert (status["stage"], status["state"], status["version"]) == ("ladder", "done", version.ref)


def test_what_was_predicted_is_said_of_the_version(climbed: Climb) -> None:
    registry = Registry(climbed.root / "registry")
    said = registry.attestations(registry.resolve("tiny/ladder-d:main"), "evaluation")
    assert len(said) == 1 and "tiny/ladder-a:1" in said[0].body["note"]
    assert said[0].body["metrics"]["ladder/predicted_loss"] == climbed.read("prediction.json")["loss"]
    assert said[0].body["metrics"]["ladder/error"] == climbed.read("ladder.json")["error"]


def test_one_vocabulary_for_all(climbed: Climb) -> None:
    registry = Registry(climbed.root / "registry")
    digests = {registry.resolve(f"tiny/ladder-{size}:main").manifest["tokenizer_digest"] for size in "abcd"}
    assert len(digests) == 1


def test_again_nothing_is_done(climbed: Climb, monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(climbed.started)
    monkeypatch.setattr(ladder, "run_stage", climbed.program())
    version = ladder.main(climbed.recipe())
    assert climbed.started == before
    assert climbed.read("status.json")["state"] == "up to date"
    assert len(Registry(climbed.root / "registry").attestations(version, "evaluation")) == 1


def test_a_prediction_after_the_outcome_says_so(climbed: Climb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "run_stage", climbed.program())
    kept = (climbed.folder / "prediction.json").read_bytes()
    try:
        (climbed.folder / "prediction.json").unlink()
        version = ladder.main(climbed.recipe())
        assert climbed.read("prediction.json")["before_training"] is False
        assert len(Registry(climbed.root / "registry").attestations(version, "evaluation")) == 1
    finally:
        (climbed.folder / "prediction.json").write_bytes(kept)


def test_another_last_size_gets_its_own_prediction(climbed: Climb, monkeypatch: pytest.MonkeyPatch) -> None:
    made_at = climbed.read("prediction.json")["made_at"]
    kept = (climbed.folder / "prediction.json").read_bytes()
    monkeypatch.setattr(ladder, "run_stage", climbed.program(lambda size: EXIT_CODE))
    text = (climbed.root / "ladder.yaml").read_text()
    (climbed.root / "ladder.yaml").write_text(text.replace("name: d", "name: e").replace("layers: 3", "layers: 4"))
    try:
        with pytest.raises(Preempted, match="size e"):
            ladder.main(climbed.recipe())
        assert climbed.read("prediction.json")["of"]["size"] == "e"
        assert (climbed.folder / f"prediction-{made_at.replace(':', '')}.json").read_bytes() == kept
    finally:
        (climbed.root / "ladder.yaml").write_text(text)
        (climbed.folder / "prediction.json").write_bytes(kept)


@pytest.mark.parametrize(
    ("code", "kind"), [(2, UserError), (1, RuntimeError), (143, Preempted), (130, Preempted), (EXIT_CODE, Preempted)]
)
def test_a_size_that_fails_ends_the_ladder(
    climbed: Climb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, kind: type[Exception]
) -> None:
    fresh = Climb(climbed.root)
    monkeypatch.setattr(ladder, "run_stage", fresh.program(lambda size: code))
    with pytest.raises(kind, match="size a"):
        ladder.main(fresh.recipe(f"registry={tmp_path / 'registry'}", f"run_dir={tmp_path / 'run'}"))
    assert fresh.started == ["a"] and not (tmp_path / "run" / "prediction.json").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("processes=3", "size a: a batch of 2 rows cannot be split evenly over 3 processes"),
        (
            "data.train=[{path: {world}/text_train.jsonl, max_epochs: 0.05}]",
            r"size .: training needs .* under max_epochs .* or lower tokens_per_parameter",
        ),
    ],
    ids=["rows", "text"],
)
def test_what_a_size_could_not_do_is_said_before_any_is_trained(
    climbed: Climb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    world = climbed.root / "world"
    recipe = climbed.recipe(
        override.replace("{world}", str(world)),
        f"run_dir={tmp_path}/run",
        f"registry={tmp_path}/registry",
    )
    monkeypatch.setattr(ladder, "run_stage", lambda *_: pytest.fail("a size was started"))
    with pytest.raises(UserError, match=said):
        ladder.main(recipe)


def test_several_processes_of_the_ladder_itself(climbed: Climb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched, but the ladder is one"):
        ladder.main(climbed.recipe())


def test_the_chain_runs_a_ladder(climbed: Climb, tmp_path: Path) -> None:
    (link,) = plan(climbed.root, ["tokens_per_parameter=1"], Options())
    assert link.stage == "ladder" and isinstance(link.recipe, LadderRecipe) and link.recipe.tokens_per_parameter == 1
    config = tmp_path / "accelerate.yaml"
    config.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    (link,) = plan(climbed.root, [], Options(config_file=config))
    assert isinstance(link.recipe, LadderRecipe) and link.recipe.config_file == str(config)
    assert link.processes == 2
