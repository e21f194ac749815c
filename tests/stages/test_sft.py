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


def test_on_long_drop_leaves_long_dialogues_out(tiny_chain: Any, tmp_path: Path, tokenizer: Any) -> None:
    from baton.run import Run

    short = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    half = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 200}]
    dropping = Run.start(tiny_chain.copy(tmp_path).recipe("sft", "train.on_long=drop"))
    packed = sft.pack_dialogues(dropping, tokenizer, [{"messages": m} for m in (short, half)], "train")
    assert packed.num_tokens == len(marked(tokenizer, short)[0])


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


def trainer_on(chain: Any, to: Path, *overrides: str) -> Any:
    """A trainer on the first dialogues, as `main` makes it."""
    from transformers import AutoTokenizer

    from baton.run import Run
    from baton.sft_trainer import DialogueTrainer
    from baton.tuned import Tuned

    run = Run.start(chain.copy(to).recipe("sft", "train.tokens_per_batch=384", *overrides))
    tokenizer = AutoTokenizer.from_pretrained(chain.folder("sft"))
    rows = [{"messages": messages} for messages in dialogues(chain, "dialogues", 12)]
    uses = {"train": rows, "eval": rows[:3]}
    packed = {use: sft.pack_dialogues(run, tokenizer, some, use).rows for use, some in uses.items()}
    recipe, base = run.recipe, chain.folder("pretrain")
    tuned = Tuned.make(base, run.dtype, trained=recipe.trained, lora=recipe.lora, seed=1)
    for name, parameter in tuned.parameters().items():
        if name.endswith(("up", "lora_B.default.weight")):  # zero at first: nothing would reach `down`
            generator = torch.Generator().manual_seed(len(name))
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return DialogueTrainer(run, tuned, tokenizer, packed)


