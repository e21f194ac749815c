"""Bad input of every sort to the real programs: exit code 2, one clear message, nothing published, no model loaded."""

import errno
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton import run as runs
from baton.launch import PROGRAMS
from baton.recipe import RECIPES
from tests.conftest import program_environment, run_stage

STAGES = ("pretrain", "sft", "reward", "ppo")
DATA = {"pretrain": "text_train", "sft": "dialogues", "reward": "preferences", "ppo": "prompts"}
FIELD = {"pretrain": "text", "sft": "messages", "reward": "chosen", "ppo": "prompt"}
FORMAT = {"pretrain": "text", "sft": "messages", "reward": "preference", "ppo": "prompts"}


class Left(Exception):
    """Stands for the end of the process."""


class Programs:
    """The four programs on a copy of the chain, run here so that many mistakes can be made in little time."""

    def __init__(self, chain: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.chain, self.monkeypatch, self.capsys = chain, monkeypatch, capsys
        self.root: Path = chain.root

    def run(self, stage: str, *overrides: str) -> tuple[int, str]:
        """(exit code, what was printed) of `program` on the stage's recipe."""
        codes: list[int] = []

        def leave(code: int) -> None:
            codes.append(code)
            raise Left

        self.monkeypatch.setattr(runs, "_leave", leave)
        self.monkeypatch.setattr(sys, "argv", [PROGRAMS[stage], str(self.root / f"{stage}.yaml"), *overrides])
        self.capsys.readouterr()
        with pytest.raises(Left):
            runs.program(lambda recipe: run_stage(stage, recipe), RECIPES[stage])  # type: ignore[type-var]
        printed = self.capsys.readouterr()
        return codes[0], printed.out + printed.err

    def refusal(self, stage: str, *overrides: str, status: bool = True) -> str:
        """The message of a refusal, after checking everything that every refusal has in common.

        `status`: whether the recipe itself was read, so that the run folder is known.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        def too_late(*arguments: object, **named: object) -> None:
            raise AssertionError("a model was loaded before the mistake was found")

        before = self.stored()
        with self.monkeypatch.context() as patch:
            for loader in (AutoModelForCausalLM, AutoModelForSequenceClassification):
                patch.setattr(loader, "from_pretrained", too_late)
            code, printed = self.run(stage, *overrides)
        assert code == 2, printed
        assert "Traceback" not in printed and printed.count("error: ") == 1
        message = printed.partition("error: ")[2].strip()
        assert self.stored() == before
        path = self.chain.run_dir(stage) / "status.json"
        assert path.exists() == status
        if status:
            told = json.loads(path.read_text())
            assert (told["state"], told["exit_code"], told["message"]) == ("refused", 2, message)
        return message

    def stored(self) -> list[str]:
        """Every file of the registry, but for the lease that a run holds until its process ends."""
        found = (path for path in (self.root / "registry").rglob("*") if path.parent.name != "leases")
        return sorted(str(path) for path in found if path.is_file())

    def write(self, name: str, *rows: dict[str, Any]) -> str:
        """A data file beside the recipes; returns the override's spelling of its path."""
        (self.root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    def rows(self, name: str, count: int) -> list[dict[str, Any]]:
        lines = (self.root / "world" / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines[:count]]


@pytest.fixture
def programs(
    tiny_chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Programs:
    return Programs(tiny_chain.copy(tmp_path), monkeypatch, capsys)


def source(path: str, use: str = "train", **keys: str) -> str:
    fields = ", ".join(f"{key}: {item}" for key, item in {"path": path, **keys}.items())
    return f"data.{use}=[{{{fields}}}]"


# --- the recipe


@pytest.mark.parametrize("stage", STAGES)
def test_a_misspelt_key_names_the_nearest(programs: Programs, stage: str) -> None:
    message = programs.refusal(stage, "train.stepps=3", status=False)
    assert message == f"{programs.root / stage}.yaml: unknown key train.stepps; did you mean steps?"


@pytest.mark.parametrize("stage", STAGES)
def test_a_wrong_type(programs: Programs, stage: str) -> None:
    message = programs.refusal(stage, "train.steps=many", status=False)
    assert message.startswith(f"{programs.root / stage}.yaml: train.steps is 'many': input should be a valid integer")


@pytest.mark.parametrize("override", ["publish.name=Tiny", "publish.name=a/b/c", "publish.alias='7'"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_name_that_the_registry_cannot_hold(programs: Programs, stage: str, override: str) -> None:
    assert programs.refusal(stage, override).startswith(f"{programs.root / stage}.yaml: publish: bad ")


def test_a_bad_name_for_the_value_model(programs: Programs) -> None:
    assert "ppo.yaml: publish_value: bad name 'value'" in programs.refusal("ppo", "publish_value.name=value")


def test_a_missing_recipe(programs: Programs) -> None:
    (programs.root / "sft.yaml").rename(programs.root / "sfft.yaml")
    message = programs.refusal("sft", status=False)
    assert message.startswith(f"no recipe at {programs.root / 'sft.yaml'}; there is {programs.root / 'sfft.yaml'}")


# --- data files


@pytest.mark.parametrize("use", ["train", "eval"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_file(programs: Programs, stage: str, use: str) -> None:
    message = programs.refusal(stage, source(f"world/{DATA[stage]}s.jsonl", use))
    assert f"no data at {programs.root / 'world' / DATA[stage]}s.jsonl" in message
    assert f"there is {DATA[stage]}.jsonl" in message


@pytest.mark.parametrize("use", ["train", "eval"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_empty_file(programs: Programs, stage: str, use: str) -> None:
    path = programs.root / programs.write("empty.jsonl")
    assert f"{path} is empty" in programs.refusal(stage, source("empty.jsonl", use))


@pytest.mark.parametrize("stage", STAGES)
def test_a_file_in_another_format(programs: Programs, stage: str) -> None:
    other = "text_train" if stage != "pretrain" else "dialogues"
    path = programs.root / "world" / f"{other}.jsonl"
    if stage == "ppo":  # any text can be a prompt
        path = programs.root / programs.write("other.jsonl", {"story": "It rained."})
        expected = "line 1 has none of `prompt`"
    else:
        found = "messages" if stage == "pretrain" else "text"
        expected = f"is a file in another format: declared as {FORMAT[stage]}, its rows look like {found}"
    assert f"{path} {expected}" in programs.refusal(stage, source(str(path), format=FORMAT[stage]))


def test_a_format_that_gives_other_rows(programs: Programs) -> None:
    message = programs.refusal("reward", source("world/dialogues.jsonl"))
    assert "the detected format messages cannot give preference rows; those that can: oasst, hh, preference" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", gzip.compress(b'{"messages": []}\n', mtime=0), "rows.jsonl line 1 is not UTF-8"),
        ("rows.jsonl.gz", b'{"messages": []}\n', "rows.jsonl.gz cannot be read"),
        ("rows.jsonl.gz", gzip.compress(b'{"messages": []}\n' * 99, mtime=0)[:-9], "rows.jsonl.gz is cut off"),
        ("rows.parquet", b"PAR0", "rows.parquet is not a parquet file"),
        ("rows.jsonl", b"name,age\nAda,36\n", "rows.jsonl line 1 is not JSON"),
        ("rows.csv", b"name,age\nAda,36\n", "rows.csv: the suffix .csv is not read"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(programs: Programs, name: str, content: bytes, message: str) -> None:
    (programs.root / name).write_bytes(content)
    assert message in programs.refusal("sft", source(name))


@pytest.mark.parametrize("use", ["train", "eval"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_row_without_its_fields_is_named_by_file_and_line(programs: Programs, stage: str, use: str) -> None:
    rows = programs.rows(DATA[stage], 4)
    del rows[2][FIELD[stage]]
    path = programs.root / programs.write("rows.jsonl", *rows)
    message = programs.refusal(stage, source("rows.jsonl", use))
    assert f"{path} line 3 has no" in message and f"`{FIELD[stage]}`" in message


@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo"])
def test_questions_without_answers(programs: Programs, stage: str) -> None:
    rows = programs.rows("questions", 3)
    del rows[1]["answers"]
    programs.write("rows.jsonl", *rows)
    message = programs.refusal(stage, source("rows.jsonl", "questions"))
    assert message.startswith("rows.jsonl: row 2 has no list `answers`")


def test_dialogues_that_end_with_the_user(programs: Programs) -> None:
    rows = [{"messages": row["messages"][:-1] + [{"role": "user", "content": "?"}]} for row in ({"messages": []},) * 2]
    path = programs.root / programs.write("rows.jsonl", *rows)
    message = programs.refusal("sft", source("rows.jsonl"))
    assert "every dialogue ends with the user, and there is no reply to learn from" in message
    assert f"first at {path} line 1" in message


@pytest.mark.parametrize(
    ("stage", "overrides", "key"),
    [
        ("sft", ["train.sequence_length=2"], "train.sequence_length = 2"),
        ("reward", ["train.max_length=4"], "train.max_length = 4"),
        ("ppo", ["rollout.max_prompt_tokens=2"], "rollout.max_prompt_tokens = 2"),
    ],
)
def test_no_row_left_after_truncation(programs: Programs, stage: str, overrides: list[str], key: str) -> None:
    message = programs.refusal(stage, *overrides)
    assert message.startswith("data.train: no") and key in message and "raise" in message


# --- what comes from the registry


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("sft", "base=tiny/sft:1", "tiny/sft:1 is an adapter version; sft trains an adapter on a base"),
        ("sft", "base=tiny/reward:1", "tiny/reward:1 is a reward version"),
        ("reward", "sft=tiny/base:1", "tiny/base:1 is a base version; the reward model goes on from SFT's adapter"),
        ("ppo", "reward=tiny/value:1", "tiny/value:1 is a value version; PPO needs a reward model"),
    ],
)
def test_a_base_of_the_wrong_kind(programs: Programs, stage: str, override: str, message: str) -> None:
    said = programs.refusal(stage, override)
    assert said.startswith(message) and "Make one: accelerate launch -m " in said


def test_a_base_that_has_not_learned_to_answer(programs: Programs) -> None:
    said = programs.refusal("ppo", "sft=tiny/base:main")
    assert said.startswith("tiny/base:1 has no chat template") and said.endswith("-m stages.sft RECIPE")


def test_a_base_that_is_no_model(programs: Programs) -> None:
    assert "world holds no config.json; expected a Hugging Face model folder" in programs.refusal("sft", "base=./world")
    assert "is neither a folder nor complete: write tiny/base:ALIAS" in programs.refusal("sft", "base=tiny/base")
    (programs.root / "model.gguf").write_bytes(b"no GGUF at all")
    empty = [f"{key}=null" for key in ("data", "tokenizer", "model", "train", "ngram_order")]
    missing = programs.refusal("pretrain", "mode=load", "base=./nowhere", *empty)
    assert missing == "base: there is no folder ./nowhere"


@pytest.mark.parametrize(
    ("stage", "role", "name", "alias"),
    [("sft", "base", "base", "main"), ("reward", "sft", "sft", "candidate"), ("ppo", "reward", "reward", "candidate")],
)
def test_an_unknown_reference_or_alias_lists_near_ones(
    programs: Programs, stage: str, role: str, name: str, alias: str
) -> None:
    unknown = programs.refusal(stage, f"{role}=tiny/{name}s:{alias}")
    assert f"has no model 'tiny/{name}s'; nearest: tiny/{name}" in unknown
    unknown = programs.refusal(stage, f"{role}=tiny/{name}:{alias[:-1]}")
    assert f"tiny/{name} has no alias '{alias[:-1]}'; aliases: tiny/{name}:{alias}; versions: 1" in unknown
    assert f"tiny/{name} has no version 7; versions: 1" in programs.refusal(stage, f"{role}=tiny/{name}:7")


@pytest.mark.parametrize("stage", STAGES)
def test_a_registry_folder_that_is_not_one(programs: Programs, stage: str) -> None:
    folder = programs.root / "photos"
    folder.mkdir()
    (folder / "beach.jpg").write_bytes(b"")
    message = programs.refusal(stage, f"registry={folder}")
    assert message.startswith(f"{folder} is not a registry: it holds files but no registry.json.")
    assert os.listdir(folder) == ["beach.jpg"]
    assert f"{folder / 'beach.jpg'} is not a registry but a file" in programs.refusal(
        stage, f"registry={folder / 'beach.jpg'}"
    )


# --- a full disk


def full_while_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run folder's disk is full once the version is being written; the checkpoints still had room."""
    from baton.tuned import Tuned

    save = Tuned.save

    def fill(self: Any, folder: Path, *arguments: Any) -> None:
        save(self, folder, *arguments)
        assert folder.name.startswith("publish-")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Tuned, "save", fill)


def full_while_publishing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry's disk is full while the files are copied into it."""
    from baton.registry import publish

    def fill(source: Any, target: Path, written: Any) -> Any:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(publish, "write_hashed", fill)


@pytest.mark.parametrize("fill", [full_while_writing, full_while_publishing])
def test_a_full_disk_while_publishing(
    tiny_chain: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fill: Callable[[pytest.MonkeyPatch], None],
) -> None:
    programs = Programs(tiny_chain.unpublished("sft", tmp_path), monkeypatch, capsys)
    before = programs.stored()
    with monkeypatch.context() as patch:
        fill(patch)
        code, printed = programs.run("sft")
    assert code == 2 and "Traceback" not in printed
    assert "error: " in printed and "no space left on the disk" in printed and "free some space" in printed
    assert programs.stored() == before
    assert list(programs.chain.run_dir("sft").glob("publish-*")) == []
    # the training is not lost: with room again the same command publishes from the last checkpoint
    code, printed = programs.run("sft")
    assert code == 0 and "continuing from" in printed and "published tiny/sft:1" in printed


# --- as a shell sees it


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("pretrain", ["data.train=[{path: world/text_trian.jsonl}]"], "there is text_train.jsonl"),
        ("sft", ["base=tiny/base:man"], "aliases: tiny/base:main"),
        ("reward", ["train.max_length=4"], "none of 40 pairs is left"),
        ("ppo", ["reward=tiny/sft:1"], "PPO needs a reward model"),
    ],
)
def test_each_program_exits_with_2(
    tiny_chain: Any, tmp_path: Path, stage: str, overrides: list[str], message: str
) -> None:
    chain = tiny_chain.unpublished(stage, tmp_path)
    command = [sys.executable, "-m", PROGRAMS[stage], str(tmp_path / f"{stage}.yaml"), *overrides]
    done = subprocess.run(command, env=program_environment(stage), capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr and done.stderr.count("error: ") == 1 and "Traceback" not in done.stdout + done.stderr
    assert json.loads((chain.run_dir(stage) / "status.json").read_text())["state"] == "refused"
    assert chain.versions[stage].name not in chain.registry.models()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "{root}", "train.stepps=3"], "pretrain.yaml: unknown key train.stepps; did you mean steps?"),
        (["run", "{root}", "sft.data.eval=[{{path: nowhere.jsonl}}]"], "sft.yaml: data.eval: no data at"),
        (["show", "tiny/stf:1", "--registry", "{root}/registry"], "nearest: tiny/sft"),
        (["chat", "tiny/sft:canddate", "--once", "hi", "--registry", "{root}/registry"], "tiny/sft:candidate"),
        (["list", "--registry", "{root}"], "is not a registry: it holds files but no registry.json"),
        (["publish", "{root}/world", "--name", "tiny/new", "--kind", "base", "--registry", "{root}/registry"], "world"),
    ],
)
def test_the_command_exits_with_2(tiny_chain: Any, tmp_path: Path, command: list[str], message: str) -> None:
    chain = tiny_chain.copy(tmp_path)
    before = chain.registry.models()
    words = [word.format(root=tmp_path) for word in command]
    environment = program_environment("sft")
    done = subprocess.run(
        [sys.executable, "-m", "baton.cli", *words], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr and "Traceback" not in done.stderr
    assert chain.registry.models() == before
    assert not (tmp_path / "runs").exists()
