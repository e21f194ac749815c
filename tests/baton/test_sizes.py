"""Size presets: parameters near the name, figures by hand, overrides."""

import pytest
from pydantic import ValidationError

from baton.errors import UserError
from baton.pretrain_sections import Decoder, PretrainRecipe
from baton.sizes import SIZES, Shape, learning_rate_of, shape_of, tokens_per_batch_of


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("vocabulary", [2048, 16384, 32768])
def test_the_parameters_are_near_the_name(size: str, vocabulary: int) -> None:
    shape = shape_of(size, vocabulary)
    assert shape.num_parameters(vocabulary) == pytest.approx(SIZES[size], rel=0.15)
    assert shape.hidden_size % shape.heads == 0 and shape.heads % shape.kv_heads == 0


def test_parameters_are_counted_as_transformers_counts_them() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=40,
        tie_word_embeddings=False,
    )
    expected = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert Shape(24, 3, 6, 2, 40).num_parameters(50, tied=False) == expected


def test_learning_rate_and_batch_by_hand() -> None:
    # C = 6 x 124e6 x 20 x 124e6 = 1.845e18; 0.3118 C^-0.125 = 1.62e-3; 0.292 C^0.3271 = 276,000 = 270 rows of 1,024
    assert learning_rate_of("124M") == 1.6e-3
    assert tokens_per_batch_of("124M", 1024) == 256 * 1024


def test_a_vocabulary_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(UserError, match=r"model.size: 2M with a vocabulary of 100,000"):
        shape_of("2M", 100_000)


def test_single_figures_are_overridden() -> None:
    preset = Decoder(size="10M").shape(8192)
    assert Decoder(size="10M", layers=3).shape(8192) == preset._replace(layers=3)
    wide = Decoder(size="10M", hidden_size=512).shape(8192)
    assert (wide.hidden_size, wide.heads, wide.kv_heads, wide.layers) == (512, 8, 8, preset.layers)
    with pytest.raises(UserError, match=r"hidden_size \(320\) must be an even multiple of heads \(7\)"):
        Decoder(size="10M", heads=7).shape(8192)


def recipe(train: dict[str, object]) -> PretrainRecipe:
    return PretrainRecipe.model_validate(
        {
            "stage": "pretrain",
            "mode": "scratch",
            "run_dir": "x",
            "publish": {"name": "a/b"},
            "data": {"train": [{"path": "a.txt"}]},
            "tokenizer": {"vocab_size": 2048},
            "model": {"size": "10M"},
            "train": {"steps": 10, "sequence_length": 512, **train},
        }
    )


def test_a_size_says_the_learning_rate_and_the_batch_where_the_recipe_does_not() -> None:
    found = recipe({}).train
    assert found is not None and (found.learning_rate, found.tokens_per_batch) == (3e-3, 65536)
    given = recipe({"learning_rate": 1e-4, "tokens_per_batch": 1024}).train
    assert given is not None and (given.learning_rate, given.tokens_per_batch) == (1e-4, 1024)


def test_without_a_size_the_whole_shape_is_needed() -> None:
    with pytest.raises(ValidationError, match="heads, intermediate_size missing"):
        Decoder(hidden_size=64, layers=2)
