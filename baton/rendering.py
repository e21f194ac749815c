"""A dialogue as text by its chat template, and which stretches of the text the assistant says."""

from __future__ import annotations

import re
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

TODAY = datetime(2024, 7, 26)
"""What a template that tells the date is given, Llama 3's own default: a resume tomorrow must read the same tokens."""

_TELLS_DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")


class Unrenderable(Exception):
    """The template refuses a dialogue, leaves a part of it out, or does not tell what the assistant says in it."""


class UnstableError(Unrenderable):
    """A template without markers whose text changes when a dialogue goes on, so that no reply can be found in it."""


class Rendered(NamedTuple):
    """A dialogue's text, and the stretches [start, stop) of it, in characters, that the assistant says."""

    text: str
    said: list[tuple[int, int]]


def marks_turns(template: str) -> bool:
    """Whether a template marks what the assistant says, by {% generation %} … {% endgeneration %}."""
    return _MARKER.search(template) is not None


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any] | None = None, opened: bool = False
) -> Rendered:
    """The text of a dialogue, with the assistant's stretches: from the template's markers, else from its prefixes.

    With `opened` the text goes on to where the assistant's next turn begins. Raises Unrenderable where the template
    refuses the dialogue, leaves out a tool, a call or a result, or is not prefix-stable without markers
    (`said_by_prefixes`).
    """
    text, said = _run(tokenizer, messages, tools, opened)
    _check_tools(text, messages, tools)
    # a tool's name stands in its calls too
    if tools and text == _run(tokenizer, messages, None, opened)[0]:
        raise Unrenderable("the template leaves the tools out")
    if not marks_turns(str(tokenizer.chat_template)):
        said = said_by_prefixes(tokenizer, messages, tools, text)
    else:
        specials = special_tokens(tokenizer)
        said = [(first, _end_of_turn(text, first, last, specials)) for first, last in said]
    return Rendered(text, said)


def render_whole(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any] | None = None, opened: bool = False
) -> Rendered:
    """The text alone, in one piece, by a template in which replies cannot be told apart. Raises Unrenderable."""
    text = _run(tokenizer, messages, tools, opened)[0]
    _check_tools(text, messages, tools)
    return Rendered(text, [])


def _end_of_turn(text: str, first: int, last: int, specials: re.Pattern[str] | None) -> int:
    """Where what is sampled ends in text[first:last]: white space behind the turn's last special token never is."""
    ends = [found.end() for found in specials.finditer(text, first, last)] if specials else []
    return ends[-1] if ends and text[ends[-1] : last].isspace() else last


def said_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any] | None, text: str
) -> list[tuple[int, int]]:
    """What the assistant says in `text`, the rendering of `messages`, by a template that marks nothing.

    A reply is what comes between the rendering that opens the assistant's turn and the one that ends with it, up to
    the last special token there; what follows that token, commonly a line break, is never sampled. It holds only where
    each of these is the beginning of the next: else Unrenderable, with the first text that differs.
    """
    specials = special_tokens(tokenizer)
    said = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _run(tokenizer, messages[:at], tools, opened=True)[0]
        after = _run(tokenizer, messages[: at + 1], tools, opened=False)[0]
        _check_begins(after, before, f"message {at + 1} rendered", "the opening of the assistant's turn")
        _check_begins(text, after, "the whole dialogue", f"its first {at + 1} messages")
        ends = [found.end() for found in specials.finditer(after, len(before))] if specials else []
        said.append((len(before), ends[-1] if ends else len(after)))
    return said


def encode(tokenizer: PreTrainedTokenizerBase, rendered: list[Rendered]) -> list[tuple[list[int], list[bool]]]:
    """(ids, is_said) of each rendered dialogue.

    What the assistant says is tokenised apart from what comes before it, as it is when a model answers a prompt: no
    token reaches over the border, and the ids of a prompt followed by those of a reply are the ids of the dialogue.
    """
    if not splits_freely(tokenizer):
        return [_encode_whole(tokenizer, one) for one in rendered]
    pieces: list[str] = []
    flags: list[bool] = []
    counts: list[int] = []
    for text, said in rendered:
        start, before = 0, len(pieces)
        for first, last in said:
            for piece, flag in ((text[start:first], False), (text[first:last], True)):
                if piece:
                    pieces.append(piece)
                    flags.append(flag)
            start = last
        if start < len(text):
            pieces.append(text[start:])
            flags.append(False)
        counts.append(len(pieces) - before)
    found = _encode_batch(tokenizer, pieces)
    encoded = []
    at = 0
    for count in counts:
        ids: list[int] = []
        is_said: list[bool] = []
        for piece_ids, flag in zip(found[at : at + count], flags[at : at + count], strict=True):
            ids += piece_ids
            is_said += [flag] * len(piece_ids)
        encoded.append((ids, is_said))
        at += count
    return encoded


