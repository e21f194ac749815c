"""A small tokenizer, and recipes of stage 1 over files that the tests write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.recipe import PretrainRecipe, load_recipe

MakeRecipe = Callable[..., PretrainRecipe]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 tokens."""
    from baton.bpe import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    text = " ".join(f"the brown fox number {number} jumps over a lazy dog" for number in range(100))
    train_tokenizer([text], 400, 100_000).save_pretrained(folder)
    return folder


@pytest.fixture
def make_recipe(tmp_path: Path) -> MakeRecipe:
    """make_recipe(data) -> the recipe with that data section, in tmp_path, as a file `pretrain.yaml`."""

    def make(data: dict[str, Any]) -> PretrainRecipe:
        content = {
            "stage": "pretrain",
            "mode": "scratch",
            "registry": str(tmp_path / "registry"),
            "run_dir": str(tmp_path / "run"),
            "publish": {"name": "a/b"},
            "data": data,
            "tokenizer": {"vocab_size": 400},
            "model": {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 32},
            "train": {"steps": 1, "learning_rate": 0.1, "tokens_per_batch": 64, "sequence_length": 64},
        }
        path = tmp_path / "pretrain.yaml"
        path.write_text(json.dumps(content))
        return load_recipe(path, [], PretrainRecipe)

    return make
