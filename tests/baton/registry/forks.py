"""Runs the registry's commands in children that may be killed: forks of one process that has imported all they need.

As a program it reads requests, lines of JSON, from its standard input: `{"call": …, "arguments": {…}, "failpoint": …}`
starts a child and answers its process id, `{"wait": pid}` answers how it ended. `Forks` is the other side of it.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


class Forks:
    """Starts children and waits for them."""

    def __init__(self) -> None:
        """Start the process that forks them; it imports while the caller goes on."""
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def start(self, call: str, failpoint: str = "", **arguments: str) -> int:
        """Start one of the functions below in a child; returns its process id."""
        return int(self._ask({"call": call, "failpoint": failpoint, "arguments": arguments})["pid"])

    def wait(self, pid: int) -> int:
        """How a child ended: its exit code, or minus the signal that killed it."""
        return int(self._ask({"wait": pid})["code"])

    def run(self, call: str, failpoint: str = "", **arguments: str) -> int:
        """Start and wait."""
        return self.wait(self.start(call, failpoint, **arguments))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def publish(registry: str, folder: str, name: str, kind: str, base: str = "") -> None:
    """Publish a folder."""
    from baton.registry import Registry

    reg = Registry(registry, create=True)
    reg.publish(folder, name=name, kind=kind, base=reg.resolve(base) if base else None)


def promote(registry: str, ref: str, alias: str) -> None:
    """Move an alias."""
    from baton.registry import Registry

    Registry(registry).promote(ref, alias, "better")


def push(registry: str, ref: str, target: str) -> None:
    """Push a version to another registry."""
    from baton.registry import Registry
    from baton.registry.travel.transfer import push

    source = Registry(registry)
    push(source, source.resolve(ref), Registry(target))


def import_bundle(registry: str, file: str) -> None:
    """Import a bundle."""
    from baton.registry import Registry
    from baton.registry.travel.bundle import import_bundle

    import_bundle(Registry(registry), Path(file))


def gc(registry: str) -> None:
    """Collect all that nothing needs."""
    from baton.registry import Registry
    from baton.registry.care.gc import collect

    collect(Registry(registry), 0)


def publish_many(registry: str, folder: str, name: str, base: str, writer: str, count: str, report: str) -> None:
    """Publish an adapter `count` times, each time with other weights; `report`: what was answered, for comparison."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from baton.registry import Registry

    reg, answered = Registry(registry), {}
    base_version = reg.resolve(base)
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    changed = sorted(tensors)[0]
    with tempfile.TemporaryDirectory() as own:
        shutil.copytree(folder, own, dirs_exist_ok=True)
        for number in range(int(count)):
            seed = np.random.default_rng([int(writer), number])
            tensors[changed] = seed.normal(size=tensors[changed].shape).astype(tensors[changed].dtype)
            save_file(tensors, f"{own}/adapter_model.safetensors", metadata={"format": "pt"})
            version = reg.publish(own, name=name, kind="adapter", base=base_version)
            answered[version.number] = version.digest
    Path(report).write_text(json.dumps(answered))


def promote_many(registry: str, name: str, alias: str, writer: str, count: str, report: str) -> None:
    """Move an alias between versions 1 and 2, as often as it is let; `report`: how often."""
    from baton.errors import UserError
    from baton.registry import Registry

    reg, moved = Registry(registry), 0
    for number in range(int(count)):
        try:
            record = reg.promote(f"{name}:{1 + (int(writer) + number) % 2}", alias, f"{writer}-{number}")
        except UserError as error:
            assert "look again" in str(error), error
            continue
        moved += record["reason"] == f"{writer}-{number}"  # else it meant that version already
    Path(report).write_text(json.dumps(moved))


def churn(registry: str, writer: str, seconds: str) -> None:
    """Publish few contents under one name over and over, and delete each version at once, but the last."""
    from baton.registry import Registry
    from baton.registry.care import tombstones
    from tests.baton.registry.care import small_models

    reg, until, round_number = Registry(registry), time.monotonic() + float(seconds), 0
    while True:
        files = {"own": f"{writer} {round_number % 2}".encode(), "shared": f"all {round_number % 3}".encode()}
        version = small_models.publish(reg, f"team/churn-{writer}", files)
        assert reg.verify(version) == []  # nobody may have taken anything of it
        round_number += 1
        if time.monotonic() > until:
            return
        tombstones.delete(reg, version.ref, "churn")


def collect_often(registry: str, seconds: str, report: str) -> None:
    """Collect without a pause; `report`: how many blobs were deleted, how many files spared."""
    from baton.registry import Registry
    from baton.registry.care.gc import collect

    until, blobs, spared = time.monotonic() + float(seconds), 0, 0
    while time.monotonic() < until:
        done = collect(Registry(registry), 0)
        blobs += done.by_kind().get("blobs", (0, 0))[0]
        spared += done.num_spared
    Path(report).write_text(json.dumps([blobs, spared]))


CALLS = {
    "publish": publish,
    "promote": promote,
    "push": push,
    "import": import_bundle,
    "gc": gc,
    "publish_many": publish_many,
    "promote_many": promote_many,
    "churn": churn,
    "collect_often": collect_often,
}


class SharedProbes:
    """The parent's process for probes, for its children, one at a time: each would import torch for itself."""

    def __init__(self, probes: Any, lock: str) -> None:
        """lock: a file that exists."""
        self._probes = probes
        self._lock = lock

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """As ProbeProcess.ask."""
        with open(self._lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            answer: dict[str, Any] = self._probes.ask(request)
            return answer


def _serve() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)
    import baton.registry.care.gc
    import baton.registry.publish
    import baton.registry.travel.bundle  # noqa: F401
    import baton.registry.trust.promotion  # noqa: F401
    from baton.registry import probe_process

    probes = probe_process.start()
    probe_process._current = None  # or a child would close it, as it must when it does not expect to inherit it
    shared = SharedProbes(probes, __file__)
    probe_process.start = lambda: shared
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                _run(request)
            answer = {"pid": pid}
        os.write(answers, json.dumps(answer).encode() + b"\n")
    probes.close()


def _run(request: dict[str, Any]) -> None:
    signal.alarm(int(os.environ.get("TEST_CHILD_LIMIT_S", "120")))
    os.environ["BATON_FAILPOINT"] = request["failpoint"]
    try:
        CALLS[request["call"]](**request["arguments"])
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


if __name__ == "__main__":
    _serve()
