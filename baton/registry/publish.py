"""Publish a folder: inspect, write aside, probe what was written, then make it appear at once."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from baton.errors import UserError
from baton.registry import manifest as manifests
from baton.registry import probe, provenance, records, vocabulary, weights
from baton.registry.inspection import ADAPTER_CONFIG, ADAPTER_WEIGHTS, inspect, rows_of, vocabulary_size
from baton.registry.reference import check_name
from baton.registry.stores.files import full_disk_is_user_error, write_hashed
from baton.registry.version import HEAD_KINDS, Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

DETAILS = {"data", "recipe", "metrics", "licence", "build_key", "code", "packages"}
_PATH_KEYS = (
    "_name_or_path",
    "name_or_path",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "best_model_checkpoint",
)


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
    assert set(details) <= DETAILS, f"unknown details: {set(details) - DETAILS}"
    paths = inspect(folder, kind, base)
    for version in [*parents.values(), *([base] if base else [])]:
        registry.read_manifest(version.digest)  # an ancestor of another registry would break the lineage
    base_folder = registry.materialise(base) if base else None
    with (
        full_disk_is_user_error(f"publishing {name} to {registry.location} failed"),
        registry.store.workspace() as aside,
    ):
        files = _copy(folder, paths, aside, base)
        content = _describe(aside, kind, files, base)
        content |= _circumstances(parents, details)
        content["probe"] = probe.record(aside, base_folder, kind, content["vocabulary"])
        existing = registry.find_same(name, content)
        if existing:
            return existing
        for entry in files:
            if (aside / entry["path"]).exists():
                registry.store.put_blob(aside / entry["path"], entry["sha256"])
        return _commit(registry, name, content)


def _commit(registry: "Registry", name: str, content: dict[str, Any]) -> Version:
    data = manifests.canonical(content)
    digest = manifests.digest_of(data)
    stored = manifests.parse(data, digest, "the new manifest")
    registry.store.put_if_absent(manifests.manifest_path(digest), data)
    registry.read_manifest(digest)  # an older copy under that name may have been damaged since
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
        existing = registry.find_same(name, stored)
        if existing:
            return existing
        # A number that was just refused is taken, even where NFS still lists the folder without it.
        number = max([number, *registry.all_numbers(name)]) + 1
        if records.write(registry.store, folder, number, {"number": number, **record}):
            return Version(name, number, digest, registry)


def _copy(folder: Path, paths: list[str], aside: Path, base: Version | None) -> list[dict[str, Any]]:
    files = {}
    for path in paths:
        source: Path | bytes = folder / path
        rewritten = without_local_paths(folder / path, base)
        sha256, size = write_hashed(source if rewritten is None else rewritten, aside / path)
        files[path] = {"path": path, "sha256": sha256, "size": size}
    if base and "tokenizer.json" not in files:
        # Its blobs are in the store already: the version then loads complete, with the base's tokenizer.
        inherited = {e["path"]: e for e in base.manifest["files"] if e["path"] in vocabulary.TOKENIZER_FILES}
        files = inherited | files
    return [files[path] for path in sorted(files)]


def without_local_paths(path: Path, base: Version | None) -> bytes | None:
    """The file's bytes without this machine's paths, an adapter's base by digest; None: keep it as it is."""
    if path.name == "README.md":
        return _model_card(path, base)
    if path.suffix != ".json" or path.name in ("tokenizer.json", "vocab.json") or path.stat().st_size > 4 << 20:
        return None
    try:
        settings = json.loads(path.read_bytes())
    except ValueError:
        return None
    if not isinstance(settings, dict):
        return None
    changed = {key: value for key, value in settings.items() if not (key in _PATH_KEYS and _is_local(value))}
    if path.name == ADAPTER_CONFIG and base:
        changed |= {"base_model_name_or_path": f"baton:{base.digest}", "revision": None}
        # PEFT writes sets, whose order changes from process to process: one adapter would get two digests.
        for key in ("target_modules", "exclude_modules"):
            if isinstance(changed.get(key), list):
                changed[key] = sorted(changed[key])
    if changed == settings:
        return None
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _model_card(path: Path, base: Version | None) -> bytes | None:
    text = card = path.read_text("utf-8", errors="replace")
    for name, key in ((ADAPTER_CONFIG, "base_model_name_or_path"), ("config.json", "_name_or_path")):
        settings = vocabulary.read_json(path.parent / name) if (path.parent / name).is_file() else {}
        named = settings.get(key)
        if _is_local(named):
            card = card.replace(named, f"baton:{base.digest}" if base else f"…/{Path(named).name}")
    card = card.replace(str(path.parent.absolute()), f"…/{path.parent.name}")
    return None if card == text else card.encode("utf-8")


def _is_local(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and (os.path.isabs(value) or value[:1] in (".", "~") or os.path.exists(value))


def _describe(aside: Path, kind: str, files: list[dict[str, Any]], base: Version | None) -> dict[str, Any]:
    tensors = weights.read_header(aside / ADAPTER_WEIGHTS) if base else weights.read_model(aside)
    described: dict[str, Any] = {
        "format": manifests.FORMAT,
        "kind": kind,
        "files": files,
        "dtype": weights.dtype_of(tensors),
        "base": base.digest if base else None,
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


def _circumstances(parents: dict[str, Version], details: dict[str, Any]) -> dict[str, Any]:
    details = manifests.storable(details)
    if any(not role for role in parents):
        raise UserError("a parent needs a role, such as sft=team/name:3.")
    return {
        "parents": {role: parent.digest for role, parent in parents.items()},
        "data": details.get("data") or [],
        "recipe": details.get("recipe") or {},
        "metrics": details.get("metrics") or {},
        "licence": details.get("licence"),
        "build_key": details.get("build_key"),
        "code": details.get("code") or provenance.code_state(),
        "packages": details.get("packages") or provenance.package_versions(),
    }
