"""Encoding in parallel: batches of texts to token ids, languages and signatures, in processes that share nothing."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from baton.errors import UserError

UNKNOWN = "und"
"""ISO 639-2's code for a language that nobody told."""

_LANGUAGE_CHARACTERS = 300
"""So much of a document's beginning tells its language."""


@dataclass(frozen=True)
class Encoding:
    """How texts become tokens: what a process needs to know, in a form that can be sent to it.

    A document stands between `start_token`, its context, and `end_token`; mostly they are the same. `tokenizer` is the
    JSON of the tokenizers library, as transformers loaded it. `permutations`: how many minimal hashes a document's
    signature has, 0 for no signature.
    """

    tokenizer: str
    start_token: int
    end_token: int
    dtype: str
    permutations: int = 0


class Texts(NamedTuple):
    """A batch to encode, and the language of its documents; None: it is to be detected."""

    texts: list[str]
    language: str | None


class Encoded(NamedTuple):
    """A batch's documents."""

    tokens: np.ndarray  # (total,) each document between two end tokens, one after the other
    lengths: np.ndarray  # (documents,) tokens
    num_bytes: np.ndarray  # (documents,) UTF-8 bytes of the text
    languages: list[str]  # of each document
    signatures: np.ndarray | None  # (documents, permutations) uint32


class Encoder:
    """Encodes batches in this process, on one core."""

    def __init__(self, encoding: Encoding) -> None:
        from tokenizers import Tokenizer

        self.encoding = encoding
        self._tokenizer = Tokenizer.from_str(encoding.tokenizer)
        # a text that spells a special token must not become one
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._detect: Callable[[str], str] | None = None
        self._sign: Callable[[str], np.ndarray] | None = None
        if encoding.permutations:
            from baton.corpus.near_duplicates import Signer

            self._sign = Signer(encoding.permutations)

    def encode(self, batch: Texts) -> Encoded:
        """The documents of one batch."""
        texts = batch.texts
        dtype = np.dtype(self.encoding.dtype)
        with _one_thread():
            # the fast way leaves out the offsets, which nobody reads here
            found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.array([len(one) + 2 for one in found], np.int64)
        tokens = np.full(int(lengths.sum()), self.encoding.end_token, dtype)
        start = 0
        for one, length in zip(found, lengths.tolist(), strict=True):
            tokens[start] = self.encoding.start_token
            tokens[start + 1 : start + length - 1] = one.ids
            start += length
        return Encoded(
            tokens=tokens,
            lengths=lengths,
            num_bytes=np.array([len(text.encode()) for text in texts], np.int64),
            languages=[batch.language] * len(texts) if batch.language else self._languages(texts),
            signatures=np.stack([self._sign(text) for text in texts]) if self._sign and texts else None,
        )

    def _languages(self, texts: list[str]) -> list[str]:
        self._detect = self._detect or _detector()
        return [self._detect(text) for text in texts]


class Encoders:
    """`workers` processes that encode, started when there is work for them; with one, this process does it itself.

    Use as a context manager. The processes are spawned, not forked: torch's threads would not survive a fork. They end
    with their parent, even where that is killed: their end of the pipe closes.
    """

    def __init__(self, encoding: Encoding, workers: int) -> None:
        self.encoding, self.workers = encoding, workers
        self._own: Encoder | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._processes: list[Any] = []
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def submit(self, texts: Texts, here: bool = False) -> Future[Encoded]:
        """Encode a batch; where this process encodes, the future is done when it is returned.

        `here`: it is too little to start processes for; where they run already, one of them takes it.
        """
        if self.workers > 1 and not (here and self._threads is None):
            if self._threads is None:
                self._start()
            assert self._threads is not None
            return self._threads.submit(self._ask, texts)
        self._own = self._own or Encoder(self.encoding)
        done: Future[Encoded] = Future()
        done.set_result(self._own.encode(texts))
        return done

    def _start(self) -> None:
        self._own = None
        context = multiprocessing.get_context("spawn")
        for number in range(self.workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, self.encoding), name=f"prepare-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._idle.put(ours)
        self._threads = ThreadPoolExecutor(self.workers)

    def _ask(self, texts: Texts) -> Encoded:
        connection = self._idle.get()
        try:
            connection.send(texts)
            answer = connection.recv()
        except (EOFError, OSError):
            raise UserError(
                "a process that encodes text has died, perhaps for want of memory. Run the command again, with fewer "
                "--workers: what was finished is kept"
            ) from None
        finally:  # a dead one as well: a task that waited for it would wait for ever, and now fails at once
            self._idle.put(connection)
        if isinstance(answer, Exception):
            raise answer
        return answer


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encoding_of(folder: Path, permutations: int = 0) -> Encoding:
    """The encoding by the tokenizer of a folder. Raises UserError where it has no fast form or no end token."""
    from baton.chat import DOCUMENT_END
    from baton.corpus.shards import token_dtype
    from baton.generate import document_start
    from baton.models import load_tokenizer, num_ids

    tokenizer = load_tokenizer(folder)
    # a tokenizer of a chat model ends a turn by its eos_token, and a document still by the token of its base
    end = tokenizer.get_vocab().get(DOCUMENT_END, tokenizer.eos_token_id)
    if end is None:
        raise UserError(f"the tokenizer in {folder} has no eos_token, which ends a document; set one and save it")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer in {folder} has no fast form (tokenizer.json), by which a corpus is prepared; convert it "
            "with transformers and save it"
        )
    dtype = token_dtype(num_ids(tokenizer)).str
    return Encoding(backend.to_str(), document_start(tokenizer), int(end), dtype, permutations)


def can_detect() -> bool:
    """Whether the library that tells languages apart is installed."""
    from importlib.util import find_spec

    return find_spec("py3langid") is not None


def _detector() -> Callable[[str], str]:
    from py3langid import classify  # Lui and Baldwin 2012

    def language(text: str) -> str:
        beginning = text[:_LANGUAGE_CHARACTERS]
        return str(classify(beginning)[0]) if any(letter.isalpha() for letter in beginning) else UNKNOWN

    return language


@contextmanager
def _one_thread() -> Iterator[None]:
    """The library's own threads off: each process has one core, and of a fork after threads were used it would warn."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _serve(connection: Connection, encoding: Encoding) -> None:
    """A process's life: a batch in, its encoding out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends us
    encoder = Encoder(encoding)
    while True:
        try:
            texts = connection.recv()
        except EOFError:
            return
        try:
            answer: Encoded | Exception = encoder.encode(texts)
        except Exception as error:
            answer = error
        try:
            connection.send(answer)
        except OSError:  # the parent is gone
            return
