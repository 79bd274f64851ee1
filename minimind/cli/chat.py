"""`minimind chat MODEL`: talk with a model, here or at a service, in a terminal or a pipe."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli.options import (
    Adapter,
    Context,
    Device,
    Int8,
    MaxNewTokens,
    MinP,
    RepetitionPenalty,
    RopeScaling,
    Seed,
    Temperature,
    TopK,
    TopP,
    validated_context,
)
from minimind.cli.terminal import report_short_context, stdin_lines, strip_controls
from minimind.environment import KEY_VARIABLE
from minimind.errors import MinimindError, ResourceError, UsageError
from minimind.paths import expand_user

if TYPE_CHECKING:
    from minimind.tokenizer.chat import Message
    from minimind.web.client import Answer as RemoteAnswer

    # The messages and a number for the random choices -> how many messages no longer fitted into
    # the context, and the answer.
    Answer = Callable[[list[Message], int], tuple[int, Generator[str]]]

_HELP = """\
/reset        forget what was said; the system message stays
/system TEXT  set the system message; without TEXT, remove it
/save FILE    add the conversation to FILE, as a line of JSON that `minimind sft` reads
/help         this list
/quit         leave, as /exit and Ctrl-D do; Ctrl-C stops an answer"""


def chat(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="Model or run directory; with --url, a model's name."),
    ] = None,
    adapter: Adapter = None,
    url: Annotated[
        str | None,
        typer.Option(help=f"Talk to the service there instead; its key is in {KEY_VARIABLE}."),
    ] = None,
    system: Annotated[str, typer.Option(help="What the model is told before all else.")] = "",
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = None,
    device: Device = "auto",
    int8: Int8 = False,
    context: Context = None,
    rope_scaling: RopeScaling = None,
) -> None:
    """Talk with a model, here or at a service. In a pipe or a file, each line is a message."""
    if model is None and url is None:
        raise UsageError("give a MODEL, or the --url of a service")
    context = validated_context(context, rope_scaling)
    if url is not None and (adapter or device != "auto" or int8 or context):
        raise UsageError(
            "--adapter, --device, --int8 and --context are the service's to choose, not --url's"
        )
    settings = dict(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        min_p=min_p,
    )
    with contextlib.ExitStack() as stack:
        if url is None:
            assert model is not None
            how = dict(device=device, adapter=adapter, context=context, rope_scaling=rope_scaling)
            here = _from_model(model, how, int8, max_new_tokens, seed, settings)
            answer, told = stack.enter_context(here)
        else:
            answer, told = _from_service(url, model, max_new_tokens, seed, settings)
        conversation = _Conversation(answer, system)
        if sys.stdin.isatty() and sys.stdout.isatty():
            _tell(f"{told}. /help lists the commands.")
            _in_terminal(conversation)
        else:
            # Commands are for whoever types; in a pipe or a file each line is a message.
            take = conversation.take if sys.stdin.isatty() else conversation.say
            for line in stdin_lines():
                if not take(line.rstrip("\n")):
                    break


@contextlib.contextmanager
def _from_model(
    model: Path,
    how: dict[str, Any],
    int8: bool,
    max_new_tokens: int,
    seed: int | None,
    settings: dict[str, Any],
) -> "Iterator[tuple[Answer, str]]":
    """What answers here, and what it is."""
    from minimind.inference.defaults import read_generation_defaults
    from minimind.inference.engine import Engine
    from minimind.inference.load import load_for_inference
    from minimind.inference.truncation import fit_chat

    sampling = read_generation_defaults(model).sampling_with(settings)
    loaded, tokenizer = load_for_inference(model, **how)
    size = sum(parameter.numel() for parameter in loaded.parameters())
    with Engine(loaded, tokenizer, slots=1, context=how["context"], int8=int8) as engine:
        report_short_context(engine, loaded, how["context"])
        del loaded  # the engine has its own
        room_for_answer = min(max_new_tokens, engine.context // 4)

        def answer(messages: "list[Message]", place: int) -> tuple[int, Generator[str]]:
            prompt, left_out = fit_chat(tokenizer, messages, engine.context - room_for_answer)
            return left_out, engine.stream_text(
                prompt,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=None if seed is None else seed + place,
            )

        with_adapter = f" with {how['adapter']}" if how["adapter"] else ""
        where = engine.model.device.type
        yield answer, f"{model}{with_adapter}: {size / 1e6:.1f}M parameters, on {where}"


def _from_service(
    url: str, wanted: Path | None, max_new_tokens: int, seed: int | None, settings: dict[str, Any]
) -> "tuple[Answer, str]":
    """What answers there, and what it is; torch is not imported."""
    from minimind.web.client import Client

    client = Client(url, os.environ.get(KEY_VARIABLE))
    found = {model.name: model for model in client.models()}
    name = next(iter(found), "") if wanted is None else str(wanted)
    if name not in found:
        raise UsageError(f"{client.url} has no model {name}; it has: {', '.join(found) or 'none'}")
    model = found[name]
    settings = {key: value for key, value in settings.items() if value is not None}
    if not model.is_ours:  # which may refuse what OpenAI's API lacks
        beyond = dict(top_k=0, repetition_penalty=1.0, min_p=0.0)
        if changed := [key for key, noop in beyond.items() if settings.get(key, noop) != noop]:
            flags = ", ".join(f"--{key.replace('_', '-')}" for key in changed)
            raise UsageError(f"{flags}: only services of minimind know it")
        settings = {key: value for key, value in settings.items() if key not in beyond}

    def answer(messages: "list[Message]", place: int) -> tuple[int, Generator[str]]:
        said = client.chat(
            model,
            messages,
            max_tokens=max_new_tokens,
            seed=None if seed is None else seed + place,
            **settings,
        )
        return said.left_out, _closed_at_the_end(said)

    return answer, f"{name} at {client.url}"


def _closed_at_the_end(said: "RemoteAnswer") -> Generator[str]:
    with said:
        yield from said


def _in_terminal(conversation: "_Conversation") -> None:
    """Mistakes are told and the talk goes on."""
    for line in _typed_lines():
        try:
            if not conversation.take(line):
                break
        except MinimindError as error:
            _tell(str(error))
        except KeyboardInterrupt:
            continue  # the answer that was being written ends here


def _typed_lines() -> Iterator[str]:
    with contextlib.suppress(ImportError):  # Windows has none, and needs none
        import readline  # noqa: F401
    assert isinstance(sys.stdin, io.TextIOWrapper)
    sys.stdin.reconfigure(errors="replace")  # a terminal may delete half a character
    leaving = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if leaving:
                return
            leaving = True
            _tell("Ctrl-C again leaves")
        else:
            leaving = False
            yield line


class _Conversation:
    """What was said, and what the model still sees of it."""

    def __init__(self, answer: "Answer", system: str) -> None:
        self._answer = answer
        self._system = strip_controls(system)
        self._turns: list[Message] = []  # user, assistant, user, …
        self._first = 0  # the first turn that still fits into the context

    def take(self, line: str) -> bool:
        """Do what one line asks for; False to leave."""
        if not line.startswith("/"):
            return self.say(line)
        command, _, argument = line.partition(" ")
        argument = strip_controls(argument.strip())
        match command.rstrip():
            case "/reset":
                self._turns, self._first = [], 0
            case "/system":
                self._system = argument
            case "/save":
                self._save(argument)
            case "/help":
                _tell(_HELP)
            case "/quit" | "/exit":
                return False
            case unknown:
                known = ", ".join(row[: row.index("  ")] for row in _HELP.splitlines())
                raise UsageError(
                    f"{unknown} is not a command; there are {known}. "
                    "Begin the line with a space to send it to the model"
                )
        return True

    def say(self, line: str) -> bool:
        """Send a line to the model, unless it is empty; always True.

        If the answer is interrupted, what was written of it is kept.
        """
        question = {"role": "user", "content": strip_controls(line.strip())}
        if not question["content"]:
            return True
        seen = [*self._opening(), *self._turns[self._first :], question]
        left_out, pieces = self._answer(seen, len(self._turns))
        if left_out and not self._first:
            _tell(
                "(the conversation is longer than the model can see: its oldest turns are left out)"
            )
        self._first += left_out
        said = ""
        try:
            for piece in map(strip_controls, pieces):
                print(piece, end="", flush=True)
                said += piece
        finally:
            pieces.close()  # an answer that is interrupted ends here
            print(flush=True)
            if said.strip():
                self._turns += [question, {"role": "assistant", "content": said}]
        return True

    def _opening(self) -> "list[Message]":
        return [{"role": "system", "content": self._system}] if self._system else []

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save needs a file: /save FILE")
        if not self._turns:
            raise UsageError("nothing was said yet, so there is nothing to save")
        # The ending is how it is known what a file holds.
        path = Path(name if Path(name).suffix else name + ".jsonl")
        line = json.dumps({"conversations": self._opening() + self._turns}, ensure_ascii=False)
        try:
            path = expand_user(path)
            with path.open("ab+") as file:
                if file.tell() and _last_byte(file) != b"\n":
                    file.write(b"\n")
                file.write(line.encode("utf-8", "replace") + b"\n")
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written: {error}") from error
        _tell(f"saved to {path}")


def _last_byte(file: io.BufferedRandom) -> bytes:
    file.seek(-1, io.SEEK_END)
    return file.read(1)


def _tell(text: str) -> None:
    """Say something that is not an answer: on stderr, so that a pipe gets the answers alone."""
    print(strip_controls(text), file=sys.stderr, flush=True)
