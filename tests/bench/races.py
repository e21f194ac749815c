"""Writers at once: do versions get lost or numbers repeated, does an alias's history fork?

    python -m tests.bench.races --store folder --processes 8 --publishes 100 --json

Every process publishes adapters of one base under one name, each with weights of its own, as `Registry.publish` does
it, probe included; then as many processes move one alias. The S3 store is moto's server, a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.baton.registry.forks import Forks

NAME = "team/racer"
_SERVER = """import sys
from tests.baton.registry.conftest import ObjectServer
server = ObjectServer()
print(server.url, server.make_bucket(), flush=True)
sys.stdin.read()
"""

_MODELS = """import sys
from pathlib import Path
from tests.baton.registry.conftest import save_adapter, save_base
base, adapter = map(Path, sys.argv[1:])
save_base(base, 0)
save_adapter(adapter, base, 'CAUSAL_LM', 1)
"""


def race(forks: Forks, location: str, base: str, adapter: Path, work: Path, processes: int, publishes: int) -> None:
    """Publish and promote from many processes; raises AssertionError when anything is lost, repeated or forked."""
    arguments = {"registry": location, "folder": str(adapter), "name": NAME, "base": base, "count": str(publishes)}
    reports = [work / f"published-{writer}.json" for writer in range(processes)]
    started = [
        forks.start("publish_many", writer=str(writer), report=str(report), **arguments)
        for writer, report in enumerate(reports)
    ]
    assert [forks.wait(pid) for pid in started] == [0] * processes
    answered = [json.loads(report.read_text()) for report in reports]
    (work / "answered.json").write_text(json.dumps(answered))


def check_versions(location: str, work: Path, processes: int, publishes: int) -> None:
    """That every answer is there, under contiguous numbers of its own, and nothing else, and that all is whole."""
    from baton.registry import Registry
    from baton.registry.care.fsck import check

    registry = Registry(location)
    answered = json.loads((work / "answered.json").read_text())
    expected = {int(number): digest for one in answered for number, digest in one.items()}
    found = {number: record["digest"] for number, record in registry.version_records(NAME).items()}
    assert sum(len(one) for one in answered) == processes * publishes == len(set(expected.values()))
    assert found == expected and list(found) == list(range(1, processes * publishes + 1))
    assert check(registry).problems == []


def race_aliases(forks: Forks, location: str, work: Path, processes: int, moves: int) -> int:
    """Move one alias from many processes; returns how many moves were let."""
    arguments = {"registry": location, "name": NAME, "alias": "prod", "count": str(moves)}
    reports = [work / f"moved-{writer}.json" for writer in range(processes)]
    started = [
        forks.start("promote_many", writer=str(writer), report=str(report), **arguments)
        for writer, report in enumerate(reports)
    ]
    assert [forks.wait(pid) for pid in started] == [0] * processes
    return sum(json.loads(report.read_text()) for report in reports)


def check_history(location: str, moved: int) -> None:
    """That the alias's history is one chain of as many moves as were let."""
    from baton.registry import Registry

    history = Registry(location).alias_history(NAME, "prod")
    assert [move["previous"] for move in history] == [None, *(move["to"] for move in history[:-1])]
    assert len(history) == moved > 0


@contextmanager
def place(store: str, work: Path) -> Iterator[str]:
    """Where the registry goes: a folder, or a bucket of a server that runs meanwhile."""
    if store == "folder":
        yield str(work / "registry")
        return
    server = subprocess.Popen([sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin and server.stdout
    url, bucket = server.stdout.readline().split()
    os.environ |= {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
    }
    try:
        yield f"s3://{bucket}/registry"
    finally:
        server.stdin.close()
        server.wait()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=["folder", "s3"], default="folder")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--publishes", type=int, default=100, help="by each process")
    parser.add_argument("--moves", type=int, default=20, help="of the alias, by each process")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    os.environ["TEST_CHILD_LIMIT_S"] = "3600"
    with tempfile.TemporaryDirectory() as folder, place(given.store, Path(folder)) as location:
        work = Path(folder)
        os.environ["BATON_CACHE"] = str(work / "cache")
        report: dict[str, Any] = {"store": given.store, "processes": given.processes, "publishes": given.publishes}
        # In a process of its own: this one must not have used torch when it forks.
        made = [sys.executable, "-c", _MODELS, str(work / "base"), str(work / "adapter")]
        subprocess.run(made, check=True, capture_output=True)
        forks = Forks()
        given_base = {"folder": str(work / "base"), "name": "team/base", "kind": "base"}
        assert forks.run("publish", registry=location, **given_base) == 0
        begun = time.monotonic()
        race(forks, location, "team/base:1", work / "adapter", work, given.processes, given.publishes)
        report["publishing_s"] = round(time.monotonic() - begun, 1)
        begun = time.monotonic()
        report["moves"] = race_aliases(forks, location, work, given.processes, given.moves)
        report["promoting_s"] = round(time.monotonic() - begun, 1)
        forks.close()
        check_versions(location, work, given.processes, given.publishes)
        check_history(location, report["moves"])
        report["versions"] = given.processes * given.publishes
    print(json.dumps(report) if given.json else "\n".join(f"{key}: {value}" for key, value in report.items()))


if __name__ == "__main__":
    main()
