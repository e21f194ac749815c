"""What `baton chat`, `generate` and `score` do and print, for versions of the registry."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from baton.errors import UserError
from baton.registry import Registry, Version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from baton.generate import Candidate, Step, Surprisal

BAR_CELLS = 20
SURPRISAL_STYLES = ((2.0, "green"), (6.0, "yellow"), (10.0, "bright_red"), (float("inf"), "bold white on red"))
"""(less than so many bits, style)"""


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn: temperature 0 takes the likeliest token each time."""

    max_new_tokens: int
    temperature: float
    seed: int


def chat(location: str, ref: str, sampling: Sampling, system: str | None, once: str | None, as_json: bool) -> None:
    """Talk to a version: one reply to `once`, or a conversation until the end of input. Replies are streamed."""
    if as_json and once is None:
        raise UserError("--json prints one reply as data; give its prompt by --once TEXT")
    registry, version = _resolve(location, ref)
    if version.manifest["chat_template_digest"] is None:
        raise UserError(
            f"{version.ref} has no chat template: it continues text and has not learned to answer. Continue a text by "
            f"`baton generate {ref} TEXT`, or chat with a version of the sft stage"
        )
    model, tokenizer = _load(registry, version, scorer=False)
    conversation = Conversation(model, tokenizer, sampling, system)
    if once is not None:
        reply = conversation.say(once, shown=not as_json)
        if as_json:
            _print_json({"ref": version.ref, "prompt": once, "reply": reply})
        return
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401 - gives input() its line editing and history

        print(f"{version.ref} · /reset forgets the conversation · Ctrl-C cuts a reply short · /quit or Ctrl-D leaves")
    while (text := _next_line("you> " if at_terminal else "")) is not None and text != "/quit":
        if text == "/reset":
            conversation.reset()
        elif text:
            try:
                conversation.say(text)
            except UserError as error:
                print(f"{error}; /reset forgets the conversation", file=sys.stderr)


