"""The command: where it listens, what it says, and what it needs."""

import http.client
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.ui.server import is_loopback, serve


def test_the_command_serves_and_prints_its_address(filled: Registry) -> None:
    command = [sys.executable, "-m", "baton.cli", "ui", "--port", "0", "--registry", filled.location]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            match = re.match(r"http://127\.0\.0\.1:(\d+)/ ", process.stdout.readline())
            assert match
            connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=10)
            connection.request("GET", "/m/team/base")
            answer = connection.getresponse()
            assert answer.status == 200 and b"team/base" in answer.read()
            assert "uvicorn" not in str(answer.headers)
        finally:
            process.terminate()


def test_a_taken_port_is_a_message(filled: Registry) -> None:
    import socket

    expected = r"cannot listen on 127.0.0.1, port \d+ .*--port 0 takes a free port"
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=expected):
        serve(filled, "127.0.0.1", taken.getsockname()[1], print)


def test_a_missing_library_is_a_message(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install 'baton\[ui\]'"):
        serve(filled, "127.0.0.1", 0, print)


def test_which_addresses_are_this_machines_own() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.7", "box", ""))


def test_help_needs_none_of_the_libraries() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from baton.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0\n"
        "bad = {'starlette', 'jinja2', 'uvicorn', 'huggingface_hub', 'torch'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[4])
