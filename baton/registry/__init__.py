"""The model registry: content-addressed, append-only, a plain folder without a server."""

from baton.registry.catalogue import Registry
from baton.registry.version import Version

__all__ = ["Registry", "Version"]
