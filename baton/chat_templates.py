"""Which chat template a tokenizer gets: a family's own, one in reserved tokens, plain text, or what the base brings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from baton.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Family:
    """A shipped template: its file, the tokens it cannot do without, and which of them begins a text and ends a turn.

    `default_system` is the system prompt that dialogues without one get, as the family publishes it.
    """

    file: str
    needs: tuple[str, ...]
    stop: str
    begin: str | None = None
    default_system: str | None = None


_CHATML = ("<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES = {
    # Qwen 3's too (its instruct models of 2507): it is ChatML with tools, without a system prompt of its own
    "chatml": Family("chatml.jinja", _CHATML, "<|im_end|>"),
    "qwen2.5": Family(
        "chatml.jinja",
        _CHATML,
        "<|im_end|>",
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "qwen3": Family("chatml.jinja", _CHATML, "<|im_end|>"),
    "llama3": Family("llama3.jinja", _LLAMA3, "<|eot_id|>", "<|begin_of_text|>"),
    "gemma": Family("gemma.jinja", ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "<bos>"),
    "mistral": Family("mistral.jinja", ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>"),
}
# a family found by its tokens: Qwen's are ChatML's, whose system prompt must not be made up
_DETECTED = ("chatml", "llama3", "gemma", "mistral")
# tokens that bases set aside for others' use: Llama 3, Gemma, Mistral's tekken, Baton's own, and others
_RESERVED = re.compile(
    r"<\|reserved_special_token_(\d+)\|>|<\|reserved_(\d+)\|>|<\|reserved(\d+)\|>|<unused_?(\d+)>|\[unused(\d+)\]"
    r"|\[control_(\d+)\]|<SPECIAL_(\d+)>|<\|extra_(\d+)\|>|<\|unused_?(\d+)\|>"
)


class Choice(NamedTuple):
    """A template's text, the tokens that begin a text and end a turn, and how to call it when it is announced."""

    template: str
    stop: str | None
    begin: str | None
    name: str
    new_tokens: tuple[str, ...] = ()  # reserved tokens that it is the first to use

    def describe(self) -> str:
        """One line for whoever starts a training."""
        text = f"chat template: {self.name}"
        if self.new_tokens:
            text += (
                "; the base never saw these tokens, and frozen embeddings may not tell them apart: if replies do not "
                "end, set trained: full"
            )
        return text


def choose(tokenizer: PreTrainedTokenizerBase, setting: str, folder: Path) -> Choice:
    """The template of a recipe's `chat_template`; see `baton.chat.install_template`. Raises UserError."""
    if setting in FAMILIES:
        return _family(tokenizer, setting)
    if setting == "keep":
        if not tokenizer.chat_template:
            raise UserError(
                f"chat_template: keep, but the base has none. Use chat_template: auto, {', '.join(FAMILIES)} or a "
                ".jinja file"
            )
        return Choice(str(tokenizer.chat_template), None, None, "keep")
    if setting == "auto":
        return _auto(tokenizer)
    if setting == "plain":
        return _plain(tokenizer)
    path = folder / setting
    if not path.is_file():
        names = ", ".join([*FAMILIES, "plain", "auto", "keep"])
        raise UserError(f"chat_template: {setting} is neither {names} nor a file at {path}")
    return Choice(path.read_text(encoding="utf-8"), None, None, setting)


def begins_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the base puts its begin-of-text token in front of every text, and so expects it."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and list(ids)[:1] == [tokenizer.bos_token_id]  # type: ignore[arg-type]


def _family(tokenizer: PreTrainedTokenizerBase, name: str) -> Choice:
    from baton.rendering import splits_freely

    family = FAMILIES[name]
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in family.needs if token not in vocabulary]
    if missing:
        raise UserError(
            f"chat_template: {name} needs {' and '.join(missing)}, which this base's vocabulary lacks. Choose a "
            "template for this base: chat_template: auto finds one, keep takes the base's own, or give the path of a "
            ".jinja file"
        )
    facts: dict[str, str] = {}
    if family.default_system:
        facts["default_system"] = family.default_system
    if name == "mistral":
        # since version 7 of its format the system prompt has tokens of its own; before tekken a space followed [INST]
        if "[SYSTEM_PROMPT]" in vocabulary:
            facts["system_tokens"] = "yes"
        if not splits_freely(tokenizer):
            facts["gap"] = " "
    return Choice(_text(family.file, facts), family.stop, family.begin, name)


def _auto(tokenizer: PreTrainedTokenizerBase) -> Choice:
    """The base's own template; else the family whose tokens it has; else ChatML in reserved tokens; else plain text."""
    if tokenizer.chat_template:
        return Choice(str(tokenizer.chat_template), None, None, "the base's own")
    vocabulary = tokenizer.get_vocab()
    for name in _DETECTED:
        if all(token in vocabulary for token in FAMILIES[name].needs):
            return _family(tokenizer, name)
    reserved = _reserved_tokens(tokenizer)
    if len(reserved) < 2:
        return _plain(tokenizer)
    start, end = reserved[:2]
    begins = begins_texts(tokenizer)
    text = ("{{- bos_token }}\n" if begins else "") + _text("chatml.jinja", {})
    return Choice(
        text.replace("<|im_start|>", start).replace("<|im_end|>", end),
        end,
        tokenizer.bos_token if begins else None,
        f"ChatML with {start} and {end} in the place of <|im_start|> and <|im_end|>",
        (start, end),
    )


def _plain(tokenizer: PreTrainedTokenizerBase) -> Choice:
    if not tokenizer.eos_token:
        raise UserError("chat_template: plain ends replies with the base's end-of-text token, and this base has none")
    facts = {"begins": "yes"} if begins_texts(tokenizer) else {}
    begin = tokenizer.bos_token if facts else None
    return Choice(_text("plain.jinja", facts), tokenizer.eos_token, begin, "plain text")


def _reserved_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens set aside, by their numbers, that the tokenizer reads as one token each."""
    found = []
    for token, number in tokenizer.get_vocab().items():
        match = _RESERVED.fullmatch(token)
        if match and tokenizer(token, add_special_tokens=False)["input_ids"] == [number]:
            found.append((int(next(filter(None, match.groups()))), number, token))
    return [token for *_, token in sorted(found)]


def _text(file: str, facts: dict[str, str]) -> str:
    """A shipped template, with `facts` set at its top: what is published with a model must stand alone."""
    lines = [f"{{%- set {name} = '{value}' %}}\n" for name, value in facts.items()]
    return "".join(lines) + (FOLDER / file).read_text(encoding="utf-8")
