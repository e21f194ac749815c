"""Pretraining: what it optimises and measures, against one document at a time; what it publishes; resuming."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.errors import UserError
from stages import pretrain


def pieces(tokenizer: Any, texts: list[str], length: int) -> list[list[int]]:
    """Each text between two end tokens, cut into rows' lengths."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    documents = [[end, *tokenizer(text)["input_ids"], end] for text in texts]
    return [ids[at : at + length] for ids in documents for at in range(0, len(ids), length)]


def nats(model: Any, parts: list[list[int]]) -> tuple[float, int]:
    """(total, tokens) one piece at a time, without packing, cache or padding."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for ids in parts:
            table = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            total -= sum(float(table[at, token]) for at, token in enumerate(ids[1:]))
            count += len(ids) - 1
    return total, count


def windowed_nats(model: Any, documents: list[list[int]], length: int) -> tuple[float, int]:
    """(total, tokens): each token once, after all that its document has before it, of which half a row is enough."""
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for ids in documents:
            done = 1
            while done < len(ids):
                start = 0 if done == 1 else done - length // 2
                window = ids[start : start + length]
                table = model(input_ids=torch.tensor([window]), use_cache=False).logits[0].log_softmax(-1)
                predicted = range(done - start, len(window))
                total -= sum(float(table[at - 1, window[at]]) for at in predicted)
                count += len(predicted)
                done = start + len(window)
    return total, count


def texts_of(chain: Any, name: str, count: int | None = None) -> list[str]:
    lines = (chain.root / "world" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines[:count]]


def test_the_first_loss_is_the_mean_over_tokens_of_separate_documents(
    tiny_chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baton.packing import pack

    made: list[Any] = []
    build = pretrain.build_decoder

    def build_and_keep(*arguments: Any) -> Any:
        model = build(*arguments)
        made.append((copy.deepcopy(model), arguments[1]))
        return model

    monkeypatch.setattr(pretrain, "build_decoder", build_and_keep)
    chain = tiny_chain.copy(tmp_path)
    overrides = [
        "data.train=[{path: world/text_train.jsonl, rows: [0, 6]}]",
        "train.steps=1",
        "publish.name=tiny/first",
        "data.questions=[]",
    ]
    # how many rows there are depends on the tokenizer, so it is trained first, as the program does
    settings = chain.recipe("pretrain", *overrides)
    from baton.bpe import train_tokenizer

    texts = texts_of(chain, "text_train", 6)
    tokenizer = train_tokenizer(texts, settings.tokenizer.vocab_size, settings.tokenizer.sample_bytes)
    parts = pieces(tokenizer, texts, 64)
    rows = len(pack([(ids, [True] * len(ids)) for ids in parts], 64, 1).rows)
    pretrain.main(chain.recipe("pretrain", *overrides, f"train.tokens_per_batch={64 * rows}"))
    start, used = made[0]
    assert used.get_vocab() == tokenizer.get_vocab()
    total, count = nats(start, parts)
    assert chain.metrics("pretrain")[0]["loss"] == pytest.approx(total / count, abs=1e-4)


def test_held_out_bits_per_byte(tiny_chain: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_chain.folder("pretrain")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = texts_of(tiny_chain, "text_eval")
    total, count = windowed_nats(model, pieces(tokenizer, texts, 10**6), 64)
    metrics = tiny_chain.versions["pretrain"].manifest["metrics"]
    assert metrics["eval/loss"] == pytest.approx(total / count, abs=1e-4)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert metrics["eval/bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, abs=1e-4)
    assert 0 < metrics["eval/ngram_bits_per_byte"] < 8
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())


def test_the_loss_falls_and_the_figures_are_kept(tiny_chain: Any) -> None:
    rows = tiny_chain.metrics("pretrain")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert rows[5]["loss"] < rows[0]["loss"] - 0.2
    status = json.loads((tiny_chain.run_dir("pretrain") / "status.json").read_text())
    assert status["state"] == "done" and status["version"] == "tiny/base:1"


def test_the_published_base(tiny_chain: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_chain.folder("pretrain")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.use_cache is True and model.dtype is torch.float32
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.num_key_value_heads) == (32, 2, 2)
    assert len(tokenizer) == model.config.vocab_size == 400
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.eos_token == "<|endoftext|>"
    assert tiny_chain.versions["pretrain"].manifest["licence"] == "cc0-1.0"


def test_the_dtype_asked_for_is_the_dtype_saved(tiny_chain: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    chain = tiny_chain.copy(tmp_path)
    version = pretrain.main(
        chain.recipe(
            "pretrain", "model.dtype=bfloat16", "train.steps=1", "data.questions=[]", "data.eval=[]", "ngram_order=null"
        )
    )
    tensors = load_file(chain.registry.materialise(version) / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "eval/loss" not in version.manifest["metrics"]


def test_goes_on_after_a_kill_bit_by_bit(assert_resumes: Callable[[str, int, Path], Any], tmp_path: Path) -> None:
    assert_resumes("pretrain", 3, tmp_path)


def test_the_same_again_is_up_to_date(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.copy(tmp_path)
    version = pretrain.main(chain.recipe("pretrain"))
    assert version.digest == tiny_chain.versions["pretrain"].digest
    status = json.loads((chain.run_dir("pretrain") / "status.json").read_text())
    assert status["state"] == "up to date" and not (chain.run_dir("pretrain") / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model={size: 2M}", "size would be ignored"),
        ("model.layers=null", "layers missing"),
        ("mode=continue", "mode: continue needs base"),
        ("data.train=[{path: a.txt, replay: true}]", "replay is for mode: continue"),
        ("base=tiny/base:main", "mode: scratch takes no base"),
    ],
)
def test_what_would_be_ignored_is_refused(tiny_chain: Any, tmp_path: Path, override: str, message: str) -> None:
    chain = tiny_chain.copy(tmp_path)
    with pytest.raises(UserError, match=message):
        chain.recipe("pretrain", override)


CONTINUED = """
stage: pretrain
mode: continue
base: {base}
registry: {root}/registry
run_dir: {root}/runs/continued
dtype: float32
publish: {{name: tiny/continued, alias: main}}
data:
  train:
    - {{path: world/text_eval.jsonl, share: 0.7}}
    - {{path: world/text_train.jsonl, share: 0.3, replay: true}}
  eval: [{{path: world/text_eval.jsonl}}]
  deduplicate: false
