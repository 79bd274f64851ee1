"""What `eval` and `compare` are given: directories, with an adapter or without, and services."""

import os
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.cli import console
from minimind.errors import MinimindError, ModelError, TokenizerError, UsageError

if TYPE_CHECKING:
    from minimind.evaluation.scoring import Scorer
    from minimind.evaluation.tasks import Answer, Manner
    from minimind.evaluation.words import Words
    from minimind.tokenizer.chat import Message

CONNECTIONS = 8


def open_model(
    place: str,
    device: str,
    *,
    adapter: Path | None = None,
    context: int | None = None,
    taken: Container[str] = (),
) -> Any:
    """DIR, DIR+ADAPTER, URL or URL#NAME; of a name that is not yet taken.

    Raises ModelError for what is no model or no adapter, ServiceError when nobody answers, and
    UsageError for a service without that model.
    """
    model: Any
    if is_service(place):
        if adapter or context:
            raise UsageError("--adapter and --context are for a service to choose")
        model = Service(place)
    else:
        directory, beside = _split(place)
        if adapter and beside:
            raise UsageError(f"{place} names an adapter already; leave out --adapter")
        model = _local(directory, device, adapter or beside, context)
    name, number = model.name, 1
    while model.name in taken:
        number += 1
        model.name = f"{name} {number}"
    return model


def _local(directory: Path, device: str, adapter: Path | None, context: int | None) -> Any:
    """By our own reading; what that refuses, by transformers where it is installed."""
    from minimind.evaluation.fallback import TransformersModel, is_installed
    from minimind.evaluation.models import LocalModel

    model = LocalModel(directory, device, adapter=adapter, context=context)
    try:
        model.check()
    except (ModelError, TokenizerError) as error:
        if adapter or not is_installed():
            raise
        try:
            there = TransformersModel(model.directory, device, context=context)
        except ModelError as other:
            raise ModelError(f"{error}; {other}") from other
        console.say(f"{directory}: read by transformers, because {error}")
        return there
    return model


def is_service(place: str) -> bool:
    """Whether a model is named by the URL of its service; an existing path is always a path."""
    return "://" in place and not Path(place).exists()


def _split(place: str) -> tuple[Path, Path | None]:
    """A directory, and the adapter named after a plus sign unless that sign is part of a path."""
    splits = [
        (Path(place[:at]), Path(place[at + 1 :]))
        for at, sign in enumerate(place)
        if sign == "+" and at and Path(place[:at]).exists()
    ]
    if not splits or Path(place).exists():
        return Path(place), None
    return max(splits, key=lambda split: split[1].exists())


class Service:
    """A model behind an OpenAI-compatible URL, which writes and gives no likelihoods."""

    def __init__(self, url: str, key_variables: Sequence[str] = ()) -> None:
        """`url` may end in #NAME, else the first model is meant.

        The key is in the first of the variables that is set, of which the client's is the last.
        Raises ServiceError when nobody answers, UsageError when it lacks the model.
        """
        from minimind.web.client import KEY_VARIABLE, Client

        place, _, wanted = url.partition("#")
        keys = [os.environ.get(variable) for variable in (*key_variables, KEY_VARIABLE)]
        self._client = Client(place, next(filter(None, keys), None))
        found = {model.name: model for model in self._client.models()}
        name = wanted or next(iter(found), "")
        if name not in found:
            raise UsageError(
                f"{self._client.url} has no model {name}; it has: {', '.join(found) or 'none'}"
            )
        self._model, self.name = found[name], name

    def identity(self) -> dict[str, Any]:
        """Which service; whether its model is still the same nobody can tell."""
        return {"url": self._client.url, "model": self._model.name}

    def scorer(self) -> "tuple[Scorer, Words]":
        """Raises UsageError."""
        raise UsageError(
            "a service gives no likelihoods; give a model directory, or take a task that is "
            "answered in words: quiz, gsm8k, cmath, degeneration"
        )

    def answer(self, messages: "Sequence[Message]", **settings: Any) -> "Answer":
        """The answer to a conversation; settings are those of OpenAI's API. Raises ServiceError."""
        from minimind.evaluation.tasks import Answer

        with self._client.chat(self._model, messages, **settings) as said:
            text = "".join(said).strip()
        ended = None if said.finish_reason is None else said.finish_reason != "length"
        return Answer(text, said.tokens, ended)

    def answers(
        self, questions: Sequence[str], manner: "Manner"
    ) -> "Iterator[tuple[int, Answer | Exception]]":
        """Some questions at once, as the service lets them wait."""
        from minimind.evaluation.tasks import asked_together

        def ask(question: str) -> "Answer":
            return self.answer(
                [{"role": "user", "content": question}],
                max_tokens=manner.max_new_tokens,
                temperature=manner.temperature,
                top_p=None if manner.temperature == 0 else manner.top_p,
                seed=None if manner.temperature == 0 else manner.seed_of(question),
            )

        before = time.perf_counter()
        together = min(CONNECTIONS, manner.at_once)
        for place, answer in asked_together(ask, questions, together):
            now = time.perf_counter()
            if isinstance(answer, MinimindError):
                yield place, answer
            else:
                yield place, replace(answer, seconds=now - before)
            before = now
