"""Pickles are recognised by content, and nothing else is."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from baton.registry import pickles
from baton.registry.pickles import why_pickle


def torch_file(**options: bool) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, buffer, **options)
    return buffer.getvalue()


def zip_file(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def tar_file(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def numpy_archive(**arrays: object) -> bytes:
    import numpy

    buffer = io.BytesIO()
    numpy.savez_compressed(buffer, **{name: numpy.array(value) for name, value in arrays.items()})
    return buffer.getvalue()


def numpy_records() -> bytes:
    import numpy

    buffer = io.BytesIO()
    fields = [(f"a_field_with_a_long_name_{i}", "f8") for i in range(20)] + [("last", "O")]
    numpy.save(buffer, numpy.zeros(1, fields), allow_pickle=True)
    return buffer.getvalue()


def numpy_objects() -> bytes:
    import numpy

    buffer = io.BytesIO()
    numpy.save(buffer, numpy.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


VALUE = OrderedDict(a=[1, 2.5, "text"])
PICKLES = {
    **{f"protocol {protocol}": pickle.dumps(VALUE, protocol) for protocol in range(6)},
    **{f"plain, protocol {protocol}": pickle.dumps({"a": 1}, protocol) for protocol in range(6)},
    "torch": torch_file(),
    "old torch": torch_file(_use_new_zipfile_serialization=False),
    "zip, other name": zip_file("weights", pickle.dumps(VALUE, 4)),
    "gzip": gzip.compress(pickle.dumps(VALUE, 4), mtime=0),
    "gzip, protocol 0": gzip.compress(pickle.dumps(VALUE, 0), mtime=0),
    "bzip2": bz2.compress(pickle.dumps(VALUE, 4)),
    "xz": lzma.compress(pickle.dumps(VALUE, 4)),
    "numpy objects": numpy_objects(),
    "cut off": pickle.dumps(VALUE, 4)[:-4],
    "imports by hand": b"cos\nsystem\n.",
    "long, protocol 0": pickle.dumps([VALUE, "x" * (17 << 20), {1}], 0),
    "joblib's zlib": zlib.compress(pickle.dumps(VALUE, 4)),
    "lzma alone": lzma.compress(pickle.dumps(VALUE, 4), lzma.FORMAT_ALONE),
    "zstd": zstandard.compress(pickle.dumps(VALUE, 4)),
    "lz4": b"\x04\x22\x4d\x18" + bytes(20),
    "numpy objects in an archive": numpy_archive(fine=[1.0], bad=[{"a": 1}]),
    "numpy records with objects": numpy_records(),
    "tar": tar_file("weights", pickle.dumps(VALUE, 4)),
    "tar, gzip": gzip.compress(tar_file("weights", pickle.dumps(VALUE, 0))),
    "zip in zip": zip_file("inner", zip_file("weights", pickle.dumps(VALUE, 4))),
    "zip in tar in zip": zip_file("a", tar_file("b", zip_file("c", pickle.dumps(VALUE, 2)))),
    "too deep": zip_file("a", zip_file("b", zip_file("c", zip_file("d", zip_file("e", b"hello"))))),
    "gzip in zip": zip_file("a.gz", gzip.compress(pickle.dumps(VALUE, 4), mtime=0)),
    "after a text": b"hello" + zip_file("weights", pickle.dumps(VALUE, 4)),
}


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("suffix", ["bin", "json", "safetensors", "txt"])
def test_pickles(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(PICKLES[name])
    assert why_pickle(path)


def safetensors_with_header_of(length: int) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(length).encode()
    return struct.pack("<Q", length) + header + b"\0\0\0\0"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"N.",
        b"{}",
        b'{"a": 1}\n',
        b"#version: 0.2\nc a\nt h\n.\n",
        b"cat\n",
        b"I am text.\nS.\n",
        b"MIT License\n\nCopyright.\n",
        b"---\nbase_model: x\n---\n# Card\n.",
        zip_file("notes.txt", b"hello"),
        gzip.compress(b'{"text": "hello"}\n', mtime=0),
        zip_file("a", zip_file("b", b"hello")),
        tar_file("notes.txt", b"hello"),
        zlib.compress(b"hello"),
        zstandard.compress(b'{"text": "hello"}\n'),
        numpy_archive(fine=[1.0, 2.0]),
        b"x\x9c is no zlib stream",
        b"\x1f\x8b is no gzip file",
        b"GGUF\x03\0\0\0" + bytes(64),
        b"\x08\x08\x12\x07pytorch",  # as ONNX begins
        b"c" + bytes(1 << 20),
        # The header's length begins with the same bytes as a pickle of protocol 2 and of protocol 4.
        safetensors_with_header_of(0x0280),
        safetensors_with_header_of(0x0480),
    ],
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert why_pickle(path) is None


def test_a_models_own_files(made: object) -> None:
    for folder in made:  # type: ignore[attr-defined]
        assert [path.name for path in folder.iterdir() if why_pickle(path)] == []


def without_magic(archive: bytes) -> bytes:
    """A tar archive's first header as the oldest tar wrote it: no magic, and a checksum that fits."""
    raw = bytearray(archive)
    raw[257:265] = bytes(8)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