def _encode_batch(tokenizer: PreTrainedTokenizerBase, pieces: list[str]) -> list[list[int]]:
    """The ids of each piece; past transformers' wrapper, which takes longer than the tokenizer itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [list(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces]  # type: ignore[arg-type]
    # a setting that some call or the tokenizer's file left behind would cut or fill up what is encoded here
    backend.no_truncation()
    backend.no_padding()
    return [found.ids for found in backend.encode_batch_fast(pieces, add_special_tokens=False)]


def splits_freely(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text may be tokenised in pieces; SentencePiece models put a space in front of every piece."""
    whole, left, right = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a\nb", "a\n", "b"))
    return bool(whole == left + right)  # type: ignore[operator]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What finds the special tokens that a text spells out, or None where the tokenizer has none."""
    names = {*tokenizer.all_special_tokens, *_added_specials(tokenizer)}
    return _any_of(tuple(sorted(filter(None, names), key=lambda name: (-len(name), name))))


_ADDED: WeakKeyDictionary[Any, tuple[int, list[str]]] = WeakKeyDictionary()


def _added_specials(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that have no role of their own, such as reserved ones; asked for only once, as some have 256."""
    if not hasattr(tokenizer, "added_tokens_decoder"):
        return []
    known = _ADDED.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        known = _ADDED[tokenizer] = (len(tokenizer), names)
    return known[1]


@lru_cache(maxsize=16)
def _any_of(names: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("|".join(re.escape(name) for name in names)) if names else None


def _run(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: list[Any] | None, opened: bool
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    # a key whose value is None counts as missing, as in apply_chat_template
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    template = _dated(str(tokenizer.chat_template))
    marked = marks_turns(template)
    # render_jinja_template is annotated as giving a str; it gives the texts and the said stretches of each
    draw: Any = render_jinja_template
    try:
        texts, stretches = draw(
            conversations=[plain],
            tools=tools or None,
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=opened,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError) as fault:
        raise Unrenderable(f"the template refuses it: {fault}") from None
    return str(texts[0]), [(first, last) for first, last in stretches[0]] if marked else []


@lru_cache(maxsize=16)
def _dated(template: str) -> str:
    """The template with TODAY's date where it asks for today's: what is called in a template cannot be handed in."""
    return _TELLS_DATE.sub(lambda asked: repr(TODAY.strftime(asked[2])), template)


def _check_tools(text: str, messages: Messages, tools: list[Any] | None) -> None:
    """Raises Unrenderable where the template drops a tool, a call or a result without a word."""
    for tool in tools or []:
        name = _name(tool)
        if name and name not in text:
            raise Unrenderable("the template leaves the tools out")
    for message in messages:
        for call in message.get("tool_calls") or []:
            if (name := _name(call)) and name not in text:
                raise Unrenderable("the template leaves tool calls out")
        if message["role"] == "tool" and message["content"].strip():
            # some templates write a result as JSON
            words = re.findall(r"[^\W_]+", message["content"], re.ASCII)
            if words and any(word not in text for word in words):
                raise Unrenderable("the template leaves tool results out")


def _name(tool: Any) -> str | None:
    if not isinstance(tool, dict):
        return None
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else tool.get("name")
    return name if isinstance(name, str) else None


def _check_begins(text: str, beginning: str, whole: str, part: str) -> None:
    if text.startswith(beginning):
        return
    at = next((at for at, (a, b) in enumerate(zip(text, beginning, strict=False)) if a != b), len(text))
    raise UnstableError(
        f"the template marks no assistant turns and is not prefix-stable: {whole} does not begin with {part}; at "
        f"character {at + 1} there is {text[at : at + 30]!r} instead of {beginning[at : at + 30]!r}"
    )


def _encode_whole(tokenizer: PreTrainedTokenizerBase, rendered: Rendered) -> tuple[list[int], list[bool]]:
    """In one piece, by the tokens' offsets: a token is said if it begins at or after the stretch's start."""
    encoded: Any = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    is_said = [False] * len(ids)
    for first, last in rendered.said:
        for at, (start, stop) in enumerate(offsets):
            if start >= first and stop <= last and start < stop:
                is_said[at] = True
    return ids, is_said
