"""The one thread that scores: requests in the order of their arrival, or several in one forward pass."""

from __future__ import annotations

import queue
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from reward.sample import Sample
from reward.serving.metrics import Metrics
from reward.serving.model import Scores

LAST_S = 10.0


class Scorer(Protocol):
    """What the worker needs of a model."""

    def encode(self, samples: Sequence[Sample]) -> list[list[int]]:
        """A row of ids each; RefusedError where a row cannot be read."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> Scores:
        """One reward a row."""
        ...


@dataclass
class Job:
    """One request's rows, and where their scores will be. Its future is cancelled when nobody waits any more."""

    samples: list[Sample]
    answer: Future[Scores] = field(default_factory=Future)
    num_tokens: int = 0
    waited_s: float = 0.0
    asked: float = field(default_factory=time.perf_counter)
    sequences: list[list[int]] = field(default_factory=list)


class Worker:
    """Scores jobs one after another, until it is closed.

    With `join_tokens`, jobs that wait already are scored together up to so many tokens. A reward depends in its last
    digits on the rows that share its forward pass; so this is off unless asked for, and the same request gets the same
    rewards to the bit.
    """

    def __init__(self, model: Scorer, metrics: Metrics, join_tokens: int = 0) -> None:
        self._model, self._metrics, self._join_tokens = model, metrics, join_tokens
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are still scored."""
        return self._thread.is_alive()

    def submit(self, samples: list[Sample]) -> Job:
        """Hand in rows; the job's `answer` gets their scores, RefusedError, or another exception of the model's."""
        job = Job(samples)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """End after the jobs that were handed in, unless one of them takes longer than `LAST_S`."""
        self._jobs.put(None)
        self._thread.join(LAST_S)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            together = [job] if self._begin(job) else []
            total = job.num_tokens
            while together and total < self._join_tokens and not self._jobs.empty():
                following = self._jobs.get()
                if following is None:  # closed: the next round ends by it
                    self._jobs.put(None)
                    break
                if self._begin(following):
                    total += following.num_tokens
                    together.append(following)
            self._score(together)

    def _begin(self, job: Job) -> bool:
        """Encode a job's rows; False where there is nothing left to score."""
        if not job.answer.set_running_or_notify_cancel():
            return False
        job.waited_s = time.perf_counter() - job.asked
        try:
            job.sequences = self._model.encode(job.samples)
        except Exception as error:
            job.answer.set_exception(error)
            return False
        job.num_tokens = sum(map(len, job.sequences))
        return True

    def _score(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        started = time.perf_counter()
        try:
            scores = self._model.score([ids for job in jobs for ids in job.sequences])
        except Exception as error:
            # tensors have no texts: this may be logged whole
            print(f"scoring failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
            else:  # one of them is too much for the memory, perhaps
                for job in jobs:
                    self._score([job])
            return
        self._metrics.passed(time.perf_counter() - started, sum(job.num_tokens for job in jobs))
        start = 0
        for job in jobs:
            job.answer.set_result(scores.part(start, start + len(job.sequences)))
            start += len(job.sequences)
