"""To and from the Hugging Face Hub: a version as a plain model repository, a repository as a version."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry import manifest as manifests
from baton.registry import materialise
from baton.registry.checks import adapter_configs
from baton.registry.inspection import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from baton.registry.stores.files import storage_errors_are_user_errors
from baton.registry.travel.card import HubModel, card
from baton.registry.travel.card_text import clean
from baton.registry.travel.hub_repository import HubRepository, Listed, difference
from baton.registry.trust import attestations, policy
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

CARD = "README.md"
_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
# What a loader takes for a model: a stranger's would be loaded instead of the version, or beside it.
_WEIGHTS = re.compile(r"[^/]*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack)|[^/]*\.safetensors\.index\.json")
# Not for a registry: pickles, other frameworks' copies of the weights, and git's own files.
_IGNORED = (
    *(".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".tar", ".zip", ".gz"),
    *(".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".tflite", ".ot", ".mlmodel", ".pb", ".gitattributes"),
)


def push(
    registry: "Registry",
    version: Version,
    repo_id: str,
    *,
    private: bool = True,
    message: str | None = None,
    merge: bool = False,
    base_repo: str | None = None,
    branch: str = "main",
) -> str:
    """Write a version to `repo_id` on the Hub in one commit; returns the commit's URL, or the present one's.

    private: how a new repository is made; pushing privately to a public repository is refused. merge: an adapter is
    merged into its base first. base_repo: `org/name@commit`, where an adapter's base lies on the Hub (its files are
    compared with the registry's); without it, the place that the base was pulled from, if it was.

    The repository then holds exactly the version and its card, and what others put there: files that an earlier push
    wrote and this version lacks are deleted (the card's metadata lists them), all others stay. Weights or an adapter
    among those others would be loaded in the version's place, and are refused. What is there already is not sent
    again; when all is, nothing is committed. Afterwards every file's digest is read back from the Hub, whose client
    compares sizes alone. Raises UserError when somebody else commits meanwhile, when a policy forbids handing the
    version out, and ProbeMismatch when what is in the registry is not the model that was published.
    """
    repository = HubRepository(repo_id)
    if merge and version.base is None:
        raise UserError(f"{version.ref} is of kind {version.kind}: nothing to merge. Push it without --merge.")
    policy.check_loading(registry, version)
    hub_base = _base_on_hub(registry, version, base_repo)
    with (
        storage_errors_are_user_errors(f"pushing {version.ref} to {repository.url} failed"),
        registry.store.workspace() as workspace,
    ):
        folder = workspace / "model"
        if merge:
            registry.merge(version, folder)
        else:
            _write_plain(registry, version, folder, hub_base)
        files = sorted({p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} | {CARD})
        (folder / CARD).write_text(card(registry, version, repo_id, hub_base, merge, files), "utf-8")
        head = _open(repository, private, branch)
        present = repository.files(head)
        stale = _stale(repository, head, present, files, workspace)
        changed = [path for path in files if path not in present or difference(folder / path, present[path])]
        if not changed and not stale:
            return f"{repository.url}/commit/{head}"
        if not merge:
            registry.materialise(version, replay_probe=True)  # as `get` does; merging has done it
        summary = message or f"Baton: {version.ref}"
        commit = _commit(repository, folder, changed, stale, summary, head, branch)
        _require_same(repository, commit, folder, files, stale)
    return f"{repository.url}/commit/{commit}"


def pull(
    registry: "Registry",
    repo_id: str,
    revision: str,
    name: str,
    kind: str,
    *,
    base: Version | None = None,
    allow_code: bool = False,
    allowed_licences: list[str] | None = None,
) -> Version:
    """Publish a repository of the Hub as the next version of `name`; the same content again gives the version there is.

    revision: a branch, tag or commit; the commit that it means now is recorded as the version's origin. kind, base,
    allow_code and allowed_licences as in `Registry.publish`. Every file is compared with the digest that the Hub lists.
    Pickles are not fetched: a repository without safetensors is refused. The licence is the one of the card's metadata.
    """
    if not revision.strip():
        raise UserError(f"say which revision of {repo_id}: hf://{repo_id}@main, a tag, or better a commit.")
    repository = HubRepository(repo_id)
    commit = repository.head(revision)
    if commit is None:
        raise UserError(repository.absent())
    listed = _safe(repository, repository.files(commit))
    with (
        storage_errors_are_user_errors(f"pulling {repo_id} into {registry.location} failed"),
        registry.store.workspace() as workspace,
    ):
        fetched, folder = workspace / "fetched", workspace / "model"
        for path in _wanted(repository, listed, commit, fetched):
            repository.download(path, commit, listed[path], fetched)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (fetched / path).rename(folder / path)  # out of the folder where the client keeps notes of its own
        _require_base(registry, repository, folder, base)
        version = registry.publish(
            folder,
            name=name,
            kind=kind,
            base=base,
            details={"licence": _licence(folder)},
            allow_code=allow_code,
            allowed_licences=allowed_licences,
        )
    origin = {"host": repository.api.endpoint, "repo": repo_id, "commit": commit}
    if origin not in [found.body for found in attestations.of(registry, version.digest, "origin")]:
        attestations.attest(registry, version.digest, "origin", origin)
    return version


def origins_on_hub(registry: "Registry", digest: str) -> list[HubModel]:
    """Where on this Hub the version with a manifest digest was pulled from, oldest first; the content is the same."""
    from huggingface_hub import constants

    origins = []
    for found in attestations.of(registry, digest, "origin"):
        repo, commit = found.body.get("repo"), found.body.get("commit")
        if found.body.get("host") == constants.ENDPOINT and isinstance(repo, str) and isinstance(commit, str):
            origins.append(HubModel(HubRepository(repo).repo_id, commit))
    return origins


def _base_on_hub(registry: "Registry", version: Version, base_repo: str | None) -> HubModel | None:
    if base_repo is None:
        return next(iter(origins_on_hub(registry, version.base)), None) if version.base else None
    if version.base is None:
        raise UserError(f"{version.ref} is of kind {version.kind} and has no base: leave out --base-repo.")
    repo_id, at, revision = base_repo.removeprefix("hf://").partition("@")
    if not at or not revision:
        raise UserError(f"{base_repo!r} names no revision; expected org/name@commit.")
    repository = HubRepository(repo_id)
    commit = repository.head(revision)
    if commit is None:
        raise UserError(repository.absent())
    listed = repository.files(commit)
    weights = [entry for entry in registry.manifest(version.base)["files"] if entry["path"].endswith(".safetensors")]
    for entry in weights:
        found = listed.get(entry["path"])
        if found is None or found.sha256 != entry["sha256"]:
            raise UserError(
                f"{repository.url} at {commit} is not the base of {version.ref}: its {entry['path']} has sha256 "
                f"{found and found.sha256}, the base's has {entry['sha256']}. Name the repository that has it."
            )
    return HubModel(repo_id, commit)


def _write_plain(registry: "Registry", version: Version, folder: Path, hub_base: HubModel | None) -> None:
    for entry in version.manifest["files"]:
        (folder / entry["path"]).parent.mkdir(parents=True, exist_ok=True)
        materialise.copy_blob(registry.store, entry, folder / entry["path"])
    if version.base is not None and hub_base is not None:
        named = {"base_model_name_or_path": hub_base.repo_id, "revision": hub_base.commit}
        for path in adapter_configs(entry["path"] for entry in version.manifest["files"]):
            settings = json.loads((folder / path).read_bytes()) | named
            (folder / path).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _open(repository: HubRepository, private: bool, branch: str) -> str:
    head = repository.head(branch)
    if head is None:
        repository.create(private)
        head = repository.head(branch)
        if head is None:
            raise UserError(repository.absent())
    # also after making it: another may have made a public one in between
    if private and not repository.is_private():
        raise UserError(
            f"{repository.url} is public: everybody could read what is pushed. Make it private on its page, or push "
            "with --public."
        )
    return head


def _stale(
    repository: HubRepository, head: str, present: dict[str, Listed], files: list[str], workspace: Path
) -> list[str]:
    """The files to delete: an earlier push wrote them. Raises UserError for a stranger's weights."""
    ours: set[str] = set()
    if CARD in present:
        repository.download(CARD, head, present[CARD], workspace / "card")
        noted = _metadata(workspace / "card" / CARD).get("baton")
        names = noted.get("files") if isinstance(noted, dict) else None
        ours = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
    stale = [path for path in present if path in ours and path not in files and path != ".gitattributes"]
    strange = [
        path
        for path in present
        if path not in files and path not in stale and (_WEIGHTS.fullmatch(path) or path == ADAPTER_CONFIG)
    ]
    if strange:
        raise UserError(
            f"{repository.url} holds model files that Baton did not write: {', '.join(strange[:5])}. They could be "
            "loaded instead of what is pushed. Delete them on its page, or push to another repository."
        )
    return stale


def _commit(
    repository: HubRepository,
    folder: Path,
    changed: list[str],
    stale: list[str],
    message: str,
    head: str,
    branch: str,
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(path, str(folder / path)) for path in changed]
    operations += [CommitOperationDelete(path, is_folder=False) for path in stale]
    with repository.errors(branch):
        info = repository.api.create_commit(
            repository.repo_id, operations, commit_message=message, parent_commit=head, revision=branch
        )
    return str(info.oid)


def _require_same(repository: HubRepository, commit: str, folder: Path, files: list[str], stale: list[str]) -> None:
    present = repository.files(commit)
    problems = [f"{path} is still there" for path in stale if path in present]
    for path in files:
        # the Hub leaves out of a commit what the repository's .gitignore names, without an error
        problem = difference(folder / path, present[path]) if path in present else "it is missing"
        problems += [f"{path}: {problem}"] if problem else []
    if problems:
        raise UserError(
            f"{repository.url} at {commit} is not what was pushed: {'; '.join(problems)}. Do not use that commit: "
            "push again, or revert it."
        )


def _safe(repository: HubRepository, listed: dict[str, Listed]) -> dict[str, Listed]:
    """The files that may be fetched; raises UserError for a name that could leave the folder."""
    for path in listed:
        if not manifests.is_safe_path(path):
            raise UserError(f"{repository.url} has a file with an unsafe name, {path!r}: it is not pulled.")
    return {path: entry for path, entry in listed.items() if not path.lower().endswith(_IGNORED)}


def _wanted(repository: HubRepository, listed: dict[str, Listed], commit: str, fetched: Path) -> list[str]:
    """The paths to fetch: small files at the top, and those weights that a loader would take."""
    if ADAPTER_WEIGHTS in listed:
        weights = {ADAPTER_WEIGHTS}
    elif _WHOLE in listed:
        weights = {_WHOLE}
    elif _INDEX in listed:
        repository.download(_INDEX, commit, listed[_INDEX], fetched)
        try:
            weights = set(map(str, json.loads((fetched / _INDEX).read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{_INDEX} of {repository.url} at {commit} is not an index: {error!r}.") from error
        if lacking := sorted(weights - set(listed)):
            raise UserError(f"{repository.url} at {commit} lacks {', '.join(lacking[:5])}, which {_INDEX} names.")
    else:
        raise UserError(
            f"{repository.url} at {commit} has no {_WHOLE}, {_INDEX} or {ADAPTER_WEIGHTS}. Pickles (.bin, .pt) can run "
            "any code and are not pulled: ask its owners for safetensors, or convert it on a machine of no value."
        )
    others = {
        path
        for path in listed
        # folders hold other forms of the model (onnx/, original/); an index beside a whole file is of no use
        if "/" not in path and not path.endswith(".safetensors") and (path != _INDEX or _WHOLE not in weights)
    }
    return sorted(others | weights)


def _require_base(registry: "Registry", repository: HubRepository, folder: Path, base: Version | None) -> None:
    """An adapter that says on which model of the Hub it was trained is not put on another."""
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        named, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    except (OSError, ValueError, AttributeError):
        return
    if base is None:
        raise UserError(
            f"{repository.repo_id} is an adapter on {named!r}{f' at {revision}' if revision else ''}. Pull or publish "
            "that model first, and name its version as the base (--base REF)."
        )
    origins = origins_on_hub(registry, base.digest)
    if isinstance(named, str) and named.startswith("baton:") and named != f"baton:{base.digest}":
        raise UserError(f"{repository.repo_id} is an adapter on {named[6:]}; {base.ref} is {base.digest}.")
    if origins and isinstance(named, str) and named.count("/") == 1 and named[0] not in "./~":
        commit = revision if re.fullmatch("[0-9a-f]{40}", str(revision)) else None
        if not any(named.lower() == o.repo_id.lower() and commit in (None, o.commit) for o in origins):
            known = ", ".join(f"{origin.repo_id} at {origin.commit}" for origin in origins)
            raise UserError(
                f"{repository.repo_id} is an adapter on {named}{f' at {revision}' if revision else ''}; {base.ref} was "
                f"pulled from {known}. Name the version that came from there (--base REF)."
            )


def _metadata(path: Path) -> dict[str, Any]:
    """The metadata of a card; empty where there is none that can be read: the card is not ours."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}


def _licence(folder: Path) -> str | None:
    found = _metadata(folder / CARD)
    named = found.get("license")
    if named == "other" and isinstance(found.get("license_name"), str):
        named = found["license_name"]
    licences = [clean(entry) for entry in (named if isinstance(named, list) else [named]) if isinstance(entry, str)]
    return " AND ".join(sorted(licences)) or None
