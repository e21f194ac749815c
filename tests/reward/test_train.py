"""The reward model starts from SFT and not from the raw base, and its head survives; resuming after a kill."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.adapters import SCORE_KEY, member_folders
from baton.errors import UserError
from reward import train
from reward.members import Members

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
    return members_of(tiny_chain)


def members_of(chain: Any, count: int = 1, trained: Any = "adapter") -> Members:
    folders = chain.folder("pretrain"), chain.folder("sft")
    return Members.from_sft(*folders, torch.float32, 1, count=count, trained=trained, seed=5)


def hidden(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.model(input_ids=IDS, use_cache=False).last_hidden_state


def test_the_start_is_sft_and_not_the_raw_base(tiny_chain: Any, start: Any) -> None:
    from peft import PeftModel

    raw = base_model(tiny_chain, "causal")
    raw_states = hidden(raw)
    sft_states = hidden(PeftModel.from_pretrained(raw, tiny_chain.folder("sft")).eval().base_model.model)
    with torch.no_grad():
        found = start._hidden(IDS, 0)
    torch.testing.assert_close(found, sft_states, rtol=0, atol=1e-5)
    assert float((found - raw_states).abs().max()) > 1e-3


def test_the_start_gives_equal_rewards_and_trains_adapter_and_head(start: Any) -> None:
    assert start.score(IDS.tolist()).tolist() == [[0.0]]
    trained = {name for name, parameter in start.named_parameters() if parameter.requires_grad}
    assert sum(".additions.member_0." in name for name in trained) == 28
    assert {name for name in trained if ".additions." not in name} == {"heads.0.weight"}


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


@pytest.fixture(scope="module")
def tokenizer(tiny_chain: Any) -> Any:
    from baton.models import load_tokenizer

    return load_tokenizer(tiny_chain.folder("sft"))


@pytest.fixture
def touched(tiny_chain: Any) -> Any:
    """Two members that are no longer what they started as."""
    members = members_of(tiny_chain, count=2)
    with torch.no_grad():
        for number in (0, 1):
            for parameter in members.parameters_of(number).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return members


SAMPLES = [[5, 90, 17], [8, 41]]


@pytest.mark.parametrize("lost", ["", "members/1"])
def test_a_head_that_is_lost_on_saving_is_caught(
    touched: Any, tokenizer: Any, tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of either member. peft itself refuses a folder without the head that its configuration names; not another one."""
    from safetensors.torch import load_file, save_file

    save = touched.save

    def save_with_another_head(number: int, folder: Path) -> None:
        save(number, folder)
        if folder == tmp_path / lost:
            path = folder / "adapter_model.safetensors"
            save_file(load_file(path) | {SCORE_KEY: torch.randn(1, 32)}, path)

    monkeypatch.setattr(touched, "save", save_with_another_head)
    with pytest.raises(RuntimeError, match=f"does not survive being saved: reloaded, member {1 if lost else 0}"):
        train.write_members(touched, tokenizer, tmp_path, SAMPLES)


def test_heads_that_are_kept_pass(touched: Any, tokenizer: Any, tmp_path: Path) -> None:
    train.write_members(touched, tokenizer, tmp_path, SAMPLES)
    assert member_folders(tmp_path) == [tmp_path, tmp_path / "members" / "1"]
    assert (tmp_path / "tokenizer.json").is_file()


def test_float32_decides_where_bfloat16_rounds_too_much(
    tiny_chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single sample far off in bfloat16 is no lost tensor; a lost one is far off in float32 too."""
    folders = tiny_chain.folder("pretrain"), tiny_chain.folder("sft")
    members = Members.from_sft(*folders, torch.bfloat16, 1, count=1, trained="adapter", seed=5)
    members.join()
    with torch.no_grad():
        for parameter in members.parameters_of(0).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    members.save(0, tmp_path)
    plain, narrow = train.score_as_others_do, []

    def magnified(members: Members, folder: Path, samples: Any) -> torch.Tensor:
        scores = plain(members, folder, samples)
        if members.dtype is torch.bfloat16:
            narrow.append(scores)
            return scores + torch.tensor([0.0, 0.2 * (1 + float(scores.abs().max()))])
        return scores

    monkeypatch.setattr(train, "score_as_others_do", magnified)
    train.check_member(members, 0, tmp_path, SAMPLES)
    assert len(narrow) == 1
    with torch.no_grad():
        next(iter(members.parameters_of(0).values())).add_(0.05)
    with pytest.raises(RuntimeError, match="does not survive being saved: reloaded, member 0"):
        train.check_member(members, 0, tmp_path, SAMPLES)
    assert members.dtype is torch.bfloat16


def test_margins_that_no_pair_has_are_refused(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.unpublished("reward", tmp_path)
    with pytest.raises(UserError, match="loss.margin_weight would be ignored: none of 40 training pairs has a margin"):
        train.main(chain.recipe("reward", "loss.margin_weight=1"))


def test_an_ensemble_is_published_and_each_member_loads_in_plain_peft(tiny_chain: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    chain = tiny_chain.unpublished("reward", tmp_path)
    settings = ["ensemble=2", "train.eval_every=2", "train.patience=1", "measure.sft_samples=0", "measure.perturbed=1"]
    version = train.main(chain.recipe("reward", *settings))
    folders = member_folders(chain.registry.materialise(version))
    assert len(folders) == 2
    scores = []
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        assert Path(config["base_model_name_or_path"]) == tiny_chain.folder("pretrain")
        model = PeftModel.from_pretrained(base_model(tiny_chain, "classifier"), folder).eval()
        with torch.no_grad():
            scores.append(model(input_ids=IDS, use_cache=False).logits.item())
    assert abs(scores[0] - scores[1]) > 1e-3
    again = Members.from_folders(tiny_chain.folder("pretrain"), folders, torch.float32, 1)
    assert again.score(IDS.tolist())[:, 0].tolist() == pytest.approx(scores, abs=1e-5)
    metrics = version.manifest["metrics"]
    assert {"best_step/0", "best_step/1", "eval/agreement"} <= metrics.keys()
    assert (chain.run_dir("reward") / "reward_report.html").is_file()
    assert (folders[0] / "reward_report.html").is_file()


def test_every_weight_can_be_trained(tiny_chain: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    chain = tiny_chain.unpublished("reward", tmp_path)
    settings = ["trained=full", "data.eval=[]", "train.steps=2"]
    version = train.main(chain.recipe("reward", *settings))
    assert version.base is None and version.manifest["parents"] == {"sft": tiny_chain.versions["sft"].digest}
    model = AutoModelForSequenceClassification.from_pretrained(chain.registry.materialise(version))
    raw = base_model(tiny_chain, "classifier").state_dict()
    moved = [name for name, item in model.state_dict().items() if "score" not in name and not item.equal(raw[name])]
    assert len(moved) == len(raw) - 1 and model.score.weight.abs().max() > 0
    assert "eval/accuracy" not in version.manifest["metrics"]


def test_questions_are_refused(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.copy(tmp_path)
    with pytest.raises(UserError, match="unknown key data.questions; valid here: train, eval"):
        train.main(chain.recipe("reward", "data.questions=[{path: world/questions.jsonl}]"))


def test_goes_on_after_a_kill_bit_by_bit(assert_resumes: Callable[[str, int, Path], Any], tmp_path: Path) -> None:
    assert_resumes("reward", 2, tmp_path)
