"""Remote models behind an OpenAI-compatible API, which generate answers without likelihoods.

Services differ in the parameters they accept. A parameter that a service rejects is left out, or
sent under its older name; of all further requests too, if the service then answers. If it does not,
the question was rejected, and not the parameter.
"""

import json
import re
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from minimind.errors import (
    MinimindError,
    RejectedRequestError,
    ServiceError,
    UsageError,
    install_line,
)
from minimind.evaluation.tasks import Answer, GenerationConfig, format_error, map_concurrently
from minimind.service_url import parse_service_url
from minimind.tokenizer.chat import Message
from minimind.version import __version__

if TYPE_CHECKING:
    from minimind.evaluation.encoding import PromptEncoder
    from minimind.evaluation.scoring import Scorer

MAX_CONNECTIONS = 8
_RETRIES = 5  # per request, after rate limits, server errors and connection errors
_TIMEOUT = 120.0  # seconds without data
_CONNECT_TIMEOUT = 10.0  # seconds
_REJECTED = (400, 413, 422)  # status codes of requests that are too long or invalid
_MAX_TOKENS, _OLD_MAX_TOKENS = "max_completion_tokens", "max_tokens"


class Service:
    """A model that a service offers. rejected: the parameters that the service rejects."""

    def __init__(self, url: str, key: str | None = None, key_variable: str = "its key") -> None:
        """Connect to URL#NAME, or to the first model of URL.

        key_variable: the environment variable that error messages name if the key is wrong. Raises
        UsageError if openai is not installed or the service does not have the model, and
        ServiceError if the service does not respond.
        """
        try:
            import openai
        except ImportError as error:
            raise UsageError(
                f"remote models need the openai package, which is not installed ({error}); "
                f"{install_line('remote')}, then run the same command again"
            ) from error
        location, _, name = url.partition("#")
        self.url, is_local = parse_service_url(location)
        self._openai: Any = openai
        self._key_variable = key_variable
        self._client: Any = openai.OpenAI(
            api_key=key or "none",  # the client requires one
            base_url=self.url,
            timeout=openai.Timeout(_TIMEOUT, connect=_CONNECT_TIMEOUT),
            max_retries=_RETRIES,
            # A redirect would send the key to another host.
            http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=not is_local),
        )
        weakref.finalize(self, self._client.close)
        names = self._models()
        self.name = name or next(iter(names), "")
        if self.name not in names:
            raise UsageError(
                f"{self.url} has no model {self.name}; available: {', '.join(names) or 'none'}"
            )
        self._model = self.name
        self.rejected: set[str] = set()

    def identity(self) -> dict[str, Any]:
        """Return the identity of the model; the API does not reveal a change of the weights."""
        return {"version": __version__, "url": self.url, "model": self._model}

    def scorer(self) -> "tuple[Scorer, PromptEncoder]":
        """Raise UsageError, because the API returns no log-likelihoods of prompts."""
        raise UsageError(
            "a remote model returns no log-likelihoods; use a model directory, or a generative "
            "task: quiz, gsm8k, cmath, degeneration"
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
        parameters = {
            _MAX_TOKENS: max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "stream_options": {"include_usage": True},
        }
        disconnects = 0
        rejected_now: set[str] = set()
        while True:
            rejected = self.rejected | rejected_now
            settings = {
                name: value
                for name, value in parameters.items()
                if value is not None and name not in rejected
            }
            if _MAX_TOKENS in rejected:
                settings[_OLD_MAX_TOKENS] = max_tokens
            try:
                answer = self._stream(messages, settings)
            except self._openai.APIStatusError as error:
                names = _rejected_parameters(settings, error)
                # Never ask for an answer without a limit, which may take hours and is no result.
                if error.status_code not in _REJECTED or not names or _OLD_MAX_TOKENS in names:
                    raise self._to_service_error(error) from None
                rejected_now |= names
                continue
            except (self._openai.APIConnectionError, _StreamInterrupted) as error:
                disconnects += 1
                if disconnects > 1 or not isinstance(error, _StreamInterrupted):
                    raise self._to_service_error(error) from None
                continue
            except self._openai.OpenAIError as error:
                raise self._to_service_error(error) from None
            if _MAX_TOKENS in settings and (answer.tokens or 0) > max_tokens:
                rejected_now.add(_MAX_TOKENS)  # accepted, but ignored
                continue
            self.rejected |= rejected_now
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
                    raise _StreamInterrupted(str(error)) from error
                raise
            except (MemoryError, KeyboardInterrupt):
                raise
            except Exception as error:  # of the HTTP library, or from an invalid stream
                raise _StreamInterrupted(format_error(error)) from error
        if finish_reason is None:
            raise _StreamInterrupted("no finish_reason")
        return Answer("".join(texts).strip(), tokens, finish_reason != "length")

    def answers(
        self, conversations: Sequence[Sequence[Message]], generation: GenerationConfig
    ) -> Iterator[tuple[int, Answer | Exception]]:
        """Answer conversations; see Model."""

        def ask(messages: Sequence[Message]) -> Answer:
            greedy = generation.temperature == 0
            return self.answer(
                messages,
                max_tokens=generation.max_new_tokens,
                temperature=generation.temperature,
                top_p=None if greedy else generation.top_p,
                seed=None if greedy else generation.seed_for(messages),
            )

        before = time.perf_counter()
        concurrency = min(MAX_CONNECTIONS, generation.concurrency)
        for index, answer in map_concurrently(ask, conversations, concurrency):
            now = time.perf_counter()
            if isinstance(answer, MinimindError):
                yield index, answer
            else:
                yield index, replace(answer, seconds=now - before)
            before = now

    def _models(self) -> list[str]:
        """Return the names of the models of the service."""
        try:
            models = self._client.with_options(max_retries=1).models.list().data
            return [str(model.id) for model in models]
        except self._openai.OpenAIError as error:
            raise self._to_service_error(error) from None
        except (AttributeError, TypeError, ValueError):
            raise ServiceError(f"{self.url}/models is not an OpenAI-compatible API") from None

    def _to_service_error(self, error: Exception) -> ServiceError:
        if isinstance(error, self._openai.AuthenticationError):
            return ServiceError(
                f"{self.url} rejects the API key or needs one; set {self._key_variable}"
            )
        if isinstance(error, self._openai.APIStatusError):
            kind = RejectedRequestError if error.status_code in _REJECTED else ServiceError
            return kind(f"{self.url} returned status {error.status_code}: {_error_message(error)}")
        if isinstance(error, self._openai.APITimeoutError):
            return ServiceError(f"{self.url} did not respond within {_TIMEOUT:g} seconds")
        if isinstance(error, self._openai.APIConnectionError):
            return ServiceError(
                f"{self.url} cannot be reached ({error.__cause__ or error}); check that it "
                "is running; `minimind serve MODEL` starts a service"
            )
        if isinstance(error, _StreamInterrupted):
            return ServiceError(f"{self.url} closed the connection during an answer: {error}")
        return ServiceError(f"{self.url}: {error}")


class _StreamInterrupted(Exception):
    """A response stream that ended too early."""


def _rejected_parameters(settings: dict[str, Any], error: Any) -> set[str]:
    """Return the parameters that an error response names."""
    if getattr(error, "param", None) in settings:
        return {error.param}
    body = error.body if isinstance(error.body, str) else json.dumps(error.body, default=str)
    return {name for name in settings if re.search(rf"(?<!\w){name}(?!\w)", body or "")}


def _error_message(error: Any) -> str:
    """Return the message of an error response in any of the common formats."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, default=str)
    return " ".join(text.split())[:500] if body else "no message"
