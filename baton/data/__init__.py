"""Data sources: loaded into a stage's normalised rows, fingerprinted, mixed by weight and reported.

Formats (`format:` in a recipe) and what a row of each looks like:

- `text`: `{text}`, or a .txt file, which is one document whatever its lines are.
- `lines`: a .txt file with one document (or prompt) a line. Never detected: it has to be declared.
- `messages`: `messages` of {role, content} or of strings spoken in turn (the user begins), or `utterances` of
  {name, text}.
- `prompt_completion`: `prompt`, `question` or `query` with `response`, `completion` or `answer`. An Alpaca
  template around the prompt is taken off.
- `alpaca`: `instruction`, `input`, `output`; instruction and input become one user turn, with a blank line
  between.
- `sharegpt`: `conversations` of {from, value}; `function_call` and `observation` are a tool call and its result.
- `oasst`: Open Assistant's message trees; see `formats._oasst` for the paths that are taken.
- `hh`: `chosen` and `rejected` transcripts with "Human:" and "Assistant:".
- `preference`: `chosen` and `rejected` (strings, a message, or messages) with `prompt`, `conversations` or
  `instruction`; or whole dialogues on both sides.
- `arena`: `response_a` and `response_b` with a prompt, or whole dialogues `conversation_a` and `conversation_b`, and
  the `winner`: model_a, model_b, tie or tie (bothbad).
- `prompts`: `prompt`, `turns` (the first is the prompt), `question`, `query` or `text`; what else the row has
  stays in `columns`.

A dialogue's `tools` (or `functions`) go to the chat template with it; see `tools` for how calls are written.

Where `format:` is left out, the fields of the first row decide, if they make it plain. `formats.SERVES` says
which kinds of rows each format can give: preferences serve dialogues by their chosen side, dialogues serve
prompts by what comes before the last reply.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.data.faults import BadRow, Unusable
from baton.data.files import Record, digest, locate, place_unit, read_hub, read_records
from baton.data.formats import FORMATS, KINDS, SERVES, convert, detect
from baton.data.turns import check_row
from baton.errors import UserError

if TYPE_CHECKING:
    from baton.recipe import Source

__all__ = ["FORMATS", "KINDS", "Dropped", "Loaded", "examples", "fingerprint", "load", "mix", "report"]


@dataclass(frozen=True)
class Dropped:
    """Rows of one source that were left out for one reason."""

    reason: str
    count: int
    first_line: int  # 1-based; of a .json array, parquet or hub dataset: the row
    file: str  # where the first of them is


@dataclass
class Loaded:
    """A source's normalised rows, what was left out, and the fingerprint for manifests."""

    rows: list[dict]
    dropped: list[Dropped]
    fingerprint: dict[str, Any]
    places: list[tuple[str, int]] = field(default_factory=list)  # of each row: its file and number there


def load(source: Source, folder: Path, kind: str) -> Loaded:
    """Read a source into rows of `kind`; a relative path starts at `folder`.

    Rows by kind: text {"text"}, dialogue {"messages"} and, where the source has them, {"tools"}, preference {"prompt",
    "chosen", "rejected"} and, where the source tells them, {"margin", "is_tie", "annotator", "pair"}
    (`judgement.judgement_of`), prompt {"prompt", "columns"}. Raises UserError for whatever is wrong with the file, by
    file and line. Rows that are well-formed but useless (empty, no reply, equal sides) are dropped and counted; it is
    an error if none is left.
    """
    facts = fingerprint(source, folder)
    rows: list[dict] = []
    places: list[tuple[str, int]] = []
    dropped: dict[str, Dropped] = {}
    for record, result in examples(source, folder, kind):
        if isinstance(result, dict):
            rows.append(result)
            places.append((record.file, record.number))
        else:
            seen = dropped.get(result) or Dropped(result, 0, record.number, record.file)
            dropped[result] = Dropped(result, seen.count + 1, seen.first_line, seen.file)
    if not rows:
        raise UserError(_nothing_left(source.path, list(dropped.values())))
    return Loaded(rows, list(dropped.values()), {**facts, "rows": len(rows)}, places)


