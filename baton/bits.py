"""Bits per byte of held-out documents, by source and language: of a model, and of the n-gram model that it must beat.

The sum of -log2 p over a document's tokens, its end token included, divided by its UTF-8 bytes: comparable across
tokenizers. Every token is predicted exactly once. In a document longer than the model's rows, windows overlap by half
a row, so that a token never stands at the start of its context (Press et al. 2021, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

    from baton.corpus.shards import PreparedSource

UNKNOWN = "und"
"""The language of a document of which neither source nor detector says one (BCP 47)."""

NGRAM_TOKENS = 15_000_000
"""The n-gram model counts at most so many tokens: some 1.7 GB at order 5."""


class Window(NamedTuple):
    """Tokens [start, stop) of a document, of which [first, stop) are predicted here; the others are their context."""

    source: int
    document: int
    start: int
    stop: int
    first: int

    @property
    def length(self) -> int:
        """How many tokens the model reads."""
        return self.stop - self.start


def windows(num_tokens: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first) of windows of at most `length` tokens that predict all but the first token once.

    From the second window on, a predicted token has at least length / 2 tokens of context.
    """
    assert num_tokens >= 2 and length >= 2
    stop = min(num_tokens, length)
    yield 0, stop, 1
    while stop < num_tokens:
        first, start = stop, stop - (length + 1) // 2
        stop = min(num_tokens, start + length)
        yield start, stop, first


def bits_per_byte(
    model: Any,
    sources: Sequence[PreparedSource],
    sequence_length: int,
    tokens_at_once: int,
    dtype: torch.dtype,
    state: Any = None,
) -> dict[str, float]:
    """`eval/loss` in nats a token, and `eval/bits_per_byte` in all and by source and language, of a causal model.

    The processes of `state` (accelerate's PartialState) share the windows; all must call, each with the whole model.
    `tokens_at_once` bounds a forward pass, padding included; what is measured does not depend on it.
    """
    nats = model_nats(model, sources, sequence_length, tokens_at_once, dtype, state)
    num_predicted = sum(source.num_tokens - source.num_documents for source in sources)
    loss = sum(float(part.sum()) for part in nats) / max(num_predicted, 1)
    return {"eval/loss": loss, **figures("eval/bits_per_byte", sources, nats)}


def ngram_bits_per_byte(
    train: Sequence[PreparedSource],
    held_out: Sequence[PreparedSource],
    order: int,
    vocabulary: int,
    max_tokens: int = NGRAM_TOKENS,
) -> dict[str, float]:
    """`eval/ngram_bits_per_byte`, in all and by source and language, of an n-gram model of the very same tokens.

    Every document counts once, whatever its source's weight. Where `train` holds more than `max_tokens`, only the first
    documents of each source are counted, in proportion, and `eval/ngram_counted_share` says how much that was.
    """
    from baton.ngram import train as count

    total = sum(source.num_tokens for source in train)
    model = count(_first_documents(train, min(1.0, max_tokens / max(total, 1))), order, vocabulary)
    nats = [
        model.document_nats(source.document(number)[1:] for number in range(source.num_documents))
        for source in held_out
    ]
    found = figures("eval/ngram_bits_per_byte", held_out, nats)
    if total > max_tokens:
        num_predictable = total - sum(source.num_documents for source in train)
        found["eval/ngram_counted_share"] = model.num_tokens / num_predictable
    return found


def _first_documents(sources: Sequence[PreparedSource], share: float) -> Iterator[np.ndarray]:
    """Documents without the end token that stands before them: the context of the first token, never predicted."""
    for source in sources:
        left = share * source.num_tokens
        for number in range(source.num_documents):
            document = source.document(number)
            if len(document) > left:
                document = document[: int(left)]
            left -= len(document)
            if len(document) > 1:
                yield document[1:]
            if left < 1:
                break


def figures(key: str, sources: Sequence[PreparedSource], nats: Sequence[np.ndarray]) -> dict[str, float]:
    """Bits per byte from the nats of each source's documents: `key`, `key/SOURCE` and `key/LANGUAGE`.

    A language that is called as a source is: `key/LANGUAGE (language)`.
    """
    by_source: dict[str, list[float]] = {}
    by_language: dict[str, list[float]] = {}
    for source, costs in zip(sources, nats, strict=True):
        for language, (spent, num_bytes) in _by_language(source, costs).items():
            for table, name in ((by_source, source.name), (by_language, language)):
                sums = table.setdefault(name, [0.0, 0.0])
                sums[0] += spent
                sums[1] += num_bytes
    total = [sum(column) for column in zip(*by_source.values(), strict=True)] or [0.0, 0.0]
    by_language.pop(UNKNOWN, None)
    named = {f"{key}/{name}": sums for name, sums in by_source.items()}
    for name, sums in by_language.items():
        named[f"{key}/{name}" + (" (language)" if name in by_source else "")] = sums
    return {name: sums[0] / math.log(2) / sums[1] for name, sums in {key: total, **named}.items() if sums[1]}


