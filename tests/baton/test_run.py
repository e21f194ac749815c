"""A run's folder and status, its process group, what it continues and what it forgets."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from baton import run as runs
from baton.errors import UserError
from baton.run import Run


@pytest.fixture
def chain(tiny_chain: Any, tmp_path: Path) -> Any:
    return tiny_chain.copy(tmp_path)


def status(run: Run[Any]) -> dict[str, Any]:
    return json.loads((run.folder / "status.json").read_text())


def test_the_status_tells_how_it_stands(chain: Any) -> None:
    run = Run.start(chain.recipe("sft"))
    assert status(run) == {"stage": "sft", "state": "running", "message": "", "exit_code": 0, "version": None}
    run.finish(chain.versions["sft"])
    assert status(run)["state"] == "done" and status(run)["version"] == "tiny/sft:1"
    run.finish(chain.versions["sft"], "up to date")
    assert status(run)["state"] == "up to date"
    assert [path.name for path in run.folder.iterdir() if path.name.endswith(".new")] == []


def test_what_is_published_already_is_found(chain: Any) -> None:
    assert Run.start(chain.recipe("sft")).already_published() == chain.versions["sft"]
    assert Run.start(chain.recipe("sft", "train.seed=99")).already_published() is None


def leases(chain: Any) -> list[dict[str, Any]]:
    store = chain.registry.store
    return [json.loads(store.get(f"leases/{name}")) for name in store.list("leases")]


def test_what_a_run_reads_is_leased_until_it_is_done(chain: Any) -> None:
    run = Run.start(chain.recipe("sft"))
    (lease,) = leases(chain)
    assert lease["holds"] == [chain.versions["pretrain"].digest.removeprefix("sha256:")]
    assert lease["what"].startswith("stage sft in ")
    run.finish(chain.versions["sft"])
    assert leases(chain) == []


def test_a_program_that_fails_lets_go(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Run.start(chain.recipe("sft"))
    monkeypatch.setattr(runs.os, "_exit", lambda code: None)
    runs._leave(1)
    assert leases(chain) == []


def checkpoint(run: Run[Any], step: int, complete: bool = True) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if complete:
        (folder / "complete").touch()
    return folder


def test_the_same_run_keeps_its_checkpoints_and_metrics(chain: Any) -> None:
    run = Run.start(chain.recipe("sft"))
    kept = checkpoint(run, 20)
    checkpoint(run, 3)
    checkpoint(run, 30, complete=False)
    run.log(20, {"loss": 1.0})
    again = Run.start(chain.recipe("sft", "registry=" + str(chain.root / "registry")))
    assert again.last_checkpoint() == kept, "the newest by number, and complete"
    assert (again.folder / "metrics.jsonl").is_file()


@pytest.mark.parametrize("override", ["train.learning_rate=0.5", "data.train=[{path: world/dialogues_eval.jsonl}]"])
def test_checkpoints_of_another_recipe_or_data_are_dropped(
    chain: Any, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.start(chain.recipe("sft"))
    checkpoint(run, 2)
    run.log(2, {"loss": 1.0})
    again = Run.start(chain.recipe("sft", override))
    assert again.last_checkpoint() is None and not (again.folder / "metrics.jsonl").exists()
    assert "recipe, inputs or code have changed; starting afresh" in capsys.readouterr().out


def test_checkpoints_of_other_code_are_set_aside(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.start(chain.recipe("sft"))
    checkpoint(run, 2)
    monkeypatch.setattr("baton.build.code_digest", lambda: "other code")
    again = Run.start(chain.recipe("sft"))
    assert again.last_checkpoint() is None, "old weights must not be published as the new code's"
    (kept,) = (again.folder / "set-aside").glob("*/checkpoints/checkpoint-2/complete")
    assert kept.is_file()


def test_checkpoints_are_taken_back_when_the_change_is_undone(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two changes, and back again in any order: no training's checkpoints are lost, and each keeps its dtype."""
    import torch

    monkeypatch.setattr("baton.models._fast_bfloat16", lambda: True)
    kept = {}
    for step, rate in enumerate(("0.5", "0.25", "0.125"), 1):
        run = Run.start(chain.recipe("sft", f"train.learning_rate={rate}", "dtype=auto"))
        assert run.last_checkpoint() is None and run.dtype is torch.bfloat16
        kept[rate] = checkpoint(run, step).name
        run.log(step, {"rate": rate})
    monkeypatch.setattr("baton.models._fast_bfloat16", lambda: False)
    for rate in ("0.25", "0.5", "0.125", "0.25"):
        run = Run.start(chain.recipe("sft", f"train.learning_rate={rate}", "dtype=auto"))
        found = run.last_checkpoint()
        assert found is not None and found.name == kept[rate] and run.dtype is torch.bfloat16
        assert f'"rate": "{rate}"' in (run.folder / "metrics.jsonl").read_text()
    assert len(list((run.folder / "set-aside").iterdir())) == 2