def examples(
    source: Source, folder: Path, kind: str, longest: int | None = None
) -> Iterator[tuple[Record, dict | str]]:
    """Every row of a source as `kind`, or why it is unusable, in order, each read when it is asked for.

    The text of a .txt file that is one document comes in parts of some `longest` characters, cut between two lines.
    With `longest` a hub dataset is streamed. Raises UserError for whatever is wrong with the file, by file and line.
    """
    assert kind in KINDS, kind
    files = locate(source.path, folder)
    if files and source.model_fields_set & {"subset", "split", "revision"}:
        raise UserError(
            f"{source.path} is a local file: subset, split and revision are for hub ids; use rows to take a part"
        )
    records = (
        read_records(files)
        if files
        else read_hub(source.path, source.subset, source.split, source.revision, streaming=longest is not None)
    )
    if source.rows:
        records = _slice(records, *source.rows, source.path)
    records = iter(records)
    first = next(records, None)
    if first is None:
        raise UserError(f"{source.path} is empty; expected at least one row")
    fmt = _settle_format(source, first, kind)
    for record in _rows_of_text(chain([first], records), fmt, longest):
        for result in _examples(record, fmt, kind):
            yield record, result


def fingerprint(source: Source, folder: Path) -> dict[str, Any]:
    """What identifies a source: all of `Loaded.fingerprint` but the number of rows, without parsing any.

    `sha256` and `size` are of the raw bytes, `format` as declared. A hub dataset has no bytes before it is
    downloaded: its id, `revision`, `subset` and `split` identify it, so that a change is noticed only if the revision
    is one commit.
    """
    files = locate(source.path, folder)
    sha256, size = digest(files) if files else (None, None)
    facts = {
        "path": source.path,
        "format": source.format,
        "sha256": sha256,
        "size": size,
        "licence": source.licence,
        "weight": source.weight,
        "slice": list(source.rows) if source.rows else None,
    }
    return facts if files else {**facts, "subset": source.subset, "split": source.split, "revision": source.revision}


def mix(loaded: list[Loaded], seed: int) -> list[dict]:
    """One epoch: each source's rows `weight` times, shuffled. The same inputs and seed give the same order.

    Weight 2.0 is every row twice, 0.5 a random half of them, 1.5 every row and a random half again. Repeated
    rows are the same objects. Raises UserError for a weight that leaves a source without any row.
    """
    epoch: list[dict] = []
    for index, item in enumerate(loaded):
        weight = item.fingerprint["weight"]
        num_rows, whole = len(item.rows), int(weight)
        extra = int((weight - whole) * num_rows + 0.5)
        if not whole and not extra:
            path = item.fingerprint["path"]
            raise UserError(f"{path}: weight {weight:g} of {num_rows} rows leaves none; raise the weight")
        # each source draws from its own generator: one source more must not change what the others give
        picked = sorted(random.Random(f"{seed}/{index}").sample(range(num_rows), extra))
        epoch += item.rows * whole + [item.rows[row] for row in picked]
    random.Random(seed).shuffle(epoch)
    return epoch


def report(loaded: list[Loaded]) -> str:
    """A line a source with the rows kept and dropped, then one a reason with its count and first place."""
    lines = []
    for item in loaded:
        count = sum(drop.count for drop in item.dropped)
        weight = item.fingerprint["weight"]
        lines.append(
            f"{item.fingerprint['path']}: {_counted(len(item.rows))} kept"
            + (f", {count:,} dropped" if count else "")
            + (f", weight {weight:g}" if weight != 1 else "")
        )
        lines += [f"  {_drop_line(drop)}" for drop in item.dropped]
    return "\n".join(lines)


