"""baton.data as a whole: load, fingerprint, mix and report on sources in files that the tests write."""

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from baton.data import Dropped, Loaded, fingerprint, load, mix, report
from baton.errors import UserError
from baton.recipe import Source


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ask(question: str, answer: str | None = None) -> dict:
    """A row of the messages format."""
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def refusal(source: Source, folder: Path, kind: str) -> str:
    with pytest.raises(UserError) as caught:
        load(source, folder, kind)
    return str(caught.value)


def test_relative_paths_start_at_the_folder_and_absolute_ones_do_not(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "A fox."}])
    assert load(Source(path="a.jsonl"), tmp_path, "text").rows == [{"text": "A fox."}]
    absolute = Source(path=str(tmp_path / "a.jsonl"))
    assert load(absolute, Path("elsewhere"), "text").rows == [{"text": "A fox."}]


def test_rows_is_a_slice_of_the_raw_rows_over_all_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "0"}, {"text": " "}, {"text": "2"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "3"}, {"text": "4"}])

    def texts(start: int | None, stop: int | None) -> list[str]:
        rows = load(Source(path="*.jsonl", rows=(start, stop)), tmp_path, "text").rows
        return [row["text"] for row in rows]

    assert texts(None, None) == ["0", "2", "3", "4"]
    assert texts(1, 4) == ["2", "3"]  # row 1 is the empty one: sliced first, dropped then
    assert texts(None, 1) == ["0"]
    assert texts(4, None) == ["4"]


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (3, None), (7, 9)])
def test_a_slice_outside_the_source_is_refused(tmp_path: Path, start: int, stop: int | None) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "0"}, {"text": "1"}, {"text": "2"}])
    message = refusal(Source(path="a.jsonl", rows=(start, stop)), tmp_path, "text")
    assert json.dumps([start, stop]) in message and "3 rows" in message


def test_an_empty_slice_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "0"}, {"text": "1"}])
    assert "rows [1, 1] is empty" in refusal(Source(path="a.jsonl", rows=(1, 1)), tmp_path, "text")


def test_a_txt_is_one_document_and_its_rows_are_lines(tmp_path: Path) -> None:
    (tmp_path / "play.txt").write_text("FOX:\nGood day.\n\nCROW:\nGood day.\n")
    (tmp_path / "tale.txt").write_text("Once.\n")
    whole = load(Source(path="*.txt"), tmp_path, "text")
    assert whole.rows == [{"text": "FOX:\nGood day.\n\nCROW:\nGood day.\n"}, {"text": "Once.\n"}]
    part = load(Source(path="*.txt", rows=(3, 6)), tmp_path, "text")
    assert part.rows == [{"text": "CROW:\nGood day.\n"}, {"text": "Once.\n"}]


def test_lines_is_one_document_or_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The fox is red. \r\n\nThe crow is black.\n")
    source = Source.model_construct(path="a.txt", format="lines")
    loaded = load(source, tmp_path, "text")
    assert loaded.rows == [{"text": "The fox is red. "}, {"text": "The crow is black."}]
    assert loaded.dropped == [Dropped("empty text", 1, 2, str(tmp_path / "a.txt"))]
    prompts = load(source, tmp_path, "prompt").rows
    assert prompts[1] == {"prompt": [{"role": "user", "content": "The crow is black."}], "columns": {}}


def test_lines_is_for_txt_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "0"}])
    source = Source.model_construct(path="a.jsonl", format="lines")
    assert "a file in another format" in refusal(source, tmp_path, "text")


def test_dropped_rows_are_counted_with_their_first_place(tmp_path: Path) -> None:
    rows = [ask("Q1", "A1"), ask("Q2"), ask("Q3", "A3"), ask("Q4", "  "), ask("Q5")]
    rows.append({"messages": [*ask("Q6", "A6")["messages"], {"role": "user", "content": "And?"}]})
    file = str(write_jsonl(tmp_path / "a.jsonl", rows))
    loaded = load(Source(path="a.jsonl"), tmp_path, "dialogue")
    assert loaded.rows == [ask("Q1", "A1"), ask("Q3", "A3")]
    assert loaded.dropped == [
        Dropped("no assistant message", 2, 2, file),
        Dropped("empty turn", 1, 4, file),
        Dropped("ends with the user", 1, 6, file),
    ]


