"""The model registry: content-addressed, append-only, in a folder or an object store, without a server."""

from baton.registry.catalogue import Registry
from baton.registry.version import Version

__all__ = ["Registry", "Version"]
