"""Hand-marked texts: what the assistant says stands in ⟦ ⟧; and tokenizers that have the tokens of a model family."""

from pathlib import Path
from typing import Any

from baton.bpe import train_tokenizer

MASKS = Path(__file__).parent / "masks"
TEXTS = ["Where does Zoë live? Ada lives in Redcliff. She is a baker. The fox. user assistant system\n\n{}[]\n"] * 4
MISTRAL_V3 = ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]"]
MISTRAL_V3 += ["[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<s>", "</s>", "<unk>"]
TOKENS = {
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    + ["<|eom_id|>", "<|finetune_right_pad_id|>"],
    "gemma": ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": [*MISTRAL_V3, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"],
    "mistral_v3": MISTRAL_V3,
}


def family_tokenizer(family: str) -> Any:
    """A small trained BPE that has the special tokens of `family`, each as one token."""
    tokenizer = train_tokenizer(TEXTS, 420, 10_000)
    if family in TOKENS:
        tokenizer.add_special_tokens({"additional_special_tokens": TOKENS[family]})
    return tokenizer


def with_own_tokens(*tokens: str, bos: bool = False) -> Any:
    """A byte-level tokenizer as others make them: no turn tokens, but those given; `bos` begins every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<unk>", *tokens])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", len(alphabet))])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def read_marked(path: Path) -> list[tuple[str, bool]]:
    """(stretch, is trained) of a marked file, whose last line break is the file's own."""
    stretches = []
    for part in path.read_text(encoding="utf-8").removesuffix("\n").split("⟦"):
        trained, found, rest = part.rpartition("⟧")
        stretches += [(trained, True)] if found else []
        stretches += [(rest, False)] if rest else []
    return stretches


def tokenised(tokenizer: Any, stretches: list[tuple[str, bool]]) -> tuple[list[int], list[bool]]:
    """Each stretch tokenised by itself, with its mark at every token; no template involved."""
    ids: list[int] = []
    marks: list[bool] = []
    for text, trained in stretches:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += found
        marks += [trained] * len(found)
    return ids, marks
