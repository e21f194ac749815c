"""What is wrong with preference pairs before anything is trained on them: repeats, contradictions, leaked prompts."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from baton.data.files import place_unit
from baton.data.turns import Messages
from baton.errors import UserError
from reward.agreement import Agreement, Judgement, Verdict, agreement, in_words

Repeated = Literal["vote", "keep", "drop"]


@dataclass(frozen=True)
class Placed:
    """A normalised preference row, and the file and row that it came from."""

    row: dict[str, Any]
    file: str
    number: int
    source: int = 0  # which of the recipe's sources

    @property
    def place(self) -> str:
        return f"{self.file} {place_unit(self.file)} {self.number}"


@dataclass
class Findings:
    """What an audit of one use's pairs found; counts are of rows where the name says rows, else of different pairs."""

    rows: int = 0
    kept: int = 0
    revised: int = 0  # rows that the same annotator judged again under the same `pair`: the later one counts
    repeats: int = 0  # rows that say of a pair what an earlier row says
    contradictions: int = 0  # pairs that rows judge differently: both ways, or a tie once
    both_ways: int = 0  # of them those with either reply chosen over the other
    voted: int = 0  # of them those that a majority settled
    dropped: int = 0  # of them those left out: no majority, or `repeated: drop`
    ties: int = 0  # kept rows
    margins: int = 0  # kept rows
    first_repeat: str = ""
    first_contradiction: str = ""
    agreement: Agreement | None = None

    def report(self, use: str, repeated: Repeated) -> str:
        """A line with the sum, and one for each thing found, with its first place."""
        facts = [f"{self.ties:,} ties"] * bool(self.ties) + [f"{self.margins:,} with a margin"] * bool(self.margins)
        lines = [f"{use}: {self.kept:,} pairs of {self.rows:,} judgements" + "".join(f", {fact}" for fact in facts)]
        if self.revised:
            lines.append(f"  {self.revised:,} × judged again by the same annotator, whose last judgement counts")
        if self.repeats:
            done = "kept" if repeated == "keep" else "kept once"
            lines.append(f"  {self.repeats:,} × a pair judged again, alike ({done}), first {self.first_repeat}")
        if self.contradictions:
            done = "kept" if repeated == "keep" else f"{self.voted:,} by majority, {self.dropped:,} dropped"
            ways = f"{self.both_ways:,} of them both ways"
            first = self.first_contradiction
            lines.append(f"  {self.contradictions:,} × a pair judged differently, {ways} ({done}), first {first}")
        if self.agreement:
            lines.append(f"  {in_words(self.agreement)}")
        return "\n".join(lines)

    def facts(self, use: str) -> dict[str, float]:
        """The findings as metrics `data/<use>/…` for a manifest; an undefined coefficient is left out."""
        names = ("kept", "revised", "repeats", "contradictions", "both_ways", "dropped", "ties")
        found: dict[str, float | None] = {name: getattr(self, name) for name in names}
        if self.agreement:
            found |= {
                "annotators": self.agreement.annotators,
                "cohen_kappa": self.agreement.cohen,
                "fleiss_kappa": self.agreement.fleiss,
                "krippendorff_alpha": self.agreement.alpha,
            }
        return {f"data/{use}/{name}": value for name, value in found.items() if value is not None}


def audit(judged: list[Placed], repeated: Repeated) -> tuple[list[Placed], Findings]:
    """The rows that count, in their order, and what was found.

    A pair is a prompt and two replies, in either order. Of one judged more than once, `repeated` keeps every row
    (`keep`), one row that says what the majority says (`vote`), or one row unless the judgements differ (`drop`). A
    majority has more votes than either other verdict has; its row's margin is the mean of the majority's.
    """
    keyed, num_revised = _last_words([(item, *pair_key(item.row)) for item in judged])
    groups: dict[str, list[tuple[Placed, Verdict]]] = defaultdict(list)
    for item, key, verdict in keyed:
        groups[key].append((item, verdict))
    found = Findings(rows=len(judged), revised=num_revised, agreement=agreement(_named(groups)))
    for group in groups.values():
        _count(group, found)
    kept = [item for item, _, _ in keyed] if repeated == "keep" else _settled(list(groups.values()), repeated, found)
    found.kept = len(kept)
    found.ties = sum(bool(item.row.get("is_tie")) for item in kept)
    found.margins = sum(item.row.get("margin") is not None for item in kept)
    return kept, found


def judgements_of(rows: list[dict[str, Any]]) -> list[Judgement]:
    """The judgements in normalised preference rows that name their annotator, for `reward.agreement.agreement`."""
    keyed = [(row, *pair_key(row)) for row in rows if row.get("annotator")]
    return [Judgement(row["annotator"], key, verdict) for row, key, verdict in keyed]


def pair_key(row: dict[str, Any]) -> tuple[str, Verdict]:
    """(what identifies the pair, which reply won) whatever order the two replies came in.

    Compared without the white space at the ends of the messages. Reply a is the one with the smaller hash: an order
    that has nothing to do with the text, so that neither verdict is more likely from the start.
    """
    prompt, chosen, rejected = (_digest(row[part]) for part in ("prompt", "chosen", "rejected"))
    verdict: Verdict = "tie" if row.get("is_tie") else "a" if chosen < rejected else "b"
    return prompt + min(chosen, rejected) + max(chosen, rejected), verdict


