"""The chain: order, overrides, what is skipped, how failures end it. The stages are small programs of the test."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from baton import launch
from baton.chain import Options, plan, route_overrides, run
from baton.errors import UserError
from baton.recipe import Recipe

SOURCE = {"path": "data.jsonl"}
TOKENS = {"steps": 10, "learning_rate": 0.001, "tokens_per_batch": 64, "sequence_length": 32}
RECIPES = {
    "world": {"out": "out", "people": 4, "text_only": 2, "documents": 8},
    "pretrain": {"mode": "load", "base": "../model", "publish": {"name": "t/base", "alias": "main"}},
    "sft": {"base": "t/base:main", "publish": {"name": "t/sft"}, "data": {"train": [SOURCE]}, "train": TOKENS},
    "reward": {
        "sft": "t/sft:candidate",
        "publish": {"name": "t/reward"},
        "data": {"train": [SOURCE]},
        "train": {"steps": 10, "learning_rate": 0.001, "pairs_per_batch": 4, "max_length": 32},
    },
    "ppo": {
        "sft": "t/sft:candidate",
        "reward": "t/reward:candidate",
        "publish": {"name": "t/ppo"},
        "data": {"train": [SOURCE]},
        "rollout": {"max_new_tokens": 8},
        "train": {"steps": 10, "learning_rate": 0.001, "episodes_per_batch": 4},
    },
}
ORDER = list(RECIPES)

PROGRAM = """
import json, os, pathlib, sys, yaml
recipe = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())
stage, run_dir = recipe["stage"], pathlib.Path(recipe["run_dir"])
acts = json.loads(pathlib.Path("acts.json").read_text()).get(stage, {})
with open("order.txt", "a") as order:
    order.write(" ".join([stage, *sys.argv[2:]]) + "\\n")
print("hello from", stage)
if acts.get("state", "done"):
    run_dir.mkdir(parents=True, exist_ok=True)
    status = {"state": acts.get("state", "done"), "stage": stage, "message": acts.get("message", ""), "exit_code": 0,
              "version": f"t/{stage}:1"}
    (run_dir / "status.json").write_text(json.dumps(status))