class Conversation:
    """The messages so far, and the model that goes on with them."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, system: str | None = None
    ) -> None:
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self._system)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._system)

    def say(self, text: str, shown: bool = True) -> str:
        """The reply to `text`, printed as it is made; both join the conversation, unless no reply could be made."""
        from baton.chat import encode_prompt, stop_ids
        from baton.generate import TextStream, generate

        messages = [*self.messages, {"role": "user", "content": text}]
        stream = TextStream(self._tokenizer)
        reply = ""
        steps = generate(
            self._model,
            encode_prompt(self._tokenizer, messages),
            max_new_tokens=self._sampling.max_new_tokens,
            stop_ids=stop_ids(self._tokenizer),
            temperature=self._sampling.temperature,
            seed=self._sampling.seed + len(messages),
        )
        try:
            for step in steps:
                reply += _show(stream.push(step.token_id), shown)
        except KeyboardInterrupt:
            pass  # what has been said stays in the conversation
        reply += _show(stream.flush(), shown)
        _show("\n", shown)
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        return reply


def continue_text(location: str, ref: str, text: str, sampling: Sampling, candidates: int, as_json: bool) -> None:
    """Print the continuation of `text`, or, with `candidates` > 0, a table of what was likely at each token."""
    registry, version = _resolve(location, ref)
    model, tokenizer = _load(registry, version, scorer=False)
    from baton.chat import stop_ids
    from baton.generate import TextStream, document_start, generate

    start = document_start(tokenizer)
    stream = TextStream(tokenizer)
    streamed = not as_json and not candidates
    _show(text, streamed)
    steps: list[Step] = []
    continuation = ""
    for step in generate(
        model,
        [start, *tokenizer(text, add_special_tokens=False)["input_ids"]],
        max_new_tokens=sampling.max_new_tokens,
        stop_ids=[start, *stop_ids(tokenizer)],
        temperature=sampling.temperature,
        candidates=candidates,
        seed=sampling.seed,
    ):
        steps.append(step)
        continuation += _show(stream.push(step.token_id), streamed)
    continuation += _show(stream.flush(), streamed)
    if as_json:
        tokens = [_step_as_data(tokenizer, step) for step in steps]
        _print_json({"ref": version.ref, "text": text, "continuation": continuation, "tokens": tokens})
    elif candidates:
        _print(candidates_table(tokenizer, steps))
        print(text + continuation)
    else:
        print()


def best_of(location: str, ref: str, reward_ref: str, text: str, sampling: Sampling, count: int, as_json: bool) -> None:
    """Sample `count` replies to `text` at once and print them with a reward model's scores, the best first."""
    registry, version = _resolve(location, ref)
    scorer = registry.resolve(reward_ref)
    _check_best_of(version, scorer, sampling, count)
    model, tokenizer = _load(registry, version, scorer=False)
    from baton.chat import encode_prompt
    from baton.generate import context_length, reward
    from baton.sampling import answers, best_of_kl, reply_text

    prompt = [{"role": "user", "content": text}]
    room = context_length(model) - len(encode_prompt(tokenizer, prompt))
    if room <= 0:
        raise UserError(
            f"the text leaves no room in the {context_length(model)} tokens that the model reads; shorten it"
        )
    replies = answers(
        model,
        tokenizer,
        [prompt] * count,
        range(count),
        seed=sampling.seed,
        temperature=sampling.temperature,
        max_new_tokens=min(sampling.max_new_tokens, room),
    )
    texts = [reply_text(tokenizer, reply) for reply in replies]
    del model  # two models at once may be more than a GPU holds
    judge, their_tokenizer = _load(registry, scorer, scorer=True)
    # one that was sampled twice is scored once: ties must be ties
    scores = {
        said: reward(judge, their_tokenizer, [*prompt, {"role": "assistant", "content": said}])
        for said in dict.fromkeys(texts)
    }
    rows: list[dict[str, Any]] = [
        {"text": said, "reward": scores[said], "ended": reply.ended, "draw": draw}
        for draw, (said, reply) in enumerate(zip(texts, replies, strict=True))
    ]
    rows.sort(key=lambda row: (-row["reward"], row["draw"]))
    facts = {"ref": version.ref, "reward": scorer.ref, "prompt": text, "n": count}
    facts |= {"temperature": sampling.temperature, "seed": sampling.seed, "kl_nats_at_most": best_of_kl(count)}
    if as_json:
        _print_json({**facts, "distinct": len(scores), "replies": rows})
        return
    _print(replies_table(rows))
    print(
        f"best of {count} ({len(scores)} different) by {scorer.ref}: at most {best_of_kl(count):.2f} nats of KL from "
        f"{version.ref}"
    )


def _check_best_of(version: Version, scorer: Version, sampling: Sampling, count: int) -> None:
    """Raises UserError before anything is loaded."""
    from baton.models import check_answers

    check_answers(version)
    if scorer.kind != "reward":
        raise UserError(f"--reward {scorer.ref} is a {scorer.kind} model; expected a version of the reward stage")
    if count < 2:
        raise UserError(f"--best-of {count}: there is a best one only of 2 and more")
    if not sampling.temperature:
        raise UserError("--best-of at --temperature 0 would say the same every time; give a temperature above 0")


def score(location: str, ref: str, text: str, prompt: str | None, as_json: bool) -> None:
    """Print how natural a text is to a language model, or, for a reward model, the reward of `text` after `prompt`."""
    registry, version = _resolve(location, ref)
    kind = version.kind
    if kind == "reward" and prompt is None:
        raise UserError(
            f"{version.ref} is a reward model: it scores a reply to something. Give what was asked: --prompt PROMPT"
        )
    if kind != "reward" and prompt is not None:
        raise UserError(f"{version.ref} is a {kind} version, which has no use for --prompt; only a reward model has")
    model, tokenizer = _load(registry, version, scorer=kind == "reward")
    if prompt is not None:
        from baton.generate import reward

        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        value = reward(model, tokenizer, messages)
        if as_json:
            _print_json({"ref": version.ref, "prompt": prompt, "reply": text, "reward": value})
        else:
            print(f"reward {value:.4f}")
        return
    from baton.generate import surprisals

    scored = surprisals(model, tokenizer, text)
    bits, num_bytes = sum(each.bits for each in scored), len(text.encode())
    if as_json:
        from baton.generate import token_text

        tokens = [{**each._asdict(), "text": token_text(tokenizer, each.token_id)} for each in scored]
        _print_json(
            {"ref": version.ref, "bits_per_byte": bits / num_bytes, "bits": bits, "bytes": num_bytes, "tokens": tokens}
        )
        return
    _print(surprisals_table(tokenizer, scored))
    print(f"{bits / num_bytes:.3f} bits per byte  ({bits:.1f} bits, {num_bytes} bytes, {len(scored)} tokens)")