def step_of(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch of all rows but one."""
    loss = trainer.training_step(trainer.model, {"row": torch.arange(len(trainer.rows["train"]) - 1)})
    return float(loss), {name: p.grad.clone() for name, p in trainer.tuned.parameters().items()}


@pytest.fixture(scope="module")
def reference_step(tiny_chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = trainer_on(tiny_chain, tmp_path_factory.mktemp("reference"), "train.packing=false")
    assert len(trainer.rows["train"]) > 4
    return step_of(trainer)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.packing=true",),
        ("train.packing=true", "train.tokens_per_micro_batch=384"),
        ("train.packing=false", "train.tokens_per_micro_batch=384"),
    ],
    ids=["packed", "packed at once", "apart at once"],
)
def test_a_step_does_not_depend_on_how_it_is_computed(
    overrides: tuple[str, ...], tiny_chain: Any, tmp_path: Path, reference_step: Any
) -> None:
    loss, gradients = step_of(trainer_on(tiny_chain, tmp_path, *overrides))
    assert loss == pytest.approx(reference_step[0], rel=1e-5)
    assert gradients.keys() == reference_step[1].keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference_step[1][name], rtol=1e-4, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3


def test_noise_on_the_embeddings_is_in_training_alone(tiny_chain: Any, tmp_path: Path, reference_step: Any) -> None:
    noisy = trainer_on(tiny_chain, tmp_path / "a", "neftune_alpha=20")
    plain = trainer_on(tiny_chain, tmp_path / "b")
    loss, _ = step_of(noisy)
    assert loss == step_of(noisy)[0] != pytest.approx(reference_step[0], abs=1e-3)
    noisy.state.global_step = 1
    assert step_of(noisy)[0] != pytest.approx(loss, abs=1e-4), "drawn anew at every step"
    assert noisy.held_out_loss() == plain.held_out_loss()
    embeddings = noisy.tuned.plain.get_input_embeddings()
    assert not embeddings._forward_hooks and not hasattr(embeddings, "neftune_noise_alpha")


def test_dora_is_published_as_peft_reads_it_and_what_follows_says_what_it_wants(
    tiny_chain: Any, tmp_path: Path, tokenizer: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from baton.build import resolve_inputs
    from reward.train import main as train_reward

    chain = tiny_chain.copy(tmp_path)
    version = sft.main(
        chain.recipe(
            "sft",
            "lora={r: 4, alpha: 8, dora: true, rank_stabilised: true, dropout: 0.1}",
            "neftune_alpha=5",
            "publish={name: tiny/dora, alias: candidate}",
            "data.questions=[]",
            "train.steps=2",
        )
    )
    folder = chain.registry.materialise(version)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_dora"] and config["use_rslora"] and version.kind == "adapter"
    fresh = AutoModelForCausalLM.from_pretrained(tiny_chain.folder("pretrain"))
    tuned = PeftModel.from_pretrained(fresh, folder).eval()
    found = mean_nats(tuned, tokenizer, dialogues(tiny_chain, "dialogues_eval"))
    assert version.manifest["metrics"]["eval/loss"] == pytest.approx(found, abs=1e-4)
    assert found != pytest.approx(version.manifest["metrics"]["eval/loss_before"], abs=1e-4)
    with pytest.raises(UserError, match="plain LoRA adapters; tiny/dora:1 has use_dora. Merge it first: baton get"):
        train_reward(chain.recipe("reward", f"sft={version.ref}"))
    with pytest.raises(UserError, match="plain LoRA adapters; tiny/dora:1 has use_dora"):
        resolve_inputs(chain.recipe("ppo", f"sft={version.ref}"), chain.registry)
    resolve_inputs(chain.recipe("reward", f"sft={version.ref}", "trained=full"), chain.registry)
    with pytest.raises(UserError, match="tiny/sft:1 is an adapter, which goes on as the reward's. Leave lora out"):
        train_reward(chain.recipe("reward", "lora={r: 2}"))


def test_trained_whole_it_goes_on_to_reward_and_policy(tiny_chain: Any, tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    from reward.train import main as train_reward
    from stages.ppo import main as train_policy

    chain = tiny_chain.copy(tmp_path)
    recipe = chain.root / "sft.yaml"
    recipe.write_text(recipe.read_text().replace("lora: {r: 4, alpha: 8}", "trained: full"))
    gently = ["data.questions=[]", "train.steps=4", "train.learning_rate=2.0e-3"]
    version = sft.main(chain.recipe("sft", "publish.name=tiny/whole", *gently))
    assert version.kind == "merged" and version.base is None
    assert version.manifest["parents"] == {"base": tiny_chain.versions["pretrain"].digest}
    whole = AutoModelForCausalLM.from_pretrained(chain.registry.materialise(version)).eval()
    found = mean_nats(whole, tokenizer, dialogues(tiny_chain, "dialogues_eval"))
    assert version.manifest["metrics"]["eval/loss"] == pytest.approx(found, abs=1e-4)
    assert found < version.manifest["metrics"]["eval/loss_before"] - 0.01
    # plain transformers ends its replies where it was taught to, and not where its base ended texts
    stop, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|pad|>"])
    for settings in (whole.config, whole.generation_config):
        assert (settings.eos_token_id, settings.pad_token_id) == (stop, pad)
    # the first token that it says is the end of its turn
    told = whole.generate(torch.tensor([[5, 6]]), max_new_tokens=4, prefix_allowed_tokens_fn=lambda *_: [stop])
    assert told.tolist() == [[5, 6, stop]]
    after = [f"sft={version.ref}", "train.steps=1"]
    with pytest.raises(UserError, match="the reward model is a new adapter on it and needs its settings"):
        train_reward(chain.recipe("reward", *after))
    reward = train_reward(chain.recipe("reward", *after, "lora={r: 2, alpha: 4}", "measure.sft_samples=0"))
    assert reward.kind == "reward" and reward.base == version.digest
    policy = train_policy(
        chain.recipe("ppo", *after, "lora={r: 2, alpha: 4}", f"reward={reward.ref}", "data.questions=[]")
    )
    assert policy.kind == "adapter" and policy.base == version.digest


@pytest.mark.parametrize(("packing", "refused"), [("true", True), ("false", False)])
def test_documents_that_leak_are_refused_before_training(
    packing: str, refused: bool, tiny_chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaModel

    forward = LlamaModel.forward

    def carried_on(self: Any, **given: Any) -> Any:
        """As a recurrent layer does: a state goes on over what positions say."""
        found = forward(self, **given)
        found.last_hidden_state = found.last_hidden_state.cumsum(1)
        return found

    monkeypatch.setattr(LlamaModel, "forward", carried_on)
    if not refused:
        trainer_on(tiny_chain, tmp_path, f"train.packing={packing}")
        return
    with pytest.raises(UserError, match="documents packed into one row see each other.*With train.packing: false"):
        trainer_on(tiny_chain, tmp_path, f"train.packing={packing}")


def test_a_process_without_held_out_rows_waits_for_the_others(
    tiny_chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_on(tiny_chain, tmp_path, "train.packing=true")
    whole = trainer.held_out_loss()
    asked = []

    def summed(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        asked.append(tensors[0].clone())
        tensors[0] += torch.tensor([2.0, 4.0])  # of the other process
        return tensors

    monkeypatch.setattr(trainer, "_summed", summed)
    monkeypatch.setattr(trainer, "rows", {**trainer.rows, "eval": []})
    assert trainer.held_out_loss() == 0.5 and asked[0].tolist() == [0.0, 0.0] and whole > 1


def test_adapters_on_a_quantised_base_are_trained_in_float32_and_its_figures_say_so(
    tiny_chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL makes what is trained on four bits bfloat16. The four bits themselves need CUDA."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "is_loaded_in_4bit", True, raising=False)
    trainer = trainer_on(tiny_chain, tmp_path, "lora={r: 4, alpha: 8, dropout: 0.1}")
    assert {p.dtype for p in trainer.tuned.parameters().values()} == {torch.float32}
    trainer.tuned.quantise = "nf4"
    assert sft.measure(trainer, None, [], "_before").keys() == {"eval/loss_quantised_before"}


def test_dialogues_longer_than_the_base_knows_are_refused_before_it_is_loaded(
    tiny_chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baton.tuned import Tuned
    from reward.members import Members
    from reward.train import main as train_reward

    monkeypatch.setattr(Tuned, "make", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(Members, "from_sft", lambda *_: pytest.fail("loaded"))
    chain = tiny_chain.copy(tmp_path)
    longer = ["train.tokens_per_batch=2048", "train.tokens_per_micro_batch=2048", "train.sequence_length=2048"]
    with pytest.raises(UserError, match="train.sequence_length is 2048, but the base knows 1024 positions"):
        sft.main(chain.recipe("sft", *longer, "train.seed=8"))
    with pytest.raises(UserError, match="train.max_length is 2048, but the base knows 1024 positions"):
        train_reward(chain.recipe("reward", "train.max_length=2048", "train.tokens_per_micro_batch=4096"))


def test_four_bits_are_refused_before_any_work(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.copy(tmp_path)
    with pytest.raises(UserError, match="quantise: nf4 is computed by CUDA kernels"):
        sft.main(chain.recipe("sft", "quantise=nf4", f"base={tiny_chain.folder('pretrain')}", "publish.name=guest/sft"))
    assert "guest/base" not in chain.registry.models()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trained=full"], "trained: full trains every weight and would ignore lora"),
        (["neftune_alpha=0"], "neftune_alpha"),
        (["train.packing=best"], "train.packing"),
        (["quantise=int8"], "quantise"),
    ],
)
def test_settings_that_cannot_be(tiny_chain: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_chain.recipe("sft", *overrides)
