"""Preparing: what is in the shards, what is left out, and that neither processes nor a kill change any of it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from baton.corpus import documents
from baton.corpus import prepare as prepare_module
from baton.corpus.encode import Encoders, Texts, encoding_of
from baton.corpus.prepare import corpus_key, prepare, prepared_corpus
from baton.corpus.shards import Corpus, ShardWriter
from baton.errors import UserError

TEXTS = [
    "the brown fox",
    "a lazy dog jumps",
    "number 17 <|endoftext|> <|im_start|>",
    "素早い茶色の狐",
    "fox\n\n  dog\n",
]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path.name


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Different short documents."""
    draw = random.Random(seed)
    words = ["fox", "dog", "lazy", "brown", "over", "jumps", "狐"]
    return [f"{at} " + " ".join(draw.choices(words, k=draw.randint(3, 30))) for at in range(count)]


def contents(folder: Path) -> dict[str, str]:
    """The digest of each shard's files, and the manifest's sources."""
    files = sorted(file for file in folder.glob("*/0*") if file.suffix in (".tokens", ".npy", ".json"))
    found = {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return found | {"sources": json.loads((folder / "manifest.json").read_text())["sources"]}


def dropped(corpus: Corpus, use: str, at: int = 0) -> dict[str, int]:
    facts = [facts for facts in corpus.manifest["sources"] if facts["use"] == use][at]
    return {reason: found["count"] for reason, found in facts["dropped"].items()}


def test_shards_hold_what_the_tokenizer_gives_for_each_document(
    tmp_path: Path, make_recipe: Any, tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer

    recipe = make_recipe({"train": [{"path": write_jsonl(tmp_path / "a.jsonl", TEXTS), "licence": "mit"}]})
    corpus = prepare(recipe, tokenizer_folder, workers=1)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    source, end = corpus.train[0], tokenizer.eos_token_id
    for at, text in enumerate(TEXTS):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert end not in ids and tokenizer.decode(ids) == text
        assert source.document(at).tolist() == [end, *ids, end]
        assert source.document_bytes(at) == len(text.encode())
    facts = corpus.manifest["sources"][0]
    assert facts["documents"] == len(TEXTS) and facts["licence"] == "mit" and facts["name"] == "a"
    assert facts["tokens"] == source.num_tokens and facts["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert corpus.folder.parent == tmp_path / "corpora"
    AutoTokenizer.from_pretrained(corpus.tokenizer_folder)


@pytest.mark.parametrize("form", ["txt", "lines", "jsonl.gz", "txt.zst", "parquet", "folder", "glob"])
def test_every_form_of_source_is_read(form: str, tmp_path: Path, make_recipe: Any, tokenizer_folder: Path) -> None:
    texts, source = ["first fox", "second dog"], {"path": f"a.{form}"}
    if form in ("txt", "lines"):
        source = {"path": "a.txt", **({"format": "lines"} if form == "lines" else {})}
        (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
        texts = ["first fox\nsecond dog\n"] if form == "txt" else texts
    elif form == "jsonl.gz":
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode(), mtime=0))
    elif form == "txt.zst":
        (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"first fox"))
        texts = texts[:1]
    elif form == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    else:
        (tmp_path / "many").mkdir()
        for at, text in enumerate(texts):
            (tmp_path / "many" / f"{at}.txt").write_text(text)
        source = {"path": "many" if form == "folder" else "many/*.txt"}
    corpus = prepare(make_recipe({"train": [source]}), tokenizer_folder, workers=1)
    num_bytes = [corpus.train[0].document_bytes(at) for at in range(corpus.train[0].num_documents)]
    assert num_bytes == [len(text) for text in texts]


def test_duplicates_and_held_out_documents_are_dropped_and_counted(
    tmp_path: Path, make_recipe: Any, tokenizer_folder: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one fox", "two dogs", " one fox\n", "held", "", "two dogs"])
    write_jsonl(tmp_path / "b.jsonl", ["two dogs", "three"])
    write_jsonl(tmp_path / "e.jsonl", ["held", "held", "other"])
    data = {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl"}], "eval": [{"path": "e.jsonl"}]}
    corpus = prepare(make_recipe(data), tokenizer_folder, workers=1)
    assert [source.num_documents for source in corpus.train] == [2, 1]
    assert dropped(corpus, "train") == {"duplicate": 2, "held out too": 1, "empty text": 1}
    assert dropped(corpus, "train", 1) == {"duplicate": 1}
    assert dropped(corpus, "eval") == {"duplicate": 1}
    assert corpus.train[0].facts["dropped"]["held out too"]["line"] == 4

    kept = prepare(make_recipe({**data, "deduplicate": False}), tokenizer_folder, workers=1)
    assert kept.train[0].num_documents == 5 and kept.folder != corpus.folder


def test_a_source_without_any_document_left_is_refused(
    tmp_path: Path, make_recipe: Any, tokenizer_folder: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["same"])
    data = {"train": [{"path": "a.jsonl"}], "eval": [{"path": "a.jsonl"}]}
    with pytest.raises(
        UserError, match=r"a.jsonl: no document is left \(1 × held out too, first at .*a.jsonl line 1\)"
    ):
        prepare(make_recipe(data), tokenizer_folder, workers=1)


def test_the_result_is_the_same_however_many_processes(
    tmp_path: Path, make_recipe: Any, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 500)
    texts = some_texts(150)
    write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[:20]])
    recipe = make_recipe({"train": [{"path": "a.jsonl", "language": "en"}], "shard_tokens": 2000})
    found = {
        workers: contents(prepare(recipe, tokenizer_folder, tmp_path / str(workers), workers).folder)
        for workers in (1, 3)
    }
    assert found[1] == found[3]
    assert len(found[1]["sources"][0]["shards"]) > 2


def test_long_documents_are_cut_between_lines(
    tmp_path: Path, make_recipe: Any, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LONGEST", 40)
    line = "nine char\n"
    (tmp_path / "a.txt").write_text(line * 9)
    write_jsonl(tmp_path / "b.jsonl", [line * 7, "x" * 100, line * 6])
    data = {"train": [{"path": "a.txt"}, {"path": "b.jsonl"}], "deduplicate": False}
    corpus = prepare(make_recipe(data), tokenizer_folder, workers=1)
    sizes = [[source.document_bytes(at) for at in range(source.num_documents)] for source in corpus.train]
    assert sizes == [[40, 40, 10], [40, 30, 40, 60, 60]]


def test_a_finished_corpus_is_not_prepared_again_and_a_changed_one_is(
    tmp_path: Path, make_recipe: Any, tokenizer_folder: Path
) -> None:
    data: dict[str, Any] = {"train": [{"path": write_jsonl(tmp_path / "a.jsonl", TEXTS)}]}
    first = prepare(make_recipe(data), tokenizer_folder, workers=1)
    before = (first.folder / "manifest.json").stat().st_mtime_ns
    data["train"][0]["weight"] = 3.0  # says nothing about what is prepared
    again = prepare(make_recipe(data), tokenizer_folder, workers=1)
    assert again.folder == first.folder and (again.folder / "manifest.json").stat().st_mtime_ns == before
    data["train"][0]["language"] = "en"
    other = prepare(make_recipe(data), tokenizer_folder, workers=1)
    assert other.folder != first.folder and other.train[0].languages == ["en"]

    data["prepared"] = str(first.folder)
    with pytest.raises(UserError, match="other train than the recipe has now"):
        prepare(make_recipe(data), tokenizer_folder, workers=1)


def test_languages_are_detected_by_document(tmp_path: Path, make_recipe: Any, tokenizer_folder: Path) -> None:
    pytest.importorskip("py3langid")
    texts = ["The quick brown fox jumps over the lazy dog.", "速い茶色の狐がのろまな犬を飛び越える。", "123"]
    recipe = make_recipe({"train": [{"path": write_jsonl(tmp_path / "a.jsonl", texts)}]})
    source = prepare(recipe, tokenizer_folder, workers=1).train[0]
    assert [source.document_language(at) for at in range(3)] == ["en", "ja", "und"]
    assert source.facts["languages"]["ja"]["bytes"] == len(texts[1].encode())


def test_a_killed_preparation_goes_on_after_its_last_finished_shard(
    tmp_path: Path, make_recipe: Any, tokenizer_folder: Path
) -> None:
    texts = some_texts(4000)
    write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[:200]])
    recipe = make_recipe({"train": [{"path": "a.jsonl", "language": "en"}], "shard_tokens": 4000})
    program = (
        "import sys\nfrom pathlib import Path\nfrom baton.corpus import documents\n"
        "from baton.corpus.prepare import prepare\nfrom baton.recipe import load_recipe\n"
        "documents.BATCH_CHARACTERS = 2000\n"
        "prepare(load_recipe(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), workers=2)\n"
    )
    script = tmp_path / "program.py"
    script.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in program.splitlines()))
    out = tmp_path / "killed"
    command = [sys.executable, str(script), str(recipe.path), str(tokenizer_folder), str(out)]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (out / "train-00" / "00002.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)  # the parent alone: its processes have to end by themselves
    process.wait()
    assert not (out / "manifest.json").exists()
    finished = {file: file.stat().st_mtime_ns for file in out.glob("train-00/0*.json")}
    assert len(finished) >= 3
    while _alive(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    corpus = prepare(recipe, tokenizer_folder, out, workers=1)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert dropped(corpus, "train") == {"duplicate": 200}
    assert not list(out.glob("*/*.new")) and not list(out.glob("*/*resume*"))
    whole = Corpus.open(out, verify=True)
    assert whole.train[0].num_documents == 4000


def _alive(session: int) -> bool:
    """Whether a process of the session is left."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                return True
    return False


def test_the_recipe_s_own_tokenizer_is_trained_once(
    tmp_path: Path, make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", some_texts(50))
    recipe = make_recipe({"train": [{"path": "a.jsonl"}]})
    said: list[str] = []
    corpus = prepared_corpus(recipe, workers=1, say=said.append)
    assert len(said) == 1 and "400" in said[0]
    assert prepared_corpus(recipe, workers=1, say=said.append).folder == corpus.folder
    assert len(said) == 1
    assert os.listdir(tmp_path / "corpora" / "tokenizers")


@pytest.mark.parametrize("near", [False, True], ids=["exact", "near"])
def test_what_was_seen_before_an_end_is_known_after_it(
    near: bool, tmp_path: Path, make_recipe: Any, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if near:
        pytest.importorskip("datasketch")
    monkeypatch.setattr(documents, "BATCH_CHARACTERS", 300)
    texts = some_texts(60)
    alike = [text.upper() + " END" for text in texts[:10] if len(text.split()) > 20]
    write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[:10], *alike])
    write_jsonl(tmp_path / "e.jsonl", some_texts(20, seed=1))
    data: dict[str, Any] = {
        "train": [{"path": "a.jsonl", "language": "en"}],
        "eval": [{"path": "e.jsonl", "language": "en"}],
        "shard_tokens": 300,
    }
    if near:
        data["near_duplicates"] = {"threshold": 0.6}
    recipe = make_recipe(data)
    plain = prepare(recipe, tokenizer_folder, tmp_path / "plain", workers=1)
    assert dropped(plain, "train")["duplicate"] == 10
    assert dropped(plain, "train").get("near duplicate", 0) == (len(alike) if near else 0)

    left = [0]  # shards that may be finished before the end

    def close(self: ShardWriter, facts: Any, scratch: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return whole(self, facts, scratch)

    whole = ShardWriter.close
    monkeypatch.setattr(ShardWriter, "close", close)
    for finished in (1, 3, 1):  # one after the other: each starts where the one before had ended
        left[0] = finished
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe, tokenizer_folder, tmp_path / "again", workers=1)
    left[0] = 1000
    again = prepare(recipe, tokenizer_folder, tmp_path / "again", workers=1)
    assert contents(again.folder) == contents(plain.folder)


def test_a_detector_installed_later_makes_another_corpus(
    tmp_path: Path, make_recipe: Any, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where a language is left to detect."""
    keys: dict[str | None, set[str]] = {None: set(), "en": set()}
    (tmp_path / "a.txt").write_text("fox")
    for language, found in keys.items():
        recipe = make_recipe({"train": [{"path": "a.txt", "language": language}]})
        for is_there in (False, True):
            monkeypatch.setattr("baton.corpus.prepare.can_detect", lambda is_there=is_there: is_there)
            found.add(corpus_key(recipe.data, recipe.folder, tokenizer_folder)[0])
    assert [len(found) for found in keys.values()] == [2, 1]


def test_sources_of_one_file_name_keep_figures_of_their_own(
    tmp_path: Path, make_recipe: Any, tokenizer_folder: Path
) -> None:
    for folder in ("en", "ja"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.txt").write_text(f"the fox of {folder}")
    (tmp_path / "a.txt").write_text("fox")
    held_out = [{"path": f"{folder}/test.txt", "language": folder} for folder in ("en", "ja")]
    recipe = make_recipe({"train": [{"path": "a.txt", "language": "en"}], "eval": held_out})
    corpus = prepare(recipe, tokenizer_folder, workers=1)
    assert [source.name for source in corpus.eval] == ["en/test", "ja/test"]


def test_processes_start_where_there_is_more_than_a_batch(tokenizer_folder: Path) -> None:
    """And take even a small batch once they run: this process has the reading and writing to do."""
    with Encoders(encoding_of(tokenizer_folder), workers=2) as encoders:
        small = encoders.submit(Texts([TEXTS[0]], "en"), here=True)
        assert small.done() and not encoders._processes
        large = encoders.submit(Texts([TEXTS[0]], "en"))
        assert len(encoders._processes) == 2
        after = encoders.submit(Texts([TEXTS[0]], "en"), here=True)
        assert encoders._own is None
        assert large.result().tokens.tolist() == small.result().tokens.tolist() == after.result().tokens.tolist()


def test_a_process_that_dies_is_told(tokenizer_folder: Path) -> None:
    with Encoders(encoding_of(tokenizer_folder), workers=2) as encoders:
        first = [encoders.submit(Texts([text], "en")) for text in TEXTS]
        assert [len(future.result().lengths) for future in first] == [1] * len(TEXTS)
        for process in encoders._processes:
            process.kill()
            process.join()
        with pytest.raises(UserError, match="has died.*fewer --workers"):
            encoders.submit(Texts(["fox"], "en")).result()


def test_an_error_ends_the_command_however_many_batches_wait(
    tmp_path: Path, make_recipe: Any, tokenizer_folder: Path
) -> None:
    """The bad line is met while more batches are under way than there are processes."""
    lines = [json.dumps({"text": text}).encode() for text in some_texts(120)]
    lines[110] = b'{"text": "caf\xe9"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    recipe = make_recipe({"train": [{"path": "a.jsonl", "language": "en"}]})
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom baton.corpus import documents\n"
        "from baton.corpus.prepare import prepare\nfrom baton.recipe import load_recipe\n"
        "if __name__ == '__main__':\n"
        "    documents.BATCH_CHARACTERS = 2000\n"
        "    prepare(load_recipe(sys.argv[1]), Path(sys.argv[2]), workers=2)\n"
    )
    command = [sys.executable, str(script), str(recipe.path), str(tokenizer_folder)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode and "a.jsonl line 111" in found.stderr


def test_another_end_token_or_template_is_another_corpus(
    tmp_path: Path, make_recipe: Any, tokenizer_folder: Path
) -> None:
    data = {"train": [{"path": write_jsonl(tmp_path / "a.jsonl", TEXTS), "language": "en"}]}
    first = prepare(make_recipe(data), tokenizer_folder, workers=1)
    folders = {first.folder}
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    (other / "README.md").write_text("nothing about tokens")
    assert prepare(make_recipe(data), other, workers=1).folder == first.folder
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_end|>"}))
    folders.add(prepare(make_recipe(data), other, workers=1).folder)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    corpus = prepare(make_recipe(data), other, workers=1)
    assert len({*folders, corpus.folder}) == 3
    assert (corpus.tokenizer_folder / "chat_template.jinja").is_file()


def test_no_digest_is_lost_between_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents.DigestSet, "_RECENT", 8)
    draw, seen, known = random.Random(3), documents.DigestSet(), set()
    for _ in range(60):
        # of few values, so that many come again; a zero byte at the end is a digest like any other
        some = [bytes([draw.randrange(256), draw.randrange(2)]) + bytes(14) for _ in range(draw.randint(0, 9))]
        expected = []
        for digest in some:
            expected.append(digest not in known)
            known.add(digest)
        assert seen.add(np.array(some, "S16")).tolist() == expected
    assert len(seen) == len(known) and seen.contains(np.array(sorted(known), "S16")).all()


def test_the_folder_of_a_corpus_does_not_change_what_is_built(tmp_path: Path, make_recipe: Any) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    plain, named, other = (
        make_recipe({"train": [{"path": "a.jsonl"}], **more}).digest()
        for more in ({}, {"prepared": "elsewhere"}, {"deduplicate": False})
    )
    assert plain == named != other


def test_near_duplicates_need_deduplication_and_their_library(
    tmp_path: Path, make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data: dict[str, Any] = {"train": [{"path": write_jsonl(tmp_path / "a.jsonl", TEXTS)}], "near_duplicates": {}}
    with pytest.raises(UserError, match="near_duplicates without deduplicate"):
        make_recipe({**data, "deduplicate": False})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"baton\[corpus\]"):
        prepared_corpus(make_recipe(data), workers=1)
    assert not (tmp_path / "corpora").exists()


def test_a_long_preparation_says_how_far_it_is(
    tmp_path: Path, make_recipe: Any, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "TELL_EVERY_S", 0)
    recipe = make_recipe({"train": [{"path": write_jsonl(tmp_path / "a.jsonl", TEXTS), "language": "en"}]})
    said: list[str] = []
    prepare(recipe, tokenizer_folder, workers=1, say=said.append)
    assert len(said) == 1 and said[0].startswith("a.jsonl: 5 documents read, ")
