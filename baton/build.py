"""What a stage is built from: its inputs by digest, and the keys that say "same recipe, same inputs, same code"."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from baton.adapters import check_shareable
from baton.corpus_sections import CorpusData
from baton.data import fingerprint
from baton.errors import UserError
from baton.functions import source_file
from baton.ppo_sections import RewardSource
from baton.recipe import (
    PairData,
    PPORecipe,
    PretrainRecipe,
    Recipe,
    RewardRecipe,
    SFTRecipe,
    TextData,
    TrainedRecipe,
    WorldRecipe,
)
from baton.registry import Registry, Version
from baton.registry.checks import adapter_configs
from baton.registry.history.licences import Holding, licences_of, refuse
from baton.registry.stores.interface import blob_path
from baton.tokenizer_source import tokenizer_source


@dataclass(frozen=True)
class ModelSource:
    """A model outside the registry: a local Hugging Face folder, a GGUF file, or a hub id with its revision."""

    kind: str
    path: str
    revision: str | None = None

    def describe(self) -> dict[str, Any]:
        """What identifies its content: digests of local files, the revision of a hub id."""
        if self.kind == "hub":
            return {"kind": "hub", "id": self.path, "revision": self.revision}
        path = Path(self.path)
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        return {"kind": self.kind, "files": {p.name: _file_digest(p) for p in files}}


@dataclass(frozen=True)
class Inputs:
    """Everything a stage reads: registry versions by role, data fingerprints by use, a model outside the registry."""

    versions: dict[str, Version] = field(default_factory=dict)
    sources: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    model: ModelSource | None = None
    template: str | None = None  # sha256 of a chat template that is a file
    functions: dict[str, str] = field(default_factory=dict)  # "pkg.module:function" -> sha256 of its module's file
    classifiers: dict[str, ModelSource] = field(default_factory=dict)  # a reward's `classifier` -> where it lies
    tokenizer: dict[str, Any] | None = None  # what identifies an existing one (`tokenizer.path`)

    def identity(self) -> dict[str, Any]:
        """Digests only."""
        return {
            "versions": {role: version.digest for role, version in sorted(self.versions.items())},
            "sources": self.sources,
            "model": self.model.describe() if self.model else None,
            "template": self.template,
            "functions": self.functions,
            "classifiers": {setting: source.describe() for setting, source in sorted(self.classifiers.items())},
            "tokenizer": self.tokenizer,
        }


def resolve_inputs(recipe: TrainedRecipe, registry: Registry) -> Inputs:
    """Resolve the recipe's references once, check their kinds and that they fit together, fingerprint the data.

    Raises UserError on an unknown reference, a version of the wrong kind, roles that do not fit, or a licence outside
    the recipe's `allowed_licences`.
    """
    versions: dict[str, Version] = {}
    model: ModelSource | None = None
    data: TextData | PairData | CorpusData | None = None
    functions: dict[str, str] = {}
    classifiers: dict[str, ModelSource] = {}
    tokenizer: dict[str, Any] | None = None
    if isinstance(recipe, PretrainRecipe):
        data = recipe.data
        if recipe.tokenizer and recipe.tokenizer.path:
            tokenizer = tokenizer_source(recipe.tokenizer.path, recipe.folder, lambda: registry).identity()
        if recipe.base:
            model = model_source(recipe.base, recipe.folder)
            if model is None and not recipe.is_continued:
                raise UserError(
                    f"{recipe.path}: base: {recipe.base} is a registry reference, and so registered already; "
                    "mode: load takes a local folder, a .gguf file or a hub id with @revision"
                )
            if model is None:
                versions["base"] = registry.resolve(recipe.base)
                need = "mode: continue trains every weight of a base"
                _expect_kind(versions["base"], ("base", "merged"), need, "stages.pretrain")
    elif isinstance(recipe, SFTRecipe):
        data = recipe.data
        model = model_source(recipe.base, recipe.folder)
        if model is None:
            versions["base"] = registry.resolve(recipe.base)
            _expect_kind(versions["base"], ("base", "merged"), "sft trains an adapter on a base", "stages.pretrain")
    elif isinstance(recipe, RewardRecipe):
        data = recipe.data
        sft = versions["sft"] = registry.resolve(recipe.sft)
        _expect_kind(sft, ("adapter", "merged"), "the reward model goes on from SFT's adapter", "stages.sft")
        _check_new_adapter(recipe, sft)
    elif isinstance(recipe, PPORecipe):
        data = recipe.data
        versions = _ppo_versions(recipe, registry)
        for source in _reward_sources(recipe):
            if source.function:
                functions[source.function] = _file_digest(source_file(source.function))
            if source.classifier:
                classifiers[source.classifier] = classifier_source(source.classifier, recipe.folder)
    sources = {}
    if data is not None:
        for use in ("train", "eval", "questions", "ptx"):
            sources[use] = [fingerprint(source, recipe.folder) for source in getattr(data, use, [])]
    _check_licences(recipe, registry, versions, sources, model)
    template = recipe.folder / recipe.chat_template if isinstance(recipe, SFTRecipe) else None
    template_digest = _file_digest(template) if template and template.is_file() else None
    return Inputs(versions, sources, model, template_digest, functions, classifiers, tokenizer)


def _check_new_adapter(recipe: RewardRecipe, sft: Version) -> None:
    """A reward model's own adapter is described where there is none to go on with, and nowhere else."""
    if sft.manifest["chat_template_digest"] is None:
        raise UserError(f"{sft.ref} has no chat template: it has not learned to answer. Give a version of stage sft")
    if sft.kind == "adapter" and recipe.lora is not None:
        raise UserError(f"{recipe.path}: lora: {sft.ref} is an adapter, which goes on as the reward's. Leave lora out")
    if sft.kind == "adapter" and recipe.trained != "full":
        _check_shareable(sft)
    if sft.kind == "merged" and recipe.trained != "full" and recipe.lora is None:
        raise UserError(
            f"{recipe.path}: {sft.ref} is a merged version, so the reward model is a new adapter on it and needs its "
            "settings, for example lora: {r: 16, alpha: 32}. To train every weight instead, set trained: full"
        )


