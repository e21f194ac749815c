"""Rows worked by hand from small shards: packing, borders, cuts, indices, which document a token is of, the order."""

import multiprocessing
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baton.corpus.rows import Piece, RowIndex, SourceRows, training_rows
from baton.corpus_sections import CorpusData
from baton.errors import UserError
from baton.packing import IGNORED
from baton.train_sections import TokenTrain
from tests.corpus_maker import END, make_corpus

PAD = 1
NO = IGNORED


def listed(row: Any) -> tuple[list[int], ...]:
    return tuple(row[key].tolist() for key in ("input_ids", "labels", "position_ids"))


def train_settings(**changes: int) -> TokenTrain:
    settings = {"steps": 6, "tokens_per_batch": 24, "sequence_length": 8, "learning_rate": 1.0, "seed": 5} | changes
    return TokenTrain.model_validate(settings)


def test_documents_are_kept_whole_where_a_row_holds_them(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": [[11, 12, 13], [21], [31, 32]]})
    rows = SourceRows(corpus.train[0], 8, PAD)
    # with end tokens 5, 3 and 4: the 5 and the 3 fill a row
    assert len(rows) == 2
    assert listed(rows[0]) == (
        [END, 11, 12, 13, END, END, 21, END],
        [NO, 11, 12, 13, END, NO, 21, END],
        [0, 1, 2, 3, 4, 0, 1, 2],
    )
    assert listed(rows[1]) == (
        [END, 31, 32, END, PAD, PAD, PAD, PAD],
        [NO, 31, 32, END, NO, NO, NO, NO],
        [0, 1, 2, 3, 0, 1, 2, 3],
    )
    assert rows.pieces(0) == [Piece(0, 0, 5), Piece(1, 5, 3)]
    assert rows.pieces(1) == [Piece(2, 8, 4)]
    assert rows.padding_share == pytest.approx(4 / 16)


def test_a_long_document_is_cut_and_no_token_but_its_first_is_lost(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": [[21], [11, 12, 13, 14, 15, 16, 17]]})
    rows = SourceRows(corpus.train[0], 4, PAD)
    # 9 tokens by fours: each piece begins with the last token of the one before
    found = sorted((piece, listed(rows[row])[:2]) for row in range(len(rows)) for piece in rows.pieces(row))
    assert found == [
        (Piece(0, 0, 3), ([END, 21, END, PAD], [NO, 21, END, NO])),
        (Piece(1, 3, 4), ([END, 11, 12, 13], [NO, 11, 12, 13])),
        (Piece(1, 6, 4), ([13, 14, 15, 16], [NO, 14, 15, 16])),
        (Piece(1, 9, 3), ([16, 17, END, PAD], [NO, 17, END, NO])),
    ]


def test_a_stream_is_cut_at_the_ends_of_rows_and_knows_its_borders(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": [[11, 12, 13], [21], [31, 32]]}, documents_per_shard=2)
    rows = SourceRows(corpus.train[0], 7, PAD, "stream")
    assert [listed(rows[row]) for row in range(len(rows))] == [
        ([END, 11, 12, 13, END, END, 21], [NO, 11, 12, 13, END, NO, 21], [0, 1, 2, 3, 4, 0, 1]),
        ([END, END, 31, 32, END, PAD, PAD], [NO, NO, 31, 32, END, NO, NO], [0, 0, 1, 2, 3, 0, 1]),
    ]
    assert [rows.pieces(row) for row in range(2)] == [
        [Piece(0, 0, 5), Piece(1, 5, 2)],
        [Piece(1, 7, 1), Piece(2, 8, 4)],
    ]
    assert not list(tmp_path.rglob("*.rows-*"))


def test_a_border_at_a_row_end_is_the_same_border(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": [[11, 12], [21, 22]]})
    rows = SourceRows(corpus.train[0], 4, PAD, "stream")
    assert [listed(rows[row])[1] for row in range(len(rows))] == [[NO, 11, 12, END], [NO, 21, 22, END]]


@pytest.fixture
def documents() -> list[list[int]]:
    draw = random.Random(0)
    return [[1000 * at + place for place in range(draw.randint(0, 30))] for at in range(2, 62)]


@pytest.mark.parametrize("length", [2, 5, 16, 64])
def test_each_token_is_predicted_once_and_belongs_to_its_document(
    tmp_path: Path, documents: list[list[int]], length: int
) -> None:
    source = make_corpus(tmp_path, {}, {"a": documents}, documents_per_shard=17).eval[0]
    rows = SourceRows(source, length, PAD)
    predicted: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(documents))}
    for row in range(len(rows)):
        ids, labels, positions = listed(rows[row])
        at = 0
        for piece in rows.pieces(row):
            end = at + piece.length
            assert positions[at:end] == list(range(piece.length))
            assert ids[at:end] == source.tokens(piece.start, piece.start + piece.length).tolist()
            assert labels[at:end] == [NO, *ids[at + 1 : end]]
            predicted[piece.document] += list(enumerate(ids[at + 1 : end], piece.start + 1))
            at = end
        assert set(labels[at:]) <= {NO}
    for number, ids in enumerate(documents):
        assert [token for _, token in sorted(predicted[number])] == [*ids, END]
    assert rows.num_tokens == sum(
        len(rows.source.tokens(p.start, p.start + p.length)) for r in range(len(rows)) for p in rows.pieces(r)
    )


def test_the_index_is_saved_once_and_used_again(tmp_path: Path, documents: list[list[int]]) -> None:
    source = make_corpus(tmp_path, {"a": documents}, documents_per_shard=25).train[0]
    first = SourceRows(source, 16, PAD)
    files = sorted(tmp_path.rglob("*.rows-16-*"))
    assert len(files) == 3
    # what is read is the file: one that says less gives fewer rows
    index = RowIndex.of(source.shard_ends(0)[:5], 16)
    np.save(files[0], index._numbers)
    assert len(SourceRows(source, 16, PAD)) < len(first)
    assert len(SourceRows(source, 8, PAD)) > len(first), "another length has its own"


def test_a_shard_prepared_anew_gets_another_index(tmp_path: Path, documents: list[list[int]]) -> None:
    SourceRows(make_corpus(tmp_path, {"a": documents}).train[0], 16, PAD)
    other = make_corpus(tmp_path, {"a": documents[:9]}).train[0]
    assert len(SourceRows(other, 16, PAD)) == RowIndex.of(other.shard_ends(0), 16).num_rows


def test_a_folder_that_cannot_be_written_to_does_without(
    tmp_path: Path, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_corpus(tmp_path, {"a": documents}).train[0]

    def refuse(*paths: Path) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("os.replace", refuse)
    rows = SourceRows(source, 16, PAD)
    assert len(rows) == RowIndex.of(source.shard_ends(0), 16).num_rows
    assert not list(tmp_path.rglob("*rows-*"))


def _first_rows(folder: str) -> list[list[int]]:
    from baton.corpus.shards import Corpus

    rows = SourceRows(Corpus.open(Path(folder)).train[0], 16, PAD)
    return [row.tolist() for row in (rows[at]["input_ids"] for at in range(len(rows)))]


def test_processes_that_want_the_index_at_once_all_get_it(tmp_path: Path, documents: list[list[int]]) -> None:
    make_corpus(tmp_path, {"a": documents}, documents_per_shard=20)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_first_rows, [str(tmp_path)] * 8, chunksize=1)
    assert all(rows == found[0] for rows in found)
    assert len(list(tmp_path.rglob("*rows-16-*"))) == 3 and not list(tmp_path.rglob("*.new"))


def test_a_training_is_the_mixture_and_travels_to_another_process(tmp_path: Path, documents: list[list[int]]) -> None:
    corpus = make_corpus(tmp_path, {"a": documents[:40], "b": documents[40:]})
    data = CorpusData.model_validate({"train": [{"path": "a", "share": 0.75}, {"path": "b", "share": 0.25}]})
    rows = training_rows(corpus, data, train_settings(), PAD)
    assert len(rows) == 18
    for number in range(18):
        sample = rows.mixture.sample(number)
        expected = SourceRows(corpus.train[sample.source], 8, PAD)
        assert listed(rows[number]) == listed(expected[sample.row])
        assert rows.pieces(number) == expected.pieces(sample.row)
    copied = pickle.loads(pickle.dumps(rows))
    assert [listed(copied[number]) for number in range(18)] == [listed(rows[number]) for number in range(18)]
    with pytest.raises(IndexError):
        rows[18]


def test_skipped_batches_are_passed_over(tmp_path: Path, documents: list[list[int]]) -> None:
    corpus = make_corpus(tmp_path, {"a": documents})
    data = CorpusData.model_validate({"train": [{"path": "a"}]})
    plain, other = (training_rows(corpus, data, train_settings(), PAD, skipped) for skipped in ((), (1, 3)))
    batches = [[rows.sample(number) for number in range(18)] for rows in (plain, other)]
    # steps 0 … 3 read the batches 0, 2, 4, 5
    assert batches[1][:12] == [*batches[0][:3], *batches[0][6:9], *batches[0][12:18]]


def test_seed_packing_share_and_cap_are_read(tmp_path: Path, documents: list[list[int]]) -> None:
    corpus = make_corpus(tmp_path, {"a": documents[:30], "b": documents[30:]})

    def first(seed: int = 5, packing: str = "best_fit", **wanted: float) -> list[Any]:
        sources = [
            {"path": "a", **wanted},
            {"path": "b", **({"share": 1 - wanted["share"]} if "share" in wanted else {})},
        ]
        data = CorpusData.model_validate({"train": sources, "packing": packing})
        rows = training_rows(corpus, data, train_settings(seed=seed), PAD)
        return [listed(rows[number]) for number in range(18)]

    plain = first()
    assert first() == plain
    assert first(seed=6) != plain
    assert first(packing="stream") != plain
    assert first(weight=3.0) != plain
    assert first(share=0.75) != plain
    assert first(max_epochs=0.05) != plain


def test_too_little_text_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": [[11, 12, 13, 14, 15, 16]] * 9})
    data = CorpusData.model_validate({"train": [{"path": "a", "max_epochs": 2}]})
    assert len(training_rows(corpus, data, train_settings(), PAD)) == 18
    with pytest.raises(UserError, match=r"needs 168 tokens .* there are 144 under max_epochs"):
        training_rows(corpus, data, train_settings(steps=7), PAD)


def test_passed_over_batches_come_last_where_there_is_no_other_text(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": [[11, 12, 13, 14, 15, 16]] * 9})
    data = CorpusData.model_validate({"train": [{"path": "a", "max_epochs": 2}]})
    plain = training_rows(corpus, data, train_settings(), PAD)
    other = training_rows(corpus, data, train_settings(), PAD, skipped=[1, 2])
    assert batches_of(other) == [batches_of(plain)[number] for number in (0, 3, 4, 5, 1, 2)]
    # batch 6, the first that is read again, was passed over as well
    again = training_rows(corpus, data, train_settings(), PAD, skipped=[1, 2, 6])
    assert batches_of(again) == [batches_of(plain)[number] for number in (0, 3, 4, 5, 2, 1)]


def batches_of(rows: Any) -> list[list[Any]]:
    samples = [rows.sample(number) for number in range(len(rows))]
    return [samples[at : at + rows.rows_per_batch] for at in range(0, len(rows), rows.rows_per_batch)]


def test_it_is_known_where_a_source_is_used_up(tmp_path: Path) -> None:
    """a and b take turns until a's 9 rows are used up, after 18 samples or one less, in the batch of step 5."""
    corpus = make_corpus(tmp_path, {"a": [[11, 12, 13, 14, 15, 16]] * 9, "b": [[11, 12, 13, 14, 15, 16]] * 9})
    data = CorpusData.model_validate(
        {"train": [{"path": "a", "share": 0.5, "max_epochs": 1}, {"path": "b", "share": 0.5}]}
    )
    rows = training_rows(corpus, data, train_settings(steps=12), PAD)
    last = max(number for number in range(len(rows)) if rows.sample(number).source == 0)
    assert [step for step in range(12) if rows.changes_at(step)] == [(last + 1) // 3]
    plain = training_rows(
        corpus, CorpusData.model_validate({"train": [{"path": "a"}, {"path": "b"}]}), train_settings(steps=12), PAD
    )
    assert not any(plain.changes_at(step) for step in range(12))


def test_the_report_says_shares_epochs_and_padding(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": [[11, 12, 13, 14, 15, 16]] * 9, "b": [[21, 22]] * 4})
    data = CorpusData.model_validate({"train": [{"path": "a"}, {"path": "b"}]})
    # 9 full rows, and 4 documents of 4 tokens in 2 rows
    assert training_rows(corpus, data, train_settings(tokens_per_batch=88, steps=2), PAD).report() == (
        "a: 81.8% of the training's tokens, 2.00 epochs of 9 rows, 0.0% padding\n"
        "b: 18.2% of the training's tokens, 2.00 epochs of 2 rows, 0.0% padding\n"
        "22 rows of 8 in all, 0.00% padding"
    )


def test_a_sample_says_where_its_text_lies(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, {"a": [[11, 12, 13], [21]]})
    data = CorpusData.model_validate({"train": [{"path": "a"}]})
    rows = training_rows(corpus, data, train_settings(), PAD)
    assert rows.sample_id(4) == "a, epoch 4, row 0: documents 0, 1"
