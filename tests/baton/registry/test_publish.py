"""Publishing: same content same version, no local paths, races, a full disk, debris."""

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.vocabulary import tokenizer_digest
from tests.baton.registry.conftest import in_processes, overwrite, paths

QUICK_PROBE: dict[str, Any] = {"output": "score", "vocabulary_size": 280, "atol": 0.0, "rtol": 0.0}
QUICK_PROBE |= {"input_ids": [[0]], "expected": [[0.0]]}


def test_the_same_content_is_the_same_version(filled: Registry, folders: Any, tmp_path: Path) -> None:
    base = filled.resolve("team/base:1")
    again = filled.publish(folders.base, name="team/base", kind="base", details={"licence": "apache-2.0"})
    assert again == base and filled.numbers("team/base") == [1]
    other = filled.publish(folders.base, name="team/base", kind="base", details={"licence": "mit"})
    assert other.number == 2 and other.digest != base.digest
    same_under_another_name = filled.publish(
        folders.base, name="team/copy", kind="base", details={"licence": "apache-2.0"}
    )
    assert (same_under_another_name.number, same_under_another_name.digest) == (1, base.digest)
    assert filled.by_digest(base.digest) == base
    assert filled.resolve(f"team/base@{base.digest}") == base


def test_a_probe_that_differs_in_its_last_digits_is_the_same_version(
    filled: Registry, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baton.registry import probe

    record = probe.record

    def a_little_off(*arguments: Any) -> dict[str, Any]:
        found = record(*arguments)
        return found | {"expected": [[value + 1e-5 for value in row] for row in found["expected"]]}

    monkeypatch.setattr(probe, "record", a_little_off)
    again = filled.publish(folders.base, name="team/base", kind="base", details={"licence": "apache-2.0"})
    assert again == filled.resolve("team/base:1")


def test_no_path_of_this_machine_is_stored(filled: Registry, made: Any, folders: Any, tmp_path: Path) -> None:
    base = filled.resolve("team/base:1")
    (folders.base / "README.md").write_text(f"# A model, tuned from {folders.base.resolve()}")
    for folder in folders:
        for name in ("config.json", "tokenizer_config.json"):
            if (folder / name).exists():
                path = folder / name
                path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": str(folder)}))
    recipe = {"run_dir": str(tmp_path / "runs"), "data": {"train": [str(tmp_path / "data.jsonl")]}}
    details = {"recipe": recipe, "data": [{"path": str(tmp_path / "data.jsonl")}]}
    version = filled.publish(folders.adapter, name="team/new", kind="adapter", base=base, details=details)
    filled.publish(folders.base, name="team/new-base", kind="base", details=details)
    assert version.manifest["recipe"] == {"run_dir": "…/runs", "data": {"train": ["…/data.jsonl"]}}
    assert str(made.base) in (made.adapter / "README.md").read_text()  # PEFT writes it there
    for path in paths(filled):
        for secret in (str(tmp_path), str(made.base.parent), str(Path.home()) + "/"):
            assert secret.encode() not in filled.store.get(path), path
    stored = {entry["path"]: entry["sha256"] for entry in version.manifest["files"]}
    config = json.loads(filled.store.get(f"blobs/sha256/{stored['adapter_config.json']}"))
    assert config["base_model_name_or_path"] == f"baton:{base.digest}" and config["revision"] is None


def test_an_adapter_without_tokenizer_gets_its_bases(filled: Registry, folders: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folders.adapter / name).unlink()
    base = filled.resolve("team/base:1")
    version = filled.publish(folders.adapter, name="team/bare", kind="adapter", base=base)
    for key in ("vocabulary", "tokenizer_digest", "chat_template_digest"):
        assert version.manifest[key] == base.manifest[key]
    folder = filled.materialise(version)
    assert (folder / "tokenizer.json").exists() and (folder / "chat_template.jinja").exists()


def test_truncation_and_padding_do_not_make_another_tokenizer(folders: Any) -> None:
    from transformers import AutoTokenizer

    before = tokenizer_digest(folders.base)
    tokenizer = AutoTokenizer.from_pretrained(folders.base)
    tokenizer(["a", "the town"], truncation=True, padding=True, max_length=2)
    tokenizer.save_pretrained(folders.base)
    assert json.loads((folders.base / "tokenizer.json").read_text())["truncation"]
    assert tokenizer_digest(folders.base) == before
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(folders.base)
    assert tokenizer_digest(folders.base) != before


def test_a_whole_model_may_be_published_as_merged(filled: Registry, folders: Any) -> None:
    parents = {"base": filled.resolve("team/base:1"), "sft": filled.resolve("team/adapter:1")}
    version = filled.publish(folders.other_base, name="team/merged", kind="merged", parents=parents)
    assert version.manifest["parents"] == {role: parent.digest for role, parent in parents.items()}
    assert filled.verify(version) == []


def _publish_many(path: str, folder: str, writer: int, count: int) -> None:
    from baton.registry import probe

    # The race is about numbers; loading a model a thousand times would only hide it.
    probe.record = lambda *arguments: QUICK_PROBE  # type: ignore[assignment]
    registry = Registry(path, create=True)
    for number in range(count):
        registry.publish(folder, name="team/race", kind="base", details={"build_key": f"{writer}-{number}"})
        registry.publish(folder, name="team/same", kind="base", details={"build_key": "one"})


def test_writers_at_once_get_contiguous_numbers(folder_registry: Registry, folders: Any) -> None:
    registry, writers, count = folder_registry, 4, 6
    arguments = [(registry.location, str(folders.base), writer, count) for writer in range(writers)]
    in_processes(registry, _publish_many, arguments)
    assert registry.numbers("team/race") == list(range(1, writers * count + 1))
    keys = {version.manifest["build_key"] for version in registry.versions("team/race")}
    assert keys == {f"{writer}-{number}" for writer in range(writers) for number in range(count)}
    assert registry.numbers("team/same") == [1]
    assert registry.verify_all() == [] and registry.store.list("tmp") == []


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_full_disk_publishes_nothing(
    folder_registry: Registry, folders: Any, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Fail at the first, second, … call: each time the registry stays as it was, until a publish succeeds."""
    real = getattr(os, call)
    monkeypatch.setattr("baton.registry.probe.record", lambda *arguments: QUICK_PROBE)
    for failing in range(1, 100):
        calls = 0

        def full(*arguments: Any, failing: int = failing) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                folder_registry.publish(folders.base, name="team/base", kind="base")
            except UserError as error:
                assert folder_registry.location in str(error) and "No space left" in str(error)
            else:
                break
        # Only the sync after the record's own link comes too late to keep it from appearing.
        assert folder_registry.models() == [] or call == "fsync"
        assert folder_registry.store.list("tmp") == [] and folder_registry.verify_all() == []
    assert failing > 5 and folder_registry.numbers("team/base") == [1] and folder_registry.verify_all() == []


def test_debris_of_a_killed_publish_is_ignored(filled: Registry, folders: Any) -> None:
    overwrite(filled, "tmp/0123/model.safetensors", (folders.base / "model.safetensors").read_bytes())
    overwrite(filled, "tmp/half.json", b'{"dig')
    assert filled.verify_all() == []
    version = filled.publish(folders.base, name="team/base", kind="base", details={"licence": "mit"})
    assert version.number == 2


def test_what_a_publish_needs_is_leased_before_anyone_looks(
    filled: Registry, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step before the record, the registry says what is in use; afterwards nothing is held."""
    from baton.registry import publish

    held: dict[str, list[set[str]]] = {}

    def look(command: str, name: str) -> None:
        found = set()
        for lease in filled.store.list("leases"):
            found |= set(json.loads(filled.store.get(f"leases/{lease}"))["holds"])
        held.setdefault(name, []).append(found)

    monkeypatch.setattr(publish, "step", look)
    base, parent = filled.resolve("team/base:1"), filled.resolve("team/reward:1")
    version = filled.publish(folders.adapter, name="team/new", kind="adapter", base=base, parents={"judge": parent})
    ancestors = {digest.removeprefix("sha256:") for digest in (base.digest, parent.digest)}
    blobs = {entry["sha256"] for entry in version.manifest["files"]}
    (first,), (probed,) = held["1-lease-taken"], held["3-probe-recorded"]
    assert first == ancestors <= probed
    for name in ("4-blob-stored", "5-manifest-stored", "6-version-recorded"):
        for found in held[name]:
            assert found == ancestors | blobs | {version.digest.removeprefix("sha256:")}
    names = len(list(folders.adapter.iterdir()))
    assert len(held["2-file-copied"]) == len(held["4-blob-stored"]) == names
    assert filled.store.list("leases") == []


def test_licences_are_gathered_and_refused(filled: Registry, folders: Any) -> None:
    base, reward = filled.resolve("team/base:1"), filled.resolve("team/reward:1")
    details = {"licence": "mit", "data": [{"path": "x.jsonl", "licence": "cc-by-4.0"}, {"path": "y.jsonl"}]}
    version = filled.publish(folders.adapter, name="team/new", kind="adapter", base=base, details=details)
    # its own and its base's; what states none is unknown
    assert version.manifest["licences"] == {"models": ["Apache-2.0", "MIT"], "data": ["CC-BY-4.0", "unknown"]}
    assert version.manifest["licence"] == "mit"
    arguments: dict[str, Any] = {"name": "team/newer", "kind": "adapter", "base": base, "details": details}
    with pytest.raises(UserError, match="licences outside the allowed ones .*MIT.*\n.*base team/base:1 has apache-2.0"):
        filled.publish(folders.adapter, allowed_licences=["MIT", "CC-BY-4.0", "unknown"], **arguments)
    with pytest.raises(UserError, match="judge team/reward:1 states no licence"):
        filled.publish(
            folders.adapter, allowed_licences=["MIT", "CC-BY-4.0", "apache-2.0"], parents={"judge": reward}, **arguments
        )
    assert "team/newer" not in filled.models() and filled.store.list("tmp") == []
    allowed = ["MIT", "CC-BY-4.0", "apache-2.0", "unknown"]
    assert filled.publish(folders.adapter, allowed_licences=allowed, **arguments).number == 1


def test_paths_are_taken_out_at_any_depth_and_tokens_are_kept(tmp_path: Path) -> None:
    from baton.registry.local_paths import without_local_paths

    here = str(tmp_path / "secret" / "base")
    (tmp_path / "secret").mkdir()
    settings = {
        "text_config": {"_name_or_path": here, "hidden_size": 4},
        "modules": [here, "org/name", "/"],
        "eos_token": here,
        "added_tokens_decoder": {"0": {"content": here}},
        "notes": "see /no/such/place for more",
        "absent": "/no/such/place",
        "sentence": f"{here} is where it lay",
        "with_space": str(tmp_path / "secret" / "my base"),
        "address": f"file://{here}",
        "command": f"train --in={here} --out=/no/such/place",
    }
    (tmp_path / "secret" / "my base").mkdir()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    found = without_local_paths(path, None)
    assert found is not None and json.loads(found) == settings | {
        "text_config": {"hidden_size": 4},
        "modules": ["…/base", "org/name", "/"],
        "with_space": "…/my base",
        "address": "file://…/base",
        "command": "train --in=…/base --out=/no/such/place",
    }
    path.write_text(json.dumps({"hidden_size": 4, "rope": [1, 2]}))
    assert without_local_paths(path, None) is None


def test_a_model_card_keeps_its_sentences(tmp_path: Path) -> None:
    from baton.registry.local_paths import without_local_paths

    card = tmp_path / "README.md"
    card.write_text("Version 1.5. Good.")
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "."}))
    assert without_local_paths(card, None) is None
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": str(tmp_path / "from")}))
    card.write_text(f"Version 1.5, from {tmp_path}/from.")
    assert without_local_paths(card, None) == "Version 1.5, from …/from.".encode()


