"""What a stage is built from: its inputs by digest, and the keys that say "same recipe, same inputs, same code"."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from baton.data import fingerprint
from baton.errors import UserError
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

    def identity(self) -> dict[str, Any]:
        """Digests only."""
        return {
            "versions": {role: version.digest for role, version in sorted(self.versions.items())},
            "sources": self.sources,
            "model": self.model.describe() if self.model else None,
            "template": self.template,
        }


def resolve_inputs(recipe: TrainedRecipe, registry: Registry) -> Inputs:
    """Resolve the recipe's references once, check their kinds and that they fit together, fingerprint the data.

    Raises UserError on an unknown reference, a version of the wrong kind, or roles that do not fit.
    """
    versions: dict[str, Version] = {}
    model: ModelSource | None = None
    data: TextData | PairData | None = None
    if isinstance(recipe, PretrainRecipe):
        data = recipe.data
        if recipe.base:
            model = model_source(recipe.base, recipe.folder)
            if model is None:
                raise UserError(
                    f"{recipe.path}: base: {recipe.base} is a registry reference, and so registered already; "
                    "mode: load "
                    "takes a local folder, a .gguf file or a hub id with @revision"
                )
    elif isinstance(recipe, SFTRecipe):
        data = recipe.data
        model = model_source(recipe.base, recipe.folder)
        if model is None:
            versions["base"] = registry.resolve(recipe.base)
            _expect_kind(versions["base"], ("base", "merged"), "sft trains an adapter on a base", "stages.pretrain")
    elif isinstance(recipe, RewardRecipe):
        data = recipe.data
        versions["sft"] = registry.resolve(recipe.sft)
        _expect_kind(versions["sft"], ("adapter",), "the reward model goes on from SFT's adapter", "stages.sft")
    elif isinstance(recipe, PPORecipe):
        data = recipe.data
        versions = {"sft": registry.resolve(recipe.sft), "reward": registry.resolve(recipe.reward)}
        _expect_kind(versions["sft"], ("adapter",), "PPO's policy starts from SFT's adapter", "stages.sft")
        _expect_kind(versions["reward"], ("reward",), "PPO needs a reward model", "reward.train")
        _check_fit(versions["sft"], versions["reward"])
    sources = {}
    if data is not None:
        for use in ("train", "eval", "questions"):
            sources[use] = [fingerprint(source, recipe.folder) for source in getattr(data, use, [])]
    template = recipe.folder / recipe.chat_template if isinstance(recipe, SFTRecipe) else None
    return Inputs(versions, sources, model, _file_digest(template) if template and template.is_file() else None)


def model_source(base: str, folder: Path) -> ModelSource | None:
    """Where `base` points outside the registry; None for a registry reference. Never guesses between the two."""
    local = Path(base).expanduser()
    if not local.is_absolute() and not local.exists():
        local = folder / local
    if base.endswith(".gguf"):
        if not local.is_file():
            raise UserError(f"base: there is no file {base}")
        return ModelSource("gguf", str(local))
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"base: the folder {base} holds no config.json; expected a Hugging Face model folder")
        return ModelSource("folder", str(local))
    if base.startswith((".", "/", "~")):
        raise UserError(f"base: there is no folder {base}")
    if re.search(r"@sha256:|:", base):
        return None
    name, at, revision = base.partition("@")
    if at and revision and name.count("/") == 1:
        return ModelSource("hub", name, revision)
    raise UserError(
        f"base: {base} is neither a folder nor complete: write {base}:ALIAS or {base}:NUMBER for a registry "
        "version, or "
        f"{base}@REVISION for a hub id"
    )


def build_key(recipe: TrainedRecipe, inputs: Inputs) -> str:
    """sha256 of recipe, inputs and Baton's code.

    A published version with this key is up to date; a checkpoint is continued only under the same key.
    """
    return _digest({"recipe": recipe.digest(), "inputs": inputs.identity(), "code": code_digest()})


def up_to_date(recipe: Recipe) -> str | None:
    """The version that the recipe's alias points at if it was built from the same recipe, inputs and code."""
    if isinstance(recipe, WorldRecipe):
        from baton.make_world import is_written

        return recipe.out if is_written(recipe) else None
    assert isinstance(recipe, TrainedRecipe)
    if not Path(recipe.registry, "registry.json").is_file():
        return None
    registry = Registry.open(recipe.registry)
    try:
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


def _check_fit(sft: Version, reward: Version) -> None:
    """The reward model must read the very ids that the policy writes, on the same base."""
    for what, key in (
        ("tokenizer", "tokenizer_digest"),
        ("chat template", "chat_template_digest"),
        ("base", "base"),
    ):
        ours, theirs = sft.manifest[key], reward.manifest[key]
        if ours != theirs:
            raise UserError(
                f"{reward.ref} has another {what} than {sft.ref} ({_short(theirs)} against {_short(ours)}): its "
                "rewards "
                "would be for other text. Train the reward model from this SFT version: accelerate launch -m "
                "reward.train RECIPE"
            )


def _short(digest: str | None) -> str:
    return (digest or "none").removeprefix("sha256:")[:12]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
