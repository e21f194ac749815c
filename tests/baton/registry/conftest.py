"""Tiny models for the registry's tests: a two-layer Llama, a byte-level tokenizer, adapters with heads."""

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from baton.registry import Registry, Version

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
ROWS = 304  # a few more than the tokenizer has tokens, as padded embeddings have


class Folders(NamedTuple):
    """Folders by save_pretrained: two bases that differ in their weights alone, adapters of the first, a classifier."""

    base: Path
    other_base: Path
    adapter: Path
    reward: Path
    value: Path
    classifier: Path


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 259 to 300 tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the baker of the town bakes bread for the town"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def llama_config(**settings: Any) -> Any:
    """Two small layers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.2,
        **settings,
    )


def save_base(folder: Path, seed: int) -> None:
    """A random Llama with its tokenizer, in bfloat16 so that merging has a dtype to come back to."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(llama_config()).to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)


def save_classifier(folder: Path, seed: int, num_labels: int = 1) -> None:
    """A random, whole Llama sequence classifier with its tokenizer."""
    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    LlamaForSequenceClassification(llama_config(num_labels=num_labels)).save_pretrained(folder)
    save_tokenizer(folder)


def save_adapter(folder: Path, base: Path, task_type: str, seed: int) -> None:
    """A LoRA adapter whose weights are all random, so that it changes the model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    loader = AutoModelForCausalLM if task_type == "CAUSAL_LM" else AutoModelForSequenceClassification
    extra = {} if task_type == "CAUSAL_LM" else {"num_labels": 1}
    torch.manual_seed(seed)
    model = get_peft_model(
        loader.from_pretrained(base, dtype=torch.float32, **extra),
        LoraConfig(task_type=task_type, r=2, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folders, made once; tests that change one use `folders`."""
    root = tmp_path_factory.mktemp("made")
    folders = Folders(*(root / name for name in Folders._fields))
    save_base(folders.base, seed=0)
    save_base(folders.other_base, seed=1)
    save_adapter(folders.adapter, folders.base, "CAUSAL_LM", seed=2)
    save_adapter(folders.reward, folders.base, "SEQ_CLS", seed=3)
    save_adapter(folders.value, folders.base, "SEQ_CLS", seed=4)
    save_classifier(folders.classifier, seed=5)
    return folders


@pytest.fixture
def folders(made: Folders, tmp_path: Path) -> Folders:
    """A copy of the folders that a test may change."""
    return Folders(*(Path(shutil.copytree(folder, tmp_path / "folders" / folder.name)) for folder in made))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("BATON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """An empty registry."""
    return Registry(tmp_path / "registry", create=True)


@pytest.fixture(scope="session")
def published(made: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with one version of each kind but merged; `filled` copies it."""
    root = tmp_path_factory.mktemp("published")
    before = os.environ.get("BATON_CACHE")
    os.environ["BATON_CACHE"] = str(root / "cache")
    try:
        filled = Registry(root / "registry", create=True)
        base = filled.publish(made.base, name="team/base", kind="base", details={"licence": "apache-2.0"})
        filled.publish(made.other_base, name="team/other", kind="base")
        parents: dict[str, Version] = {"pretrain": base}
        for kind in ("adapter", "reward", "value"):
            version = filled.publish(
                getattr(made, kind),
                name=f"team/{kind}",
                kind=kind,
                base=base,
                parents=parents,
                details={"metrics": {"accuracy": 0.75}},
            )
            parents = {"init": version}
    finally:
        if before is None:
            del os.environ["BATON_CACHE"]
        else:
            os.environ["BATON_CACHE"] = before
    return root / "registry"


@pytest.fixture
def filled(published: Path, tmp_path: Path) -> Registry:
    """A copy of the published registry: team/base, team/other, team/adapter, team/reward, team/value."""
    return Registry(shutil.copytree(published, tmp_path / "filled"))