def test_the_file_of_the_first_dropped_row_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "0"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "1"}, {"text": ""}])
    loaded = load(Source(path="*.jsonl"), tmp_path, "text")
    assert loaded.dropped == [Dropped("empty text", 1, 2, str(tmp_path / "b.jsonl"))]


def test_no_row_left_names_the_reasons(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": "\n"}])
    message = refusal(Source(path="a.jsonl"), tmp_path, "text")
    assert "no row is left" in message and "2 × empty text" in message and "a.jsonl line 1" in message


def test_a_source_whose_dialogues_all_end_with_the_user_is_refused(tmp_path: Path) -> None:
    open_ended = {"messages": [*ask("Q", "A")["messages"], {"role": "user", "content": "And?"}]}
    write_jsonl(tmp_path / "a.jsonl", [open_ended, open_ended])
    message = refusal(Source(path="a.jsonl"), tmp_path, "dialogue")
    assert "every dialogue ends with the user" in message and "2 × ends with the user" in message


def test_a_row_without_its_fields_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [ask("Q", "A"), {"mesages": []}])
    message = refusal(Source(path="a.jsonl"), tmp_path, "dialogue")
    assert "a.jsonl line 2" in message and "no `messages`" in message and "mesages" in message


def test_in_a_json_array_the_place_is_the_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "0"}, {"txt": "1"}], indent=1))
    assert "a.json row 2 has no `text`" in refusal(Source(path="a.json"), tmp_path, "text")


def test_fields_that_do_not_make_the_format_plain_are_listed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"body": "A fox.", "id": 1}])
    message = refusal(Source(path="a.jsonl"), tmp_path, "text")
    assert "body, id" in message and "prompt_completion" in message and "format:" in message


@pytest.mark.parametrize(
    ("declared", "kind", "row", "found"),
    [
        ("hh", "preference", ask("Q", "A"), "messages"),
        ("messages", "dialogue", {"instruction": "I", "input": "", "output": "O"}, "alpaca"),
        ("preference", "preference", {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "x"}, "hh"),
        ("messages", "dialogue", {"conversations": [{"from": "human", "value": "Q"}]}, "sharegpt"),
    ],
)
def test_a_file_in_another_format(tmp_path: Path, declared: str, kind: str, row: dict, found: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row])
    message = refusal(Source(path="a.jsonl", format=declared), tmp_path, kind)
    assert "a file in another format" in message and f"declared as {declared}" in message
    assert f"look like {found}" in message


def test_plain_text_is_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A fox.\n")
    message = refusal(Source(path="a.txt", format="messages"), tmp_path, "dialogue")
    assert "a file in another format: plain text" in message


def test_plain_text_among_rows_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [ask("Q", "A")])
    (tmp_path / "b.txt").write_text("A fox.\n")
    assert "b.txt is a file in another format" in refusal(Source(path="*.*"), tmp_path, "dialogue")


@pytest.mark.parametrize(
    ("row", "kind", "able"),
    [
        ({"text": "A fox."}, "dialogue", "messages"),
        ({"question": "Q", "answer": "A"}, "dialogue", "prompt_completion"),
        (ask("Q", "A"), "preference", "hh"),
        (ask("Q", "A"), "text", "lines"),
    ],
)
def test_a_format_that_cannot_give_the_kind(tmp_path: Path, row: dict, kind: str, able: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row])
    message = refusal(Source(path="a.jsonl"), tmp_path, kind)
    assert f"cannot give {kind} rows" in message and able in message


