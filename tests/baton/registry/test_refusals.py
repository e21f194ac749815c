"""A registry in a place that may not be written, or read: one message that says so, from every command."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.care import gc, leases, tombstones
from baton.registry.travel import bundle, transfer
from baton.registry.trust import approvals, attestations
from tests.baton.registry.care import small_models
from tests.baton.registry.conftest import Folders, paths

CALLS = ("open", "mkdir", "link", "unlink", "rename", "replace")


def refusing(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
    """Whatever would change something under `folder` fails; a superuser, as whom tests may run, is not to be kept out.

    Reading goes on, as it does on a file system that is mounted read-only.
    """
    for name in CALLS:
        module: Any = os
        call = getattr(module, name)

        def refuse(*arguments: Any, _call: Callable[..., Any] = call, _name: str = name, **named: Any) -> Any:
            is_ours = any(str(folder) in str(argument) for argument in arguments[:2])
            if is_ours and (_name != "open" or arguments[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)):
                raise OSError(number, os.strerror(number), str(arguments[0]))
            return _call(*arguments, **named)

        monkeypatch.setattr(os, name, refuse)

    def refuse_open(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if str(folder) in str(file) and set(mode) & set("wxa+"):
            raise OSError(number, os.strerror(number), str(file))
        return open(file, mode, *arguments, **named)

    monkeypatch.setattr("baton.registry.stores.local.open", refuse_open, raising=False)


@pytest.fixture
def small(folder_registry: Registry) -> Registry:
    small_models.publish(folder_registry, "team/base", {"a": b"base"})
    small_models.publish(folder_registry, "team/base", {"a": b"gone"})
    tombstones.delete(folder_registry, "team/base:2", "x")
    return folder_registry


def collect(registry: Registry) -> None:
    gc.collect(registry, 0)


COMMANDS: dict[str, tuple[Callable[[Registry], object], str]] = {
    "promote": (lambda reg: reg.promote("team/base:1", "prod", "x"), "promoting in"),
    "approve": (lambda reg: approvals.approve(reg, reg.resolve("team/base:1"), "x"), "writing to the registry"),
    "attest": (lambda reg: attestations.attest(reg, reg.resolve("team/base:1").digest, "evaluation", {}), "writing to"),
    "delete": (lambda reg: tombstones.delete(reg, "team/base:1", "x"), "deleting team/base:1"),
    "gc": (collect, "writing to the registry"),
    "lease": (lambda reg: leases.lease(reg.store, "x", ["0" * 64]).__enter__(), "writing to the registry"),
}


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.EROFS, "read-only"), (errno.EACCES, "permission denied"), (errno.ENOSPC, "no space left on the disk")],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_registry_that_may_not_be_written(
    small: Registry, monkeypatch: pytest.MonkeyPatch, command: str, number: int, message: str
) -> None:
    before = paths(small)
    call, doing = COMMANDS[command]
    with monkeypatch.context() as patch:
        refusing(patch, Path(small.location), number)
        with pytest.raises(UserError, match=f"{doing}.* failed: .*{message}") as caught:
            call(Registry(small.location))
    assert small.location in str(caught.value) and paths(small) == before
    call(small)  # and once it may


@pytest.fixture
def bundled(filled_folder: Registry, tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "bundle.tar"
    bundle.export(filled_folder, filled_folder.resolve("team/other:1"), file)
    yield file


def test_nothing_comes_into_a_read_only_registry(
    filled_folder: Registry, small: Registry, made: Folders, bundled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = paths(small)
    version = filled_folder.resolve("team/other:1")
    refusing(monkeypatch, Path(small.location), errno.EROFS)
    for call in (
        lambda: small.publish(made.base, name="team/new", kind="base"),
        lambda: bundle.import_bundle(small, bundled),
        lambda: transfer.push(filled_folder, version, small),
    ):
        with pytest.raises(UserError, match="the file system is read-only"):
            call()
    assert paths(small) == before


def test_where_no_registry_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, tmp_path / "closed", errno.EACCES)
    with pytest.raises(UserError, match="making the registry .*closed/registry failed: permission denied"):
        Registry(tmp_path / "closed" / "registry", create=True)
    with pytest.raises(UserError, match="a name is too long for the file system"):
        Registry(tmp_path / ("n" * 300), create=True)


def test_a_registry_that_may_not_be_read(small: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="reading the registry .* failed: permission denied.*registry.json"):
        Registry(small.location)
