"""The other side of `probe_process`: reads requests, answers each from a fork of itself, ends with its input."""

import gc
import importlib
import json
import os
import select
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any


def serve() -> None:
    """Answer the requests of standard input until it ends."""
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries may print
    failed: dict[str, Any] | None = None
    try:
        # All that loading a model imports; nothing here may compute, or the forks would inherit torch's threads.
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: F401

        from baton.registry import probe  # noqa: F401

        transformers.utils.logging.set_verbosity_error()
        _warm_up()
    except Exception:
        failed = _other()
    gc.freeze()
    waiting = b""
    while True:
        data = os.read(0, 1 << 16)
        if not data:
            return
        waiting += data
        while b"\n" in waiting:
            line, _, waiting = waiting.partition(b"\n")
            found, early = (json.dumps(failed).encode(), b"") if failed else _answer_in_fork(line)
            waiting += early
            answer = json.loads(found) | {"id": json.loads(line)["id"]}
            modules = answer.pop("modules", [])
            _write(answers, json.dumps(answer).encode() + b"\n")
            # What this kind of model needed, the next forks of it find imported: code, and nothing that was loaded.
            for name in modules:
                with suppress(Exception):
                    importlib.import_module(name)


def _warm_up() -> None:
    # Transformers compiles a thousand regular expressions, the same for every model, when it first loads one.
    with suppress(Exception):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")


def _answer_in_fork(line: bytes) -> tuple[bytes, bytes]:
    """The answer to a request, and what of the next request came meanwhile."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(ours)
            _write(theirs, json.dumps(_answer(json.loads(line))).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(theirs)
    found = early = b""
    while True:
        ready, _, _ = select.select([0, ours], [], [])
        if ours in ready:
            data = os.read(ours, 1 << 16)
            if not data:
                break
            found += data
        elif data := os.read(0, 1 << 16):
            early += data
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            sys.exit(0)
    os.close(ours)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return found, early
    reason = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"
    return json.dumps({"error": {"class": "Ended", "message": reason}}).encode(), early


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from baton.errors import UserError
    from baton.registry import probe
    from baton.registry.checks import CheckFailed

    before = set(sys.modules)
    try:
        base = request["base_folder"]
        found = probe.compute(
            Path(request["folder"]), Path(base) if base else None, request["kind"], request["vocabulary"]
        )
    except probe.ProbeMismatch as error:
        return {"error": {"class": "ProbeMismatch", "message": error.message, "check": error.check}}
    except CheckFailed as error:
        return {"error": {"class": "CheckFailed", "message": error.message, "check": error.check}}
    except UserError as error:
        return {"error": {"class": "UserError", "message": str(error)}}
    except Exception:
        return _other()
    new = [name for name in sys.modules if name not in before and name.startswith(("transformers.models.", "peft."))]
    return {"probe": found, "modules": new}


def _other() -> dict[str, Any]:
    return {"error": {"class": "other", "message": traceback.format_exc()}}


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