def _check_shareable(version: Version) -> None:
    """Raises UserError where a published adapter is none that shares a base with others."""
    for entry in version.manifest["files"]:
        if entry["path"] in adapter_configs([entry["path"]]):
            check_shareable(json.loads(version.registry.store.get(blob_path(entry["sha256"]))), version.ref)


def _check_licences(
    recipe: TrainedRecipe,
    registry: Registry,
    versions: dict[str, Version],
    sources: dict[str, list[dict[str, Any]]],
    model: ModelSource | None,
) -> None:
    """Refuse before the training what the publishing would refuse after it."""
    if recipe.allowed_licences is None:
        return
    data = [{"use": use, **row} for use, rows in sources.items() for row in rows]
    parents = {role: version.digest for role, version in versions.items()}
    found = licences_of(registry, {"licence": recipe.licence, "data": data, "parents": parents})
    mode = recipe.mode if isinstance(recipe, PretrainRecipe) else "continue"
    if model is not None and isinstance(recipe, SFTRecipe | PretrainRecipe) and mode == "continue":
        # registered on the way, without a licence; one that states it is registered by stages.pretrain, mode: load
        found = replace(found, holdings=(*found.holdings, Holding(None, "model", f"base {recipe.base}", None)))
    try:
        refuse(found, recipe.allowed_licences)
    except UserError as error:
        raise UserError(f"{recipe.path}: {error}") from None


def _ppo_versions(recipe: PPORecipe, registry: Registry) -> dict[str, Version]:
    """PPO's registry versions by role, each of a kind that the role can be."""
    sft = registry.resolve(recipe.sft)
    _expect_kind(sft, ("adapter", "merged", "base"), "PPO's policy starts from SFT's model", "stages.sft")
    versions = {"sft": sft}
    for source in _reward_sources(recipe):
        for role, reference in zip(reward_roles(recipe, source), source.references, strict=True):
            version = versions[role] = registry.resolve(reference)
            _expect_kind(version, ("reward",), "PPO needs a reward model", "reward.train")
    if sft.manifest["probe"]["output"] != "logits":
        raise UserError(f"{sft.ref} is a classifier and writes no text; PPO's policy starts from SFT's model")
    if sft.manifest["chat_template_digest"] is None:
        raise UserError(
            f"{sft.ref} has no chat template: it has not learned to answer, and PPO's prompts are dialogues. Make an "
            "SFT version of it: accelerate launch -m stages.sft RECIPE"
        )
    if sft.kind == "adapter" and recipe.lora is not None:
        raise UserError(
            f"{recipe.path}: lora: {sft.ref} is an adapter, which PPO goes on training; settings of a new one would be "
            f"ignored. Leave lora out, or merge the adapter first: baton get {sft.ref} DIR --merge, then baton publish "
            "DIR --name TEAM/NAME --kind merged"
        )
    for version in versions.values():
        if version is sft or shares_base(sft, version):
            _check_shareable(version)
    if sft.kind != "adapter" and recipe.policy == "adapter" and recipe.lora is None:
        article = "an" if sft.kind[0] in "aeiou" else "a"
        raise UserError(
            f"{recipe.path}: {sft.ref} is {article} {sft.kind} version, so PPO trains a new adapter on it and needs "
            "its settings, for example lora: {r: 16, alpha: 32}. To train every weight instead, set policy: full"
        )
    return versions


def _reward_sources(recipe: PPORecipe) -> list[RewardSource]:
    return [*recipe.rewards, *([recipe.gold] if recipe.gold else [])]


def check_source(source: RewardSource, folder: Path) -> None:
    """Whether a reward's function and classifier are there, without running or loading them. Raises UserError."""
    if source.function:
        source_file(source.function)
    if source.classifier:
        classifier_source(source.classifier, folder)


