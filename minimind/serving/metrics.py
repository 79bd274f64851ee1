"""Prometheus metrics: requests, latencies, tokens and queue lengths."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from minimind.serving.models import ServedModel

_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # seconds


class Metrics:
    """The metrics of one service, in a registry per service: several can share a process."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "minimind_requests",
            "Completed HTTP requests.",
            ["route", "status"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "minimind_request_seconds",
            "Duration of HTTP requests.",
            ["route"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.time_to_first_token_seconds = Histogram(
            "minimind_time_to_first_token_seconds",
            "Time to first token (TTFT).",
            ["model"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "minimind_prompt_tokens", "Prompt tokens.", ["model"], registry=registry
        )
        self.cached_tokens = Counter(
            "minimind_cached_tokens",
            "Prompt tokens taken from the prefix cache.",
            ["model"],
            registry=registry,
        )
        self.completion_tokens = Counter(
            "minimind_completion_tokens", "Generated tokens.", ["model"], registry=registry
        )
        running = Gauge(
            "minimind_running", "Answers being generated.", ["model"], registry=registry
        )
        waiting = Gauge(
            "minimind_waiting", "Answers waiting for a slot.", ["model"], registry=registry
        )
        for model in models:
            running.labels(model.name).set_function(_engine_stat(model, "running"))
            waiting.labels(model.name).set_function(_engine_stat(model, "waiting"))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def _engine_stat(model: ServedModel, name: str) -> Callable[[], float]:
    return lambda: float(getattr(model.engine.stats(), name))
