"""Before fine-tuning: three dialogues as the model will see them, what was cut and dropped, and what must not be."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from baton.chat import stop_ids
from baton.chat_templates import begins_texts
from baton.dialogues import Document, Encoded
from baton.errors import UserError
from baton.rendering import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = 3
HEAD, TAIL = 220, 60
"""Tokens of a sample that are shown at its beginning and at its end."""
MANY_WITHOUT_STOP = 0.05
"""From this share of dialogues on whose end was cut off, the model is said to learn to go on for too long."""
TRAINED = "bold green underline"


def preflight(tokenizer: PreTrainedTokenizerBase, encoded: Encoded, use: str, console: Console | None) -> None:
    """Print samples, statistics and warnings on `console` (none: only check). Raises UserError for what must not run.

    On every process with the same data, so that all of them stop; only the main process has a console.
    """
    warnings = check(tokenizer, encoded, use)
    if console is None or not encoded.documents:
        return
    for number, document in enumerate(encoded.documents[:SAMPLES], 1):
        ids, is_said = document
        console.rule(f"{use} sample {number}: {len(ids):,} tokens, {sum(is_said):,} trained", align="left")
        console.print(highlighted(tokenizer, document, coloured=console.is_terminal and not console.no_color))
    legend = f"[{TRAINED}]trained[/]" if console.is_terminal and not console.no_color else "⟦trained⟧"
    console.rule(f"{legend} · {use}", align="left")
    console.print(statistics(encoded))
    for warning in warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def check(tokenizer: PreTrainedTokenizerBase, encoded: Encoded, use: str) -> list[str]:
    """Warnings about encoded dialogues. Raises UserError where no stop token is trained or a text begins twice."""
    counts, documents = encoded.counts, encoded.documents
    if not documents:
        return []
    stops = set(stop_ids(tokenizer))
    if not any(said and token in stops for ids, is_said in documents for token, said in zip(ids, is_said, strict=True)):
        cut = f"; {counts.cut:,} of {counts.rows:,} dialogues are longer than train.sequence_length: raise it"
        raise UserError(
            f"data.{use}: no dialogue trains the token that ends a turn ({tokenizer.eos_token}): the model would not "
            "learn to stop" + (cut if counts.cut else "; choose another chat_template")
        )
    return [
        *_check_begin(tokenizer, documents, use),
        *_check_header(tokenizer),
        *_check_stops(encoded, use),
    ]


def _check_begin(tokenizer: PreTrainedTokenizerBase, documents: list[Document], use: str) -> list[str]:
    begin = tokenizer.bos_token_id
    twice = sum(ids[:2] == [begin, begin] for ids, _ in documents)
    if twice:
        raise UserError(
            f"data.{use}: {twice:,} of {len(documents):,} dialogues begin with {tokenizer.bos_token} twice; take it "
            "out of the chat template, which writes it once too often"
        )
    missing = sum(ids[0] != begin for ids, _ in documents)
    if missing and begins_texts(tokenizer):
        return [
            f"the base begins every text with {tokenizer.bos_token}, and the chat template writes none; "
            "chat_template: auto, or a .jinja file that begins with {{ bos_token }}"
        ]
    return []


def _check_header(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A header that is trained is never sampled: it is part of the prompt."""
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    opening = render(tokenizer, [ask], opened=True).text
    rendered = render(tokenizer, [ask, answer])
    if not rendered.text.startswith(opening):
        return ["the chat template opens the assistant's turn with another text than the one that replies follow"]
    if rendered.said[0][0] < len(opening):
        shown = rendered.text[rendered.said[0][0] : len(opening)]
        return [f"the chat template trains {shown!r}, which the prompt already holds when a model answers"]
    return []


def _check_stops(encoded: Encoded, use: str) -> list[str]:
    counts = encoded.counts
    share = counts.without_stop / counts.kept
    if share < MANY_WITHOUT_STOP:
        return []
    return [
        f"data.{use}: in {share:.0%} of the dialogues no end of a turn is left after they were cut: replies get too "
        "long. Raise train.sequence_length, or leave long dialogues out by on_long: drop"
    ]


def highlighted(tokenizer: PreTrainedTokenizerBase, document: Document, coloured: bool) -> Text:
    """A document's text, what is trained in colour or, without colours, in ⟦ ⟧; a long one without its middle."""
    ids, is_said = document
    text = Text()
    hidden = len(ids) - HEAD - TAIL
    if hidden > 0:
        _append(tokenizer, text, (ids[:HEAD], is_said[:HEAD]), coloured)
        text.append(f" … {hidden:,} tokens … ", style="dim")
        ids, is_said = ids[-TAIL:], is_said[-TAIL:]
    _append(tokenizer, text, (ids, is_said), coloured)
    return text


def _append(tokenizer: PreTrainedTokenizerBase, text: Text, document: Document, coloured: bool) -> None:
    for said, run in groupby(zip(*document, strict=True), key=lambda pair: pair[1]):
        shown = str(tokenizer.decode([token for token, _ in run], skip_special_tokens=False))
        # an escape sequence in the data would be the terminal's to obey
        shown = "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in shown)
        if coloured:
            text.append(shown, style=TRAINED if said else "")
        else:
            text.append(f"⟦{shown}⟧" if said else shown)


def statistics(encoded: Encoded) -> Table:
    """Counts of dialogues and tokens, and why rows were dropped."""
    counts = encoded.counts
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    share = counts.trained / counts.tokens if counts.tokens else 0.0
    rows = [
        ("dialogues", f"{counts.kept:,} of {counts.rows:,}"),
        ("tokens", f"{counts.tokens:,}, {counts.trained:,} of them trained ({share:.1%})"),
        ("tokens a dialogue", f"{counts.mean_length:,.0f} on average; the longest had {counts.longest:,}"),
        ("cut", f"{counts.cut:,}, {counts.without_stop:,} of them without an end of a turn left"),
        *((f"dropped: {reason}", f"{count:,}") for reason, count in counts.dropped.most_common()),
    ]
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table
