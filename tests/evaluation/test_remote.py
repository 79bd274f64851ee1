"""Remote models, on a local server that behaves like several kinds of services."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import RejectedRequestError, ServiceError, UsageError
from minimind.evaluation import remote
from minimind.evaluation.remote import Service
from minimind.evaluation.tasks import Answer, GenerationConfig
from minimind.serving.limits import Limits
from minimind.tokenizer import Tokenizer
from tests.support.remote_services import (
    Policy,
    RemoteService,
    accepts_everything,
    like_gpt5,
    like_mistral,
    like_old,
    like_vllm,
)
from tests.support.services import InProcess, save_models

ASK = [{"role": "user", "content": "How are you?"}]


def respond(messages: list[dict[str, str]]) -> str:
    return "I am fine."


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_TIMEOUT", 0.5)


@pytest.mark.parametrize(
    ("policy", "sent", "rejected"),
    [
        (accepts_everything, {"max_completion_tokens", "temperature", "stream_options"}, set()),
        (like_gpt5, {"max_completion_tokens", "stream_options"}, {"temperature"}),
        (like_mistral, {"max_tokens", "temperature"}, {"max_completion_tokens", "stream_options"}),
    ],
)
def test_rejected_parameters_are_left_out_of_later_requests(
    policy: Policy, sent: set[str], rejected: set[str]
) -> None:
    with RemoteService(respond, "m", policy) as server:
        service = Service(server.url, "k")
        first = service.answer(ASK, max_tokens=9, temperature=0)
        requests = len(server.requests)
        second = service.answer(ASK, max_tokens=9, temperature=0)
    tokens = None if "stream_options" in rejected else 3
    assert first == second == Answer("I am fine.", tokens, True)
    assert requests == 1 + bool(rejected)
    assert len(server.requests) == requests + 1
    assert set(server.requests[-1]) == {"model", "messages", "stream", *sent}
    assert service.rejected == rejected
    assert set(server.keys) == {"Bearer k"}


def test_rejected_sampling_parameters() -> None:
    with RemoteService(respond, "m", like_gpt5) as server:
        service = Service(server.url)
        generation = GenerationConfig(9, temperature=0.5, concurrency=1)
        [(_, answer)] = service.answers([ASK], generation)
        assert isinstance(answer, Answer)
        assert (answer.text, service.rejected) == ("I am fine.", {"temperature", "top_p"})
        assert server.requests[-1]["seed"] == generation.seed_for(ASK)
    assert set(server.keys) == {"Bearer none"}


def test_the_older_name_is_used_if_the_token_limit_is_ignored() -> None:
    with RemoteService(respond, "m", like_old) as server:
        answer = Service(server.url).answer(ASK, max_tokens=2, temperature=0)
    assert answer == Answer("I am", 2, False)
    assert [body.get("max_tokens") for body in server.requests] == [None, 2]


def test_a_rejected_question_changes_no_later_request() -> None:
    """A question that is too long, and one that an error quotes with the name of a parameter."""

    def refuse(body: dict[str, Any]) -> tuple[int, object] | None:
        question = body["messages"][-1]["content"]
        flagged = 400, {"error": {"message": f"Flagged: {question}"}}
        return flagged if "temperature" in question else like_vllm(body)

    generation = GenerationConfig(9, temperature=0.5, concurrency=1)
    with RemoteService(respond, "m", refuse) as server:
        service = Service(server.url)
        questions = [
            [{"role": "user", "content": text}]
            for text in ("Why?" * 100, "Which temperature?", "Why?")
        ]
        long, flagged, answer = (
            answer for _, answer in sorted(service.answers(questions, generation))
        )
        assert isinstance(long, RejectedRequestError)
        assert "too large: 9. This model's maximum context" in str(long)
        assert "Flagged: Which temperature?" in str(flagged)
        assert answer.text == "I am fine."
    assert service.rejected == set()
    sent = server.requests[-1]
    assert (sent["max_completion_tokens"], sent["temperature"]) == (9, 0.5)
    assert all("max_completion_tokens" in body or "max_tokens" in body for body in server.requests)


@pytest.mark.parametrize("fault", ["429", "503", "500", "html", "hang", "stall", "cut"])
def test_temporary_faults_are_retried(fault: str) -> None:
    with RemoteService(respond, "m", accepts_everything, fault) as server:
        answer = Service(server.url).answer(ASK, max_tokens=9, temperature=0)
    assert answer == Answer("I am fine.", 3, True)
    assert len(server.requests) == 2
    if fault == "429":
        assert server.times[1] - server.times[0] >= 0.2  # as Retry-After says


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        ("429", "returned status 429: Slow down.", 2),
        ("html", "returned status 502: <html>Bad gateway</html>", 2),
        ("hang", "did not respond within 0.5 seconds", 2),
        ("stall", "closed the connection during an answer", 2),
        ("cut", "closed the connection during an answer", 2),
        ("error", "the model crashed", 1),
        ("403", "returned status 403: Slow down.", 1),
        ("401", "rejects the API key or needs one; set MY_KEY", 1),
    ],
)
def test_permanent_faults_are_errors_with_their_cause(
    fault: str, message: str, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_RETRIES", 1)
    with RemoteService(respond, "m", accepts_everything, *[fault] * 9) as server:
        service = Service(server.url, "k", "MY_KEY")
        with pytest.raises(ServiceError) as raised:
            service.answer(ASK, max_tokens=9, temperature=0)
    assert message in str(raised.value)
    assert len(server.requests) == requests


def test_a_rejection_that_names_no_parameter_is_an_error() -> None:
    def refuse(body: dict[str, object]) -> tuple[int, object]:
        return 400, {"error": {"message": "The request was flagged."}}

    with (
        RemoteService(respond, "m", refuse) as server,
        pytest.raises(ServiceError, match="flagged"),
    ):
        Service(server.url).answer(ASK, max_tokens=9, temperature=0)


def test_urls_without_a_service_are_errors() -> None:
    with pytest.raises(UsageError, match="is not the URL of a service"):
        Service("ftp://127.0.0.1")
    with pytest.raises(UsageError, match="is not the URL of a service"):
        Service("http://127.0.0.1:port")
    with pytest.raises(ServiceError, match="cannot be reached"):
        Service("http://127.0.0.1:9")
    with RemoteService(respond, "m") as server:
        with pytest.raises(UsageError, match="has no model other; available: m"):
            Service(f"{server.url}#other")
        assert Service(f"{server.url}/v1#m").url == Service(server.url).url == f"{server.url}/v1"
        assert Service(f"{server.url}/v1beta/openai").url == f"{server.url}/v1beta/openai"


def test_without_openai_the_error_has_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UsageError, match=r"\.\[remote\]"):
        Service("http://127.0.0.1:9")


@pytest.fixture
def own(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[InProcess]:
    with InProcess(save_models(tmp_path, tokenizer), 2, Limits(), ["k"]) as service:
        yield service


def test_minimind_serve_accepts_all_parameters(own: InProcess) -> None:
    service = Service(f"{own.url}#other", "k")
    [(_, answer)] = service.answers(
        [[{"role": "user", "content": "你好"}]], GenerationConfig(5, temperature=1)
    )
    assert isinstance(answer, Answer)
    assert (answer.tokens, answer.ended, service.rejected) == (5, False, set())
    with pytest.raises(ServiceError, match="needs one; set MINIMIND"):
        Service(own.url, "wrong", "MINIMIND_API_KEY")
