"""Property-based tests: schemathesis generates requests from the OpenAPI document."""

import re
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

load_all_checks()

_SHORT = 4  # tokens per answer: these tests are about requests
_WITHOUT_DATA = [("GET", "/"), ("GET", "/health"), ("GET", "/metrics"), ("GET", "/v1/models")]
_WITH_DATA = [
    ("GET", "/v1/models/{model}", "positive"),  # every name is valid
    ("POST", "/v1/chat/completions", "positive"),
    ("POST", "/v1/chat/completions", "negative"),
    ("POST", "/v1/completions", "positive"),
    ("POST", "/v1/completions", "negative"),
]


@pytest.fixture(scope="session")
def schema(process: Any) -> Any:
    document = schemathesis.openapi.from_url(f"{process.url}/openapi.json")
    described = {(method.upper(), path) for path in document for method in document[path]}
    assert described == {*_WITHOUT_DATA, *(operation[:2] for operation in _WITH_DATA)}
    return document


def with_short_answer(case: Any) -> None:
    """Use an existing model and few tokens; invalid values stay invalid."""
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = "tiny"
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if type(value) is int and (value == -1 or _SHORT < value < 2**31):  # larger is invalid
            body[name] = _SHORT
        elif name in body and body[name] is None:
            del body[name]
    if "max_completion_tokens" not in body:
        body.setdefault("max_tokens", _SHORT)


def run_generated(
    process: Any, schema: Any, method: str, path: str, mode: str, examples: int
) -> None:
    session = requests.Session()
    answered = []

    # Some valid requests are refused, such as a token id beyond the vocabulary.
    excluded = [CHECKS.get_one("positive_data_acceptance")]

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy(generation_mode=GenerationMode(mode)))
    def check(case: Any) -> None:
        with_short_answer(case)
        response = case.call(base_url=process.url, session=session)
        answered.append(response.status_code)
        case.validate_response(response, excluded_checks=excluded)

    check()
    session.close()
    assert len(answered) >= min(examples, 5)
    if method == "POST" and mode == "positive":
        assert 200 in answered


@pytest.mark.parametrize(("method", "path", "mode"), _WITH_DATA)
def test_generated_requests(process: Any, schema: Any, method: str, path: str, mode: str) -> None:
    run_generated(process, schema, method, path, mode, examples=40)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "mode"), _WITH_DATA)
def test_500_generated_requests(
    process: Any, schema: Any, method: str, path: str, mode: str
) -> None:
    run_generated(process, schema, method, path, mode, examples=500)


@pytest.mark.parametrize(("method", "path"), _WITHOUT_DATA)
def test_requests_without_data(process: Any, schema: Any, method: str, path: str) -> None:
    run_generated(process, schema, method, path, "positive", examples=1)


def test_every_parameter_is_described_with_its_default(process: Any) -> None:
    schemas = requests.get(f"{process.url}/openapi.json").json()["components"]["schemas"]
    kinds = ["ChatRequest", "CompletionRequest", "Message", "TextPart", "StreamOptions"]
    for kind in [*kinds, "ResponseFormat", "JsonSchema"]:
        required = schemas[kind].get("required", [])
        for name, field in schemas[kind]["properties"].items():
            assert field.get("description"), (kind, name)
            stated = field.get("default") is not None or "Default: " in field["description"]
            assert stated or name in required, (kind, name)
    chat, text = (schemas[kind]["properties"] for kind in kinds[:2])
    assert {name: field["default"] for name, field in chat.items() if field.get("default")} == {
        "n": 1,
        "service_tier": "auto",
        "truncation": "disabled",
        "parallel_tool_calls": True,
    }
    assert text["max_tokens"]["default"] == 16
    assert "generation_config.json, else 1." in chat["temperature"]["description"]
    assert "generation_config.json, else 1." in chat["top_p"]["description"]


def test_docs_load_nothing_from_other_hosts(process: Any) -> None:
    page = requests.get(f"{process.url}/docs").text
    urls = re.findall(r"""(?:src|href|url)\s*[:=]\s*["']([^"']+)""", page)
    assert "/openapi.json" in urls
    assert any(url.endswith(".js") for url in urls)
    for url in urls:
        assert url.startswith("/")
        assert not url.startswith("//")
        assert requests.get(f"{process.url}{url}").status_code == 200
