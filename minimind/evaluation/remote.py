"""A model behind an OpenAI-compatible API: it generates answers and gives no likelihoods.

Services differ in the parameters that they accept. One that a service refuses is left out of all
further requests to it, or replaced by its older name.
"""

import json
import re
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from minimind.errors import MinimindError, ServiceError, UsageError, install_line
from minimind.evaluation.tasks import Answer, GenerationConfig, ask_concurrently, told
from minimind.tokenizer.chat import Message
from minimind.version import __version__

if TYPE_CHECKING:
    from minimind.evaluation.encoding import PromptEncoder
    from minimind.evaluation.scoring import Scorer

CONNECTIONS = 8
_RETRIES = 5  # per request: of refusals by rate limits, of server errors, of broken connections
_TIMEOUT = 120.0  # seconds without a single byte
_CONNECT_TIMEOUT = 10.0  # seconds
_LENGTH, _OLD_LENGTH = "max_completion_tokens", "max_tokens"
_OWN = "minimind"  # the owner of models that `minimind serve` serves


class Service:
    """A model of a service at a URL. dropped: the parameters that the service refused."""

    def __init__(self, url: str, key: str | None = None, key_variable: str = "its key") -> None:
        """Connect to `url`, which may end in #NAME; without it the first model is meant.

        Raises UsageError where openai is not installed or the service lacks the model, and
        ServiceError when the service does not answer. key_variable: named where a key is missing.
        """
        try:
            import openai
        except ImportError as error:
            raise UsageError(
                f"a service is reached with the openai package, which is not installed ({error}); "
                f"{install_line('remote')}, then give the same command"
            ) from error
        place, _, wanted = url.partition("#")
        self.url, is_local = _base_url(place)
        self._openai: Any = openai
        self._key_variable = key_variable
        self._client: Any = openai.OpenAI(
            api_key=key or "none",  # the client insists on one
            base_url=self.url,
            timeout=openai.Timeout(_TIMEOUT, connect=_CONNECT_TIMEOUT),
            max_retries=_RETRIES,
            # A key belongs to the place that it was given for, so redirects are not followed.
            http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=not is_local),
        )
        weakref.finalize(self, self._client.close)
        owners = self._models()
        self.name = wanted or next(iter(owners), "")
        if self.name not in owners:
            raise UsageError(
                f"{self.url} has no model {self.name}; it has: {', '.join(owners) or 'none'}"
            )
        self._model = self.name
        self._is_own = owners[self.name] == _OWN
        self.dropped: set[str] = set()

    def identity(self) -> dict[str, Any]:
        """Return what is known of the model; whether its weights changed cannot be known."""
        return {"version": __version__, "url": self.url, "model": self._model}

    def scorer(self) -> "tuple[Scorer, PromptEncoder]":
        """Raise UsageError."""
        raise UsageError(
            "a service gives no likelihoods; give a model directory, or take a task that is "
            "answered in words: quiz, gsm8k, cmath, degeneration"
        )

    def answer(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Answer:
        """Return the answer to a conversation. Raises ServiceError."""
        wanted = {
            _LENGTH: max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "stream_options": {"include_usage": True},
            "truncation": "auto" if self._is_own else None,
        }
        breaks = 0
        while True:
            settings = {
                name: value
                for name, value in wanted.items()
                if value is not None and name not in self.dropped
            }
            if _LENGTH in self.dropped and _OLD_LENGTH not in self.dropped:
                settings[_OLD_LENGTH] = max_tokens
            try:
                answer = self._stream(messages, settings)
            except self._openai.APIStatusError as error:
                refused = _named(settings, error)
                if error.status_code not in (400, 422) or not refused:
                    raise self._translated(error) from None
                self.dropped |= refused
                continue
            except (self._openai.APIConnectionError, _BrokenOff) as error:
                breaks += 1
                if breaks > 1 or not isinstance(error, _BrokenOff):
                    raise self._translated(error) from None
                continue
            except self._openai.OpenAIError as error:
                raise self._translated(error) from None
            if _LENGTH in settings and (answer.tokens or 0) > max_tokens:
                self.dropped.add(_LENGTH)  # it was not refused, but ignored
                continue
            return answer

    def _stream(self, messages: Sequence[Message], settings: dict[str, Any]) -> Answer:
        texts: list[str] = []
        finish_reason = tokens = None
        with self._client.chat.completions.create(
            model=self._model, messages=list(messages), stream=True, extra_body=settings
        ) as stream:
            try:
                for chunk in stream:
                    tokens = chunk.usage.completion_tokens if chunk.usage else tokens
                    for choice in chunk.choices or ():
                        texts.append(choice.delta.content or "")
                        finish_reason = choice.finish_reason or finish_reason
            except self._openai.APIStatusError:
                raise
            except self._openai.APIError as error:
                if isinstance(error, self._openai.APIConnectionError):
                    raise _BrokenOff(str(error)) from error
                raise
            except (MemoryError, KeyboardInterrupt):
                raise
            except Exception as error:  # of the HTTP library, or for what is not as OpenAI streams
                raise _BrokenOff(told(error)) from error
        if finish_reason is None:
            raise _BrokenOff("without a finish_reason")
        return Answer("".join(texts).strip(), tokens, finish_reason != "length")

    def answers(
        self, questions: Sequence[str], manner: GenerationConfig
    ) -> Iterator[tuple[int, Answer | Exception]]:
        """Answer questions, several at a time."""

        def ask(question: str) -> Answer:
            greedy = manner.temperature == 0
            return self.answer(
                [{"role": "user", "content": question}],
                max_tokens=manner.max_new_tokens,
                temperature=manner.temperature,
                top_p=None if greedy else manner.top_p,
                seed=None if greedy else manner.seed_of(question),
            )

        before = time.perf_counter()
        at_once = min(CONNECTIONS, manner.at_once)
        for place, answer in ask_concurrently(ask, questions, at_once):
            now = time.perf_counter()
            if isinstance(answer, MinimindError):
                yield place, answer
            else:
                yield place, replace(answer, seconds=now - before)
            before = now

    def _models(self) -> dict[str, str | None]:
        """The names of the service's models, each with its owner."""
        try:
            found = self._client.with_options(max_retries=1).models.list().data
            return {str(model.id): getattr(model, "owned_by", None) for model in found}
        except self._openai.OpenAIError as error:
            raise self._translated(error) from None
        except (AttributeError, TypeError, ValueError):
            raise ServiceError(f"{self.url}/models does not speak OpenAI's API") from None

    def _translated(self, error: Exception) -> ServiceError:
        if isinstance(error, self._openai.AuthenticationError):
            return ServiceError(
                f"{self.url} refuses the key, or wants one; set {self._key_variable}"
            )
        if isinstance(error, self._openai.APIStatusError):
            return ServiceError(f"{self.url} answers {error.status_code}: {_message(error)}")
        if isinstance(error, self._openai.APITimeoutError):
            return ServiceError(f"{self.url} did not answer within {_TIMEOUT:g} seconds")
        if isinstance(error, self._openai.APIConnectionError):
            return ServiceError(
                f"{self.url} cannot be reached ({error.__cause__ or error}); is it running? "
                "`minimind serve MODEL` starts a service"
            )
        if isinstance(error, _BrokenOff):
            return ServiceError(f"{self.url} broke off in the middle of an answer: {error}")
        return ServiceError(f"{self.url}: {error}")


class _BrokenOff(Exception):
    """A stream that did not come to its end."""


def _base_url(text: str) -> tuple[str, bool]:
    """The base of the API's paths, and whether it is on this machine. Raises UsageError."""
    try:
        parts = urlsplit(text if "//" in text else f"http://{text}")
        fits = parts.scheme in ("http", "https") and parts.hostname and not parts.query
        parts.port  # noqa: B018 (raises ValueError for what is no port)
    except ValueError:
        fits = False
    if not fits:
        raise UsageError(f"{text} is not the URL of a service, such as http://127.0.0.1:8000")
    path = parts.path.rstrip("/")
    if not re.search(r"/(v\d\w*|openai)$", path):  # as Google's and others' end
        path += "/v1"
    is_local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    return f"{parts.scheme}://{parts.netloc}{path}", is_local


def _named(settings: dict[str, Any], error: Any) -> set[str]:
    """The settings that a refusal names."""
    if getattr(error, "param", None) in settings:
        return {error.param}
    body = error.body if isinstance(error.body, str) else json.dumps(error.body, default=str)
    return {name for name in settings if re.search(rf"(?<!\w){name}(?!\w)", body or "")}


def _message(error: Any) -> str:
    """What a refusal says, whatever its form."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, default=str)
    return " ".join(text.split())[:500] if body else "it does not say why"
