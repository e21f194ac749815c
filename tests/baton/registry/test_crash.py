"""Killed at every step of every command that writes: the old or the new state, no damage, and again it succeeds."""

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from baton.registry import Registry
from baton.registry.care import tombstones
from baton.registry.care.fsck import check
from baton.registry.care.gc import collect
from baton.registry.failpoints import STEPS
from baton.registry.travel.bundle import export
from baton.registry.trust import attestations
from tests.baton.registry.care import small_models
from tests.baton.registry.conftest import Folders
from tests.baton.registry.forks import Forks

NEW = (
    "publish.6-version-recorded",
    "promote.2-alias-recorded",
    "import.5-version-recorded:2",  # after the base, which is there already
    "push.5-version-recorded:2",
)
"""Here the new state must be there; everywhere else the old one."""
AGAIN = (
    "publish.2-file-copied:3",
    "publish.4-blob-stored:3",
    "import.2-file-verified:4",
    "import.5-version-recorded:2",
    "push.5-version-recorded:2",
    "gc.4-blob-deleted:2",
)
"""Steps that are done more than once, in the middle of it."""
POINTS = [*(f"{command}.{name}" for command, names in STEPS.items() for name in names), *AGAIN]


@pytest.fixture(scope="module")
def another_adapter(made: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of team/base:1 that has not been published."""
    folder = tmp_path_factory.mktemp("another") / "adapter"
    shutil.copytree(made.adapter, folder)
    weights = folder / "adapter_model.safetensors"
    tensors = {name: np.flip(tensor, 0).copy() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


State = tuple[dict[str, dict[int, str]], dict[str, dict[str, int]]]


def state(location: str) -> State:
    """What people see: every version's digest, and what every alias means."""
    registry = Registry(location)
    names = registry.models()
    versions = {name: {n: r["digest"] for n, r in registry.version_records(name).items()} for name in names}
    return versions, {name: registry.aliases(name) for name in names}


class Scene:
    """A registry before a command, and the command."""

    def __init__(self, written: Registry, call: str, **arguments: str) -> None:
        """written: the registry that the command writes to."""
        self.registry = written
        self.call = call
        self.arguments = arguments


@pytest.fixture
def set_up(
    make_filled: Callable[[str], Registry], new_location: Callable[[str], str], another_adapter: Path, tmp_path: Path
) -> Callable[[str, str], Scene]:
    """set_up(command, "folder" or "s3")."""

    def make(command: str, kind: str) -> Scene:
        if command in ("publish", "promote", "gc"):
            registry = make_filled(kind)
            if command == "publish":
                given = {"folder": str(another_adapter), "name": "team/adapter", "kind": "adapter"}
                return Scene(registry, command, registry=registry.location, base="team/base:1", **given)
            if command == "promote":
                registry.promote("team/base:1", "candidate", "x")
                return Scene(registry, command, registry=registry.location, ref="team/base:1", alias="prod")
            gone = small_models.publish(registry, "team/gone", {"a": b"a", "b": b"b"})
            tombstones.delete(registry, gone.ref, "x")
            return Scene(registry, command, registry=registry.location)
        # team/base:1 is there already: what comes is one version, with its attestation
        source, target = make_filled("folder"), Registry(new_location(kind), create=True)
        attestations.attest(source, source.resolve("team/adapter:1").digest, "evaluation", {"metrics": {"x": 1.0}})
        from baton.registry.travel.transfer import push

        push(source, source.resolve("team/base:1"), target)
        if command == "push":
            there = target.location
            return Scene(target, command, registry=source.location, ref="team/adapter:1", target=there)
        export(source, source.resolve("team/adapter:1"), tmp_path / "bundle.tar")
        return Scene(target, command, registry=target.location, file=str(tmp_path / "bundle.tar"))

    return make


def reach_the_end(forks: Forks, scene: Scene) -> None:
    assert forks.run(scene.call, **scene.arguments) == 0


def crash(forks: Forks, scene: Scene, point: str) -> None:
    location = scene.registry.location
    old = state(location)
    assert forks.run(scene.call, failpoint=point, **scene.arguments) == -signal.SIGKILL
    after = state(location)
    assert (after != old) == (point in NEW)
    assert check(Registry(location)).problems == []
    reach_the_end(forks, scene)
    new = state(location)
    assert check(Registry(location)).problems == []
    assert after == (new if point in NEW else old)
    if scene.call == "gc":
        assert new == old
        assert not any(name == "team/gone" for name in Registry(location).models())
    else:
        assert new != old
        reach_the_end(forks, scene)
        assert state(location) == new
    # What the dead one left is collected, with its lease; and nothing else.
    collect(Registry(location), 0)
    report = check(Registry(location))
    assert (report.problems, report.num_orphans, report.num_files.get("lease", 0)) == ([], 0, 0)
    assert state(location) == new


@pytest.mark.parametrize("point", POINTS)
def test_killed_there(forks: Forks, set_up: Callable[[str, str], Scene], store_kind: str, point: str) -> None:
    crash(forks, set_up(point.partition(".")[0], store_kind), point)


@pytest.mark.parametrize("point", [point for point in POINTS if point.startswith("publish.") and ":" not in point])
def test_a_collector_harms_no_publisher(
    forks: Forks, set_up: Callable[[str, str], Scene], point: str, tmp_path: Path
) -> None:
    """The publisher stands still after each step; what it publishes was there, and may be collected."""
    scene = set_up("publish", "folder")
    registry = scene.registry
    reach_the_end(forks, scene)
    tombstones.delete(registry, "team/adapter:2", "x")
    gate = tmp_path / "gate"
    gate.touch()
    pid = forks.start(scene.call, failpoint=f"{point}={gate}", **scene.arguments)
    while not Path(f"{gate}.reached").exists():
        time.sleep(0.005)
    collect(Registry(registry.location), 0)
    assert check(Registry(registry.location)).problems == []
    gate.unlink()
    assert forks.wait(pid) == 0
    collect(Registry(registry.location), 0)
    assert check(Registry(registry.location)).problems == []
    assert Registry(registry.location).resolve("team/adapter:3").folder().is_dir()
