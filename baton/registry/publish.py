"""Publish a folder: inspect, write aside, probe what was written, then make it appear at once."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.adapters import member_folders
from baton.errors import UserError
from baton.registry import manifest as manifests
from baton.registry import probe, probe_process, provenance, records, vocabulary, weights
from baton.registry.care.leases import lease
from baton.registry.checks import check_adapter_against_base, check_merged, check_tokenizer
from baton.registry.failpoints import step
from baton.registry.history import licences
from baton.registry.inspection import ADAPTER_WEIGHTS, has_code, inspect, rows_of, vocabulary_size
from baton.registry.local_paths import without_local_paths
from baton.registry.reference import check_name
from baton.registry.stores.files import storage_errors_are_user_errors, write_hashed
from baton.registry.version import HEAD_KINDS, WHOLE_KINDS, Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

DETAILS = {"data", "recipe", "metrics", "licence", "build_key", "code", "packages"}
_WORTH_OVERLAPPING = 64 << 20  # bytes; less is copied before another process has even started
_COPIES_AT_ONCE = 4


def publish(
    registry: "Registry",
    folder: Path,
    name: str,
    kind: str,
    base: Version | None,
    parents: dict[str, Version],
    details: dict[str, Any],
    allow_code: bool,
    allowed_licences: list[str] | None,
) -> Version:
    """Publish `folder` as the next version of `name`; the same content again gives the existing version."""
    check_name(name)
    if unknown := sorted(set(details) - DETAILS):
        raise UserError(f"publishing {name}: details has {', '.join(unknown)}; expected {', '.join(sorted(DETAILS))}.")
    paths = inspect(folder, kind, base, allow_code)
    if sum((folder / path).stat().st_size for path in paths) > _WORTH_OVERLAPPING:
        probe_process.start()  # it imports torch while the files are copied
    ancestors = {version.digest for version in [*parents.values(), *([base] if base else [])]}
    with (
        storage_errors_are_user_errors(f"publishing {name} to {registry.location} failed"),
        lease(registry.store, f"publish {name}", ancestors) as held,
        registry.store.workspace() as aside,
        ThreadPoolExecutor(_COPIES_AT_ONCE) as copying,
    ):
        step("publish", "1-lease-taken")
        for digest in sorted(ancestors):
            registry.read_manifest(digest)  # an ancestor of another registry would break the lineage
        circumstances = _circumstances(registry, base, parents, details, allowed_licences)
        base_folder = registry.materialise(base) if base else None
        copies = {path: _start_copy(copying, folder, path, aside, base) for path in paths}
        for copy in copies.values():
            copy.wait()
        # What follows reads what was written, while its hashing and the disk are still at it: the folder may have
        # changed since it was looked at, and a trainer may be writing to it still.
        _inspect_copies(folder, aside, paths, kind, base, allow_code)
        content = _describe(aside, kind, base) | circumstances
        if has_code(aside, paths):
            content["architecture"]["remote_code"] = True
        _check_against_ancestors(registry, folder, content, base, parents, base_folder)
        content["probe"] = probe.record(aside, base_folder, kind, content["vocabulary"])
        content["files"] = _files(copies, base)
        step("publish", "3-probe-recorded")
        held.add([*(entry["sha256"] for entry in content["files"]), manifests.digest_of(manifests.canonical(content))])
        existing = registry.find_same(name, content)
        if existing:
            return existing
        for entry in content["files"]:
            if entry["path"] in copies:
                registry.store.put_blob(aside / entry["path"], entry["sha256"])
                step("publish", "4-blob-stored")
        return _commit(registry, name, content)


def _inspect_copies(
    folder: Path, aside: Path, paths: list[str], kind: str, base: Version | None, allow_code: bool
) -> None:
    """Refuse copies that would have been refused in their folder, which is what the messages name."""
    try:
        copied = inspect(aside, kind, base, allow_code)
    except UserError as error:
        error.args = (str(error).replace(str(aside), str(folder)) + " It changed while it was being published.",)
        raise
    assert copied == paths, (copied, paths)


def _commit(registry: "Registry", name: str, content: dict[str, Any]) -> Version:
    data = manifests.canonical(content)
    digest = manifests.digest_of(data)
    stored = manifests.parse(data, digest, "the new manifest")
    registry.store.put_if_absent(manifests.manifest_path(digest), data)
    registry.read_manifest(digest)  # an older copy under that name may have been damaged since
    step("publish", "5-manifest-stored")
    record = {
        "digest": digest,
        "kind": stored["kind"],
        "identity": manifests.identity(stored),
        "by": provenance.user(),
        "time": provenance.now(),
    }
    folder = records.versions_folder(name)
    number = 0
    while True:
        # The number first: whoever takes a lower one with the same content is then among those that are compared.
        # A number that was just refused is taken, even where NFS still lists the folder without it.
        registry.store.see_latest(folder)
        number = max([number, *registry.all_numbers(name)]) + 1
        existing = registry.find_same(name, stored)
        if existing:
            return existing
        if records.write(registry.store, folder, number, {"number": number, **record}):
            step("publish", "6-version-recorded")
            return Version(name, number, digest, registry)
        if existing := _same_at(registry, name, number, stored):
            return existing


def _same_at(registry: "Registry", name: str, number: int, content: dict[str, Any]) -> Version | None:
    """The version of that number, just taken by another publisher, if it is the same: no listing need show it yet."""
    try:
        record = records.read(registry.store, records.versions_folder(name), number, "digest")
        if record.get("identity") != manifests.identity(content):
            return None
        taken = Version(name, number, record["digest"], registry)
        recorded = taken.manifest["probe"]
    except UserError:
        return None  # damaged; that must not stop others from publishing
    if registry.store.exists(records.record_path(records.tombstones_folder(name), number)):
        return None
    is_same = recorded["input_ids"] == content["probe"]["input_ids"]
    return taken if is_same and probe.largest_difference(content["probe"]["expected"], recorded) is None else None


@dataclass(frozen=True)
class _Copy:
    """A file on its way into the workspace."""

    path: str
    written: threading.Event
    result: "Future[tuple[str, int]]"

    def wait(self) -> None:
        """Until its bytes can be read there; raises what kept them from it."""
        self.result.add_done_callback(lambda _: self.written.set())
        self.written.wait()
        if self.result.done():
            self.result.result()
        step("publish", "2-file-copied")

    def entry(self) -> dict[str, Any]:
        """As in a manifest's `files`, when it is hashed and on the disk."""
        sha256, size = self.result.result()
        return {"path": self.path, "sha256": sha256, "size": size}


