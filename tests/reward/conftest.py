"""Rows to be judged, and a random classifier to judge them."""

from pathlib import Path
from typing import Any

import torch

from baton.ppo_sections import RewardSource
from reward.sources import Sample, Source, open_sources

ROWS = [
    Sample([{"role": "user", "content": "one"}], [1, 2], [3, 4], "first reply", {"answer": "1", "split": "a"}),
    Sample([{"role": "user", "content": "two"}], [5], [6], "second reply", {"answer": "2"}),
    Sample([{"role": "user", "content": "three"}], [7], [8, 9, 10], "third reply", {"answer": "3"}),
]


def opened(dtype: torch.dtype = torch.float32, **setting: Any) -> Source:
    """The source of a reward's settings, by `open_sources`; nothing of it is in a registry."""
    given: dict[str, Any] = {"registry": None, "versions": [], "folder": Path.cwd(), "device": torch.device("cpu")}
    return open_sources(RewardSource(**setting), **given, dtype=dtype, max_tokens=64)[0]


TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>\n{% endfor %}"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz [].,?!'<>/\n\u200b"


def save_classifier(folder: Path, *, pad: str | None, template: str | None = TEMPLATE, **config: Any) -> Path:
    """A random Llama classifier that reads single characters; `pad` is its pad token, and its tokenizer's."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    special = ["<unk>", "</s>", "<pad>"]
    vocabulary = {token: at for at, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", additional_special_tokens=["<pad>"]
    )
    fast.pad_token = pad
    fast.chat_template = template
    fast.save_pretrained(folder)
    torch.manual_seed(7)
    settings = {"num_labels": 1, "pad_token_id": vocabulary[pad] if pad else None, "max_position_embeddings": 64}
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=None,
            eos_token_id=1,
            initializer_range=0.3,
            **(settings | config),
        )
    )
    model.save_pretrained(folder)
    return folder


def alone(folder: Path, texts: list[str]) -> list[float]:
    """What plain transformers gives for each text by itself, without padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]


RENDERED = [
    "[user] one</s>\n[assistant] first reply</s>",
    "[user] two</s>\n[assistant] second reply</s>",
    "[user] three</s>\n[assistant] third reply</s>",
]
