"""The object store: S3, Google Cloud Storage or Azure, by conditional puts, without a server of our own."""

import hashlib
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from baton.errors import UserError
from baton.registry.stores.connection import Connection
from baton.registry.stores.files import CHUNK_BYTES
from baton.registry.stores.interface import Entry, Store, blob_path
from baton.registry.stores.parts import abort_unfinished, send_in_parts
from baton.registry.stores.scratch import scratch_folder

READERS = 32
"""Small objects read at a time."""
RANGE_BYTES = 4 << 20
"""A blob is read in ranges of this size, `RANGES` of them at a time: 32 MiB of memory, however large the blob."""
RANGES = 8
PART_BYTES = 16 << 20
"""A blob larger than this is sent in parts of this size, `PARTS` of them at a time: some 80 MiB of memory."""
PARTS = 4
MARK = "sha256"
"""The name of the metadata by which a blob's sender says which digest its file had."""
_ATTEMPTS = 5
_IN_ORDER = "The store, or a proxy before it, is not in order: mend that, and run the same command again."
_WITH_CONDITIONS = "Put the registry into a store that has them (Amazon, Google, Azure, MinIO, R2), or into a folder."

_probed: set[tuple[int, str, str | None]] = set()
_probing = threading.Lock()


class CloudStore(Store):
    """Objects under one prefix of a bucket (or container).

    obstore's threads do not survive a fork: a child process that wants to use a registry in an object store must be
    spawned.

    What is trusted: the store's conditional put, which is probed; the size that it reports; and, of a blob, the mark
    that its sender left. What is not: that bytes arrived or stayed as they were. A record is compared with the ETag
    or read back when it is written, a manifest and a blob are hashed whenever they are read.
    """

    def __init__(self, url: str) -> None:
        """url: `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`; settings from the environment."""
        self.location = url.rstrip("/")
        self._connection = Connection(self.location)

    def describe(self, path: str) -> str:
        """The object's URL."""
        return f"{self.location}/{path}"

    def require_conditional_writes(self) -> None:
        """Write one object twice: the first must win. Raises UserError for a store that ignores or rejects that."""
        path = f"tmp/{uuid.uuid4().hex}.conditional"
        try:
            first, second = self._create(path, b"first"), self._create(path, b"second")
            if not first or second or self.get(path) != b"first":
                raise UserError(
                    f"{self.location} lets a second writer replace the first: it ignores `If-None-Match: *`, without "
                    f"which versions get lost. {_WITH_CONDITIONS}"
                )
        except UserError as error:
            if "NotImplemented" not in str(error):
                raise
            raise UserError(
                f"{self.location} has no conditional writes (`If-None-Match: *`), without which two writers lose "
                f"versions: {error} {_WITH_CONDITIONS}"
            ) from error
        finally:
            self.delete(path)
        _probed.add(self._probe_key())

    def _probe_key(self) -> tuple[int, str, str | None]:
        return os.getpid(), self.location, os.environ.get("AWS_ENDPOINT_URL")

    def _require_probed(self) -> None:
        """Probe before this process's first write: the registry may be older than what now serves its bucket."""
        if self._probe_key() not in _probed:
            with _probing:
                if self._probe_key() not in _probed:
                    self.require_conditional_writes()

    def get(self, path: str) -> bytes:
        """The bytes of one object."""
        import obstore

        with self._connection.errors(path):
            return bytes(obstore.get(self._connection.objects, path).bytes())

    def get_many(self, paths: Sequence[str]) -> dict[str, bytes]:
        """The bytes of those objects that are there, `READERS` at a time."""

        def read(path: str) -> bytes | None:
            try:
                return self.get(path)
            except FileNotFoundError:
                return None

        if len(paths) < 2:
            found = [read(path) for path in paths]
        else:
            with ThreadPoolExecutor(min(READERS, len(paths))) as pool:
                found = list(pool.map(read, paths))
        return {path: data for path, data in zip(paths, found, strict=True) if data is not None}

    def stat(self, path: str) -> Entry | None:
        """Size and time of one object; None when it is not there."""
        import obstore

        try:
            with self._connection.errors(path):
                meta = obstore.head(self._connection.objects, path)
        except FileNotFoundError:
            return None
        return Entry(path, meta["size"], meta["last_modified"].timestamp())

    def list(self, folder: str) -> list[str]:
        """The names directly under `folder`, sorted; every page of them."""
        import obstore

        with self._connection.errors(folder):
            found = obstore.list_with_delimiter(self._connection.objects, folder or None)
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return sorted({path.rpartition("/")[2] for path in paths} - {""})

    def walk(self, folder: str) -> Iterator[Entry]:
        """Every object at any depth under `folder`, sorted by path, folder by folder as on a disk."""
        import obstore

        with self._connection.errors(folder):
            found = [meta for page in obstore.list(self._connection.objects, folder or None) for meta in page]
        for meta in sorted(found, key=lambda meta: meta["path"].split("/")):
            yield Entry(meta["path"], meta["size"], meta["last_modified"].timestamp())

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write `path` at once, unless it exists; True as well when the very same bytes lie there."""
        self._require_probed()
        return self._create(path, data)

    def replace(self, path: str, data: bytes) -> None:
        """Write `path` at once over what lies there."""
        import obstore

        with self._connection.errors(path):
            result = obstore.put(self._connection.objects, path, data, use_multipart=False)
        if not _is_md5_of(result["e_tag"], data) and self.get(path) != data:
            raise UserError(f"{self.describe(path)} has other bytes than were just written. {_IN_ORDER}")

    def _create(self, path: str, data: bytes) -> bool:
        """Put with `If-None-Match: *`, and look for ourselves whenever the answer is not a plain yes."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError

        for attempt in range(_ATTEMPTS):
            problem: Exception | None = None
            is_done = False
            try:
                result = obstore.put(self._connection.objects, path, data, mode="create", use_multipart=False)
                if _is_md5_of(result["e_tag"], data):
                    return True
                is_done = True
            except (PermissionDeniedError, UnauthenticatedError, FileNotFoundError) as error:
                raise self._connection.explained(error, path) from error
            except AlreadyExistsError:
                pass  # somebody's object, or ours: an answer may have been lost, and the put been repeated
            except BaseError as error:
                problem = error
            with suppress(FileNotFoundError):
                is_ours = self.get(path) == data
                if is_done and not is_ours:
                    raise UserError(f"{self.describe(path)} has other bytes than were just written. {_IN_ORDER}")
                return is_ours
            if problem is not None and attempt == _ATTEMPTS - 1:
                raise self._connection.explained(problem, path) from problem
            time.sleep(0.1 * 2**attempt)  # deleted meanwhile, or the put failed: once more
        raise UserError(f"{self.describe(path)} was reported as written and is not there. {_IN_ORDER}")

    def put_blob(self, file: Path, sha256: str) -> None:
        """Send a file, already hashed, as the blob `sha256`, unless it is there.

        There means: of the right size, with its sender's mark; without the mark (as when another tool copied the
        registry) the blob is read and hashed. One that rotted under its mark is found by `fsck`, and deleted first.
        What is sent is hashed once more on its way, and never appears half-sent.
        """
        self._require_probed()
        path, size = blob_path(sha256), file.stat().st_size
        for attempt in range(_ATTEMPTS):
            if self._is_whole(path, sha256, size):
                return
            try:
                self._send(file, path, sha256, size)
            except UserError:
                # An answer may have been lost, or another sender have finished the very upload that we were at.
                if attempt == _ATTEMPTS - 1 or not self._is_whole(path, sha256, size):
                    raise
        found = self.stat(path)
        raise UserError(
            f"{self.describe(path)} was sent with {size} bytes and has {found.size if found else 'none'}, or others. "
            f"{_IN_ORDER}"
        )

    def _is_whole(self, path: str, sha256: str, size: int) -> bool:
        import obstore

        try:
            with self._connection.errors(path):
                head = obstore.get(self._connection.objects, path, options={"head": True})
                if head.meta["size"] != size:
                    return False
                return head.attributes.get(MARK) == sha256 or self.hash_blob(sha256)[0] == sha256
        except FileNotFoundError:
            return False

    def _send(self, file: Path, path: str, sha256: str, size: int) -> None:
        import obstore

        mark = {MARK: sha256}
        if self._connection.scheme == "s3" and size > PART_BYTES:
            send_in_parts(self._connection, path, file, sha256, PART_BYTES, PARTS, mark)
            return
        with self._connection.errors(path):
            # Overwriting is harmless: whoever writes this path writes these bytes.
            obstore.put(
                self._connection.objects,
                path,
                _checked(file, sha256) if size > PART_BYTES else b"".join(_checked(file, sha256)),
                attributes=mark,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS,
                use_multipart=size > PART_BYTES,
            )

    def abort_unfinished(self, older_than_s: float, dry_run: bool = False) -> Sequence[str]:
        """Give up uploads that nobody finished, for garbage collection; returns their paths.

        Google and Azure drop them by themselves, or by the bucket's lifecycle rule.
        """
        return abort_unfinished(self._connection, older_than_s, dry_run) if self._connection.scheme == "s3" else []

    def fetch_blob(self, sha256: str, target: Path) -> str:
        """Copy a blob to a new file, synced; returns the hex digest of what was written."""
        digest = hashlib.sha256()
        size = self._size(blob_path(sha256))
        with open(target, "xb", buffering=0) as out:
            for chunk in self._chunks(blob_path(sha256), size):
                out.write(chunk)
                digest.update(chunk)
            os.fsync(out.fileno())
        return digest.hexdigest()

    def hash_blob(self, sha256: str) -> tuple[str, int]:
        """Read a blob through: (hex digest, bytes) as found."""
        digest, size = hashlib.sha256(), 0
        for chunk in self._chunks(blob_path(sha256), self._size(blob_path(sha256))):
            digest.update(chunk)
            size += len(chunk)
        return digest.hexdigest(), size

    def _size(self, path: str) -> int:
        found = self.stat(path)
        if found is None:
            raise FileNotFoundError(self.describe(path))
        return found.size

    def _chunks(self, path: str, size: int) -> Iterator[memoryview]:
        """The bytes of an object in order, fetched ahead in ranges."""
        import obstore

        def read(start: int) -> memoryview:
            end = min(start + RANGE_BYTES, size)
            with self._connection.errors(path):
                return memoryview(obstore.get_range(self._connection.objects, path, start=start, end=end))

        with ThreadPoolExecutor(RANGES) as pool:
            ahead: deque[Future[memoryview]] = deque()
            for start in range(0, size, RANGE_BYTES):
                ahead.append(pool.submit(read, start))
                if len(ahead) == RANGES:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens when it is not there."""
        import obstore

        with suppress(FileNotFoundError), self._connection.errors(path):
            obstore.delete(self._connection.objects, path)

    def workspace(self) -> AbstractContextManager[Path]:
        """A fresh folder on this machine, beside the cache, removed at the end whatever happens."""
        return scratch_folder()


def _checked(file: Path, sha256: str) -> Iterator[bytes]:
    """A file's bytes in chunks; raises UserError at the end, so that nothing appears, if they are not as expected."""
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as source:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            yield chunk
    if digest.hexdigest() != sha256:
        raise UserError(f"{file} changed while it was being sent: expected sha256:{sha256}. Start again.")


def _is_md5_of(etag: str | None, data: bytes) -> bool:
    """Whether an ETag proves that the store holds these bytes; buckets with their own keys give another one."""
    return (etag or "").strip('"') == hashlib.md5(data, usedforsecurity=False).hexdigest()
