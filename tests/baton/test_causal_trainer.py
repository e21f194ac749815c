"""The loss that is trained on against transformers' own, document by document; averages; what is compiled."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from baton import causal_trainer
from baton.causal_trainer import (
    Average,
    TrainingLoss,
    choose_row_attention,
    compiles,
    document_table,
    has_plain_head,
    micro_batch_tokens,
)
from baton.pretrain_sections import PretrainTrain

CPU = torch.device("cpu")


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    """Two rows of ten: documents of 6 and 4 tokens; one of 7 and padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 48, (2, 10), generator=generator)
    positions = torch.tensor([[*range(6), *range(4)], [*range(7), *range(3)]])
    labels = ids.masked_fill(positions == 0, -100)
    labels[1, 7:] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def separate_nats(model: Any, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum over documents, each alone, by transformers."""
    ids = rows["input_ids"]
    total = torch.zeros(())
    for document in _documents(ids):
        total = total + model(input_ids=document[None], labels=document[None]).loss * (len(document) - 1)
    return total


@pytest.mark.parametrize("is_plain", [True, False], ids=["without logits", "by logits"])
def test_the_loss_is_that_of_separate_documents(tiny_llama: Any, rows: dict[str, torch.Tensor], is_plain: bool) -> None:
    plain, ours = copy.deepcopy(tiny_llama), copy.deepcopy(tiny_llama)
    expected = separate_nats(plain, rows)
    expected.backward()
    choose_row_attention(ours, 10, CPU)
    loss = TrainingLoss(ours, None, 0.0, False)
    loss.is_plain = is_plain
    with loss:
        found = ours(**rows)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-4), name
    assert "forward" not in vars(ours), "the model's own forward is back"


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="compiling needs a C++ compiler")
def test_compiled_the_loss_is_that_of_separate_documents(
    tiny_llama: Any, rows: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """In a process of its own, as this one has compilation switched off: loss and gradients, borders included."""
    tiny_llama.save_pretrained(tmp_path)
    torch.save(rows, tmp_path / "rows.pt")
    program = f"""
import torch
from transformers import LlamaForCausalLM
from baton.causal_trainer import TrainingLoss, choose_row_attention
model = LlamaForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float32).train()
choose_row_attention(model, 10, torch.device("cpu"))
training = TrainingLoss(model, None, 0.0, True)
with training:
    loss = model(**torch.load({str(tmp_path / "rows.pt")!r}, weights_only=True))
loss.backward()
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
torch.save([loss.detach(), *(p.grad for p in model.parameters())], {str(tmp_path / "found.pt")!r})
"""
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loss, *gradients = torch.load(tmp_path / "found.pt", weights_only=True)
    plain = copy.deepcopy(tiny_llama)
    expected = separate_nats(plain, rows)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    for (name, p), gradient in zip(plain.named_parameters(), gradients, strict=True):
        assert torch.allclose(gradient, p.grad, rtol=1e-3, atol=1e-4), name


def test_narrow_copies_leave_wide_weights_and_gradients(tiny_llama: Any, rows: dict[str, torch.Tensor]) -> None:
    model = copy.deepcopy(tiny_llama)
    expected = separate_nats(model, rows)
    choose_row_attention(model, 10, CPU)
    with TrainingLoss(model, torch.bfloat16, 0.0, False):
        found = model(**rows)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=0.02)
    assert all(p.dtype is torch.float32 and p.grad.dtype is torch.float32 for p in model.parameters())


@pytest.mark.parametrize("is_plain", [True, False], ids=["without logits", "by logits"])
def test_z_loss(tiny_llama: Any, rows: dict[str, torch.Tensor], is_plain: bool) -> None:
    model = copy.deepcopy(tiny_llama)
    choose_row_attention(model, 10, CPU)
    found = []
    for z in (0.0, 0.5):
        loss = TrainingLoss(model, None, z, False)
        loss.is_plain = is_plain
        with loss, torch.no_grad():
            found.append(float(model(**rows)))
    with torch.no_grad():
        ids = rows["input_ids"]
        logits = [model(input_ids=part[None], use_cache=False).logits[0, :-1] for part in _documents(ids)]
    squares = sum(float(each.logsumexp(-1).square().sum()) for each in logits)
    assert found[1] - found[0] == pytest.approx(0.5 * squares, rel=1e-4)


def _documents(ids: torch.Tensor) -> list[torch.Tensor]:
    return [ids[0, :6], ids[0, 6:], ids[1, :7]]


def test_a_head_that_is_more_than_a_product_is_seen() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=4.0,
        initializer_range=0.3,
        pad_token_id=0,
    )
    assert not has_plain_head(GraniteForCausalLM(config))


def test_the_head_of_a_llama_is_a_product(tiny_llama: Any) -> None:
    kind = tiny_llama.config._attn_implementation
    assert has_plain_head(tiny_llama) and tiny_llama.config._attn_implementation == kind


def test_the_table_of_two_documents() -> None:
    table = document_table(torch.tensor([[0, 1, 0, 1]]), torch.float32)
    sees = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert (table[0, 0] == 0).int().tolist() == sees and table.shape == (1, 1, 4, 4)


@pytest.mark.parametrize(
    ("told", "dtype", "length", "expected"),
    [
        (512, torch.bfloat16, 256, 512),  # the recipe's
        (None, torch.bfloat16, 512, 17_920),  # 34 bytes x 768 x 18 a token: 35 rows of 512 are in 8 GiB
        (None, torch.float32, 512, 8_704),
        (None, torch.bfloat16, 1 << 17, 1 << 17),  # a row at least
    ],
)
def test_a_micro_batch_has_the_activations_that_fit(
    told: int | None, dtype: torch.dtype, length: int, expected: int
) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=768, num_hidden_layers=18)
    train = PretrainTrain(
        steps=1, learning_rate=1.0, tokens_per_batch=1 << 18, tokens_per_micro_batch=told, sequence_length=length
    )
    assert micro_batch_tokens(config, train, dtype, 1) == expected
    share = micro_batch_tokens(config, train.model_copy(update={"tokens_per_batch": 2 * length}), dtype, 2)
    assert share == (told or length)


def test_the_average_by_hand() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    average = Average(layer, 0.5)
    layer.weight.data.fill_(1.0)
    average.update(1)  # decay 2/11: 0 x 2/11 + 1 x 9/11
    assert float(average.tensors["weight"]) == pytest.approx(9 / 11)
    layer.weight.data.fill_(3.0)
    average.update(1000)  # decay 0.5
    average.write_to_model()
    assert float(layer.weight.detach()) == pytest.approx((9 / 11 + 3) / 2)


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compiles(True, 1e20, CPU), "TORCHDYNAMO_DISABLE says no"
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setattr(causal_trainer.shutil, "which", lambda name: None)
    assert not compiles("auto", 1e20, CPU) and compiles(True, 1.0, CPU) and not compiles(False, 1e20, CPU)
    monkeypatch.setattr(causal_trainer.shutil, "which", lambda name: "/usr/bin/" + name)
    assert compiles("auto", 1e20, CPU) and not compiles("auto", 1e12, CPU)
