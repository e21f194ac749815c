"""Dialogues as token ids: the template, which tokens are trained, where a reply stops, what a reward model reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase

DOCUMENT_END = "<|endoftext|>"
PAD = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = [DOCUMENT_END, PAD, TURN_START, TURN_END]
"""Reserved by every tokenizer that stage 1 trains, so that no later stage resizes the embeddings."""

TEMPLATES = {"chatml": "chatml.jinja"}
Messages = list[dict[str, Any]]


def install_template(tokenizer: Tokenizer, setting: str, folder: Path) -> None:
    """Give `tokenizer` the chat template of a recipe: a shipped name, `keep`, or a .jinja file relative to `folder`.

    The end-of-sequence token becomes the token that ends an assistant's turn, and the pad token becomes one that is
    neither that token nor another that dialogues contain. Raises UserError when the vocabulary lacks the template's
    tokens, when the template marks no assistant turns, or when the turn's end would never be trained.
    """
    if setting in TEMPLATES:
        template = (Path(__file__).parent / "templates" / TEMPLATES[setting]).read_text(encoding="utf-8")
        missing = [token for token in (TURN_START, TURN_END) if token not in tokenizer.get_vocab()]
        if missing:
            raise UserError(
                f"chat_template: {setting} needs {' and '.join(missing)}, which this base's vocabulary lacks. Choose a "
                "template for this base: chat_template: keep, or the path of a .jinja file"
            )
        tokenizer.eos_token = TURN_END
    elif setting == "keep":
        if not tokenizer.chat_template:
            raise UserError("chat_template: keep, but the base has none. Use chat_template: chatml, or a .jinja file")
        template = str(tokenizer.chat_template)
    else:
        path = folder / setting
        if not path.is_file():
            raise UserError(f"chat_template: {setting} is neither {', '.join(TEMPLATES)}, keep nor a file at {path}")
        template = path.read_text(encoding="utf-8")
    tokenizer.chat_template = template
    if not re.search(r"{%-?\s*generation\b", template):
        raise UserError(
            f"chat_template: {setting} marks no assistant turns. Wrap what the assistant says, its end token included, "
            "in {% generation %} … {% endgeneration %}, or use chat_template: chatml"
        )
    choose_pad(tokenizer)
    ids, is_response = encode_dialogue(
        tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    stops = stop_ids(tokenizer)
    if not any(token in stops and trained for token, trained in zip(ids, is_response, strict=True)):
        raise UserError(
            f"chat_template: {setting} never trains the token that ends a turn ({tokenizer.eos_token}): the "
            "model would "
            "not learn to stop. Move it inside {% generation %} … {% endgeneration %}"
        )


def choose_pad(tokenizer: Tokenizer) -> None:
    """Make the pad token differ from eos and bos: a reward model reads its score before the first pad token."""
    taken = {tokenizer.eos_token, tokenizer.bos_token, TURN_START, TURN_END}
    if tokenizer.pad_token and tokenizer.pad_token not in taken:
        return
    special = [token for token in tokenizer.all_special_tokens if token not in taken]
    vocabulary = tokenizer.get_vocab()
    candidates = [token for token in (PAD, DOCUMENT_END) if token in vocabulary and token not in taken] + special
    if not candidates:
        raise UserError(
            f"the tokenizer has no special token to pad with besides {', '.join(sorted(t for t in taken if t))}; add a "
            f"{PAD} token to the base's tokenizer and register it again"
        )
    tokenizer.pad_token = candidates[0]


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a reply."""
    assert tokenizer.eos_token_id is not None
    return [int(tokenizer.eos_token_id)]


def has_control_text(tokenizer: Tokenizer, messages: Messages) -> bool:
    """Whether a message spells out a special token: tokenised, it would end a turn or open another's."""
    return any(token in str(message["content"]) for message in messages for token in tokenizer.all_special_tokens)


def encode_dialogue(tokenizer: Tokenizer, messages: Messages) -> tuple[list[int], list[bool]]:
    """(ids, is_response): the rendered dialogue and, for each token, whether the assistant says it."""
    encoded: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


def encode_prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """The ids of `messages` and the opening of the assistant's turn."""
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    return list(encoded["input_ids"])


def encode_scored(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """The ids that a reward model reads: the dialogue up to and including the token that ends the last reply.

    The one rendering for the reward model's training and for PPO's scoring: there, the same ids arise as prompt ids
    followed by the sampled reply.
    """
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    ids = list(encoded["input_ids"])
    stops = stop_ids(tokenizer)
    last = max((at for at, token in enumerate(ids) if token in stops), default=len(ids) - 1)
    return ids[: last + 1]