sys.exit(acts.get("code", 0))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of five recipes, whose programs note that they ran and end as `acts` says."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for stage, content in RECIPES.items():
        whole = {"stage": stage, "run_dir": f"runs/{stage}", "registry": "registry", **content}
        (recipes / f"{stage}.yaml").write_text(yaml.safe_dump(whole))
    (recipes / SOURCE["path"]).write_text('{"text": "a"}\n')
    (tmp_path / "stub_program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "WITHOUT_ACCELERATE", set(ORDER))
    for stage in ORDER:
        monkeypatch.setitem(launch.PROGRAMS, stage, "stub_program")
    monkeypatch.setattr("baton.build.up_to_date", lambda recipe: None)
    monkeypatch.setattr("baton.chain._check_references", lambda links: None)  # the stubs publish nothing
    act(folder=tmp_path)
    return recipes


def act(folder: Path | None = None, **stages: dict[str, object]) -> None:
    ((folder or Path()) / "acts.json").write_text(json.dumps(stages))


def ran() -> list[str]:
    path = Path("order.txt")
    return path.read_text().splitlines() if path.exists() else []


def run_chain(folder: Path, *overrides: str, options: Options | None = None) -> tuple[int, str]:
    """(exit code, what the chain itself printed)"""
    screen = io.StringIO()
    console = Console(file=screen, width=200, highlight=False)
    return run(folder, list(overrides), options or Options(), console), screen.getvalue()


def test_stages_run_in_order(folder: Path) -> None:
    code, text = run_chain(folder)
    assert code == 0
    assert ran() == ORDER
    assert "t/ppo:1" in text


def test_a_folder_may_hold_some_stages(folder: Path) -> None:
    for stage in ("world", "reward", "ppo"):
        (folder / f"{stage}.yaml").unlink()
    assert run_chain(folder)[0] == 0
    assert ran() == ["pretrain", "sft"]


def test_output_is_shown_and_logged(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_chain(folder, options=Options(only="sft"))
    assert "hello from sft" in capfd.readouterr().out
    assert Path("runs/sft/log.txt").read_text() == "hello from sft\n"


def test_from_and_only(folder: Path) -> None:
    run_chain(folder, options=Options(start="reward"))
    run_chain(folder, options=Options(only="sft"))
    assert ran() == ["reward", "ppo", "sft"]


@pytest.mark.parametrize(
    ("acts", "code", "word"),
    [
        ({"state": "failed", "message": "the loss is nan", "code": 1}, 1, "the loss is nan"),
        ({"state": "refused", "message": "data.jsonl is empty", "code": 1}, 2, "data.jsonl is empty"),
        ({"state": "", "code": 2}, 2, "message is above"),
        ({"state": "running", "code": 9}, 9, "exit code 9"),
        ({"state": "running", "code": 0}, 1, "did not say that it was done"),
        ({"state": "", "code": 0}, 1, "did not say that it was done"),
        ({"state": "", "code": 3}, 3, "exit code 3"),
    ],
)
def test_a_failure_stops_the_chain(folder: Path, acts: dict[str, object], code: int, word: str) -> None:
    act(sft=acts)
    found, text = run_chain(folder)
    assert found == code
    assert ran() == ["world", "pretrain", "sft"]
    assert word in text and "sft" in text and "runs/sft/log.txt" in text


def test_the_status_of_an_earlier_run_is_not_believed(folder: Path) -> None:
    assert run_chain(folder, options=Options(only="sft"))[0] == 0
    act(sft={"state": "", "code": 0})
    assert run_chain(folder, options=Options(only="sft"))[0] == 1


def test_what_is_up_to_date_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def up_to_date(recipe: Recipe) -> str | None:
        asked.append(f"{recipe.stage} after {len(ran())}")
        return "t/sft:3" if recipe.stage == "sft" else None

    monkeypatch.setattr("baton.build.up_to_date", up_to_date)
    code, text = run_chain(folder)
    assert code == 0
    assert ran() == ["world", "pretrain", "reward", "ppo"]
    # asked only once the stages before it have run: what they publish decides
    assert asked == ["world after 0", "pretrain after 1", "sft after 2", "reward after 2", "ppo after 3"]
    assert "sft       up to date  t/sft:3" in text


def test_overrides_reach_the_programs(folder: Path) -> None:
    run_chain(folder, "sft.train.steps=5", "dtype=float32", options=Options(registry="other"))
    assert ran() == [
        "world registry=other",
        "pretrain dtype=float32 registry=other",
        "sft train.steps=5 dtype=float32 registry=other",
        "reward dtype=float32 registry=other",
        "ppo dtype=float32 registry=other",
    ]


ROUTES: list[tuple[str, dict[str, list[str]]]] = [
    # pretrain registers a base here: it has no training section, and is not given one
    ("train.seed=1", {stage: ["train.seed=1"] for stage in ("sft", "reward", "ppo")}),
    ("lora.r=4", {"sft": ["lora.r=4"]}),  # not in the file: the section has defaults
    ("ppo.epochs=2", {"ppo": ["ppo.epochs=2"]}),
    ("ppo.ppo.epochs=2", {"ppo": ["ppo.epochs=2"]}),
    ("ppo.train.steps=2", {"ppo": ["train.steps=2"]}),
    ("sft=t/sft:3", {"reward": ["sft=t/sft:3"], "ppo": ["sft=t/sft:3"]}),
    ("sft.base=a=b", {"sft": ["base=a=b"]}),
    ("people=9", {"world": ["people=9"]}),
    # addressed, so the stage's own check names what is wrong with it
    ("reward.trian.steps=2", {"reward": ["trian.steps=2"]}),
    ("pretrain.train.steps=2", {"pretrain": ["train.steps=2"]}),
]


@pytest.mark.parametrize(("override", "expected"), ROUTES)
def test_where_an_override_goes(folder: Path, override: str, expected: dict[str, list[str]]) -> None:
    routed = route_overrides({stage: folder / f"{stage}.yaml" for stage in ORDER}, [override])
    assert {stage: found for stage, found in routed.items() if found} == expected


def rewrite(folder: Path, file: str, **changes: object) -> None:
    path = folder / f"{file}.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


REFUSED: list[tuple[Callable[[Path], object], list[str], Options, str]] = [
    (lambda folder: None, ["trian.steps=5"], Options(), "did you mean train"),
    (lambda folder: None, ["train.stesp=5"], Options(), "did you mean steps"),
    (lambda folder: None, ["steps"], Options(), "is not key=value"),
    (lambda folder: None, ["tokenizer.vocab_size=500"], Options(), "no stage of the folder has a section tokenizer"),
    (lambda folder: (folder / "world.yaml").unlink(), ["world.people=5"], Options(), "the folder has no stage world"),
    (lambda folder: None, [], Options(start="sft", only="ppo"), "exclude each other"),
    (lambda folder: None, [], Options(only="dpo"), "has no stage dpo; it has world, pretrain"),
    (lambda folder: None, [], Options(config_file=Path("missing.yaml")), "--config_file missing.yaml"),
    (lambda folder: rewrite(folder, "ppo", stage="sft"), [], Options(), "ppo.yaml is a recipe for stage sft"),
    (lambda folder: rewrite(folder, "ppo", run_dir="runs/sft"), [], Options(), "share the run_dir"),
    (lambda folder: (folder / "data.jsonl").unlink(), [], Options(start="sft"), "sft.yaml: data.train: no data at"),
    (lambda folder: (folder / "ppo.yaml").write_text("stage: [ppo"), [], Options(), "ppo.yaml is not valid YAML"),
]


@pytest.mark.parametrize(("change", "overrides", "options", "message"), REFUSED)
def test_mistakes_are_found_before_anything_starts(
    folder: Path, change: Callable[[Path], object], overrides: list[str], options: Options, message: str
) -> None:
    change(folder)
    with pytest.raises(UserError, match=message):
        run_chain(folder, *overrides, options=options)
    assert ran() == []


def test_the_folder_must_be_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean recipes"):
        run_chain(Path("recipse"))
    with pytest.raises(UserError, match="baton run recipes --only sft"):
        run_chain(Path("recipes/sft.yaml"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no recipe; expected some of world.yaml"):
        run_chain(Path("empty"))


def test_processes_come_from_the_option_the_recipe_or_the_config(folder: Path) -> None:
    def counts(options: Options, *overrides: str) -> dict[str, int]:
        return {link.stage: link.processes for link in plan(folder, list(overrides), options)}

    config = Path("config.yaml")
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 4\n")
    assert set(counts(Options()).values()) == {1}
    assert counts(Options(), "sft.processes=2") == {"world": 1, "pretrain": 1, "sft": 2, "reward": 1, "ppo": 1}
    assert counts(Options(config_file=config), "sft.processes=2")["sft"] == 2
    assert counts(Options(config_file=config))["ppo"] == 4
    assert set(counts(Options(processes=3, config_file=config), "sft.processes=2").values()) == {3}


def test_a_stage_that_ran_is_plotted(folder: Path) -> None:
    Path("runs/sft").mkdir(parents=True)
    Path("runs/sft/metrics.jsonl").write_text('{"step": 1, "time_s": 0.5, "loss": 2.0}\n')
    _, text = run_chain(folder, options=Options(only="sft"))
    assert "runs/sft/plots/sft.png" in text
    assert Path("runs/sft/plots/sft.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.reward=t/rewrd:candidate"], "ppo.yaml: reward: "),
        (["ppo.sft=t/sft:other"], "ppo.yaml: sft: "),
        (["ppo.publish.name=Bad"], "Bad"),
        (["pretrain.base=../nowhere"], "there is no folder ../nowhere"),
    ],
)
def test_a_later_stages_reference_is_checked_before_the_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    for stage, content in RECIPES.items():
        whole = {"stage": stage, "run_dir": f"runs/{stage}", "registry": "registry", **content}
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(whole))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    for path in list(tmp_path.glob("*.yaml")):
        path.rename(tmp_path / "recipes" / path.name)
    assert [link.stage for link in plan(Path("recipes"), [], Options())] == ORDER
    with pytest.raises(UserError, match=message):
        plan(Path("recipes"), overrides, Options())
