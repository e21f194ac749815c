"""The command and environment that start a stage: no questions, no warnings, the processes that were asked for."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from baton import launch
from baton.errors import UserError
from baton.launch import processes_of, stage_command, stage_environment
from baton.recipe import RECIPES

ROOT = Path(__file__).parents[2]
PROBE = """
import json, os, sys
from accelerate import Accelerator
state = Accelerator().state
import torch
row = [state.process_index, state.num_processes, torch.get_num_threads(), sys.argv[1:]]
os.write(1, json.dumps(row).encode() + b"\\n")  # in one piece: both processes write to one pipe
state.wait_for_everyone()
os._exit(0)
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage sft is a program that prints its place in the process group, its threads and its arguments."""
    (tmp_path / "probe_program.py").write_text(PROBE)
    monkeypatch.setitem(launch.PROGRAMS, "sft", "probe_program")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")


def started(processes: int, config_file: Path | None = None) -> tuple[list[list[object]], str]:
    command = stage_command("sft", Path("sft.yaml"), ["train.steps=5"], processes, config_file)
    done = subprocess.run(
        command, env=stage_environment("sft", processes), capture_output=True, text=True, check=True, timeout=300
    )
    return sorted(json.loads(line) for line in done.stdout.splitlines()), done.stderr


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize("config_file", [None, ROOT / "accelerate_config.yaml"])
@pytest.mark.parametrize("processes", [1, 2])
def test_starts_what_was_asked_for_without_a_word(processes: int, config_file: Path | None) -> None:
    found, errors = started(processes, config_file)
    arguments = ["sft.yaml", "train.steps=5"]
    assert found == [[rank, processes, 2, arguments] for rank in range(processes)]
    assert errors == ""


FAILURES = [
    ("os.write(2, b'error: no data\\n'); os._exit(2)", 2, "error: no data\n"),
    ("os.kill(os.getpid(), 9)", 137, "error: the program was ended by signal 9\n"),
]


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("end", "code", "message"), FAILURES)
def test_what_a_program_says_last_is_all_that_is_printed(
    processes: int, end: str, code: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "probe_program.py").write_text(
        f"import os, time\nif os.environ.get('RANK', '0') == '0':\n    {end}\ntime.sleep(100)"
    )
    command = stage_command("sft", Path("sft.yaml"), [], processes)
    done = subprocess.run(command, env=stage_environment("sft", processes), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout + done.stderr) == (code, message)


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize("processes", [1, 2])
def test_programs_end_in_good_order_at_ctrl_c(processes: int, tmp_path: Path) -> None:
    (tmp_path / "probe_program.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        f"mine = pathlib.Path({str(tmp_path)!r}, os.environ.get('RANK', '0'))\n"
        "def stop(number, frame):\n"
        "    time.sleep(1); mine.with_suffix('.saved').touch(); os._exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "mine.with_suffix('.ready').touch()\n"
        "while True: time.sleep(0.1)"
    )
    chain = (
        "import sys, pathlib; from baton.child import run_child\n"
        f"sys.exit(run_child({stage_command('sft', Path('sft.yaml'), [], processes)!r}, "
        f"{stage_environment('sft', processes)!r}, pathlib.Path({str(tmp_path / 'log.txt')!r})))"
    )
    command = [sys.executable, "-c", chain]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(list(tmp_path.glob("*.ready"))) < processes:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(list(tmp_path.glob("*.saved"))) == processes
    assert "Traceback" not in output


def test_the_world_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    command = stage_command("world", Path("world.yaml"), [], 2)
    assert command[1:] == ["-m", "baton.make_world", "world.yaml"]
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert "ACCELERATE_USE_CPU" not in stage_environment("world", 2)


def test_every_stage_has_its_program() -> None:
    assert set(launch.PROGRAMS) == set(RECIPES)
    assert all(find_spec(module) for module in launch.PROGRAMS.values())


def test_gpus_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "has_cuda", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    one, four = (stage_command("ppo", Path("ppo.yaml"), [], count) for count in (1, 4))
    assert "--cpu" not in one and "--multi_gpu" not in one
    assert "--cpu" not in four and "--multi_gpu" in four
    assert four[four.index("--num_processes") + 1] == "4"
    assert "ACCELERATE_USE_CPU" not in stage_environment("ppo", 4)


def test_settings_of_the_allocator_give_way_to_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    environment = stage_environment("sft")
    assert (environment["MALLOC_MMAP_MAX_"], environment["MALLOC_TRIM_THRESHOLD_"]) == ("7", "17179869184")


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.cpu_threads(2) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert launch.cpu_threads(1) >= launch.cpu_threads(2) >= 1
    assert launch.cpu_threads(100_000) == 1


def test_config_of_a_sharded_run_keeps_its_kind(tmp_path: Path) -> None:
    config = tmp_path / "fsdp.yaml"
    config.write_text("distributed_type: FSDP\nnum_processes: 8\n")
    assert processes_of(config) == 8
    command = stage_command("sft", Path("sft.yaml"), [], 8, config)
    assert "--multi_gpu" not in command  # it would replace FSDP by plain data parallelism


@pytest.mark.parametrize("content", [None, "[1, 2", "- a\n", "num_processes: 2\n"])
def test_a_config_that_is_none_is_refused(content: str | None, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    if content is not None:
        config.write_text(content)
    with pytest.raises(UserError, match="--config_file .*config.yaml"):
        processes_of(config)
