"""An existing tokenizer: found in a folder, on the hub or in the registry, identified by content, kept once."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from baton.bpe import train_tokenizer
from baton.errors import UserError
from baton.registry import Registry
from baton.tokenizer_source import TokenizerSource, existing_tokenizer, fetch_tokenizer, tokenizer_source

TEXTS = ["the baker of the town bakes bread"] * 4


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    train_tokenizer(TEXTS, 300, 1000, reserved=2).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def no_registry() -> Registry:
    raise AssertionError("it is not needed")


def test_a_relative_folder_starts_at_the_recipe(folder: Path) -> None:
    assert tokenizer_source("theirs", folder.parent, no_registry) == TokenizerSource(str(folder))
    assert tokenizer_source(str(folder), Path("/"), no_registry) == TokenizerSource(str(folder))


def test_a_hub_id_has_a_revision(tmp_path: Path) -> None:
    found = tokenizer_source("team/tokens@abc123", tmp_path, no_registry)
    assert found == TokenizerSource("team/tokens", "abc123")
    assert found.identity() == {"hub": "team/tokens", "revision": "abc123"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("./nowhere", "there is no folder ./nowhere"),
        (
            "team/tokens",
            "write team/tokens:ALIAS or team/tokens:NUMBER for a registry version, or team/tokens@REVISION",
        ),
        ("empty", "the folder empty holds no tokenizer.json"),
        ("slow", "holds no tokenizer.json but merges.txt, vocab.json: load and save it with transformers once"),
    ],
)
def test_where_there_is_none(setting: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "slow").mkdir()
    for name in ("merges.txt", "vocab.json"):
        (tmp_path / "slow" / name).touch()
    with pytest.raises(UserError) as error:
        tokenizer_source(setting, tmp_path, no_registry)
    assert said in str(error.value)


def test_the_identity_is_what_the_tokenizer_does(folder: Path) -> None:
    source = tokenizer_source(str(folder), folder, no_registry)
    before = source.identity()
    (folder / "README.md").write_text("hello")
    assert source.identity() == before
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][4]["content"] = "<call>"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    changed = source.identity()
    assert changed != before
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert source.identity() != changed


def test_it_is_written_once(folder: Path, tmp_path: Path) -> None:
    from baton.models import load_tokenizer

    said: list[str] = []
    given: Any = (str(folder), tmp_path, str(tmp_path / "no registry yet"))
    kept = existing_tokenizer(*given, tmp_path / "home", said.append)
    assert len(said) == 1 and "283 tokens; for dialogues: chat template: chatml" in said[0]
    assert load_tokenizer(kept)("the baker")["input_ids"] == load_tokenizer(folder)("the baker")["input_ids"]
    stamp = (kept / "tokenizer.json").stat().st_mtime_ns
    assert existing_tokenizer(*given, tmp_path / "home", said.append) == kept and len(said) == 1
    assert (kept / "tokenizer.json").stat().st_mtime_ns == stamp
    assert [path.name for path in (tmp_path / "home").iterdir()] == [kept.name]


def test_a_versions_tokenizer(tiny_chain: Any) -> None:
    source = tokenizer_source("tiny/base:main", Path("/"), lambda: tiny_chain.registry)
    base = tiny_chain.versions["pretrain"]
    assert source.identity()["digest"] == base.manifest["tokenizer_digest"]


@pytest.mark.parametrize(
    ("spare", "template"), [([], "plain text"), (["<unused0>", "<unused1>"], "ChatML with <unused0> and <unused1>")]
)
def test_it_is_said_what_dialogues_will_be_written_in(spare: list[str], template: str, tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    plain.add_special_tokens([AddedToken(name, special=True) for name in spare])
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>").save_pretrained(tmp_path / "plain")
    said = fetch_tokenizer(TokenizerSource(str(tmp_path / "plain")), tmp_path / "out")
    assert f"{2 + len(spare)} tokens; for dialogues: chat template: {template}" in said
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_without_a_token_between_documents(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="has no eos_token, which ends a document"):
        fetch_tokenizer(TokenizerSource(str(tmp_path / "plain")), tmp_path / "out")


def test_a_damaged_one(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="does not load as a tokenizer"):
        fetch_tokenizer(TokenizerSource(str(folder)), tmp_path / "out")
    shutil.rmtree(folder)