continuations: 0
train: {{steps: 8, tokens_per_batch: 256, sequence_length: 64, learning_rate: 5.0e-3, seed: 3, save_every: 4,
        log_every: 4}}
"""


def continued(chain: Any, base: str, *overrides: str) -> Any:
    from baton.recipe import load_recipe

    (chain.root / "continued.yaml").write_text(CONTINUED.format(base=base, root=chain.root))
    return load_recipe(chain.root / "continued.yaml", list(overrides))


def test_a_base_is_trained_further(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.copy(tmp_path)
    recipe = continued(chain, "tiny/base:main")
    assert recipe.train.warmup_steps == 1, "the learning rate rises again"
    version = pretrain.main(recipe)
    parent = tiny_chain.versions["pretrain"]
    assert version.kind == "base" and version.manifest["parents"] == {"base": parent.digest}
    assert version.manifest["tokenizer_digest"] == parent.manifest["tokenizer_digest"]
    metrics = version.manifest["metrics"]
    assert metrics["before/loss"] == pytest.approx(parent.manifest["metrics"]["eval/loss"], abs=1e-4)
    assert metrics["eval/loss"] < metrics["before/loss"] - 0.1


def test_a_base_from_outside_is_registered_as_the_parent(tiny_chain: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    chain = tiny_chain.copy(tmp_path)
    version = pretrain.main(continued(chain, str(tiny_chain.folder("pretrain")), "train.steps=2", "data.eval=[]"))
    parent = chain.registry.resolve("tiny/continued-start:main")
    assert version.manifest["parents"] == {"base": parent.digest}
    before, after = (load_file(chain.registry.materialise(v) / "model.safetensors") for v in (parent, version))
    assert before.keys() == after.keys() and not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_rows_longer_than_the_base_knows_are_refused(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.copy(tmp_path)
    with pytest.raises(UserError, match="knows 1024 positions"):
        overrides = ("train.sequence_length=2048", "train.tokens_per_batch=2048", "data.eval=[]")
        pretrain.main(continued(chain, "tiny/base:main", *overrides))


def load_recipe_text(chain: Any, base: str) -> str:
    return (
        f"stage: pretrain\nmode: load\nbase: {base}\nregistry: {chain.root}/registry\n"
        f"run_dir: {chain.root}/runs/load\npublish: {{name: tiny/loaded, alias: main}}\n"
    )


def test_loading_a_base_keeps_its_weights_and_dtype(tiny_chain: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from baton.recipe import load_recipe

    chain = tiny_chain.copy(tmp_path)
    source = tiny_chain.folder("pretrain")
    (tmp_path / "load.yaml").write_text(load_recipe_text(chain, str(source)))
    version = pretrain.main(load_recipe(tmp_path / "load.yaml"))
    assert version.kind == "base" and version.name == "tiny/loaded"
    before = load_file(source / "model.safetensors")
    after = load_file(chain.registry.materialise(version) / "model.safetensors")
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert version.manifest["architecture"]["num_parameters"] == 31392


def test_a_base_that_does_not_load_is_refused(tiny_chain: Any, tmp_path: Path) -> None:
    from baton.recipe import load_recipe

    chain = tiny_chain.copy(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (tmp_path / "load.yaml").write_text(load_recipe_text(chain, str(broken)))
    with pytest.raises(UserError, match="does not load as a causal language model"):
        pretrain.main(load_recipe(tmp_path / "load.yaml"))
    assert "tiny/loaded" not in chain.registry.models()


def test_heads_that_do_not_divide_the_width_are_refused(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.copy(tmp_path)
    with pytest.raises(UserError, match=r"hidden_size \(30\) must be an even multiple of heads \(4\)"):
        pretrain.main(chain.recipe("pretrain", "model.hidden_size=30"))


def test_averaged_weights_are_measured_and_published_and_resumed(tiny_chain: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    overrides = [
        "publish.name=tiny/averaged",
        "data.questions=[]",
        "ngram_order=null",
        "train.ema=0.9",
        "continuations=0",
    ]
    chain = tiny_chain.copy(tmp_path)
    whole = pretrain.main(chain.recipe("pretrain", *overrides))
    assert whole.manifest["metrics"]["eval/loss"] != tiny_chain.versions["pretrain"].manifest["metrics"]["eval/loss"]
    tensors = load_file(chain.registry.materialise(whole) / "model.safetensors")
    # killed after the checkpoint of step 3
    shutil.rmtree(tmp_path / "registry" / "models" / "tiny" / "averaged")
    shutil.rmtree(chain.run_dir("pretrain") / "checkpoints" / "checkpoint-6")
    again = pretrain.main(chain.recipe("pretrain", *overrides))
    for name, tensor in load_file(chain.registry.materialise(again) / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name]), name


def test_ids_that_no_token_has_get_their_rows_as_well() -> None:
    """The largest id is 9, of three tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from baton.models import num_ids
    from baton.recipe import Decoder
    from stages.pretrain import build_decoder

    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 4, "</s>": 9}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert (len(tokenizer), num_ids(tokenizer)) == (3, 10)
    decoder = Decoder(hidden_size=8, layers=1, heads=2, intermediate_size=8)
    assert len(build_decoder(decoder, tokenizer, 16).get_input_embeddings().weight) == 10


def test_what_is_measured_at_once_is_a_process_s_share(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import torch
    from transformers import LlamaConfig

    from stages.pretrain import measure

    asked: list[int] = []

    def record(model: Any, texts: Any, length: int, at_once: int, dtype: Any, state: Any) -> dict[str, float]:
        asked.append(at_once)
        return {}

    monkeypatch.setattr("baton.bits.bits_per_byte", record)
    train = SimpleNamespace(tokens_per_micro_batch=None, tokens_per_batch=512, sequence_length=64)
    state = SimpleNamespace(num_processes=4, device="cpu")
    run: Any = SimpleNamespace(recipe=SimpleNamespace(train=train), state=state, dtype=torch.float32)
    start: Any = SimpleNamespace(corpus=SimpleNamespace(eval=["some"]))
    model = SimpleNamespace(to=lambda device: None, config=LlamaConfig())
    measure(run, model, start, "eval")
    train.tokens_per_micro_batch = 64
    measure(run, model, start, "eval")
    assert asked == [128, 64]
