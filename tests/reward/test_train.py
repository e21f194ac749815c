"""The reward model starts from SFT and not from the raw base, and its head survives; resuming after a kill."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.errors import UserError
from reward import train

IDS = torch.tensor([[5, 90, 300, 17, 41, 2]])


def base_model(chain: Any, kind: str) -> Any:
    """The chain's base as a causal model or a classifier."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if kind == "causal":
        return AutoModelForCausalLM.from_pretrained(chain.folder("pretrain"))
    model = AutoModelForSequenceClassification.from_pretrained(chain.folder("pretrain"), num_labels=1)
    model.config.pad_token_id = 1
    return model


@pytest.fixture(scope="module")
def published(tiny_chain: Any) -> Any:
    """The published reward model in plain peft."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base_model(tiny_chain, "classifier"), tiny_chain.folder("reward")).eval()


@pytest.fixture
def start(tiny_chain: Any) -> Any:
    """What training starts from."""
    return train.reward_from_sft(tiny_chain.folder("pretrain"), tiny_chain.folder("sft"), torch.float32, 1)


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.model(input_ids=IDS, use_cache=False).last_hidden_state


def test_the_start_is_sft_and_not_the_raw_base(tiny_chain: Any, start: Any) -> None:
    from peft import PeftModel

    raw = base_model(tiny_chain, "causal")
    raw_states = hidden(raw)
    sft_states = hidden(PeftModel.from_pretrained(raw, tiny_chain.folder("sft")).eval().base_model.model)
    found = hidden(start.eval().base_model.model)
    torch.testing.assert_close(found, sft_states, rtol=0, atol=1e-5)
    assert float((found - raw_states).abs().max()) > 1e-3


def test_the_start_gives_equal_rewards_and_trains_adapter_and_head(start: Any) -> None:
    with torch.no_grad():
        assert start(input_ids=IDS).logits.item() == 0.0
    trained = {name for name, parameter in start.named_parameters() if parameter.requires_grad}
    assert sum("lora_" in name for name in trained) == 28
    assert {name for name in trained if "lora_" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }


def test_the_first_loss_is_that_of_equal_rewards(tiny_chain: Any) -> None:
    rows = tiny_chain.metrics("reward")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]


def test_held_out_metrics_are_those_of_the_published_model(tiny_chain: Any, published: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_chain.folder("sft"))
    margins, lengths = [], []
    for line in (tiny_chain.root / "world" / "preferences_eval.jsonl").read_text().splitlines():
        row = json.loads(line)
        sides = []
        for side in ("chosen", "rejected"):
            messages = row["prompt"] + row[side]
            text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
            ids = tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                sides.append((published(input_ids=torch.tensor([ids]), use_cache=False).logits.item(), len(ids)))
        margins.append(sides[0][0] - sides[1][0])
        lengths.append(sides[0][1] - sides[1][1])
    count, metrics = len(margins), tiny_chain.versions["reward"].manifest["metrics"]
    assert metrics["eval/margin"] == pytest.approx(sum(margins) / count, abs=1e-5)
    assert metrics["eval/loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / count, abs=1e-5)
    assert metrics["eval/accuracy"] == pytest.approx(sum(m > 0 for m in margins) / count)
    longer = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in lengths)
    assert metrics["eval/accuracy_longer"] == pytest.approx(longer / count)


def test_the_published_adapter_holds_head_and_moved_layers(tiny_chain: Any) -> None:
    from safetensors.torch import load_file

    version = tiny_chain.versions["reward"]
    assert version.kind == "reward" and version.base == tiny_chain.versions["pretrain"].digest
    reward = load_file(tiny_chain.folder("reward") / "adapter_model.safetensors")
    sft = load_file(tiny_chain.folder("sft") / "adapter_model.safetensors")
    assert reward["base_model.model.score.weight"].abs().max() > 0
    shared = [key for key in sft if key in reward]
    assert len(shared) == 28 and any(not torch.equal(reward[key], sft[key]) for key in shared)
    # four steps of at most 0.01 each away from SFT's adapter, not from zero
    assert max(float((reward[key] - sft[key]).abs().max()) for key in shared) < 0.041


@pytest.fixture
def run(tiny_chain: Any, tmp_path: Path) -> Any:
    from baton.run import Run

    return Run.start(tiny_chain.copy(tmp_path).recipe("reward"))


@pytest.fixture(scope="module")
def tokenizer(tiny_chain: Any) -> Any:
    from baton.models import load_tokenizer

    return load_tokenizer(tiny_chain.folder("sft"))


def test_a_head_that_is_lost_on_saving_is_caught(run: Any, tiny_chain: Any, tokenizer: Any, tmp_path: Path) -> None:
    """LoRA without a task type freezes the random head and does not save it; the next loader draws another."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(base_model(tiny_chain, "classifier"), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    samples = [[5, 90, 17], [8, 41]]
    arguments = (run, model, tokenizer, tmp_path / "out", tiny_chain.folder("pretrain"), torch.float32, samples)
    with pytest.raises(RuntimeError, match="does not survive being saved"):
        train.write_reward(*arguments)


def test_a_head_that_is_kept_passes(run: Any, start: Any, tiny_chain: Any, tokenizer: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        for name, parameter in start.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter) if "score" in name else 0.01
    samples = [[5, 90, 17], [8, 41]]
    folder = tiny_chain.folder("pretrain")
    train.write_reward(run, start.eval(), tokenizer, tmp_path / "out", folder, torch.float32, samples)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_long_pairs_are_dropped_whole_and_counted(run: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def pair(chosen: str, rejected: str) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }

    rows = [pair("b", "c"), pair("b", "word " * 200)]
    pairs = train.encode_pairs(run, tokenizer, rows, "train")
    assert [len(side) for side in pairs.values()] == [1, 1]
    assert "1 pairs; 1 longer than 160 tokens dropped" in capsys.readouterr().out
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert all(ids[-1] == stop for side in pairs.values() for ids in side)
    with pytest.raises(UserError, match="none of 1 pairs is left.*train.max_length = 160"):
        train.encode_pairs(run, tokenizer, rows[1:], "train")


def test_questions_are_refused(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.copy(tmp_path)
    with pytest.raises(UserError, match="unknown key data.questions; valid here: train, eval"):
        train.main(chain.recipe("reward", "data.questions=[{path: world/questions.jsonl}]"))


def test_goes_on_after_a_kill_bit_by_bit(assert_resumes: Callable[[str, int, Path], Any], tmp_path: Path) -> None:
    assert_resumes("reward", 2, tmp_path)