def _start_copy(copying: ThreadPoolExecutor, folder: Path, path: str, aside: Path, base: Version | None) -> _Copy:
    rewritten = without_local_paths(folder / path, base)
    written = threading.Event()
    source = folder / path if rewritten is None else rewritten
    return _Copy(path, written, copying.submit(write_hashed, source, aside / path, written))


def _files(copies: dict[str, _Copy], base: Version | None) -> list[dict[str, Any]]:
    files = {path: copy.entry() for path, copy in copies.items()}
    if base and "tokenizer.json" not in files:
        # Its blobs are in the store already: the version then loads complete, with the base's tokenizer.
        inherited = {e["path"]: e for e in base.manifest["files"] if e["path"] in vocabulary.TOKENIZER_FILES}
        files = inherited | files
    return [files[path] for path in sorted(files)]


def _check_against_ancestors(
    registry: "Registry",
    folder: Path,
    content: dict[str, Any],
    base: Version | None,
    parents: dict[str, Version],
    base_folder: Path | None,
) -> None:
    if base is not None and base_folder is not None:
        for member in member_folders(folder):
            check_adapter_against_base(member, weights.read_header(member / ADAPTER_WEIGHTS), base, base_folder)
        tensors = weights.read_header(folder / ADAPTER_WEIGHTS)
        check_tokenizer(folder, content["tokenizer_digest"], tensors, base)
    if content["kind"] != "merged":
        return
    # What it was merged into: a parent that is whole, and the base of one that is an adapter. A policy's reward model
    # may sit on another base.
    models = [parent for parent in parents.values() if parent.kind not in HEAD_KINDS] or list(parents.values())
    for digest, parent in sorted({parent.base or parent.digest: parent for parent in models}.items()):
        whole = registry.by_digest(digest) if parent.base else parent
        if whole.kind in WHOLE_KINDS:
            check_merged(folder, content["tokenizer_digest"], whole, registry.materialise(whole))


