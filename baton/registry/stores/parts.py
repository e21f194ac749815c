"""A large file to S3 in parts, several at a time; what an upload that was killed has sent is not sent again.

S3 itself remembers unfinished uploads by key, and a blob's key says its content: so the next sender, on this machine
or another, finds the upload, asks which parts have arrived, compares their checksums with the file, and sends the
rest. Two senders at once work at one upload; whoever comes second finds it finished. Nothing is kept locally.
"""

import base64
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from baton.errors import UserError
from baton.registry.stores.connection import Connection

MAX_PARTS = 10_000
"""S3's own limit."""


class Part(NamedTuple):
    """A part that the store has: its ETag, and its SHA-256 in base64 where the store reports it."""

    etag: str
    sha256: str | None
    size: int


def part_size(size: int, smallest: int) -> int:
    """Bytes of every part but the last, the same for every sender of a file of `size` bytes."""
    needed = -(-size // MAX_PARTS)
    return max(smallest, -(-needed // (1 << 20)) << 20)


def send_in_parts(
    connection: Connection, path: str, file: Path, sha256: str, smallest: int, senders: int, metadata: dict[str, str]
) -> None:
    """Send a file as the object at `path`, going on where an earlier sender was stopped.

    smallest: bytes of a part, unless the file needs larger ones. senders: parts at a time, which is also what is held
    in memory. Raises UserError when the file is no longer what `sha256` says; then nothing appears at `path`.
    """
    client, where = connection.s3, {"Bucket": connection.bucket, "Key": connection.key(path)}
    with connection.s3_errors(path):
        upload, arrived = _unfinished(client, where)
        if upload is None:
            upload = client.create_multipart_upload(**where, Metadata=metadata, **_with_checksums())["UploadId"]
        where["UploadId"] = upload

        def send(number: int, data: bytes) -> Part:
            if (found := arrived.get(number)) and _holds(found, data):
                return found
            return _send_part(client, where, number, data)

        digest, parts = hashlib.sha256(), []
        with ThreadPoolExecutor(senders) as pool:
            waiting: deque[Future[Part]] = deque()
            try:
                for number, data in _read(file, part_size(file.stat().st_size, smallest)):
                    digest.update(data)
                    waiting.append(pool.submit(send, number, data))
                    if len(waiting) > senders:
                        parts.append(waiting.popleft().result())
                parts += [future.result() for future in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if digest.hexdigest() != sha256:
            client.abort_multipart_upload(**where)
            raise UserError(f"{file} changed while it was being sent: expected sha256:{sha256}. Start again.")
        # No If-None-Match: a damaged blob must be replaceable, and whoever writes this key writes these bytes.
        client.complete_multipart_upload(**where, MultipartUpload={"Parts": _listed(parts)})


def abort_unfinished(connection: Connection, older_than_s: float, dry_run: bool) -> list[str]:
    """Give up uploads begun more than `older_than_s` ago under the prefix; returns their paths. They cost storage."""
    client, aborted = connection.s3, []
    begin = f"{connection.prefix}/" if connection.prefix else ""
    with connection.s3_errors("blobs"):
        for upload in _uploads(client, connection.bucket, begin):
            initiated: datetime = upload["Initiated"]
            if datetime.now(initiated.tzinfo) - initiated < timedelta(seconds=older_than_s):
                continue
            aborted.append(str(upload["Key"]).removeprefix(begin))
            if not dry_run:
                client.abort_multipart_upload(Bucket=connection.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    return aborted


def _unfinished(client: Any, where: dict[str, str]) -> tuple[str | None, dict[int, Part]]:
    """The latest unfinished upload of this very key, and its parts by number; (None, {}) to begin a new one."""
    from botocore.exceptions import ClientError

    try:
        found = [upload for upload in _uploads(client, where["Bucket"], where["Key"]) if upload["Key"] == where["Key"]]
        if not found:
            return None, {}
        upload = max(found, key=lambda upload: upload["Initiated"])["UploadId"]
        pages = client.get_paginator("list_parts").paginate(**where, UploadId=upload)
        parts = [part for page in pages for part in page.get("Parts", [])]
    except ClientError as error:
        # Gone meanwhile, or one may put objects but not list uploads: then all parts are sent.
        if error.response["Error"]["Code"] in ("NoSuchUpload", "AccessDenied", "NotImplemented"):
            return None, {}
        raise
    return upload, {part["PartNumber"]: Part(part["ETag"], part.get("ChecksumSHA256"), part["Size"]) for part in parts}


def _uploads(client: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
    return [upload for page in pages for upload in page.get("Uploads", [])]


def _with_checksums() -> dict[str, str]:
    """Ask the store to verify and remember SHA-256 of every part, unless the environment says that it cannot."""
    is_plain = os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION", "").lower() == "when_required"
    return {} if is_plain else {"ChecksumAlgorithm": "SHA256"}


def _read(file: Path, size: int) -> Iterator[tuple[int, bytes]]:
    with open(file, "rb", buffering=0) as source:
        number = 0
        while data := source.read(size):
            number += 1
            yield number, data


def _sha256(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _holds(part: Part, data: bytes) -> bool:
    """Whether the store's part has these bytes, by the checksum that it keeps; unsure means no."""
    if part.size != len(data):
        return False
    return part.sha256 == _sha256(data) if part.sha256 else part.etag.strip('"') == _md5(data).hex()


def _send_part(client: Any, where: dict[str, str], number: int, data: bytes) -> Part:
    # The store refuses a part that arrives with other bytes than it was sent with.
    if _with_checksums():
        sha256 = _sha256(data)
        answer = client.upload_part(**where, PartNumber=number, Body=data, ChecksumSHA256=sha256)
        return Part(answer["ETag"], sha256, len(data))
    md5 = base64.b64encode(_md5(data)).decode()
    answer = client.upload_part(**where, PartNumber=number, Body=data, ContentMD5=md5)
    return Part(answer["ETag"], None, len(data))


def _listed(parts: list[Part]) -> list[dict[str, Any]]:
    return [
        {"PartNumber": number, "ETag": part.etag} | ({"ChecksumSHA256": part.sha256} if part.sha256 else {})
        for number, part in enumerate(parts, 1)
    ]
