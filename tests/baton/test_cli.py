"""The command as a shell sees it: what it imports, how it refuses, what it passes on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from baton.chain import Options
from baton.cli import main
from baton.errors import UserError

HEAVY = {"torch", "transformers", "numpy", "datasets", "peft", "trl", "accelerate", "matplotlib", "omegaconf"}


def shell(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "baton.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["chat", "--help"], ["list", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['baton', *{arguments!r}]\n"
        "from baton.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "import json\n"
        "print('\\nimported', json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    text, imported = done.stdout.rsplit("imported", 1)
    assert "Usage" in text
    # typer itself imports pydantic once a command is chosen
    heavy = HEAVY | {"pydantic"} if arguments == ["--help"] else HEAVY
    assert heavy & set(json.loads(imported)) == set()


def test_every_command_is_there(tmp_path: Path) -> None:
    text = shell("--help", folder=tmp_path).stdout
    registry = ("list", "show", "log", "diff", "children", "verify", "get", "publish", "promote")
    for command in ("run", "chat", "generate", "score", *registry):
        assert f" {command} " in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere"], "no folder at nowhere"),
        (["chat", "a/b:c"], "no registry at .baton/registry"),
        (["list", "--registry", "nowhere"], "no registry at nowhere"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = shell(*arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "arguments", [["chat"], ["run", "x", "--processes", "0"], ["chat", "a", "--temperature", "-1"]]
)
def test_a_wrong_command_line_is_exit_code_2(tmp_path: Path, arguments: list[str]) -> None:
    done = shell(*arguments, folder=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_run_passes_on_its_options_and_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(*arguments: Any) -> int:
        seen.append(arguments)
        return 7

    monkeypatch.setattr("baton.chain.run", run)
    options = ["--from", "sft", "--processes", "2", "--config_file", "c.yaml", "--registry", "r"]
    monkeypatch.setattr(sys, "argv", ["baton", "run", "recipes/x", "sft.train.steps=5", "dtype=float32", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 7
    folder, overrides = Path("recipes/x"), ["sft.train.steps=5", "dtype=float32"]
    assert seen == [(folder, overrides, Options("sft", None, 2, Path("c.yaml"), "r"))]


def test_the_message_is_red_in_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refuse(*arguments: Any) -> int:
        raise UserError("found a, expected b")

    monkeypatch.setattr("baton.chain.run", refuse)
    monkeypatch.setattr(sys, "argv", ["baton", "run", "x"])
    for terminal, expected in ((False, "error: found a, expected b\n"), (True, "\033[31merror:\033[0m found a, expe")):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(expected)


def test_a_closed_folder_that_no_command_foresaw(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def refuse(*arguments: Any) -> int:
        raise PermissionError(13, "Permission denied", "/closed/file")

    monkeypatch.setattr("baton.chain.run", refuse)
    monkeypatch.setattr(sys, "argv", ["baton", "run", "x"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: permission denied") and "'/closed/file'" in said

    def break_(*arguments: Any) -> int:
        raise IsADirectoryError(21, "Is a directory", "x")

    monkeypatch.setattr("baton.chain.run", break_)
    with pytest.raises(IsADirectoryError):  # a defect stays a traceback
        main()