@pytest.mark.parametrize("late", ["notes.txt", "config.json"])
def test_what_changes_while_it_is_copied_is_looked_at_again(
    registry: Registry, folders: Any, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """A pickle, or code, that comes after the first look and before the copy."""
    from baton.registry import publish

    (folders.base / "notes.txt").write_text("notes")
    config = json.loads((folders.base / "config.json").read_bytes())
    change = {
        "notes.txt": pickle.dumps({"a": 1}, 4),
        "config.json": json.dumps(config | {"auto_map": {"AutoModel": "m.M"}}).encode(),
    }

    def swapped(path: Path, base: Any) -> bytes | None:
        if path.name == late:
            path.write_bytes(change[late])
        return None

    monkeypatch.setattr(publish, "without_local_paths", swapped)
    reason = "is a pickle" if late == "notes.txt" else "has auto_map"
    with pytest.raises(UserError, match=f"^{folders.base / late} {reason}.* It changed while it was being published"):
        registry.publish(folders.base, name="team/base", kind="base")
    assert registry.models() == [] and registry.store.list("tmp") == []


@pytest.mark.parametrize("is_told", [True, False])
def test_a_listing_that_is_remembered_does_not_publish_twice(
    filled: Registry, folders: Any, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """As NFS remembers one, until it is asked to look again; and where it does not even then."""
    from baton.registry.stores.local import LocalStore

    stale: dict[str, list[str]] = {"models/team/copy/versions": []}
    real = LocalStore.list
    Registry(filled.location).publish(folders.base, name="team/copy", kind="base")  # on another machine
    monkeypatch.setattr(
        LocalStore, "list", lambda store, folder: stale[folder] if folder in stale else real(store, folder)
    )
    if is_told:
        monkeypatch.setattr(LocalStore, "see_latest", lambda store, folder: stale.pop(folder, None))
    version = filled.publish(folders.base, name="team/copy", kind="base")
    monkeypatch.undo()
    assert version.number == 1 and Registry(filled.location).numbers("team/copy") == [1]
