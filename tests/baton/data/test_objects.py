"""Data in an object store, behind a real S3 server on this machine: found, told apart, and read like local files."""

from __future__ import annotations

import gzip
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

pytest.importorskip("obstore")
pytest.importorskip("moto")

from baton.data import fingerprint, load
from baton.data.files import locate
from baton.data.objects import _RANGE_BYTES
from baton.errors import UserError
from baton.recipe import Source

Put = Callable[[str, bytes], None]
ROWS = b'{"text": "a fox"}\n{"text": "two dogs"}\n'


@pytest.fixture(scope="module")
def put() -> Iterator[Put]:
    """put(key, content): into the bucket `data`, which s3://data leads to."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            patch.setenv(name, "us-east-1")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket="data")
        yield lambda key, content: client.put_object(Bucket="data", Key=key, Body=content)
    server.stop()


def texts(path: str) -> list[str]:
    return [row["text"] for row in load(Source(path=path), Path("."), "text").rows]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "json"])
def test_every_form_of_file_is_read(form: str, put: Put) -> None:
    if form == "parquet":
        import pyarrow
        from pyarrow import parquet

        stream = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": ["a fox", "two dogs"]}), stream)
        content = stream.getvalue()
    elif form == "json":
        content = json.dumps([json.loads(line) for line in ROWS.splitlines()]).encode()
    else:
        pack = {"jsonl": bytes, "jsonl.gz": lambda raw: gzip.compress(raw, mtime=0), "jsonl.zst": zstandard.compress}
        content = pack[form](ROWS)
    put(f"form/a.{form}", content)
    assert texts(f"s3://data/form/a.{form}") == ["a fox", "two dogs"]


def test_prefixes_and_patterns_are_sorted_and_stay_in_their_folder(put: Put) -> None:
    for key in ("many/b.txt", "many/a.txt", "many/deep/c.txt", "many/README", "many2/d.txt"):
        put(key, key.encode())
    expected = {
        "many": ["many/a.txt", "many/b.txt", "many/deep/c.txt"],
        "many/*.txt": ["many/a.txt", "many/b.txt"],
        "many/**/?.txt": ["many/a.txt", "many/b.txt", "many/deep/c.txt"],
        "many*/*.txt": ["many/a.txt", "many/b.txt", "many2/d.txt"],
    }
    assert {path: texts(f"s3://data/{path}") for path in expected} == expected
    places = load(Source(path="s3://data/many/*.txt"), Path("."), "text").places
    assert places[0] == ("s3://data/many/a.txt", 1)


def test_a_file_of_several_ranges_is_read_whole(put: Put) -> None:
    lines = [f"line {number} " + "x" * 1000 for number in range(2 * _RANGE_BYTES // 1000)]
    put("long.jsonl", "".join(json.dumps({"text": line}) + "\n" for line in lines).encode())
    assert texts("s3://data/long.jsonl") == lines


def test_the_fingerprint_is_of_the_content_without_reading_it(put: Put) -> None:
    found = []
    for content in (b"one", b"two", b"one"):
        put("print/a.txt", content)
        found.append(fingerprint(Source(path="s3://data/print/a.txt"), Path(".")))
    assert found[0] == found[2] != found[1] and found[0]["size"] == 3


@pytest.mark.parametrize("path", ["s3://data/absent.txt", "s3://data/absent/*.txt", "s3://nowhere/a.txt", "ftp://a/b"])
def test_what_is_not_there_is_a_user_s_mistake(path: str, put: Put) -> None:
    with pytest.raises(UserError, match="nothing lies there|no bucket|is not read"):
        locate(path, Path("."))
