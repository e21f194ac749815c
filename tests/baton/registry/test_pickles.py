"""Pickles are recognised by content, and nothing else is."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest

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
    "gzip": gzip.compress(pickle.dumps(VALUE, 4)),
    "gzip, protocol 0": gzip.compress(pickle.dumps(VALUE, 0)),
    "bzip2": bz2.compress(pickle.dumps(VALUE, 4)),
    "xz": lzma.compress(pickle.dumps(VALUE, 4)),
    "numpy objects": numpy_objects(),
    "cut off": pickle.dumps(VALUE, 4)[:-4],
    "imports by hand": b"cos\nsystem\n.",
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
        gzip.compress(b'{"text": "hello"}\n'),
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