@pytest.mark.parametrize("override", ["train.save_every=7", "train.keep=1", "train.log_every=3"])
def test_how_often_it_is_saved_and_told_may_change_on_the_way(chain: Any, override: str) -> None:
    before = Run.start(chain.recipe("sft"))
    kept = checkpoint(before, 2)
    run = Run.start(chain.recipe("sft", override))
    assert run.last_checkpoint() == kept
    assert run.build_key != before.build_key, "the published record has them"


def test_the_dtype_is_chosen_once_and_kept(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("baton.models._fast_bfloat16", lambda: True)
    assert Run.start(chain.recipe("sft", "dtype=auto")).dtype is torch.bfloat16
    monkeypatch.setattr("baton.models._fast_bfloat16", lambda: False)
    assert Run.start(chain.recipe("sft", "dtype=auto")).dtype is torch.bfloat16, "a run that goes on keeps its own"
    assert Run.start(chain.recipe("sft", "dtype=float32")).dtype is torch.float32


def test_checkpoints_of_another_input_version_are_dropped(chain: Any) -> None:
    run = Run.start(chain.recipe("reward"))
    checkpoint(run, 2)
    chain.registry.promote(chain.registry.resolve("tiny/policy:1").ref, "candidate", reason="a test")
    assert Run.start(chain.recipe("reward")).last_checkpoint() is not None
    assert Run.start(chain.recipe("reward", "sft=tiny/policy:1")).last_checkpoint() is None


def test_metrics_without_a_checkpoint_are_those_of_a_run_that_starts_again(chain: Any) -> None:
    Run.start(chain.recipe("sft")).log(1, {"loss": 1.0})
    again = Run.start(chain.recipe("sft"))
    assert not (again.folder / "metrics.jsonl").exists()


def test_metrics_after_the_step_are_trimmed(chain: Any) -> None:
    run = Run.start(chain.recipe("sft"))
    for step in (1, 2, 3):
        run.log(step, {"loss": float(step)})
    path = run.folder / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # the line that the kill cut off
    run.trim_metrics(2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    run.log(3, {"loss": 0.0})
    assert len(path.read_text().splitlines()) == 3


def test_another_world_size_than_the_environment_asks_for(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE asks for 2 processes, but 1 runs as one group"):
        Run.start(chain.recipe("sft"))
    assert not chain.run_dir("sft").exists()


def test_another_world_size_than_the_recipe_asks_for(chain: Any) -> None:
    with pytest.raises(UserError, match="the recipe's processes asks for 3 processes, but 1 runs"):
        Run.start(chain.recipe("sft", "processes=3"))
    assert Run.start(chain.recipe("sft", "processes=1")).is_main


def launcher(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Let the process above this one be `words`."""
    import psutil

    parent = SimpleNamespace(cmdline=lambda: words, environ=lambda: {"OMP_NUM_THREADS": "1"})
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))


@pytest.mark.parametrize(
    "words",
    [
        ["python", "/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "stages.sft", "r.yaml"],
        ["python", "-m", "accelerate.commands.launch", "--num_processes=2", "-m", "stages.sft"],
        ["/venv/bin/accelerate", "launch", "--num-processes", "2", "-m", "stages.sft"],
    ],
)
def test_the_launcher_that_silently_starts_one(chain: Any, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """`accelerate launch --cpu --num_processes 2` runs one process and exits with 0."""
    launcher(monkeypatch, words)
    with pytest.raises(UserError, match="accelerate launch --num_processes asks for 2 processes, but 1 runs"):
        Run.start(chain.recipe("sft"))


@pytest.mark.parametrize(
    "words",
    [
        ["accelerate", "launch", "--num_processes", "1", "-m", "stages.sft", "r.yaml"],
        ["accelerate", "launch", "-m", "stages.sft", "r.yaml", "--num_processes", "4"],
        ["bash", "-c", "run --num_processes 2"],
        ["python", "-m", "pytest", "--num_processes", "2"],
        [],
    ],
)
def test_what_does_not_ask_for_several(chain: Any, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    launcher(monkeypatch, words)
    assert Run.start(chain.recipe("sft")).state.num_processes == 1


def test_an_unknown_input_is_refused_before_anything_is_written(chain: Any) -> None:
    with pytest.raises(UserError):
        Run.start(chain.recipe("sft", "base=tiny/bass:main"))
    assert not chain.run_dir("sft").exists()


@pytest.mark.parametrize("setting", ["FSDP", "DEEPSPEED"])
def test_a_model_that_would_be_spread_is_refused_before_anything(
    chain: Any, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{setting}", "true")
    recipe = chain.recipe("pretrain", f"run_dir={chain.root}/spread")
    with pytest.raises(UserError, match=f"stage pretrain holds the whole model on every process; {setting} spreads"):
        Run.start(recipe)
    assert not Path(recipe.run_dir).exists()


class Left(Exception):
    """Stands for the end of the process."""


def ended(monkeypatch: pytest.MonkeyPatch, main: Any, *arguments: str) -> int:
    """The exit code of `program` on a command line."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Left

    monkeypatch.setattr(runs, "_leave", leave)
    monkeypatch.setattr(sys, "argv", ["stages.sft", *arguments])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="stages.sft"))
    from baton.recipe import SFTRecipe

    with pytest.raises(Left):
        runs.program(main, SFTRecipe)
    return codes[0]


def test_a_program_ends_with_0_when_main_returns(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    code = ended(
        monkeypatch, lambda recipe: seen.append(recipe.train.steps), str(chain.root / "sft.yaml"), "train.steps=3"
    )
    assert code == 0 and seen == [3]


def test_a_users_mistake_ends_with_2_and_one_message(
    chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(recipe: Any) -> Any:
        raise UserError("no such thing; make one")

    assert ended(monkeypatch, main, str(chain.root / "sft.yaml")) == 2
    assert capsys.readouterr().err == "error: no such thing; make one\n"
    told = json.loads((chain.run_dir("sft") / "status.json").read_text())
    assert (told["state"], told["message"], told["exit_code"]) == ("refused", "no such thing; make one", 2)


def test_a_defect_ends_with_1_and_a_traceback(
    chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(recipe: Any) -> Any:
        raise RuntimeError("broken inside")

    assert ended(monkeypatch, main, str(chain.root / "sft.yaml")) == 1
    assert "Traceback" in capsys.readouterr().err
    told = json.loads((chain.run_dir("sft") / "status.json").read_text())
    assert (told["state"], told["message"]) == ("failed", "RuntimeError: broken inside")


def test_a_recipe_that_does_not_load_ends_with_2(
    chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, lambda recipe: None, str(chain.root / "ppo.yaml")) == 2
    assert "is a recipe for stage ppo; this program runs stage sft" in capsys.readouterr().err


def test_without_a_recipe_it_says_how(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(monkeypatch, lambda recipe: None) == 2
    assert "usage: accelerate launch -m stages.sft RECIPE [key=value …]" in capsys.readouterr().out


def test_a_preempted_program_says_where_it_goes_on(
    chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from baton.preemption import Preempted

    ignored: list[bool] = []
    monkeypatch.setattr(runs, "ignore_signals", lambda: ignored.append(True))

    def main(recipe: Any) -> Any:
        raise Preempted(12)

    assert ended(monkeypatch, main, str(chain.root / "sft.yaml")) == 75
    message = "preempted and saved at step 12; the same command goes on from there"
    assert capsys.readouterr().out == message + "\n"
    told = json.loads((chain.run_dir("sft") / "status.json").read_text())
    assert (told["state"], told["message"], told["exit_code"]) == ("preempted", message, 75)
    assert ignored == [True], "a second signal must not end the program before its status is written"
