"""A published version: its name, number, digest and manifest."""

from dataclasses import dataclass, field
from typing import Any

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
    manifest: dict[str, Any] = field(repr=False, compare=False)

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
