"""What /metrics tells, in Prometheus' text form: counters of the engine, memory, latencies.

The engine's numbers are read when somebody asks; only times and HTTP counts are kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gemloom.engine.generation import Usage
from gemloom.server.backend import Backend

if TYPE_CHECKING:
    from gemloom.engine.engine import Stats

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_GAUGES = {
    "running": "Requests being computed",
    "waiting": "Requests in the queue",
    "slots": "Requests that fit at once",
    "slots_busy": "Slots in use",
    "snapshot_bytes": "Bytes of kept sliding windows",
}


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, backend: Callable[[], Backend]) -> None:
        """``backend`` gives the one that is served now."""
        self._registry = registry = CollectorRegistry()
        registry.register(_Engine(backend))
        self._requests = Counter(
            "gemloom_http_requests", "Requests answered", ["path", "status"], registry=registry
        )
        self._durations = Histogram(
            "gemloom_http_request_duration_seconds", "Until the last byte was sent", ["path"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._first = Histogram(
            "gemloom_time_to_first_token_seconds", "From a request's start, the queue included",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._token = Histogram(
            "gemloom_time_per_output_token_seconds", "Mean of one request, after its first token",
            buckets=_TOKEN_SECONDS, registry=registry,
        )  # fmt: skip

    def first_token(self, seconds: float) -> None:
        """Take note of a request's first token."""
        self._first.observe(seconds)

    def finished(self, usage: Usage) -> None:
        """Take note of a request that has run to its end."""
        if usage.completion_tokens > 1:
            self._token.observe(usage.decode_seconds / (usage.completion_tokens - 1))

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Take note of an HTTP request; ``path`` is a route's, never the client's own words."""
        self._requests.labels(path, str(status)).inc()
        self._durations.labels(path).observe(seconds)

    def text(self) -> bytes:
        """All of them, as CONTENT_TYPE says."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """What the model knows of itself, read at the moment of asking."""

    def __init__(self, backend: Callable[[], Backend]) -> None:
        self._backend = backend

    def describe(self) -> Iterator[Metric]:
        return iter(())  # or registering would read the model

    def collect(self) -> Iterator[Metric]:
        backend = self._backend()
        stats = backend.stats()
        for name, what in _GAUGES.items():
            yield GaugeMetricFamily(f"gemloom_{name}", what, value=getattr(stats, name))
        failed = float(stats.error is not None)
        yield GaugeMetricFamily("gemloom_engine_failed", "1 after the engine stopped", value=failed)
        yield CounterMetricFamily("gemloom_steps", "Steps computed", value=stats.steps)
        yield _tokens(stats)
        there = backend.adapters.list()
        yield GaugeMetricFamily("gemloom_adapters", "Adapters that are loaded", value=len(there))
        requests = CounterMetricFamily(
            "gemloom_adapter_requests", "Requests that have named an adapter", labels=["adapter"]
        )
        for info in there:
            requests.add_metric([info.name], info.requests)
        yield requests
        memory = GaugeMetricFamily("gemloom_memory_bytes", "Memory by kind", labels=["kind"])
        for kind, size in backend.memory().items():
            memory.add_metric([kind], size)
        yield memory


def _tokens(stats: Stats) -> Metric:
    family = CounterMetricFamily("gemloom_tokens", "Tokens by kind", labels=["kind"])
    kinds = {
        "prompt": stats.prompt_tokens,
        "cached": stats.cached_tokens,
        "generated": stats.generated_tokens,
    }
    for kind, count in kinds.items():
        family.add_metric([kind], count)
    return family
