"""Finding and reading data files: suffixes, compressions, folders, globs, hub ids, and all that is wrong."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from baton.data import load
from baton.errors import UserError
from baton.recipe import Source

ROWS = [{"text": "A fox."}, {"text": "狐と鴉"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def texts(path: str, folder: Path) -> list[str]:
    return [row["text"] for row in load(Source(path=path), folder, "text").rows]


def refusal(path: str, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(Source(path=path), folder, "text")
    return str(caught.value)


def parquet_bytes() -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".parquet"])
def test_every_suffix_and_compression(tmp_path: Path, suffix: str, compression: str) -> None:
    content = {
        ".txt": "A fox.\n狐と鴉".encode(),
        ".json": json.dumps(ROWS, indent=2).encode(),
        ".jsonl": JSONL,
        ".parquet": parquet_bytes(),
    }[suffix]
    squeeze = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[compression]
    (tmp_path / f"a{suffix}{compression}").write_bytes(squeeze(content))
    expected = ["A fox.\n狐と鴉"] if suffix == ".txt" else ["A fox.", "狐と鴉"]
    assert texts(f"a{suffix}{compression}", tmp_path) == expected


def test_every_member_of_a_joined_gz_or_zst_is_read(tmp_path: Path) -> None:
    first, second = JSONL.splitlines(keepends=True)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(first) + gzip.compress(second))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(first) + zstandard.compress(second))
    assert texts("a.jsonl.gz", tmp_path) == texts("a.jsonl.zst", tmp_path) == ["A fox.", "狐と鴉"]


def test_a_row_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    content = '\ufeff{"text": "A\u2028fox\x85"}\r\n\n{"text": "A crow"}'
    (tmp_path / "a.jsonl").write_bytes(content.encode())
    assert texts("a.jsonl", tmp_path) == ["A\u2028fox\x85", "A crow"]


def test_folder_takes_all_supported_files_sorted(tmp_path: Path) -> None:
    for name in ("d/b.jsonl", "d/c/a.txt.gz", "d/a.txt", "d/.hidden.txt", "d/.git/x.txt", "d/notes.md"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"text": name}) if name.endswith(".jsonl") else name
        file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert texts("d", tmp_path) == ["d/a.txt", "d/b.jsonl", "d/c/a.txt.gz"]
    assert texts("d/**/*.txt*", tmp_path) == ["d/a.txt", "d/c/a.txt.gz"]


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    assert "holds no data files" in refusal(str(tmp_path), tmp_path)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dialogues.jsonl").write_text("x")
    message = refusal("data/dialogue.jsonl", tmp_path)
    assert "dialogue.jsonl" in message and f"in {tmp_path / 'data'} there is dialogues.jsonl" in message
    # the local folder decides: nothing is looked up on the hub
    assert "there is dialogues.jsonl" in refusal("data/dialogues", tmp_path)
    assert f"in {tmp_path} there is data" in refusal("dat/x/dialogues.jsonl", tmp_path)


def test_a_glob_that_matches_nothing(tmp_path: Path) -> None:
    assert "matches no file" in refusal("*.jsonl", tmp_path)


@pytest.mark.parametrize("name", ["a.csv", "a", "a.json.xz", "a.gz"])
def test_an_unsupported_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    message = refusal(name, tmp_path)
    assert name in message and ".parquet" in message


EMPTY = {
    "a.txt": b"",
    "a.jsonl": b"\n\n",
    "a.json": b" ",
    "b.json": b"[]",
    "a.parquet": b"",
    "a.jsonl.gz": gzip.compress(b"", mtime=0),
    "b.jsonl.gz": b"",
    "a.jsonl.zst": zstandard.compress(b""),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(EMPTY[name])
    assert f"{name} is empty" in refusal(name, tmp_path)


def test_an_empty_file_among_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "b.jsonl").write_bytes(b"")
    assert "b.jsonl is empty" in refusal("*.jsonl", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "a.jsonl line 2 is a list; expected an object"),
        ("a.jsonl", b"[" * 200_000, "nested too deeply"),
        ("a.json", b'[{"text": "x"},\n{"text" 1}]', "a.json is not JSON at its line 2"),
        ("a.json", JSONL, "One object a line is .jsonl"),
        ("a.json", b'{"text": "x"}', "a.json holds an object; expected a list"),
        ("a.json", b'[{"text": "x"}, 3]', "a.json row 2 is a number"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', "a.jsonl line 2 is not UTF-8"),
        ("a.json", b'[{"text": "x"},\n{"text": "caf\xe9"}]', "a.json line 2 is not UTF-8"),
        ("a.txt", "A fox.".encode("utf-16"), "a.txt line 1 is not UTF-8"),
        ("a.parquet", b"no parquet at all", "a.parquet is not a parquet file"),
        ("a.txt.gz", gzip.compress(bytes(range(65, 90)) * 99, mtime=0)[:-20], "a.txt.gz is cut off"),
        ("a.txt.gz", b"A fox.", "a.txt.gz cannot be read"),
        ("a.txt.zst", b"A fox.", "a.txt.zst cannot be read"),
        ("a.txt.zst", zstandard.compress(bytes(range(65, 90)) * 99)[:-5], "a.txt.zst cannot be read"),
    ],
)
def test_a_damaged_or_misnamed_file(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in refusal(name, tmp_path)


def test_a_hub_dataset_is_loaded_by_id_subset_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(path: str, subset: str | None, split: str, revision: str | None) -> datasets.Dataset:
        calls.append((path, subset, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(path="org/name", subset="main", split="test", revision="0a1b", rows=(1, None))
    assert load(source, tmp_path, "text").rows == [{"text": "狐と鴉"}]
    assert calls == [("org/name", "main", "test", "0a1b")]


@pytest.mark.parametrize("error", [ConnectionError("offline"), ValueError("unknown split"), RuntimeError()])
def test_a_hub_dataset_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import datasets

    def load_dataset(path: str, subset: str | None, split: str, revision: str | None) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal("org/name", tmp_path)
    assert "no such file or folder" in message and "hub dataset" in message and (str(error) or "Runtime") in message
