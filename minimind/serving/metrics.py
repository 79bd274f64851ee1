"""Figures for Prometheus; they count requests and tokens and know no text."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from minimind.serving.models import ServedModel

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """One registry a service, so that several can live in one process."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "minimind_requests",
            "Requests that were answered.",
            ["route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "minimind_request_seconds",
            "From a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "minimind_first_token_seconds",
            "From a request to its first token.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "minimind_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry
        )
        self.cached_tokens = Counter(
            "minimind_cached_tokens",
            "Tokens of prompts that had been read before.",
            ["model"],
            registry=registry,
        )
        self.completion_tokens = Counter(
            "minimind_completion_tokens",
            "Tokens that were written.",
            ["model"],
            registry=registry,
        )
        running = Gauge(
            "minimind_running", "Answers that are being written.", ["model"], registry=registry
        )
        waiting = Gauge(
            "minimind_waiting", "Answers that wait for a slot.", ["model"], registry=registry
        )
        for model in models:
            running.labels(model.name).set_function(_stat(model, "running"))
            waiting.labels(model.name).set_function(_stat(model, "waiting"))

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)


def _stat(model: ServedModel, name: str) -> Callable[[], float]:
    return lambda: float(getattr(model.engine.stats(), name))