def _by_language(source: PreparedSource, costs: np.ndarray) -> dict[str, tuple[float, int]]:
    """(nats, bytes) of the source's documents of each language."""
    shards = range(len(source.shards))
    languages = np.concatenate([np.zeros(0, np.uint8), *(source.shard_languages(shard) for shard in shards)])
    sizes = np.concatenate([np.zeros(0, np.int64), *(source.shard_bytes(shard) for shard in shards)])
    return {
        source.languages[index]: (float(costs[languages == index].sum()), int(sizes[languages == index].sum()))
        for index in np.unique(languages)
    }


def model_nats(
    model: Any,
    sources: Sequence[PreparedSource],
    sequence_length: int,
    tokens_at_once: int,
    dtype: torch.dtype,
    state: Any = None,
) -> list[np.ndarray]:
    """Of each source, (documents,) float64: the nats of each document's tokens under the model; as `bits_per_byte`."""
    import torch

    rank, world = (state.process_index, state.num_processes) if state is not None else (0, 1)
    device = next(model.parameters()).device
    offsets = np.cumsum([0, *(source.num_documents for source in sources)])
    total = torch.zeros(int(offsets[-1]), dtype=torch.float64)
    batches = _batches(sources, sequence_length, tokens_at_once)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            measure = _measure_of(model)
            for batch in batches[rank::world]:
                spent = _window_nats(measure, _read(sources, batch), batch, device)
                places = torch.tensor([int(offsets[each.source]) + each.document for each in batch])
                total.index_add_(0, places, spent)
    finally:
        model.train(was_training)
    if world > 1:
        shared = total.to(device)
        torch.distributed.all_reduce(shared)
        total = shared.cpu()
    return np.split(total.numpy(), offsets[1:-1])


def _batches(sources: Sequence[PreparedSource], length: int, tokens_at_once: int) -> list[list[Window]]:
    """Windows of like length together, the longest first; the same on every process."""
    found = [
        Window(index, number, *window)
        for index, source in enumerate(sources)
        for number in range(source.num_documents)
        for window in windows(_document_length(source, number), length)
    ]
    found.sort(key=lambda window: (-window.length, window))
    batches: list[list[Window]] = []
    for window in found:
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].length > tokens_at_once:
            batches.append([])
        batches[-1].append(window)
    return batches


def _document_length(source: PreparedSource, number: int) -> int:
    start, stop = source.document_span(number)
    return stop - start


def _read(sources: Sequence[PreparedSource], batch: Sequence[Window]) -> list[np.ndarray]:
    return [sources[each.source].document(each.document)[each.start : each.stop] for each in batch]


Measure = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""(token ids (B, L), which tokens are predicted (B, L - 1)) -> their log-probabilities, row after row."""


def _window_nats(
    measure: Measure, rows: Sequence[np.ndarray], batch: Sequence[Window], device: torch.device
) -> torch.Tensor:
    """(B,) float64. Padding stands on the right, where causal attention keeps it from the real tokens."""
    import torch

    longest = batch[0].length
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.from_numpy(row.astype(np.int64))
    columns = torch.arange(1, longest)
    first = torch.tensor([each.first - each.start for each in batch])[:, None]
    stop = torch.tensor([each.length for each in batch])[:, None]
    predicted = (columns >= first) & (columns < stop)
    spent = torch.zeros(predicted.shape, dtype=torch.float64)
    spent[predicted] = -measure(ids.to(device), predicted.to(device)).double().cpu()
    return spent.sum(1)


def _measure_of(model: Any) -> Measure:
    """By the head on the predicted positions alone, without a table of logits, where the model's forward does no more.

    Some architectures scale or cap their logits after the head: those are measured by their own forward pass.
    """
    from baton.logprobs import token_logprobs
    from baton.output_head import head_makes_logits

    decoder, head = getattr(model, model.base_model_prefix, model), model.get_output_embeddings()

    def by_head(ids: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][predicted]
        weight, bias = head.weight.to(hidden.dtype), getattr(head, "bias", None)
        bias = None if bias is None else bias.to(hidden.dtype)
        return token_logprobs(hidden, weight, bias, ids[:, 1:][predicted], 1.0).logprobs

    def by_forward(ids: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1][predicted]
        return logits.float().log_softmax(-1).gather(-1, ids[:, 1:][predicted][:, None]).squeeze(-1)

    return by_head if head_makes_logits(model) else by_forward