def _slice(records: Iterable[Record], start: int | None, stop: int | None, path: str) -> Iterator[Record]:
    """Raw rows start (0-based) up to stop, over all files of the source; the rows of a .txt are its lines."""
    first, number = start or 0, 0
    if stop is not None and stop <= first:
        raise UserError(f"{path}: rows {json.dumps([start, stop])} is empty; expected a start below the stop")
    for number, record in enumerate(records, 1):
        if number > first:
            yield record
        if number == stop:
            return
    if stop is not None or number <= first:
        shown = json.dumps([start, stop])
        raise UserError(f"{path}: rows {shown} lies outside the source, which has {_counted(number)}")


def _settle_format(source: Source, first: Record, kind: str) -> str:
    """The declared format, else the detected one. Raises UserError if it cannot be, or cannot give `kind`."""
    is_plain = isinstance(first.row, str)
    fmt = source.format or ("text" if is_plain else detect(first.row))
    if fmt is None:
        raise UserError(
            f"{first.place}: the fields {', '.join(first.row) or '(none)'} do not make the format plain. "
            f"Declare `format:` as one of {', '.join(FORMATS)}"
        )
    assert fmt in FORMATS, fmt
    if kind not in SERVES[fmt]:
        able = ", ".join(name for name in FORMATS if kind in SERVES[name])
        how = "declared" if source.format else "detected"
        raise UserError(f"{source.path}: the {how} format {fmt} cannot give {kind} rows; those that can: {able}")
    if is_plain and fmt not in ("text", "lines"):
        raise UserError(f"{first.file} is a file in another format: plain text, declared as {fmt}")
    if fmt == "lines" and not is_plain:
        raise UserError(f"{first.file} is a file in another format: lines is for .txt files, one document a line")
    if not is_plain and source.format:
        _refuse_other_format(first, fmt, kind)
    return fmt


def _refuse_other_format(first: Record, fmt: str, kind: str) -> None:
    """Raises UserError where the first row is not of the declared format and plainly of another."""
    try:
        convert(first.row, fmt, kind)
    except BadRow as fault:
        found = detect(first.row)
        if found and found != fmt:
            raise UserError(
                f"{first.file} is a file in another format: declared as {fmt}, its rows look like {found} "
                f"({first.place} {fault})"
            ) from None
    except Unusable:
        pass


def _rows_of_text(records: Iterable[Record], fmt: str, longest: int | None) -> Iterator[Record]:
    """Turns the lines of .txt files into rows: for `text` one a file, or part of `longest`; for `lines` one a line."""
    lines: list[Record] = []
    num_characters = 0
    for record in records:
        if lines and (record.file != lines[0].file or (longest and num_characters >= longest)):
            yield _document(lines)
            lines, num_characters = [], 0
        if not isinstance(record.row, str):
            yield record
        elif fmt == "text":
            lines.append(record)
            num_characters += len(record.row)
        elif fmt == "lines":
            yield record._replace(row={"text": record.row.rstrip("\r\n")})
        else:
            raise UserError(f"{record.file} is a file in another format: plain text among rows of {fmt}")
    if lines:
        yield _document(lines)


def _document(lines: list[Record]) -> Record:
    return lines[0]._replace(row={"text": "".join(line.row for line in lines)})


def _examples(record: Record, fmt: str, kind: str) -> Iterator[dict | str]:
    """The record's normalised rows; for each that is unusable, the reason."""
    try:
        examples = convert(record.row, fmt, kind)
    except Unusable as reason:
        yield str(reason)
        return
    except BadRow as fault:
        raise UserError(f"{record.place} {fault} (format {fmt})") from None
    for example in examples:
        try:
            check_row(example, kind)
        except Unusable as reason:
            yield str(reason)
        else:
            yield example


def _nothing_left(path: str, dropped: list[Dropped]) -> str:
    reasons = "; ".join(_drop_line(drop) for drop in dropped)
    if {drop.reason for drop in dropped} <= {"ends with the user", "no assistant message"}:
        return f"{path}: every dialogue ends with the user, and there is no reply to learn from ({reasons})"
    return f"{path}: no row is left ({reasons})"


def _counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows:,} rows"


def _drop_line(drop: Dropped) -> str:
    return f"{drop.count:,} × {drop.reason}, first at {drop.file} {place_unit(drop.file)} {drop.first_line}"
