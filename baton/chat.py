"""Dialogues as token ids: the template, which tokens are trained, where a reply stops, what a reward model reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.chat_templates import Choice, choose
from baton.errors import UserError
from baton.rendering import (
    Rendered,
    Unrenderable,
    UnstableError,
    encode,
    marks_turns,
    render,
    render_whole,
    special_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase

DOCUMENT_END = "<|endoftext|>"
PAD = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = [DOCUMENT_END, PAD, TURN_START, TURN_END]
"""Reserved by every tokenizer that stage 1 trains, so that no later stage resizes the embeddings."""

Messages = list[dict[str, Any]]
_PROBE = [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, "abcd", strict=True)]
# what ends a turn beside the token that ends most: Llama 3.1 awaits a tool's result after <|eom_id|>
_ALSO_STOPS = {"<|eot_id|>": ("<|eom_id|>",)}


class CannotRenderError(UserError):
    """A chat template does not render a dialogue, or not all of it."""

    def __init__(self, messages: Messages, fault: Unrenderable) -> None:
        super().__init__(f"a dialogue that begins with {str(messages[0].get('content'))[:40]!r}: {fault}")
        self.reason = str(fault)


def install_template(tokenizer: Tokenizer, setting: str, folder: Path) -> Choice:
    """Give `tokenizer` the chat template of a recipe, and return what was chosen.

    `setting` is a shipped name (`chat_templates.FAMILIES`, or `plain`: text without turn tokens), `keep` (the base's
    own), a .jinja file relative to `folder`, or `auto`: the base's own template if it has one, else the family whose
    tokens the vocabulary has, else ChatML written in reserved tokens, else `plain`. None of them adds a token, so the
    embeddings keep their size.

    The end-of-sequence token becomes the token that ends an assistant's turn, and the pad token becomes one that is
    neither that token nor another that dialogues contain. Raises UserError when the vocabulary lacks the template's
    tokens, when it is not plain what the assistant says, or when the turn's end would never be trained.
    """
    choice = choose(tokenizer, setting, folder)
    tokenizer.chat_template = choice.template
    if choice.begin:
        tokenizer.bos_token = choice.begin
    if choice.stop:
        tokenizer.eos_token = choice.stop
    try:
        rendered = render(tokenizer, _PROBE)
    except Unrenderable as fault:
        raise UserError(
            f"chat_template: {setting}: {fault}. Wrap what the assistant says, its end token included, in "
            "{% generation %} … {% endgeneration %} in a .jinja file of your own, or use a template that ships"
        ) from None
    if not marks_turns(choice.template):
        _adopt_stop(tokenizer, rendered)
    choose_pad(tokenizer)
    ((ids, is_response),) = encode(tokenizer, [rendered])
    stops = stop_ids(tokenizer)
    following = [*is_response[1:], False]
    ends = [token for token, said, on in zip(ids, is_response, following, strict=True) if said and not on]
    if not ends or any(token not in stops for token in ends):
        count = sum(token in stops for token in ends)
        raise UserError(
            f"chat_template: {setting} trains the token that ends a turn ({tokenizer.eos_token}) at the end of {count} "
            f"of {len(ends)} replies: the model would not learn to stop. Move it inside {{% generation %}} … "
            "{% endgeneration %}, as the last token of every reply"
        )
    return choice


def _adopt_stop(tokenizer: Tokenizer, rendered: Rendered) -> None:
    """Where a base's own template ends replies with another special token than eos (Gemma), make that the eos."""
    specials = special_tokens(tokenizer)
    first, last = rendered.said[-1]
    found = specials.findall(rendered.text[first:last]) if specials else []
    if found and tokenizer.eos_token not in found:
        tokenizer.eos_token = found[-1]


