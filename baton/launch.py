"""The command and the environment of one stage's processes: `accelerate launch` with everything it would ask for.

As a program (`-m baton.launch`), `accelerate launch` itself, less the traceback of the launcher when a program fails.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from baton.errors import UserError
from baton.preemption import GRACE_S

PROGRAMS = {
    "world": "baton.make_world",
    "ladder": "stages.ladder",
    "pretrain": "stages.pretrain",
    "sft": "stages.sft",
    "reward": "reward.train",
    "ppo": "stages.ppo",
}
"""The module that runs each stage, in the order of the chain."""

WITHOUT_ACCELERATE = {"world", "ladder"}
"""A ladder launches its sizes itself."""

# glibc gives freed tensors back to the kernel and asks for them again at the next step: keeping them saved 10-15% of
# a training step on CPUs. One arena: those of other threads, such as the backward pass's, are given back regardless
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30), "MALLOC_ARENA_MAX": "1"}

# torch's launcher would die of SIGUSR1 and leave its processes behind, and would kill them 30 s after any other signal
ELASTIC = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_S),
}


def stage_command(
    stage: str, recipe: Path, overrides: list[str], processes: int = 1, config_file: Path | None = None
) -> list[str]:
    """The command that runs `stage` on `recipe` as so many processes, launched the way `config_file` says, if any."""
    program = ["-m", PROGRAMS[stage], str(recipe), *overrides]
    if stage in WITHOUT_ACCELERATE:
        return [sys.executable, *program]
    launch = [sys.executable, "-m", "baton.launch"]
    launch += ["--num_cpu_threads_per_process", str(cpu_threads(processes))]
    if config_file is not None:
        launch += ["--config_file", str(config_file), "--num_processes", str(processes)]
        if processes > 1 and config_value(config_file, "distributed_type") == "NO":
            launch += ["--multi_gpu"]
        return [*launch, *program]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_processes", str(processes)]
    if processes > 1:
        # --multi_gpu on CPUs too: with --cpu, accelerate starts one process and says nothing
        launch += ["--multi_gpu", "--main_process_port", "0"]
    elif not has_cuda():
        launch += ["--cpu"]
    return [*launch, *program]


def stage_environment(stage: str, processes: int = 1) -> dict[str, str]:
    """Our environment and how the launcher treats signals; without a GPU also the allocator's settings and Accelerate's
    switch for several processes.
    """
    environment = dict(os.environ)
    environment["PYTHONUNBUFFERED"] = "1"
    for name, setting in ELASTIC.items():
        environment.setdefault(name, setting)
    if has_cuda():
        return environment
    for name, setting in ALLOCATOR.items():
        environment.setdefault(name, setting)
    if processes > 1 and stage not in WITHOUT_ACCELERATE:
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment


def processes_of(config_file: Path) -> int:
    """How many processes an accelerate config starts, on all machines together."""
    count = config_value(config_file, "num_processes")
    return int(count) if count is not None else 1


def config_value(config_file: Path, key: str) -> str | None:
    """One top-level value of an accelerate config. Raises UserError where there is no such file or no YAML in it."""
    import yaml

    try:
        content = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config_file {config_file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config_file {config_file} is not valid YAML: {error}") from None
    if not isinstance(content, dict) or "distributed_type" not in content:
        raise UserError(
            f"--config_file {config_file} has no distributed_type; expected what `accelerate config` writes, such as "
            "accelerate_config.yaml"
        )
    found = content.get(key)
    if found is False:  # an unquoted NO is YAML's false
        return "NO"
    return None if found is None else str(found)


def has_cuda() -> bool:
    """Whether an NVIDIA driver is there, not hidden, and torch is a build that can use it.

    Asks the system and torch's version, since importing torch to ask takes seconds.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or version("torch").endswith("+cpu"):
        return False
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def cpu_threads(processes: int) -> int:
    """Threads for each of `processes`: OMP_NUM_THREADS where set, else their share of the cores we may use.

    accelerate starts programs with one thread unless told otherwise.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed) // processes)


def main() -> None:
    """Run `accelerate launch`; a failed program's exit code is ours, and what it printed is all that is printed.

    Signals are the programs' to answer: they are passed on and we wait, so that the programs can end in good order.
    """
    import logging
    import subprocess

    for name, setting in ELASTIC.items():
        os.environ.setdefault(name, setting)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, _pass_on)  # torch's launcher, for several processes, puts its own in their place
    from accelerate.commands.launch import main as accelerate_launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        accelerate_launch()
    except subprocess.CalledProcessError as error:
        _leave_with(error.returncode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        _leave_with(error.get_first_failure()[1].exitcode)


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Give a signal to the program that `accelerate launch` waits for; before there is one, end."""
    import psutil

    programs = psutil.Process().children()
    if not programs:
        sys.exit(128 + number)
    if number == signal.SIGINT:  # Ctrl-C reaches the whole process group; passed on, it would count as pressed twice
        return
    for program in programs:
        with suppress(psutil.NoSuchProcess):
            program.send_signal(number)


def _leave_with(code: int) -> None:
    if code < 0:  # the program could not say a word
        print(f"error: the program was ended by signal {-code}", file=sys.stderr)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
