"""A published version: its name, number, digest and manifest."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

KINDS = ("base", "adapter", "reward", "value", "merged")
HEAD_KINDS = ("reward", "value")  # with a score head: a PEFT adapter on a base, or a whole sequence classifier
ADAPTER_KINDS = ("adapter", *HEAD_KINDS)  # may be a PEFT adapter, which needs its base to load
WHOLE_KINDS = ("base", "merged")  # load by themselves, and may be an adapter's base


@dataclass(frozen=True)
class Version:
    """One version of a model. `digest` ("sha256:<hex>") is the manifest's and identifies the content."""

    name: str
    number: int
    digest: str
    registry: "Registry" = field(repr=False, compare=False)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """All that is known of it; read, and verified against `digest`, when first asked for."""
        return self.registry.manifest(self.digest)

    @property
    def ref(self) -> str:
        """The reference that will always mean this version: `team/name:7`."""
        return f"{self.name}:{self.number}"

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return str(self.manifest["kind"])

    @property
    def base(self) -> str | None:
        """The digest of the base that an adapter belongs to; None for whatever loads by itself."""
        return self.manifest["base"]

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics that its publisher recorded."""
        return dict(self.manifest["metrics"])

    def folder(self) -> Path:
        """A plain, verified folder of it in the cache, for reading."""
        return self.registry.materialise(self)

    def load(self, dtype: str = "auto") -> tuple[Any, Any]:
        """(model, tokenizer) in evaluation mode: a language model, or a sequence classifier for reward and value.

        dtype: "auto" takes what this machine is fast in; else a torch dtype's name.
        """
        from baton.models import load_policy, load_scorer

        loader = load_scorer if self.kind in HEAD_KINDS else load_policy
        return loader(self.registry, self, dtype)
