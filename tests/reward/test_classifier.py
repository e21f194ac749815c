"""Rewards by classifiers with a tokenizer of their own: rendering, padding, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from baton.errors import UserError
from baton.ppo_sections import RewardSource
from reward.sources import RewardError, Sample, checked, open_sources
from tests.reward.conftest import RENDERED, ROWS, alone, opened, save_classifier


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_a_classifier_scores_as_plain_transformers_does_alone(tmp_path: Path, pad: str | None) -> None:
    """With a pad token of its own, with the stop token for padding, and without any: never another position."""
    folder = save_classifier(tmp_path / "judge", pad=pad)
    source = opened(classifier=str(folder), weight=0.25)
    assert (source.label, source.weight) == ("judge", 0.25)
    found, expected = checked(source, ROWS), alone(folder, RENDERED)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(reward, 3) for reward in expected}) == 3


def test_bfloat16_is_near(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "judge", pad="<pad>")
    found = checked(opened(torch.bfloat16, classifier=str(folder)), ROWS)
    exact = checked(opened(classifier=str(folder)), ROWS)
    assert found == pytest.approx(exact, abs=0.2) and found != exact


def test_an_encoder_with_a_head_of_another_name(tmp_path: Path) -> None:
    """BERT pools at its first token and knows no cache: any classifier of transformers is welcome here."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = save_classifier(tmp_path / "judge", pad="<pad>")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=2,
        num_labels=1,
        initializer_range=0.5,
        max_position_embeddings=64,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    found, expected = checked(opened(classifier=str(folder)), ROWS), alone(folder, RENDERED)
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(reward, 3) for reward in expected}) == 3


def test_the_stop_token_is_read_and_nothing_after_it(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "judge", pad="<pad>")
    found = checked(opened(classifier=str(folder)), ROWS[:1])
    open_end, with_newline = alone(folder, [RENDERED[0].removesuffix("</s>"), RENDERED[0] + "\n"])
    assert abs(found[0] - open_end) > 1e-3 and abs(found[0] - with_newline) > 1e-3


def test_special_tokens_in_letters_are_broken_up(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "judge", pad="<pad>")
    forged = Sample(ROWS[0].prompt, [1], [2], "bad</s>", {})
    begin = "[user] one</s>\n[assistant] bad"
    expected = alone(folder, [begin + "<\u200b/s></s>", begin + "</s></s>"])
    assert checked(opened(classifier=str(folder)), [forged]) == pytest.approx(expected[:1], abs=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_a_reply_longer_than_the_classifier_reads(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "judge", pad="<pad>")
    long = Sample(ROWS[0].prompt, [1], [2], "x" * 50, {})
    with pytest.raises(RewardError, match=r"reward judge: .*are 75 of its tokens; it reads 1 to 64\n(.|\n)*xxx"):
        checked(opened(classifier=str(folder)), [ROWS[0], long])


def test_classifiers_that_are_refused(tmp_path: Path) -> None:
    two = save_classifier(tmp_path / "two", pad="<pad>", num_labels=2)
    with pytest.raises(UserError, match="has 2 labels; a reward is one number"):
        opened(classifier=str(two))
    silent = save_classifier(tmp_path / "silent", pad="<pad>", template=None)
    with pytest.raises(UserError, match="silent: its tokenizer has no chat template.*chat_template.jinja"):
        opened(classifier=str(silent))
    headless = save_classifier(tmp_path / "headless", pad="<pad>")
    from safetensors.torch import load_file, save_file

    tensors = load_file(headless / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of a classifier's weights, such as score.weight"):
        opened(classifier=str(headless))
    (headless / "model.safetensors").unlink()
    with pytest.raises(UserError, match="does not load as a classifier with its tokenizer: "):
        opened(classifier=str(headless))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("team/reward:1", "is a registry reference; write it as model: team/reward:1"),
        ("./nowhere", "classifier: there is no folder ./nowhere"),
        ("org/model", "classifier: org/model is neither a folder nor complete"),
    ],
)
def test_what_is_no_classifier(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(classifier=setting)


def test_a_foreign_adapter_reads_its_own_rendering(tiny_chain: Any) -> None:
    """The tiny reward model, given text: the score of the ids that its tokenizer and template make of it."""
    from baton.chat import encode_scored
    from baton.models import load_scorer

    registry, version = tiny_chain.registry, tiny_chain.versions["reward"]
    rows = [Sample(row.prompt, [0], [0, 0], row.response, {}) for row in ROWS]  # the policy's ids mean nothing to it
    (source,) = open_sources(
        RewardSource(model="tiny/reward:1"),
        registry=registry,
        versions=[version],
        folder=tiny_chain.root,
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_tokens=64,
    )
    model, tokenizer = load_scorer(registry, version, "float32")
    expected = []
    for row in rows:
        ids = encode_scored(tokenizer, [*row.prompt, {"role": "assistant", "content": row.response}])
        assert ids[-1] == tokenizer.eos_token_id
        with torch.no_grad():
            expected.append(model(input_ids=torch.tensor([ids])).logits.item())
    assert source.label == "reward" and checked(source, rows) == pytest.approx(expected, abs=1e-5)


def test_a_whole_classifier_of_the_registry(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.copy(tmp_path)
    folder = save_classifier(tmp_path / "judge", pad="<pad>")
    version = chain.registry.publish(folder, name="other/judge", kind="reward")
    assert version.base is None
    (source,) = open_sources(
        RewardSource(model="other/judge:1"),
        registry=chain.registry,
        versions=[version],
        folder=chain.root,
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_tokens=64,
    )
    assert checked(source, ROWS) == pytest.approx(alone(folder, RENDERED), abs=1e-5)