def reward_roles(recipe: PPORecipe, source: RewardSource) -> list[str]:
    """Under which roles `Inputs.versions`, and the parents of what is published, hold a reward's versions, in order."""
    if source is recipe.gold:
        stem = "gold"
    else:
        num_models = sum(bool(reward.references) for reward in recipe.rewards)
        stem = "reward" if num_models == 1 else f"reward-{source.label}"
    if source.model is not None:
        return [stem]
    return [f"{stem}-{at}" for at in range(1, len(source.references) + 1)]


def shares_base(sft: Version, reward: Version) -> bool:
    """Whether a reward or value adapter reads the very ids that the policy writes, on the policy's own base.

    Only then can it sit on the policy's weights and score rollouts as they are; else it is loaded by itself, and reads
    the text rendered by its own template.
    """
    base = sft.base if sft.kind == "adapter" else sft.digest
    same_ids = all(sft.manifest[key] == reward.manifest[key] for key in ("tokenizer_digest", "chat_template_digest"))
    return reward.base is not None and reward.base == base and same_ids


def classifier_source(setting: str, folder: Path) -> ModelSource:
    """Where a reward's `classifier:` lies: a local folder (relative to `folder`), or a hub id with its revision."""
    source = model_source(setting, folder, key="classifier")
    if source is None:
        raise UserError(f"classifier: {setting} is a registry reference; write it as model: {setting}")
    if source.kind == "gguf":
        raise UserError(f"classifier: {setting} is a GGUF file; expected a Hugging Face folder or a hub id@revision")
    return source


def model_source(base: str, folder: Path, key: str = "base") -> ModelSource | None:
    """Where `base` points outside the registry; None for a registry reference. Never guesses between the two.

    `key` is the recipe's, for messages.
    """
    local = Path(base).expanduser()
    if not local.is_absolute() and not local.exists():
        local = folder / local
    if base.endswith(".gguf"):
        if not local.is_file():
            raise UserError(f"{key}: there is no file {base}")
        return ModelSource("gguf", str(local))
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"{key}: the folder {base} holds no config.json; expected a Hugging Face model folder")
        return ModelSource("folder", str(local))
    if base.startswith((".", "/", "~")):
        raise UserError(f"{key}: there is no folder {base}")
    if re.search(r"@sha256:|:", base):
        return None
    name, at, revision = base.partition("@")
    if at and revision and name.count("/") == 1:
        return ModelSource("hub", name, revision)
    raise UserError(
        f"{key}: {base} is neither a folder nor complete: write {base}:ALIAS or {base}:NUMBER for a registry "
        f"version, or {base}@REVISION for a hub id"
    )


def build_key(recipe: TrainedRecipe, inputs: Inputs) -> str:
    """sha256 of recipe, inputs and Baton's code.

    A published version with this key is up to date.
    """
    return _digest({"recipe": recipe.digest(), "inputs": inputs.identity(), "code": code_digest()})


def training_key(recipe: TrainedRecipe, inputs: Inputs) -> str:
    """`build_key` without what no step depends on: a checkpoint is continued only under the same key."""
    told = {"recipe": recipe.digest(bookkeeping=False), "inputs": inputs.identity(), "code": code_digest()}
    return _digest({"training": told})


def up_to_date(recipe: Recipe) -> str | None:
    """The version that the recipe's alias points at if it was built from the same recipe, inputs and code."""
    if isinstance(recipe, WorldRecipe):
        from baton.make_world import is_written

        return recipe.out if is_written(recipe) else None
    assert isinstance(recipe, TrainedRecipe)
    try:
        registry = Registry(recipe.registry)
        version = published(recipe, registry, build_key(recipe, resolve_inputs(recipe, registry)))
    except UserError:
        return None  # the stage itself reports what is missing, once the stages before it have run
    return version.ref if version else None


def published(recipe: TrainedRecipe, registry: Registry, key: str) -> Version | None:
    """The version at the recipe's alias, when it carries this build key."""
    name, alias = recipe.publish.name, recipe.publish.alias
    if name not in registry.models() or alias not in registry.aliases(name):
        return None
    version = registry.resolve(f"{name}:{alias}")
    return version if version.manifest.get("build_key") == key else None


@lru_cache(maxsize=1)
def code_digest() -> str:
    """sha256 over Baton's own source files: what the installed packages `baton`, `reward` and `stages` hold."""
    root = Path(__file__).resolve().parent.parent
    parts = []
    for package in ("baton", "reward", "stages"):
        for path in sorted((root / package).rglob("*")):
            if path.suffix in (".py", ".jinja"):
                parts.append(f"{path.relative_to(root).as_posix()} {_file_digest(path)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _expect_kind(version: Version, kinds: tuple[str, ...], need: str, program: str) -> None:
    kind = version.manifest["kind"]
    if kind not in kinds:
        article = "an" if kind[0] in "aeiou" else "a"
        raise UserError(
            f"{version.ref} is {article} {kind} version; {need}. Make one: accelerate launch -m {program} RECIPE"
        )


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
