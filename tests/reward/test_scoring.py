"""Scores against one sequence at a time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reward.scoring import score


class LastToken(torch.nn.Module):
    """A classifier: a tenth of the last token's id, found as transformers finds it; records its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.1))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        self.shapes.append(tuple(input_ids.shape))
        last = (input_ids != 0).long().mul(torch.arange(input_ids.shape[1])).argmax(-1)
        assert torch.equal(last, attention_mask.sum(-1) - 1)
        return SimpleNamespace(logits=self.weight * input_ids.gather(1, last[:, None]))


def test_scores_come_back_in_order() -> None:
    model = LastToken()
    sequences = [[1, 2, 3], [9], [4, 0, 0, 5], [6, 7]]
    assert score(model, sequences, pad_id=0).tolist() == pytest.approx([0.3, 0.9, 0.5, 0.7])
    assert model.shapes == [(4, 4)]


def test_groups_hold_at_most_max_tokens_and_like_lengths() -> None:
    model = LastToken()
    sequences = [[1] * length for length in (2, 8, 2, 7, 2, 20)]
    score(model, sequences, pad_id=0, max_tokens=16)
    assert model.shapes == [(1, 20), (2, 8), (3, 2)]


def test_a_sequence_that_ends_with_the_pad_token_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="ends with the pad token"):
        score(LastToken(), [[1, 2], [3, 0]], pad_id=0)


def test_no_sequences_no_scores() -> None:
    assert score(LastToken(), [], pad_id=0).shape == (0,)


def test_padding_and_company_do_not_matter_to_a_real_classifier(tiny_llama: Any) -> None:
    from transformers import LlamaForSequenceClassification

    config = tiny_llama.config.__class__(**{**tiny_llama.config.to_dict(), "num_labels": 1, "architectures": None})
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config).eval()
    sequences = [[3, 9, 2, 11], [5], [7, 8, 30, 31, 32, 33, 1], [2, 2, 4]]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([ids])).logits.item() for ids in sequences]
    torch.testing.assert_close(score(model, sequences, pad_id=2), torch.tensor(alone), rtol=0, atol=1e-5)
    assert len({round(value, 3) for value in alone}) == 4
