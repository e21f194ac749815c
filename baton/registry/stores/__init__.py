"""Where a registry lies: a folder, local or on NFS, or a prefix of an object store."""

from pathlib import Path

from baton.errors import UserError
from baton.registry.stores.interface import Entry, Store, blob_path
from baton.registry.stores.local import LocalStore

__all__ = ["Entry", "Store", "blob_path", "is_url", "open_store"]

_CLOUD = ("s3", "gs", "az")


def is_url(location: str) -> bool:
    """Whether a location names an object store, and not a folder."""
    return "://" in location


def open_store(location: str | Path) -> Store:
    """The store at a folder or at `s3://bucket/prefix`, `gs://…`, `az://…`; nothing is read or written yet."""
    text = str(location)
    if not is_url(text):
        return LocalStore(Path(text).expanduser())
    scheme = text.partition("://")[0]
    if scheme not in _CLOUD:
        raise UserError(
            f"{text} is no place for a registry: expected a folder, or "
            f"{', '.join(f'{name}://bucket/prefix' for name in _CLOUD)}."
        )
    from baton.registry.stores.cloud import CloudStore

    return CloudStore(text)
