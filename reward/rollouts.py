"""Replies to be judged: several to each prompt from one or two models, as lines of a file that can be gone on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from baton.chat import Messages
from baton.errors import UserError
from baton.progress import Progress
from baton.registry import Registry, Version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS_AT_ONCE = 32
"""Prompts that are sampled together and then written. What a reply is may depend, by rounding, on its company: the
same prompts go together whenever the work is taken up again, so that the file is the same whatever interrupted it."""


@dataclass(frozen=True)
class Settings:
    """What decides the lines of a file, besides the prompts and the models."""

    replies: int  # to each prompt
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What there is now."""

    pairs: int  # lines of the file
    same: int  # prompts whose replies were all the same: there is nothing to judge, and they have no line
    unfit: int  # prompts that are too long for a model, or spell out a special token


@dataclass(frozen=True)
class _Speaker:
    """A model that replies."""

    version: Version
    model: Any
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, registry: Registry, version: Version) -> _Speaker:
        """On the GPU where there is one."""
        from baton.models import load_policy

        model, tokenizer = load_policy(registry, version)
        return cls(version, model.to(_device()), tokenizer)


def read_prompts(path: str, file_format: str | None = None, limit: int | None = None) -> tuple[list[Messages], str]:
    """(the first `limit` different prompts, what was kept and dropped in words). Raises UserError.

    path: as a recipe names data, from the current folder on; file_format: one of `baton.data.FORMATS`, or None where
    the fields tell.
    """
    from baton.data import load, report
    from baton.recipe import Source

    loaded = load(Source.model_validate({"path": path, "format": file_format}), Path.cwd(), "prompt")
    different = {_canonical(row["prompt"]): row["prompt"] for row in loaded.rows}
    told = report([loaded])
    if len(different) < len(loaded.rows):
        told += f"\n  {len(loaded.rows) - len(different):,} × repeats another prompt"
    return list(different.values())[:limit], told


def check_versions(versions: Sequence[Version]) -> None:
    """Raises UserError where a version does not answer prompts, or two are the same."""
    from baton.models import check_answers

    for version in versions:
        check_answers(version)
    if len({version.digest for version in versions}) < len(versions):
        raise UserError(f"{versions[0].ref} and --with are the same version; leave --with out: it replies --n times")


