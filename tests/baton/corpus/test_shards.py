"""Shards: what is written is read, across their borders; damage is noticed."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from baton.corpus.shards import Corpus, files_of_a_source
from baton.errors import UserError
from tests.corpus_maker import make_corpus

DOCUMENTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
STREAM = [0, 1, 2, 3, 0, 0, 4, 0, 0, 5, 6, 0, 0, 7, 8, 9, 10, 0]


@pytest.fixture(params=[1, 2, 3, 10])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Corpus:
    return make_corpus(tmp_path, {"a": DOCUMENTS}, {"b": [[11]]}, request.param, {"a": "en"})


def test_the_stream_is_read_across_shards(corpus: Corpus) -> None:
    source = corpus.train[0]
    assert source.num_tokens == len(STREAM) and source.num_documents == 4 and source.num_bytes == 20
    for start in range(len(STREAM) + 1):
        for stop in range(start, len(STREAM) + 1):
            assert source.tokens(start, stop).tolist() == STREAM[start:stop]
            expected = [end for end in (5, 8, 12, 18) if start < end <= stop]
            assert source.documents_between(start, stop).tolist() == expected


@pytest.mark.parametrize("most", [1, 4, 100])
def test_the_stream_is_read_through(corpus: Corpus, most: int) -> None:
    pieces = [piece.tolist() for piece in corpus.train[0].read_through(most)]
    assert [token for piece in pieces for token in piece] == STREAM and max(map(len, pieces)) <= most


def test_documents_are_read_by_number(corpus: Corpus) -> None:
    source = pickle.loads(pickle.dumps(corpus)).train[0]  # as a worker of a loader gets it
    assert [source.document(at).tolist() for at in range(4)] == [[0, *ids, 0] for ids in DOCUMENTS]
    assert [source.document_bytes(at) for at in range(4)] == [6, 2, 4, 8]
    assert source.document_language(3) == "en"
    assert corpus.eval[0].document(0).tolist() == [0, 11, 0]


def test_no_more_files_are_open_than_a_process_may_have(tmp_path: Path) -> None:
    """Sixty shards of six files each, where a process may open 48 files in all."""
    make_corpus(tmp_path, {"a": [[at, at + 1] for at in range(60)]}, documents_per_shard=1)
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
from pathlib import Path
from baton.corpus.rows import SourceRows
from baton.corpus.shards import Corpus
source = Corpus.open(Path({str(tmp_path)!r})).train[0]
rows = SourceRows(source, 4, 0)
assert len(source.shards) == len(rows) == 60
found = [rows[at]["input_ids"].tolist() for at in [*range(60), *range(60)]]
assert found == [[0, at, at + 1, 0] for at in [*range(60), *range(60)]]
assert sum(source.document_bytes(at) for at in range(60)) == source.num_bytes
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_process_asks_for_more_files(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 524_288))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append(limits))
    assert files_of_a_source.__wrapped__() == 4096
    assert asked == [(65_536, 524_288)]


@pytest.mark.parametrize("kind", ["tokens", "ends.npy"])
def test_a_changed_shard_is_refused_when_verified(tmp_path: Path, kind: str) -> None:
    corpus = make_corpus(tmp_path, {"a": DOCUMENTS})
    Corpus.open(tmp_path, verify=True)
    file = corpus.train[0].shard_file(0, kind)
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="has changed"):
        Corpus.open(tmp_path, verify=True)


def test_a_shard_that_was_cut_off_is_refused_when_read(tmp_path: Path) -> None:
    source = make_corpus(tmp_path, {"a": DOCUMENTS}).train[0]
    file = source.shard_file(0, "tokens")
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(UserError, match="expected 18 tokens"):
        source.tokens(0, 3)


def test_a_folder_without_manifest_or_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="baton prepare"):
        Corpus.open(tmp_path)
    make_corpus(tmp_path, {"a": DOCUMENTS})
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(UserError, match="format 99"):
        Corpus.open(tmp_path)