def check_leakage(train: list[Placed], held_out: list[Placed], leakage: Literal["refuse", "drop"]) -> list[Placed]:
    """The training rows without those on prompts that are held out too, for `drop`; for `refuse` a UserError if any.

    Prompts are compared as `plain_prompt` writes them. Also raises UserError if no training row is left.
    """
    held: dict[str, Placed] = {}
    for item in held_out:
        held.setdefault(plain_prompt(item.row["prompt"]), item)
    prompts = [plain_prompt(item.row["prompt"]) for item in train]
    leaked = [(item, prompt) for item, prompt in zip(train, prompts, strict=True) if prompt in held]
    if not leaked:
        return train
    kept = [item for item, prompt in zip(train, prompts, strict=True) if prompt not in held]
    (first, its_prompt), count = leaked[0], len({prompt for _, prompt in leaked})
    found = (
        f"data: {count:,} of the {len(held):,} held-out prompts {'is' if count == 1 else 'are'} trained on too, in "
        f"{len(leaked):,} of {len(train):,} pairs; the first is {_shown(first.row['prompt'])} ({first.place} and "
        f"{held[its_prompt].place})"
    )
    if leakage == "refuse":
        raise UserError(
            f"{found}. Accuracy on them would not be of unseen prompts: take other rows for data.eval, or set "
            "data.leakage: drop to leave these pairs out of training"
        )
    if not kept:
        raise UserError(f"{found}. Without them no pair is left to train on: take other rows for data.eval")
    return kept


def plain_prompt(prompt: Messages) -> str:
    """A prompt for comparing: who says what, without case, width and composition of characters, and white space."""
    said = [
        (turn["role"], " ".join(unicodedata.normalize("NFKC", turn["content"]).casefold().split())) for turn in prompt
    ]
    return json.dumps(said)


def _last_words(keyed: list[tuple[Placed, str, Verdict]]) -> tuple[list[tuple[Placed, str, Verdict]], int]:
    """Without the rows that a later row of the same annotator and `pair` replaces, and how many those were.

    Rows without the name of a pair are all kept: a judge who is asked in both orders gives two judgements.
    """
    last: dict[tuple[str, str, str], int] = {}
    for at, (item, key, _) in enumerate(keyed):
        if item.row.get("annotator") and item.row.get("pair"):
            last[item.row["annotator"], item.row["pair"], key] = at
    standing = set(last.values())
    kept = [
        entry
        for at, entry in enumerate(keyed)
        if at in standing or not (entry[0].row.get("annotator") and entry[0].row.get("pair"))
    ]
    return kept, len(keyed) - len(kept)


def _named(groups: dict[str, list[tuple[Placed, Verdict]]]) -> list[Judgement]:
    return [
        Judgement(item.row["annotator"], key, verdict)
        for key, group in groups.items()
        if len(group) > 1
        for item, verdict in group
        if item.row.get("annotator")
    ]


def _count(group: list[tuple[Placed, Verdict]], found: Findings) -> None:
    """Add one pair's judgements to the findings."""
    seen: dict[Verdict, Placed] = {}
    for item, verdict in group:
        if verdict in seen:
            found.repeats += 1
            found.first_repeat = found.first_repeat or f"at {seen[verdict].place} and {item.place}"
        elif len(seen) == 1:
            found.contradictions += 1
            other = next(iter(seen.values()))
            found.first_contradiction = found.first_contradiction or f"at {other.place} and {item.place}"
        seen.setdefault(verdict, item)
    found.both_ways += {"a", "b"} <= seen.keys()


def _settled(groups: list[list[tuple[Placed, Verdict]]], repeated: Repeated, found: Findings) -> list[Placed]:
    kept: list[Placed] = []
    for group in groups:
        votes = Counter(verdict for _, verdict in group).most_common()
        if len(votes) > 1:
            if repeated == "drop" or votes[0][1] == votes[1][1]:
                found.dropped += 1
                continue
            found.voted += 1
        kept.append(_merged([item for item, verdict in group if verdict == votes[0][0]], len(group)))
    return kept


def _merged(alike: list[Placed], num_judgements: int) -> Placed:
    """One row for judgements that say the same: the first, with their mean margin; of several it is nobody's own."""
    if num_judgements == 1:
        return alike[0]
    first = alike[0]
    row = {key: value for key, value in first.row.items() if key not in ("annotator", "margin")}
    margins = [item.row["margin"] for item in alike if item.row.get("margin") is not None]
    if margins:
        row["margin"] = sum(margins) / len(margins)
    return replace(first, row=row)


def _digest(messages: Messages) -> str:
    said = [{**turn, "content": turn["content"].strip()} for turn in messages]
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=12).hexdigest()


def _shown(prompt: Messages, limit: int = 80) -> str:
    text = " ".join(chain.from_iterable(turn["content"].split() for turn in prompt[-1:]))
    return json.dumps(text if len(text) <= limit else text[: limit - 1] + "…", ensure_ascii=False)
