"""`minimind chat MODEL`: chat with a local or remote model, in a terminal or through a pipe."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minimind.cli.models import pretrained_only_hint
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
)
from minimind.cli.terminal import report_short_context, stdin_lines, strip_controls
from minimind.environment import KEY_VARIABLE
from minimind.errors import MinimindError, ResourceError, UsageError
from minimind.paths import expand_user

if TYPE_CHECKING:
    from minimind.tokenizer.chat import Message
    from minimind.web.client import Answer as RemoteAnswer

    # (messages, offset added to the seed) -> (number of oldest messages left out because they
    # exceed the context, pieces of the answer)
    Answer = Callable[[list[Message], int], tuple[int, Generator[str]]]

_HELP = """\
/reset        start a new conversation; keep the system prompt
/system TEXT  set the system prompt; without TEXT, remove it
/save FILE    append the conversation to FILE (JSONL, training data for `minimind sft`)
/help         list the commands
/quit         quit, like /exit and Ctrl-D; Ctrl-C stops an answer"""


def chat(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL", help="Model or run directory; with --url, a model name."),
    ] = None,
    adapter: Adapter = None,
    url: Annotated[
        str | None,
        typer.Option(
            help=f"Chat with an OpenAI-compatible service at this URL; API key in {KEY_VARIABLE}."
        ),
    ] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
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
    """Chat with a model. If stdin is a pipe or a file, each line is a message."""
    if model is None and url is None:
        raise UsageError("give a MODEL, or a service with --url URL")
    if url is not None and (adapter or device != "auto" or int8 or context or rope_scaling):
        raise UsageError(
            "--adapter, --device, --int8, --context and --rope-scaling cannot be used with --url; "
            "set them when you start the service"
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
            if adapter is None and (hint := pretrained_only_hint(model)):
                _print_notice(hint)
            loading = dict(
                device=device, adapter=adapter, context=context, rope_scaling=rope_scaling
            )
            local = _local_model(model, loading, int8, max_new_tokens, seed, settings)
            answer, description = stack.enter_context(local)
        else:
            answer, description = _remote_model(url, model, max_new_tokens, seed, settings)
        conversation = _Conversation(answer, system)
        if sys.stdin.isatty() and sys.stdout.isatty():
            _print_notice(f"{description}. /help lists the commands.")
            _chat_in_terminal(conversation)
        else:
            # A pipe or a file has no commands: there, each line is a message.
            typed = sys.stdin.isatty()
            handle = conversation.handle if typed else conversation.send
            for line in stdin_lines():
                try:
                    if not handle(line.rstrip("\n")):
                        break
                except MinimindError as error:
                    if not typed:
                        raise
                    _print_notice(str(error))


@contextlib.contextmanager
def _local_model(
    model: Path,
    loading: dict[str, Any],
    int8: bool,
    max_new_tokens: int,
    seed: int | None,
    settings: dict[str, Any],
) -> "Iterator[tuple[Answer, str]]":
    """Load a model; yield its answer function and its description.

    loading: arguments of `load_for_inference`.
    """
    from minimind.inference.defaults import read_generation_defaults
    from minimind.inference.engine import Engine
    from minimind.inference.load import load_for_inference
    from minimind.inference.truncation import truncate_chat

    sampling = read_generation_defaults(model).sampling_with(settings)
    loaded, tokenizer = load_for_inference(model, **loading)
    num_parameters = sum(parameter.numel() for parameter in loaded.parameters())
    with Engine(loaded, tokenizer, slots=1, context=loading["context"], int8=int8) as engine:
        report_short_context(engine, loaded, loading["context"])
        del loaded  # the engine has its own copy
        reserved = min(max_new_tokens, engine.context // 4)

        def answer(messages: "list[Message]", seed_offset: int) -> tuple[int, Generator[str]]:
            prompt, left_out = truncate_chat(tokenizer, messages, engine.context - reserved)
            return left_out, engine.stream_text(
                prompt,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=None if seed is None else seed + seed_offset,
            )

        adapter = f" with {loading['adapter']}" if loading["adapter"] else ""
        device = engine.model.device.type
        yield answer, f"{model}{adapter}: {num_parameters / 1e6:.1f}M parameters, on {device}"


def _remote_model(
    url: str,
    requested: Path | None,
    max_new_tokens: int,
    seed: int | None,
    settings: dict[str, Any],
) -> "tuple[Answer, str]":
    """Return the answer function of a remote model and its description. Imports no torch."""
    from minimind.web.client import Client

    client = Client(url, os.environ.get(KEY_VARIABLE))
    models = {model.name: model for model in client.models()}
    name = next(iter(models), "") if requested is None else requested.as_posix()
    if name not in models:
        raise UsageError(f"{client.url} has no model {name}; it has: {', '.join(models) or 'none'}")
    model = models[name]
    settings = {key: value for key, value in settings.items() if value is not None}
    if not model.is_ours:  # other services may reject parameters beyond OpenAI's API
        extensions = dict(top_k=0, repetition_penalty=1.0, min_p=0.0)
        if changed := [key for key, noop in extensions.items() if settings.get(key, noop) != noop]:
            flags = ", ".join(f"--{key.replace('_', '-')}" for key in changed)
            raise UsageError(f"{flags}: supported only by services started with `minimind serve`")
        settings = {key: value for key, value in settings.items() if key not in extensions}

    def answer(messages: "list[Message]", seed_offset: int) -> tuple[int, Generator[str]]:
        stream = client.chat(
            model,
            messages,
            max_tokens=max_new_tokens,
            seed=None if seed is None else seed + seed_offset,
            **settings,
        )
        return stream.left_out, _pieces(stream)

    return answer, f"{name} at {client.url}"


def _pieces(stream: "RemoteAnswer") -> Generator[str]:
    """Yield the pieces of an answer; closing the generator cancels it at the service."""
    with stream:
        yield from stream


def _chat_in_terminal(conversation: "_Conversation") -> None:
    """Read and handle lines until the user quits; errors are printed and do not end the chat."""
    for line in _typed_lines():
        try:
            if not conversation.handle(line):
                break
        except MinimindError as error:
            _print_notice(str(error))
        except KeyboardInterrupt:
            continue  # Ctrl-C ends only the answer


def _typed_lines() -> Iterator[str]:
    """Yield typed lines until Ctrl-D, or Ctrl-C twice."""
    with contextlib.suppress(ImportError):  # Windows consoles edit lines without it
        import readline  # noqa: F401
    assert isinstance(sys.stdin, io.TextIOWrapper)
    sys.stdin.reconfigure(errors="replace")  # backspace may leave an incomplete character
    interrupted = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if interrupted:
                return
            interrupted = True
            _print_notice("Press Ctrl-C again to quit")
        else:
            interrupted = False
            yield line


class _Conversation:
    """A conversation and its commands."""

    def __init__(self, answer: "Answer", system: str) -> None:
        self._answer = answer
        self._system = strip_controls(system)
        self._turns: list[Message] = []  # user, assistant, user, …
        self._first = 0  # index of the first message that still fits into the context

    def handle(self, line: str) -> bool:
        """Execute a command or send a message; return False to quit."""
        if not line.startswith("/"):
            return self.send(line)
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
                _print_notice(_HELP)
            case "/quit" | "/exit":
                return False
            case unknown:
                known = ", ".join(row[: row.index("  ")] for row in _HELP.splitlines())
                raise UsageError(
                    f"{unknown} is not a command; the commands are {known}. "
                    "To send the line to the model, start it with a space"
                )
        return True

    def send(self, line: str) -> bool:
        """Send a message and print the answer; skip an empty line. Always return True.

        An interrupted answer stays in the conversation as far as it was printed.
        """
        question = {"role": "user", "content": strip_controls(line.strip())}
        if not question["content"]:
            return True
        messages = [*self._system_message(), *self._turns[self._first :], question]
        left_out, pieces = self._answer(messages, len(self._turns))
        if left_out and not self._first:
            _print_notice("(the conversation exceeds the context: its oldest turns are left out)")
        self._first += left_out
        answer = ""
        try:
            for piece in map(strip_controls, pieces):
                print(piece, end="", flush=True)
                answer += piece
        finally:
            pieces.close()  # cancels an interrupted answer
            print(flush=True)
            if answer.strip():
                self._turns += [question, {"role": "assistant", "content": answer}]
        return True

    def _system_message(self) -> "list[Message]":
        return [{"role": "system", "content": self._system}] if self._system else []

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save needs a file name: /save FILE")
        if not self._turns:
            raise UsageError("the conversation is empty: there is nothing to save")
        # `minimind sft` recognises the format by the suffix; a line of JSON is written.
        path = Path(name)
        if path.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
            path = Path(name + ".jsonl")
        line = json.dumps(
            {"conversations": self._system_message() + self._turns}, ensure_ascii=False
        )
        try:
            path = expand_user(path)
            with path.open("ab+") as file:
                if file.tell() and _last_byte(file) != b"\n":
                    file.write(b"\n")
                file.write(line.encode("utf-8", "replace") + b"\n")
        except OSError as error:
            raise ResourceError(f"{path}: cannot be written: {error}") from error
        _print_notice(f"saved to {path}")


def _last_byte(file: io.BufferedRandom) -> bytes:
    file.seek(-1, io.SEEK_END)
    return file.read(1)


def _print_notice(text: str) -> None:
    """Print to stderr: stdout has only the answers."""
    print(strip_controls(text), file=sys.stderr, flush=True)
