"""What a reward server counts, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server; safe to call from any thread."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        name = "baton_reward"
        self._info = Info(name, "What is served", registry=registry)
        self._requests = Counter(f"{name}_requests", "Requests for rewards, by status", ["status"], registry=registry)
        self._rows = Counter(f"{name}_rows", "Rows that got a reward", registry=registry)
        self._tokens = Counter(f"{name}_tokens", "Tokens of rows that were scored", registry=registry)
        self._failures = Counter(f"{name}_failures", "Requests that failed by the server's fault", registry=registry)
        self._seconds = Histogram(
            f"{name}_request_seconds", "From a request's head to its answer", buckets=SECONDS, registry=registry
        )
        self._passes = Histogram(
            f"{name}_scoring_seconds", "In the model, for one request or several joined", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._queue = Gauge(f"{name}_queue_length", "Requests being read, waiting or scored", registry=registry)

    def serves(self, ref: str, digest: str, dtype: str, device: str) -> None:
        """Say which version is behind the numbers."""
        self._info.info({"version": ref, "digest": digest, "dtype": dtype, "device": device})

    def queued(self, length: int) -> None:
        """So many requests are in hand now."""
        self._queue.set(length)

    def passed(self, seconds: float, num_tokens: int) -> None:
        """One call of the model."""
        self._passes.observe(seconds)
        self._tokens.inc(num_tokens)

    def answered(self, status: int, seconds: float, num_rows: int) -> None:
        """One request for rewards; num_rows: that got one."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)
        self._rows.inc(num_rows)
        self._failures.inc(status == 500)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self._registry)