def _describe(aside: Path, kind: str, base: Version | None) -> dict[str, Any]:
    tensors = weights.read_header(aside / ADAPTER_WEIGHTS) if base else weights.read_model(aside)
    described: dict[str, Any] = {
        "format": manifests.FORMAT,
        "kind": kind,
        "dtype": weights.dtype_of(tensors),
        "architecture": _architecture(aside, kind, base) | {"num_parameters": weights.num_parameters(tensors)},
    }
    if not (aside / "tokenizer.json").exists():
        assert base is not None
        for key in ("vocabulary", "tokenizer_digest", "chat_template_digest"):
            described[key] = base.manifest[key]
        if vocabulary.chat_template(aside) is not None:
            described["chat_template_digest"] = vocabulary.chat_template_digest(aside)
        return described
    ids = vocabulary.token_ids(aside)
    special = vocabulary.special_tokens(aside, ids)
    if base:
        special["stop"] = sorted({*special["stop"], *base.manifest["vocabulary"]["special_tokens"]["stop"]})
    return described | {
        "vocabulary": {
            "size": vocabulary_size(ids),
            "embedding_rows": rows_of(aside, tensors, base),
            "special_tokens": special,
        },
        "tokenizer_digest": vocabulary.tokenizer_digest(aside),
        "chat_template_digest": vocabulary.chat_template_digest(aside),
    }


def _architecture(aside: Path, kind: str, base: Version | None) -> dict[str, Any]:
    if base:
        architecture = dict(base.manifest["architecture"])
        if kind in HEAD_KINDS and architecture["class"]:
            architecture["class"] = architecture["class"].replace("ForCausalLM", "ForSequenceClassification")
        return architecture
    config = vocabulary.read_json(aside / "config.json")
    classes = config.get("architectures") or [None]
    return {
        "class": classes[0],
        "model_type": config.get("model_type"),
        "hidden_size": config.get("hidden_size", config.get("n_embd")),
        "num_layers": config.get("num_hidden_layers", config.get("n_layer")),
    }


def _circumstances(
    registry: "Registry",
    base: Version | None,
    parents: dict[str, Version],
    details: dict[str, Any],
    allowed_licences: list[str] | None,
) -> dict[str, Any]:
    details = manifests.storable(details)
    if any(not role for role in parents):
        raise UserError("a parent needs a role, such as sft=team/name:3.")
    content: dict[str, Any] = {
        "base": base.digest if base else None,
        "parents": {role: parent.digest for role, parent in parents.items()},
        "data": details.get("data") or [],
        "recipe": details.get("recipe") or {},
        "metrics": details.get("metrics") or {},
        "licence": details.get("licence"),
        "build_key": details.get("build_key"),
        "code": details.get("code") or provenance.code_state(),
        "packages": details.get("packages") or provenance.package_versions(),
    }
    if allowed_licences is not None:
        licences.refuse(licences.licences_of(registry, content), allowed_licences)
    ancestors = [version.manifest for version in [*parents.values(), *([base] if base else [])]]
    content["licences"] = licences.gather(content["licence"], ancestors, content["data"])
    return content