RUN = b"cposix\nsystem\n(S'true'\ntR"


@pytest.mark.parametrize(
    "content",
    [
        without_magic(tar_file("weights", pickle.dumps(VALUE, 4))),
        without_magic(tar_file("pickle", b"hello")),
        RUN + b"\0 and never an end",
        b"(S'true'\niposix\nsystem\n\0",
        b"cos\nsystem\n" + RUN + b"0" * 10 + RUN,
        gzip.compress(RUN + b".", mtime=0)[:-6],  # cut off, and run up to there
        b"N" * 1_100,
    ],
)
def test_what_runs_before_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(pickles, "_MAX_OPERATIONS", 1_000)
    path = tmp_path / "file"
    path.write_bytes(content)
    assert why_pickle(path)


@pytest.mark.parametrize("start", [b"", b"\x80\x03"])
@pytest.mark.parametrize("wrap", [lambda data: data, gzip.compress, zlib.compress, zstandard.compress])
def test_an_operand_too_long_to_read_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, wrap: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(pickles, "_MAX_OPERAND_BYTES", 1000)
    for operand in (b"B" + struct.pack("<I", 100_000) + bytes(100_000), b"S'" + b"x" * 100_000 + b"'\n"):
        path = tmp_path / "file"
        path.write_bytes(wrap(start + operand + b"0" + RUN + b"."))
        assert why_pickle(path)


def test_a_long_line_without_an_end_is_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MAX_OPERAND_BYTES", 1000)
    (tmp_path / "file").write_bytes(b"S'" + bytes(100_000))
    assert why_pickle(tmp_path / "file") is None
    (tmp_path / "file").write_bytes(b"B" + struct.pack("<I", 100_000) + bytes(99_999))
    assert why_pickle(tmp_path / "file") is None


@pytest.mark.parametrize("content", [b"(c) 2024 X\n\nRedistribution\n", b"cat\ndog\nRabbit\nbird\nant\n"])
def test_prose_that_reads_like_calls(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert why_pickle(tmp_path / "file") is None


def test_a_bomb_is_refused_and_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MAX_DECOMPRESSED_BYTES", 1 << 20)
    path = tmp_path / "file"
    for compress in (gzip.compress, bz2.compress, lzma.compress, zlib.compress, zstandard.compress):
        path.write_bytes(compress(bytes(8 << 20)))
        assert "too much to look through" in (why_pickle(path) or ""), compress
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", b"PK\x03\x04" + bytes(8 << 20))
    path.write_bytes(buffer.getvalue())
    assert "more than 1 MiB in an archive" in (why_pickle(path) or "")
    # What is no archive is not unpacked at all to find out whether it ends like one.
    read: list[int] = []
    real = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: read.append(n) or real(self, n))
    path.write_bytes(zip_file("zeros", bytes(8 << 20)))
    assert why_pickle(path) is None and sum(read) < 1 << 20 and -1 not in read
