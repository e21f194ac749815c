"""SFT: the loss is on the assistant's turns of separate dialogues, the adapter is what is published, resuming."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.errors import UserError
from baton.packing import IGNORED
from stages import sft


@pytest.fixture(scope="module")
def base(tiny_chain: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_chain.folder("pretrain")).eval()


@pytest.fixture(scope="module")
def tuned(tiny_chain: Any) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(tiny_chain.folder("pretrain"))
    return PeftModel.from_pretrained(fresh, tiny_chain.folder("sft")).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_chain: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_chain.folder("sft"))


def dialogues(chain: Any, name: str, count: int | None = None) -> list[list[dict[str, str]]]:
    lines = (chain.root / "world" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"] for line in lines[:count]]


def marked(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """ChatML tokenised piece by piece, and whether the assistant says each token; no template involved."""
    ids: list[int] = []
    said: list[bool] = []
    for message in messages:
        spoken = message["role"] == "assistant"
        parts = [
            (f"<|im_start|>{message['role']}\n", False),
            (message["content"] + "<|im_end|>", spoken),
            ("\n", False),
        ]
        for text, flag in parts:
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += found
            said += [flag] * len(found)
    return ids, said


def mean_nats(model: Any, tokenizer: Any, rows: list[list[dict[str, str]]], length: int = 128) -> float:
    """Over the assistant's tokens, one dialogue at a time."""
    total, count = 0.0, 0
    with torch.no_grad():
        for messages in rows:
            ids, said = (part[:length] for part in marked(tokenizer, messages))
            table = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            chosen = [at for at in range(1, len(ids)) if said[at]]
            total -= sum(float(table[at - 1, ids[at]]) for at in chosen)
            count += len(chosen)
    return total / count


def test_the_first_loss_is_the_base_on_the_assistants_tokens(
    tiny_chain: Any, tmp_path: Path, base: Any, tokenizer: Any
) -> None:
    from baton.packing import pack

    chain = tiny_chain.copy(tmp_path)
    rows = dialogues(chain, "dialogues", 6)
    count = len(pack([marked(tokenizer, row) for row in rows], 128, 1).rows)
    assert 1 < count < 6
    sft.main(
        chain.recipe(
            "sft",
            "data.train=[{path: world/dialogues.jsonl, rows: [0, 6]}]",
            "data.eval=[]",
            "data.questions=[]",
            "train.steps=1",
            f"train.tokens_per_batch={128 * count}",
        )
    )
    assert chain.metrics("sft")[0]["loss"] == pytest.approx(mean_nats(base, tokenizer, rows), abs=1e-4)


def test_held_out_loss_before_and_after(tiny_chain: Any, base: Any, tuned: Any, tokenizer: Any) -> None:
    rows, metrics = dialogues(tiny_chain, "dialogues_eval"), tiny_chain.versions["sft"].manifest["metrics"]
    before, after = mean_nats(base, tokenizer, rows), mean_nats(tuned, tokenizer, rows)
    assert metrics["eval/loss_before"] == pytest.approx(before, abs=1e-4)
    assert metrics["eval/loss"] == pytest.approx(after, abs=1e-4)


def test_training_lowers_the_loss_on_what_was_trained(
    tiny_chain: Any, tmp_path: Path, base: Any, tokenizer: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    chain = tiny_chain.copy(tmp_path)
    version = sft.main(
        chain.recipe(
            "sft",
            "data.train=[{path: world/dialogues.jsonl, rows: [0, 4]}]",
            "data.eval=[]",
            "data.questions=[]",
            "train.steps=6",
        )
    )
    fresh = AutoModelForCausalLM.from_pretrained(tiny_chain.folder("pretrain"))
    tuned = PeftModel.from_pretrained(fresh, chain.registry.materialise(version)).eval()
    rows = dialogues(chain, "dialogues", 4)
    assert mean_nats(tuned, tokenizer, rows) < mean_nats(base, tokenizer, rows) - 0.02


def test_the_published_adapter(tiny_chain: Any, tokenizer: Any) -> None:
    version, base = tiny_chain.versions["sft"], tiny_chain.versions["pretrain"]
    manifest = version.manifest
    assert version.kind == "adapter" and version.base == base.digest
    assert manifest["chat_template_digest"]
    assert {entry["use"] for entry in manifest["data"]} == {"train", "eval", "questions"}
    assert "{%- generation %}" in tokenizer.chat_template
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|pad|>"
    config = json.loads((tiny_chain.folder("sft") / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8
    assert len({name.split(".")[-1] for name in config["target_modules"]}) == 7


@pytest.fixture
def run(tiny_chain: Any, tmp_path: Path) -> Any:
    from baton.run import Run

    return Run.start(tiny_chain.copy(tmp_path).recipe("sft"))


def test_labels_are_the_assistants_tokens(tiny_chain: Any, run: Any, tokenizer: Any) -> None:
    rows = [{"messages": messages} for messages in dialogues(tiny_chain, "dialogues", 10)]
    packed = sft.pack_dialogues(run, tokenizer, rows, "train")
    expected = sorted(
        token for row in rows for token, said in zip(*marked(tokenizer, row["messages"]), strict=True) if said
    )
    assert sorted(label for row in packed.rows for label in row["labels"] if label != IGNORED) == expected
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sum(label == stop for row in packed.rows for label in row["labels"]) == sum(
        message["role"] == "assistant" for row in rows for message in row["messages"]
    )


def test_dialogues_are_cut_and_counted(run: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    long = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "never seen"}]
    half = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 200}]
    packed = sft.pack_dialogues(run, tokenizer, [{"messages": m} for m in (short, long, half)], "train")
    assert "2 dialogues cut, 1 dropped because no assistant's token was left" in capsys.readouterr().out
    assert packed.num_tokens == 128 + len(marked(tokenizer, short)[0])


def test_nothing_left_after_truncation_is_refused(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.copy(tmp_path)
    before = chain.registry.numbers("tiny/sft")
    with pytest.raises(UserError, match="no dialogue has an assistant's token within train.sequence_length = 8 tokens"):
        sft.main(chain.recipe("sft", "train.sequence_length=8", "train.tokens_per_micro_batch=8"))
    assert chain.registry.numbers("tiny/sft") == before


def test_goes_on_after_a_kill_bit_by_bit(assert_resumes: Callable[[str, int, Path], Any], tmp_path: Path) -> None:
    assert_resumes("sft", 2, tmp_path)


def test_a_base_that_is_a_folder_is_registered_first(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.copy(tmp_path)
    version = sft.main(
        chain.recipe(
            "sft",
            f"base={tiny_chain.folder('pretrain')}",
            "publish.name=guest/sft",
            "train.steps=1",
            "data.eval=[]",
            "data.questions=[]",
        )
    )
    registered = chain.registry.resolve("guest/base:from-sft")
    assert version.base == registered.digest
    assert registered.manifest["parents"] == {} or registered.manifest["parents"] == []


def test_a_reward_model_is_no_base(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.copy(tmp_path)
    with pytest.raises(UserError, match="tiny/reward:1 is a reward version; sft trains an adapter on a base"):
        sft.main(chain.recipe("sft", "base=tiny/reward:1"))