def choose_pad(tokenizer: Tokenizer) -> None:
    """Make the pad token differ from eos and bos: a reward model reads its score before the first pad token."""
    template = str(tokenizer.chat_template or "")
    taken = {tokenizer.eos_token, tokenizer.bos_token, TURN_START, TURN_END}
    if tokenizer.pad_token and tokenizer.pad_token not in taken and tokenizer.pad_token not in template:
        return
    vocabulary = tokenizer.get_vocab()
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = [*tokenizer.all_special_tokens, *added]
    named = [token for token in special if "pad" in token.lower()]
    candidates = [token for token in (PAD, DOCUMENT_END) if token in vocabulary] + named + special
    # a token that the template writes is in every dialogue
    free = [token for token in candidates if token not in taken and token not in template]
    if not free:
        raise UserError(
            f"the tokenizer has no special token to pad with besides {', '.join(sorted(t for t in taken if t))}; add a "
            f"{PAD} token to the base's tokenizer and register it again"
        )
    tokenizer.pad_token = free[0]


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a reply: the end-of-sequence token first, and any other that its format ends turns with."""
    assert tokenizer.eos_token_id is not None
    ids = [int(tokenizer.eos_token_id)]
    others = _ALSO_STOPS.get(str(getattr(tokenizer, "eos_token", "")), ())
    vocabulary = tokenizer.get_vocab() if others else {}
    return ids + [vocabulary[token] for token in others if token in vocabulary]


def has_control_text(tokenizer: Tokenizer, messages: Messages, tools: list[Any] | None = None) -> bool:
    """Whether a message spells out a special token: tokenised, it would end a turn or open another's."""
    specials = special_tokens(tokenizer)
    if specials is None:
        return False
    texts = [str(value) for message in messages for key, value in message.items() if value is not None]
    return any(specials.search(text) for text in [*texts, *(str(tool) for tool in tools or [])])


def encode_dialogue(
    tokenizer: Tokenizer, messages: Messages, tools: list[Any] | None = None
) -> tuple[list[int], list[bool]]:
    """(ids, is_response): the rendered dialogue and, for each token, whether the assistant says it.

    Raises UserError where the template does not render the dialogue; for many, `dialogues.encode_dialogues` is faster
    and counts those.
    """
    try:
        ((ids, is_response),) = encode(tokenizer, [render(tokenizer, messages, tools)])
    except Unrenderable as fault:
        raise CannotRenderError(messages, fault) from None
    return ids, is_response


def encode_prompt(tokenizer: Tokenizer, messages: Messages, tools: list[Any] | None = None) -> list[int]:
    """The ids of `messages` and the opening of the assistant's turn. Raises CannotRenderError."""
    return _encode(tokenizer, messages, tools, opened=True)


def encode_scored(tokenizer: Tokenizer, messages: Messages, tools: list[Any] | None = None) -> list[int]:
    """The ids that a reward model reads: the dialogue up to and including the token that ends the last reply.

    The one rendering for the reward model's training and for PPO's scoring: there, the same ids arise as prompt ids
    followed by the sampled reply. Raises CannotRenderError.
    """
    return until_stop(tokenizer, _encode(tokenizer, messages, tools, opened=False))


def until_stop(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """`ids` up to and including the last token that ends a reply; all of them where there is none."""
    stops = stop_ids(tokenizer)
    last = max((at for at, token in enumerate(ids) if token in stops), default=len(ids) - 1)
    return ids[: last + 1]


def _encode(tokenizer: Tokenizer, messages: Messages, tools: list[Any] | None, opened: bool) -> list[int]:
    """As fine-tuning encodes a dialogue: each reply apart from its header, as it is when a model answers.

    Tokenised as a whole, white space or a mark at the header's end may join the reply, and the ids are others.
    """
    try:
        rendered = render(tokenizer, messages, tools, opened)
    except UnstableError:  # a base's own template, which SFT refuses: there are no replies in it to keep apart
        rendered = render_whole(tokenizer, messages, tools, opened)
    except Unrenderable as fault:
        raise CannotRenderError(messages, fault) from None
    return encode(tokenizer, [rendered])[0][0]