def candidates_table(tokenizer: PreTrainedTokenizerBase, steps: list[Step]) -> Table:
    """A row a token: what was taken, and the likeliest with their probabilities as bars."""
    table = Table(show_lines=True)
    table.add_column("token", no_wrap=True)
    table.add_column("likeliest", no_wrap=True)
    table.add_column("probability", no_wrap=True)
    for step in steps:
        names = [repr(_token_text(tokenizer, each)) for each in step.candidates]
        likeliest = Text("\n").join(
            Text(name, style="bold" if each.token_id == step.token_id else "")
            for name, each in zip(names, step.candidates, strict=True)
        )
        bars = Text("\n").join(
            Text.assemble(f"{each.probability:6.1%} ", (_bar(each.probability), "cyan")) for each in step.candidates
        )
        taken = Text(f"{_token_text(tokenizer, step)!r}\n{step.probability:.1%}", style="bold")
        table.add_row(taken, likeliest, bars)
    return table


def replies_table(rows: list[dict[str, Any]]) -> Table:
    """A row a reply with its reward; an ellipsis in brackets says that it was cut off."""
    table = Table(show_lines=True)
    table.add_column("reward", justify="right")
    table.add_column("reply", overflow="fold")
    for place, row in enumerate(rows):
        said = row["text"] if row["ended"] else f"{row['text']} […]"
        table.add_row(f"{row['reward']:.4f}", Text(said), style="" if place else "bold")
    return table


def surprisals_table(tokenizer: PreTrainedTokenizerBase, scored: list[Surprisal]) -> Table:
    """A row a token: its text and its surprisal in bits, coloured from expected to astonishing."""
    table = Table()
    table.add_column("token", no_wrap=True)
    table.add_column("bits", justify="right")
    table.add_column("")
    for each in scored:
        style = next(style for limit, style in SURPRISAL_STYLES if each.bits < limit)
        bar = "█" * min(BAR_CELLS, max(1, round(each.bits)))
        table.add_row(Text(repr(_token_text(tokenizer, each)), style), Text(f"{each.bits:.2f}"), Text(bar, style))
    return table


def _token_text(tokenizer: PreTrainedTokenizerBase, token: Step | Candidate | Surprisal) -> str:
    from baton.generate import token_text

    return token_text(tokenizer, token.token_id)


def _step_as_data(tokenizer: PreTrainedTokenizerBase, step: Step) -> dict[str, Any]:
    row: dict[str, Any] = {"token_id": step.token_id, "text": _token_text(tokenizer, step)}
    row["probability"] = step.probability
    if step.candidates:
        row["candidates"] = [{**each._asdict(), "text": _token_text(tokenizer, each)} for each in step.candidates]
    return row


def _bar(share: float) -> str:
    eighths = round(share * BAR_CELLS * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def _resolve(location: str, ref: str) -> tuple[Registry, Version]:
    registry = Registry(location)
    return registry, registry.resolve(ref)


def _load(registry: Registry, version: Version, scorer: bool) -> tuple[Any, PreTrainedTokenizerBase]:
    """(model, tokenizer), on the GPU where there is one."""
    import torch

    from baton.models import load_ensemble, load_policy, quieten

    quieten()
    model, tokenizer = (load_ensemble if scorer else load_policy)(registry, version)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _next_line(prompt: str) -> str | None:
    """The next line of input, or None at its end, or at Ctrl-C."""
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        if prompt:
            print()
        return None


def _show(text: str, shown: bool) -> str:
    if shown:
        print(text, end="", flush=True)
    return text


def _print(table: Table) -> None:
    Console(highlight=False).print(table)


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, ensure_ascii=False, indent=2))