def write_rollouts(
    registry: Registry,
    versions: Sequence[Version],
    prompts: Sequence[Messages],
    settings: Settings,
    out: Path,
    shown: bool = True,
) -> Outcome:
    """Write a line a prompt to `out`, in the prompts' order; what is there already stays.

    A line: {"pair": digest of prompt and texts, "prompt": messages, "replies": [{"model", "digest", "text", "ended"},
    …]}; reply k is by version k modulo their number. A file that was cut off anywhere goes on to the bytes that it
    would have had. FILE.rollout beside it says what it was begun with; one that was begun otherwise, or that
    another process is writing, raises UserError.
    """
    from baton.sampling import can_answer

    assert settings.replies >= max(2, len(versions)) and settings.temperature > 0
    facts = _facts(versions, prompts, settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a+b") as file, _locked(file, out):
        finished = _begin(file, out, facts)
        if finished is not None:
            return finished
        speakers = [_Speaker.load(registry, version) for version in versions]
        todo = [
            prompt
            for prompt in prompts
            if all(can_answer(each.model, each.tokenizer, prompt, settings.max_new_tokens) for each in speakers)
        ]
        if not todo:
            raise UserError(
                f"none of {len(prompts):,} prompts can be answered: each spells out a special token, or leaves no room "
                f"for {settings.max_new_tokens} tokens in the model's context"
            )
        with Progress("rollout", len(todo), "replies", shown=shown) as progress:
            pairs = _go_on(file, out, speakers, todo, settings, progress)
        outcome = Outcome(pairs, len(todo) - pairs, len(prompts) - len(todo))
        _note(out, facts | {"finished": asdict(outcome) | {"bytes": file.seek(0, os.SEEK_END)}})
        return outcome


def _go_on(
    file: IO[bytes],
    out: Path,
    speakers: Sequence[_Speaker],
    todo: Sequence[Messages],
    settings: Settings,
    progress: Progress,
) -> int:
    """Append the lines that `file` lacks. Returns how many it has then."""
    places = {_canonical(prompt): place for place, prompt in enumerate(todo)}
    written = _read_back(file, out, places)
    first = max(written, default=-1) + 1
    for start in range(first - first % PROMPTS_AT_ONCE, len(todo), PROMPTS_AT_ONCE):
        group = todo[start : start + PROMPTS_AT_ONCE]
        for place, line in enumerate(_lines(speakers, group, settings), start):
            if line is not None and place not in written:
                file.write(line)
                written.add(place)
        file.flush()
        os.fsync(file.fileno())
        progress.update(start + len(group), len(group) * settings.replies, {"pairs": len(written)})
    return len(written)


def _read_back(file: IO[bytes], out: Path, places: dict[str, int]) -> set[int]:
    """Which prompts have a line; what was cut off at the end of the file is taken away."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    file.truncate(whole)
    written = set()
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            place = places[_canonical(json.loads(line)["prompt"])]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{out} line {number} is not of these prompts: the file has been changed since it was begun. Give "
                "another --out, or take the file away"
            ) from None
        written.add(place)
    return written


def _lines(speakers: Sequence[_Speaker], group: Sequence[Messages], settings: Settings) -> Iterator[bytes | None]:
    """The line of each prompt; None where all replies are the same."""
    from baton.sampling import answers, reply_text

    said: list[dict[int, dict[str, Any]]] = [{} for _ in group]
    for number, speaker in enumerate(speakers):
        draws = range(number, settings.replies, len(speakers))
        replies = answers(
            speaker.model,
            speaker.tokenizer,
            [prompt for prompt in group for _ in draws],
            [draw for _ in group for draw in draws],
            seed=settings.seed,
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
        )
        origin = {"model": speaker.version.ref, "digest": speaker.version.digest}
        for at, reply in enumerate(replies):
            text = reply_text(speaker.tokenizer, reply)
            said[at // len(draws)][draws[at % len(draws)]] = {**origin, "text": text, "ended": reply.ended}
    for prompt, by_draw in zip(group, said, strict=True):
        replies_in_order = [by_draw[draw] for draw in range(settings.replies)]
        texts = [reply["text"] for reply in replies_in_order]
        if len(set(texts)) < 2:
            yield None
            continue
        row = {"pair": _digest([prompt, texts]), "prompt": prompt, "replies": replies_in_order}
        yield _line(row)


def _line(row: dict[str, Any]) -> bytes:
    """One line for every reader: letters that some take for the end of a line (U+2028) are escaped."""
    text = json.dumps(row, ensure_ascii=False)
    for letter in "\x85\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text.encode() + b"\n"


def _begin(file: IO[bytes], out: Path, facts: dict[str, Any]) -> Outcome | None:
    """Note what the file is begun with, or check it against what it was begun with; the outcome if it is finished."""
    size = file.seek(0, os.SEEK_END)
    path = _note_path(out)
    if not size:
        _note(out, facts)
        return None
    if not path.is_file():
        raise UserError(
            f"{out} exists, and no {path.name} beside it says that baton rollout began it; give another --out"
        )
    found = json.loads(path.read_text(encoding="utf-8"))
    finished = found.pop("finished", None)
    if found != facts:
        changed = [key for key in facts if found.get(key) != facts[key]]
        differences = "; ".join(f"{key} was {found.get(key)}, now {facts[key]}" for key in changed)
        raise UserError(f"{out} was begun with something else: {differences}. Give another --out, or take it away")
    if finished is None or finished.pop("bytes") != size:
        return None
    return Outcome(**finished)


def _note_path(out: Path) -> Path:
    return out.with_name(out.name + ".rollout")


def _note(out: Path, facts: dict[str, Any]) -> None:
    aside = out.with_name(out.name + ".rollout.new")
    aside.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, _note_path(out))


@contextmanager
def _locked(file: IO[bytes], out: Path) -> Iterator[None]:
    """Alone with the file, until it is closed."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing {out}; wait for it, or give another --out") from None
    yield


def _facts(versions: Sequence[Version], prompts: Sequence[Messages], settings: Settings) -> dict[str, Any]:
    """What the bytes of a file follow from."""
    models = [f"{version.ref}@{version.digest}" for version in versions]
    return {"models": models, "prompts": _digest(list(prompts)), **asdict(settings), "device": _device()}


def _device() -> str:
    """A GPU's sums differ from a CPU's in their last bits, and so, now and then, does a sampled token."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _digest(value: Any) -> str:
    return f"sha256:{hashlib.sha256(_canonical(value).encode()).hexdigest()}"
