"""The process that records probes: it never held the model that was trained, and has no GPU and no other ranks.

`ask` starts it when it is first needed and keeps it: importing torch takes seconds, so that the process imports
once, and answers each request from a fork of itself, which has loaded nothing before. Requests and answers are lines
of JSON. It ends when its standard input does: with its parent, however that ended.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from baton.errors import UserError
from baton.registry.checks import CheckFailed

# Isolated (-I), and then with this process's own path: the same packages, whatever the working folder holds.
_START = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from baton.registry.probe_server import serve
serve()"""
# What launchers tell their workers: with any of it, torch or accelerate would wait for other processes.
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
_RENDEZVOUS_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "PET_", "GROUP_", "ROLE_", "FSDP_", "OMPI_", "PMI_", "SLURM_")
_FAILED = (
    "The probe's process ended with {code} while it loaded {folder}. It needs memory for the model in float32; where "
    "there was enough, load the folder with plain transformers to see what happens."
)


_SLOW = (
    "The probe's process has not answered within {seconds:.0f} s for {folder}, and was ended. See that the folder's "
    "disk answers and that this machine has memory for the model in float32, then run the same command again."
)
_PATIENCE_S = 900
_BYTES_PER_SECOND = 10 << 20  # of a model's files: far less than a disk and a processor manage together


class _Ended(Exception):
    """The process was ended before it was asked."""


class ProbeProcess:
    """One such process, started at once."""

    def __init__(self) -> None:
        """Returns before the process has imported anything."""
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._asked = 0
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, json.dumps([os.path.abspath(entry) for entry in sys.path])],
            bufsize=0,  # a request that was interrupted must not go out later
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what goes wrong comes back as an answer
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for the parent, whose end then ends it
        )

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer; raises what the answer says was raised.

        What interrupts the waiting ends the process: its answer would be taken for that of the next request.
        """
        with self._lock:
            if self._process.stdin is None or self._process.stdin.closed:
                raise _Ended
            try:
                answer = self._exchange(request)
            except BaseException:
                self.close()
                raise
        if error := answer.get("error"):
            raise _exception(error, request)
        return answer

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._asked += 1
        seconds = _seconds(request)
        deadline = time.monotonic() + seconds
        line = b""
        with suppress(BrokenPipeError):
            waiting = memoryview(json.dumps(request | {"id": self._asked}).encode() + b"\n")
            while waiting:
                _wait(self._process.stdin, select.POLLOUT, deadline, seconds, request)
                waiting = waiting[os.write(self._process.stdin.fileno(), waiting[: select.PIPE_BUF]) :]
            while not line.endswith(b"\n"):
                _wait(self._process.stdout, select.POLLIN, deadline, seconds, request)
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    break
                line += data
        if not line.endswith(b"\n"):
            raise UserError(_FAILED.format(code=f"exit code {self._process.wait()}", folder=request.get("folder")))
        answer: dict[str, Any] = json.loads(line)
        assert answer["id"] == self._asked, "an answer to another request"
        return answer

    def close(self) -> None:
        """End the process and wait for it."""
        if os.getpid() == self.owner:
            self._process.kill()  # it has nothing to save, and may be importing still
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        if os.getpid() == self.owner:
            self._process.wait()


def _wait(pipe: IO[bytes], event: int, deadline: float, seconds: float, request: dict[str, Any]) -> None:
    poll = select.poll()  # not select, whose descriptors end at 1,024
    poll.register(pipe, event)
    if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
        raise UserError(_SLOW.format(seconds=seconds, folder=request.get("folder")))


def _seconds(request: dict[str, Any]) -> float:
    """How long an answer may take: a hung disk must not block a publish, and its lease, for ever."""
    folders = [Path(folder) for folder in (request.get("folder"), request.get("base_folder")) if folder]
    size = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
    return _PATIENCE_S + size / _BYTES_PER_SECOND


_current: ProbeProcess | None = None
_current_lock = threading.Lock()


def start() -> ProbeProcess:
    """The process of this process, started if there is none that runs."""
    global _current
    with _current_lock:
        if _current is None or not _current.is_alive:
            if _current is not None:
                _current.close()
            _current = ProbeProcess()
        return _current


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Have a request answered by the process, which is started if there is none."""
    while True:
        with suppress(_Ended):  # by another thread, whose request was interrupted
            return start().ask(request)


def close() -> None:
    """End the process, if there is one; the next `ask` starts another."""
    global _current
    with _current_lock:
        if _current is not None:
            _current.close()
            _current = None


def _forget() -> None:
    # A forked child must neither use its parent's process nor keep it alive by an open end of its input.
    global _current, _current_lock
    _current_lock = threading.Lock()
    if _current is not None:
        _current.close()
        _current = None


atexit.register(close)
os.register_at_fork(after_in_child=_forget)


def _environment() -> dict[str, str]:
    given = {
        key: value
        for key, value in os.environ.items()
        if key not in _RENDEZVOUS and not key.startswith(_RENDEZVOUS_PREFIXES)
    }
    if "LOCAL_RANK" in os.environ:
        given.pop("OMP_NUM_THREADS", None)  # the launcher's 1 a worker: the other workers wait meanwhile
    return given | {
        "CUDA_VISIBLE_DEVICES": "",
        "HIP_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",  # where others compute too, torch's threads must not spin for a core they lack
        "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for huge pages: a large model loads in two thirds of the time
    }


def _exception(error: dict[str, Any], request: dict[str, Any]) -> Exception:
    if error["class"] == "ProbeMismatch":
        from baton.registry.probe import ProbeMismatch

        return ProbeMismatch(error["message"], error["check"])
    if error["class"] == "CheckFailed":
        return CheckFailed(error["check"], error["message"])
    if error["class"] == "UserError":
        return UserError(error["message"])
    if error["class"] == "Ended":
        return UserError(_FAILED.format(code=error["message"], folder=request.get("folder")))
    return RuntimeError(f"the probe's process failed:\n{error['message']}")
