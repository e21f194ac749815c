"""How a model continues held-out text: a few samples of every language, beside what the text really says."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

    from baton.corpus.shards import PreparedSource

PROMPT_TOKENS = 32
TEMPERATURE = 0.8
"""Below 1, because a small model's many unlikely tokens, each nearly right, add up to nonsense."""

UNREADABLE = "\ufffd"


class Continuation(NamedTuple):
    """A piece of a held-out document, and how the model goes on."""

    language: str
    source: str
    prompt: str
    text: str  # what the model says
    truth: str  # what the document says, in as many tokens


class _Place(NamedTuple):
    """Where a prompt comes from."""

    language: str
    source: int
    document: int
    part: int  # of `parts` equal parts of the document, the prompt begins with this one
    parts: int


def continuations(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[PreparedSource],
    n: int = 3,
    *,
    max_new_tokens: int = 64,
    temperature: float = TEMPERATURE,
    seed: int = 0,
) -> list[Continuation]:
    """`n` samples a language, from documents spread evenly over the sources, or from places in one document.

    A function of its arguments alone; what is said to one prompt does not depend on the others. The model may be in
    any mode and is left in it.
    """
    from baton.generate import context_length, document_start
    from baton.sampling import sample_replies, text_noise

    places, prompts, truths = [], [], []
    room = context_length(model)
    prompt_tokens = min(PROMPT_TOKENS, room // 2)
    max_new_tokens = min(max_new_tokens, room - prompt_tokens)
    for place in _places(sources, n):
        ids = sources[place.source].document(place.document).tolist()
        prompt, truth = _cut(tokenizer, ids, place, prompt_tokens, max_new_tokens)
        if prompt:
            places.append(place)
            prompts.append(prompt)
            truths.append(truth)
    if not prompts:
        return []
    end, was_training, used_cache = document_start(tokenizer), model.training, model.config.use_cache
    eos = tokenizer.eos_token_id
    stops = {end} if eos is None else {end, int(eos)}  # type: ignore[arg-type]
    model.eval()
    model.config.use_cache = True
    try:
        replies = sample_replies(
            model,
            prompts,
            np.stack([text_noise(seed, repr(tuple(place)), max_new_tokens) for place in places]),
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            stop_ids=sorted(stops),
            pad_id=end,
        )
    finally:
        model.train(was_training)
        model.config.use_cache = used_cache
    found = []
    for place, prompt, truth, reply in zip(places, prompts, truths, replies, strict=True):
        shown = _decode(tokenizer, prompt)
        said = reply.ids[:-1] if reply.ended else reply.ids
        # together: a character may begin in one part and end in the other
        text = _decode(tokenizer, prompt + said)[len(shown) :]
        expected = _decode(tokenizer, prompt + truth)[len(shown) :]
        found.append(Continuation(place.language, sources[place.source].name, shown, text, expected))
    return found


def continuations_table(found: Sequence[Continuation]) -> Table:
    """A row a continuation: the prompt, what the model goes on with (green), and what the text says (dim)."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    table.add_column("text")
    table.add_column("held-out text, and how the model goes on", overflow="fold", ratio=3)
    table.add_column("the text itself", overflow="fold", ratio=2, style="dim")
    for each in found:
        title = each.source if each.language == "und" else f"{each.language}\n{each.source}"
        table.add_row(title, Text.assemble(each.prompt, (each.text, "bold green")), Text(each.truth))
    return table


def _places(sources: Sequence[PreparedSource], n: int) -> list[_Place]:
    """`n` a language, in the sources' order; a document that is used more than once is used in parts."""
    documents: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, source in enumerate(sources):
        for number in range(source.num_documents):
            documents[source.document_language(number)].append((index, number))
    places = []
    for language, known in documents.items():
        chosen = [known[at * len(known) // n] for at in range(n)]
        uses, seen = Counter(chosen), Counter[tuple[int, int]]()
        for each in chosen:
            places.append(_Place(language, *each, seen[each], uses[each]))
            seen[each] += 1
    return places


def _cut(
    tokenizer: Any, ids: list[int], place: _Place, prompt_tokens: int, max_new_tokens: int
) -> tuple[list[int], list[int]]:
    """(prompt, as many tokens of what follows as may be said), at borders of characters; the prompt may be empty.

    A prompt from the beginning has the end token of the document before it, as in training.
    """
    last = len(ids) - 1  # its own end token is neither prompt nor truth
    start = place.part * last // place.parts
    stop = start + min(prompt_tokens, max(2, (last - start) // 2))
    while 0 < start < stop and _decode(tokenizer, ids[start:stop]).startswith(UNREADABLE):
        start += 1
    while stop > start and _decode(tokenizer, ids[start:stop]).endswith(UNREADABLE):
        stop -= 1
    return ids[start:stop], ids[stop : min(last, stop + max_new_tokens)]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
