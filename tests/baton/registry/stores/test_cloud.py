"""Object stores when things go wrong: lost answers, killed uploads, stores that ignore conditions, no access."""

import hashlib
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.stores import Store, blob_path, cloud, open_store
from baton.registry.stores.cloud import CloudStore
from baton.registry.stores.files import write_hashed
from baton.registry.stores.parts import part_size
from baton.registry.stores.scratch import scratch_folder
from tests.baton.registry.conftest import ObjectServer
from tests.baton.registry.stores.fault_proxy import FaultProxy
from tests.baton.registry.stores.test_contract import in_memory

PART = 5 << 20  # S3 and moto allow no smaller ones
LARGE = random.Random(2).randbytes(3 * PART + 1000)
LARGE_SHA256 = hashlib.sha256(LARGE).hexdigest()


@pytest.fixture
def proxy(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy before the S3 server, in the way of every store that is opened from here on."""
    with FaultProxy(object_server.url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def location(new_location: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place on S3, for patient tests with little patience."""
    monkeypatch.setattr(cloud, "PART_BYTES", PART)
    return new_location("s3")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file that goes in four parts."""
    (tmp_path / "large").write_bytes(LARGE)
    return tmp_path / "large"


def is_creation(method: str, headers: dict[str, str]) -> bool:
    return method == "PUT" and any(name.lower() == "if-none-match" for name in headers)


class Once:
    """A fault for the first `count` requests that fit."""

    def __init__(self, fault: str, fits: Callable[[str, str, dict[str, str]], bool], count: int = 1) -> None:
        self.fault, self.fits, self.left = fault, fits, count

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> str | None:
        if self.left and self.fits(method, path, headers):
            self.left -= 1
            return self.fault
        return None


@pytest.mark.parametrize("fault", ["lose", "refuse", "500", "503 SlowDown", "409 ConditionalRequestConflict"])
def test_a_record_whose_answer_is_lost_is_written_once_and_is_ours(
    proxy: FaultProxy, location: str, fault: str
) -> None:
    store = open_store(location)
    store.require_conditional_writes()
    proxy.decide = Once(fault, lambda method, path, headers: is_creation(method, headers) and "1.json" in path)
    assert store.put_if_absent("models/a/b/1.json", b"mine")
    assert any(passed.fault == fault for passed in proxy.passed)
    assert not store.put_if_absent("models/a/b/1.json", b"theirs") and store.get("models/a/b/1.json") == b"mine"


def test_a_lost_answer_to_the_loser_stays_a_loss(proxy: FaultProxy, location: str) -> None:
    store = open_store(location)
    assert store.put_if_absent("models/a/b/1.json", b"theirs")
    proxy.decide = Once("lose", lambda method, path, headers: is_creation(method, headers))
    assert not store.put_if_absent("models/a/b/1.json", b"mine")


def test_publishing_numbers_survives_lost_answers(proxy: FaultProxy, location: str) -> None:
    """Every third answer to a write is lost: promotions are recorded once each, in order."""
    registry = Registry(location, create=True)
    writes = iter(range(1_000_000))

    def every_third(method: str, path: str, headers: dict[str, str]) -> str | None:
        return "lose" if is_creation(method, headers) and next(writes) % 3 == 0 else None

    from baton.registry import records

    proxy.decide = every_third
    for number in range(1, 10):
        assert records.write(registry.store, records.alias_folder("a/b", "prod"), number, {"to": number})
    proxy.decide = lambda method, path, headers: None
    folder = records.alias_folder("a/b", "prod")
    assert records.numbers(registry.store, folder) == list(range(1, 10))
    assert sum(passed.fault == "lose" for passed in proxy.passed) >= 3


def test_a_write_that_arrived_with_other_bytes_is_not_reported_as_done(
    location: str, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that takes a wrong checksum for right: its ETag, or the object read back, tells."""
    store = open_store(location)
    store.require_conditional_writes()
    put = type(object_server.backend).put_object

    def flipped(self: Any, bucket: str, key: str, value: bytes, *rest: Any, **named: Any) -> Any:
        return put(self, bucket, key, value.replace(b"mine", b"mIne"), *rest, **named)

    monkeypatch.setattr(type(object_server.backend), "put_object", flipped)
    with pytest.raises(UserError, match="1.json has other bytes than were just written"):
        store.put_if_absent("models/a/b/1.json", b"mine")
    assert store.put_if_absent("models/a/b/2.json", b"his")


def ignores_conditions(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.s3.responses import S3Response

    put = S3Response.put_object

    def without_condition(self: Any) -> Any:
        self.headers = {name: value for name, value in self.headers.items() if name.lower() != "if-none-match"}
        return put(self)

    monkeypatch.setattr(S3Response, "put_object", without_condition)


def test_a_store_that_ignores_conditions_is_refused_at_making(
    location: str, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignores_conditions(object_server, monkeypatch)
    with pytest.raises(UserError, match="lets a second writer replace the first"):
        Registry(location, create=True)
    assert open_store(location).list("") == []


def test_a_store_that_ignores_conditions_is_refused_at_the_first_write_but_may_be_read(
    location: str, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch, large: Path
) -> None:
    Registry(location, create=True)
    ignores_conditions(object_server, monkeypatch)
    monkeypatch.setattr(cloud, "_probed", set())  # as in another process
    registry = Registry(location)
    assert registry.models() == []
    with pytest.raises(UserError, match="lets a second writer replace the first"):
        registry.store.put_if_absent("models/a/b/1.json", b"x")
    with pytest.raises(UserError, match="lets a second writer replace the first"):
        registry.store.put_blob(large, LARGE_SHA256)
    assert registry.store.list("") == ["registry.json"]


def test_a_store_that_rejects_conditions_is_refused(
    proxy: FaultProxy, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.decide = lambda method, path, headers: "501 NotImplemented" if is_creation(method, headers) else None
    monkeypatch.setattr("baton.registry.stores.connection.RETRIES", 0)
    monkeypatch.setattr(cloud, "_ATTEMPTS", 1)
    with pytest.raises(UserError, match=f"{location} has no conditional writes .*Put the registry into a store"):
        Registry(location, create=True)
    assert open_store(location).list("") == []


def test_the_probe_runs_once_a_process(proxy: FaultProxy, location: str) -> None:
    for number in range(3):
        open_store(location).put_if_absent(f"models/a/{number}.json", b"x")
    probes = [passed for passed in proxy.passed if ".conditional" in passed.path and passed.method == "PUT"]
    assert len(probes) == 2


def test_more_names_than_fit_a_page_are_all_listed(location: str, object_server: ObjectServer) -> None:
    bucket = location.split("/")[2]
    for number in range(2_500):  # a page has a thousand
        object_server.backend.put_object(bucket, f"registry/models/a/b/versions/{number:07d}.json", b"{}")
    store = open_store(location)
    names = store.list("models/a/b/versions")
    assert names == [f"{number:07d}.json" for number in range(2_500)]
    assert sum(1 for _ in store.walk("models")) == 2_500


def test_an_unsteady_store_is_asked_again(proxy: FaultProxy, location: str, large: Path, tmp_path: Path) -> None:
    store = open_store(location)
    proxy.decide = Once("503 SlowDown", lambda method, path, headers: "partNumber=" in path, count=2)
    store.put_blob(large, LARGE_SHA256)
    proxy.decide = Once("refuse", lambda method, path, headers: method == "GET", count=2)
    assert store.fetch_blob(LARGE_SHA256, tmp_path / "new") == LARGE_SHA256
    assert sum(passed.fault is not None for passed in proxy.passed) == 4


def parts_sent(proxy: FaultProxy) -> list[str]:
    return sorted(
        passed.path.partition("partNumber=")[2].partition("&")[0] or passed.path
        for passed in proxy.passed
        if passed.method == "PUT" and "uploadId=" in passed.path and passed.fault is None
    )


def send(location: str, file: Path) -> None:
    """For a process that is killed half way."""
    cloud.PART_BYTES, cloud.PARTS = PART, 1
    open_store(location).put_blob(file, LARGE_SHA256)


def test_an_upload_that_was_killed_goes_on_where_it_was(
    proxy: FaultProxy, location: str, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = threading.Event()

    def stop_at_the_third(method: str, path: str, headers: dict[str, str]) -> str | None:
        if "partNumber=3" in path:
            reached.set()
            return "refuse"
        return None

    proxy.decide = stop_at_the_third
    process = multiprocessing.get_context("spawn").Process(target=send, args=(location, large))
    process.start()
    assert reached.wait(60)
    process.kill()
    process.join()
    store = open_store(location)
    assert not store.exists(blob_path(LARGE_SHA256))
    proxy.decide = lambda method, path, headers: None
    assert parts_sent(proxy) == ["1", "2"]
    store.put_blob(large, LARGE_SHA256)
    assert parts_sent(proxy) == ["1", "2", "3", "4"]
    assert store.hash_blob(LARGE_SHA256) == (LARGE_SHA256, len(LARGE))
    assert isinstance(store, CloudStore) and list(store.abort_unfinished(0)) == []


def begin_upload(store: Store, sha256: str) -> tuple[Any, dict[str, str]]:
    assert isinstance(store, CloudStore)
    client = store._connection.s3
    where = {"Bucket": store._connection.bucket, "Key": store._connection.key(blob_path(sha256))}
    return client, where | {"UploadId": client.create_multipart_upload(**where)["UploadId"]}


def test_a_part_with_other_bytes_or_of_another_size_is_sent_again(
    proxy: FaultProxy, location: str, large: Path
) -> None:
    store = open_store(location)
    client, where = begin_upload(store, LARGE_SHA256)
    wrong = bytearray(LARGE[PART : 2 * PART])
    wrong[77] ^= 1
    client.upload_part(**where, PartNumber=1, Body=LARGE[:PART])
    client.upload_part(**where, PartNumber=2, Body=bytes(wrong))
    client.upload_part(**where, PartNumber=3, Body=LARGE[2 * PART : 3 * PART + 5])
    proxy.passed.clear()
    store.put_blob(large, LARGE_SHA256)
    assert parts_sent(proxy) == ["2", "3", "4"]
    assert store.hash_blob(LARGE_SHA256) == (LARGE_SHA256, len(LARGE))


def test_two_senders_of_one_blob_share_an_upload(location: str, large: Path) -> None:
    errors: list[Exception] = []

    def send_it() -> None:
        try:
            open_store(location).put_blob(large, LARGE_SHA256)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=send_it) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert open_store(location).hash_blob(LARGE_SHA256) == (LARGE_SHA256, len(LARGE))


@pytest.mark.parametrize("which", ["uploads=", "complete"])
def test_a_lost_answer_to_an_upload_is_no_failure(proxy: FaultProxy, location: str, large: Path, which: str) -> None:
    def fits(method: str, path: str, headers: dict[str, str]) -> bool:
        return method == "POST" and ("uploads" in path) == (which == "uploads=")

    store = open_store(location)
    proxy.decide = Once("lose", fits)
    store.put_blob(large, LARGE_SHA256)
    assert any(passed.fault == "lose" for passed in proxy.passed)
    assert store.hash_blob(LARGE_SHA256) == (LARGE_SHA256, len(LARGE))


@pytest.mark.parametrize("size", [1000, PART + 1000])
@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_file_that_changes_while_it_is_sent_never_appears(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, size: int
) -> None:
    (tmp_path / "file").write_bytes(LARGE[:size])
    sha256 = hashlib.sha256(b"what it was when it was hashed").hexdigest()
    store = open_store(location) if scheme == "s3" else in_memory(monkeypatch)
    with pytest.raises(UserError, match="changed while it was being sent"):
        store.put_blob(tmp_path / "file", sha256)
    assert store.list("blobs/sha256") == []
    assert isinstance(store, CloudStore) and list(store.abort_unfinished(0, dry_run=True)) == []


def test_a_blob_is_sent_in_one_piece_or_resumed_but_never_twice(proxy: FaultProxy, location: str, large: Path) -> None:
    store = open_store(location)
    store.put_blob(large, LARGE_SHA256)
    store.put_blob(large, LARGE_SHA256)
    assert parts_sent(proxy) == ["1", "2", "3", "4"]
    # Without Baton's mark, as after a copy by another tool, it is read through once more, and believed.
    store.delete(blob_path(LARGE_SHA256))
    client, where = begin_upload(store, LARGE_SHA256)
    client.abort_multipart_upload(**where)
    client.put_object(Bucket=where["Bucket"], Key=where["Key"], Body=LARGE)
    proxy.passed.clear()
    store.put_blob(large, LARGE_SHA256)
    assert parts_sent(proxy) == [] and sum(passed.method == "GET" for passed in proxy.passed) == 4


def test_unfinished_uploads_are_given_up_by_age(location: str) -> None:
    store = open_store(location)
    begin_upload(store, LARGE_SHA256)
    assert isinstance(store, CloudStore)
    # Moto says of every upload that it began in 2010.
    assert list(store.abort_unfinished(10**10)) == []
    assert list(store.abort_unfinished(3600, dry_run=True)) == [blob_path(LARGE_SHA256)]
    assert list(store.abort_unfinished(3600)) == [blob_path(LARGE_SHA256)]
    assert list(store.abort_unfinished(0)) == []


def test_parts_are_as_many_as_s3_takes() -> None:
    smallest = 16 << 20
    assert part_size(1, smallest) == smallest and part_size(160_000 << 20, smallest) == smallest
    assert part_size((160_000 << 20) + 1, smallest) == 17 << 20
    terabyte = 1 << 40
    assert -(-terabyte // part_size(terabyte, smallest)) <= 10_000


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("403 AccessDenied", "denies access to .*permission"),
        ("403 InvalidAccessKeyId", "does not know these credentials .*AWS_ACCESS_KEY_ID"),
        ("403 SignatureDoesNotMatch", "does not know these credentials"),
        ("400 ExpiredToken", "does not know these credentials"),
        ("404 NoSuchBucket", "there is no bucket 'test-"),
    ],
)
def test_a_refusal_names_the_place_and_the_remedy(
    proxy: FaultProxy, location: str, large: Path, fault: str, message: str
) -> None:
    sha256 = LARGE_SHA256
    if "AccessDenied" not in fault:  # once by boto3 is enough
        large.write_bytes(b"small")
        sha256 = hashlib.sha256(b"small").hexdigest()
    store = open_store(location)
    store.require_conditional_writes()
    proxy.decide = lambda method, path, headers: fault if method != "HEAD" else None
    for call in (
        lambda: store.list("models"),
        lambda: list(store.walk("models")),
        lambda: store.get("registry.json"),
        lambda: store.get_many(["registry.json", "other.json"]),
        lambda: store.put_if_absent("registry.json", b"x"),
        lambda: store.put_blob(large, sha256),
        lambda: store.delete("registry.json"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert location in str(caught.value)


def test_no_bucket_and_no_server(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = location.replace("test-", "gone-")
    for create in (False, True):
        with pytest.raises(UserError, match=f"there is no bucket .* for {absent}"):
            Registry(absent, create=create)
    monkeypatch.setattr("baton.registry.stores.connection.RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"{location} cannot be reached at 127.0.0.1"):
        Registry(location)


def test_no_credentials(location: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(UserError, match=f"no credentials for {location}. Set AWS_ACCESS_KEY_ID"):
        Registry(location)
    monkeypatch.setenv("AWS_PROFILE", "team")
    with pytest.raises(UserError, match="credentials .* cannot be read: .*team"):
        Registry(location)
    (tmp_path / "credentials").write_text("[team]\naws_access_key_id = a\naws_secret_access_key = b\n")
    Registry(location, create=True)
    assert Registry(location).models() == []


@pytest.mark.parametrize("url", ["s3://", "s3:///prefix", "gs://", "s3://key:secret@bucket/x", "s3://bucket/x?y=1"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is no place for a registry: expected .*://bucket/prefix"):
        open_store(url)


@pytest.mark.parametrize("module", ["obstore", "boto3"])
def test_a_missing_library_is_named(location: str, large: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'baton\[s3\]'"):
        open_store(location).put_blob(large, LARGE_SHA256)


def test_a_forked_process_is_told_instead_of_hanging(location: str) -> None:
    store = open_store(location)
    store.list("")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.list("")
            os.write(writing, b"no error")
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert b"start it by spawn" in pipe.read()
    os.waitpid(child, 0)


def test_the_working_folder_of_a_killed_program_is_swept_up(cache: Path) -> None:
    script = (
        "import time\nfrom baton.registry.stores.scratch import scratch_folder\n"
        "with scratch_folder() as folder:\n"
        "    (folder / 'file').write_text('x'); print(folder, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    with scratch_folder() as mine:
        assert (folder / "file").exists() and mine.parent == folder.parent == cache / "tmp"
        process.kill()
        process.wait()
        process.stdout.close()
        with scratch_folder():
            assert not folder.exists() and mine.exists()
    assert list((cache / "tmp").iterdir()) == []


def test_downloads_are_bounded_in_memory(
    proxy: FaultProxy, location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the reader, no more ranges are fetched ahead than `RANGES`."""
    monkeypatch.setattr(cloud, "RANGE_BYTES", 1000)
    sha256, size = write_hashed(LARGE[:20_500], tmp_path / "file")
    store = open_store(location)
    store.put_blob(tmp_path / "file", sha256)
    assert isinstance(store, CloudStore)
    proxy.passed.clear()
    chunks = store._chunks(blob_path(sha256), size)
    assert bytes(next(chunks)) == LARGE[:1000]
    time.sleep(0.2)
    assert len(proxy.passed) == cloud.RANGES
    assert b"".join(chunks) == LARGE[1000:20_500]
    assert len(proxy.passed) == 21