def test_fingerprint_of_one_file_is_its_sha256(tmp_path: Path) -> None:
    content = gzip.compress(b'{"text": "A fox."}\n{"text": ""}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    source = Source(path="a.jsonl.gz", format="text", weight=0.5, rows=(0, 2), licence="CC0")
    expected = {
        "path": "a.jsonl.gz",
        "format": "text",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "licence": "CC0",
        "weight": 0.5,
        "slice": [0, 2],
    }
    assert fingerprint(source, tmp_path) == expected
    assert load(source, tmp_path, "text").fingerprint == {**expected, "rows": 1}
    assert json.loads(json.dumps(expected)) == expected


def test_fingerprint_of_several_files_follows_names_and_contents(tmp_path: Path) -> None:
    def of(folder: str, files: dict[str, str]) -> dict:
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
        facts = fingerprint(Source(path="*.txt"), tmp_path / folder)
        assert load(Source(path="*.txt"), tmp_path / folder, "text").fingerprint == {**facts, "rows": 2}
        return facts

    first = of("first", {"a.txt": "fox", "b.txt": "crow"})
    assert first["size"] == 7
    assert of("elsewhere", {"a.txt": "fox", "b.txt": "crow"}) == first
    assert of("swapped", {"a.txt": "crow", "b.txt": "fox"})["sha256"] != first["sha256"]
    assert of("renamed", {"a.txt": "fox", "c.txt": "crow"})["sha256"] != first["sha256"]


def test_fingerprint_parses_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("not JSON")
    assert fingerprint(Source(path="a.jsonl"), tmp_path)["size"] == 8


def test_fingerprint_of_a_hub_dataset_is_its_revision(tmp_path: Path) -> None:
    facts = fingerprint(Source(path="org/name", revision="0a1b", split="test"), tmp_path)
    assert facts["sha256"] is None and facts["revision"] == "0a1b" and facts["split"] == "test"


def loaded(name: str, count: int, weight: float) -> Loaded:
    return Loaded([{"text": f"{name}{row}"} for row in range(count)], [], {"path": name, "weight": weight})


@pytest.mark.parametrize(
    ("weight", "times"),
    [(1.0, {1: 10}), (2.0, {2: 10}), (0.5, {1: 5}), (1.5, {1: 5, 2: 5}), (0.25, {1: 3}), (2.1, {2: 9, 3: 1})],
)
def test_weight_is_how_often_a_row_occurs(weight: float, times: dict[int, int]) -> None:
    occurs = Counter(row["text"] for row in mix([loaded("a", 10, weight)], seed=0))
    assert Counter(occurs.values()) == times


def test_mix_follows_its_seed_alone() -> None:
    sources = [loaded("a", 40, 0.5), loaded("b", 40, 1.0)]
    epoch = mix(sources, seed=1)
    assert epoch == mix(sources, seed=1)
    assert epoch != mix(sources, seed=2)
    first, second = (sorted(row["text"] for row in mix(sources, seed)) for seed in (1, 2))
    assert first != second  # another half of a
    # b is spread over the epoch, not put behind a
    assert {row["text"][0] for row in epoch[:20]} == {"a", "b"}


def test_one_source_more_does_not_change_what_the_others_give() -> None:
    alone = {row["text"] for row in mix([loaded("a", 40, 0.5)], seed=3)}
    both = {row["text"] for row in mix([loaded("a", 40, 0.5), loaded("b", 40, 0.5)], seed=3)}
    assert {text for text in both if text.startswith("a")} == alone


def test_a_weight_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="a: weight 0.01 of 10 rows leaves none"):
        mix([loaded("a", 10, 0.01)], seed=0)


def test_report() -> None:
    sources = [loaded("a.jsonl", 1200, 1.0), loaded("b.json", 1, 0.5)]
    sources[1].dropped = [Dropped("empty text", 1001, 3, "b.json"), Dropped("prompts differ", 1, 9, "b.json")]
    assert report(sources).splitlines() == [
        "a.jsonl: 1,200 rows kept",
        "b.json: 1 row kept, 1,002 dropped, weight 0.5",
        "  1,001 × empty text, first at b.json row 3",
        "  1 × prompts differ, first at b.json row 9",
    ]
