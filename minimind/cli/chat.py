"""`minimind chat MODEL`: talk with a model, in a terminal or through a pipe."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind.cli.generate import (
    Adapter,
    Device,
    MaxNewTokens,
    Model,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    plain,
    stdin_lines,
)
from minimind.errors import MinimindError, ResourceError, UsageError

if TYPE_CHECKING:
    from minimind.tokenizer.chat import Message

    # The messages and a number for the random choices -> how many messages no longer fitted into
    # the context, and the answer.
    Answer = Callable[[list[Message], int], tuple[int, Iterator[str]]]

_HELP = """\
/reset        forget what was said; the system message stays
/system TEXT  set the system message; without TEXT, remove it
/save FILE    add the conversation to FILE, as a line of JSON that `minimind sft` reads
/help         this list
/quit         leave, as /exit and Ctrl-D do; Ctrl-C stops an answer"""


def chat(
    model: Model,
    adapter: Adapter = None,
    system: Annotated[str, typer.Option(help="What the model is told before all else.")] = "",
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    max_new_tokens: MaxNewTokens = 512,
    seed: Seed = None,
    device: Device = "auto",
) -> None:
    """Talk with a model. Through a pipe, each line is a message."""
    from minimind.inference.conversation import fit_chat
    from minimind.inference.generate import stream_text
    from minimind.inference.load import load_for_inference
    from minimind.inference.sampling import Sampling

    sampling = Sampling(temperature, top_p, top_k, repetition_penalty)
    loaded, tokenizer = load_for_inference(model, device, adapter=adapter)
    context = loaded.config.max_position_embeddings
    room_for_answer = min(max_new_tokens, context // 4)

    def answer(messages: "list[Message]", place: int) -> tuple[int, Iterator[str]]:
        prompt, left_out = fit_chat(tokenizer, messages, context - room_for_answer)
        return left_out, stream_text(
            loaded,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=None if seed is None else seed + place,
        )

    conversation = _Conversation(answer, system)
    if sys.stdin.isatty() and sys.stdout.isatty():
        size = sum(parameter.numel() for parameter in loaded.parameters())
        where = loaded.head_weight.device.type
        with_adapter = f" with {adapter}" if adapter else ""
        told = f"{model}{with_adapter}: {size / 1e6:.1f}M parameters, on {where}"
        _tell(f"{told}. /help lists the commands.")
        _in_terminal(conversation)
    else:
        for line in stdin_lines():
            if not conversation.take(line.rstrip("\n")):
                break


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
        self._system = plain(system)
        self._turns: list[Message] = []  # user, assistant, user, …
        self._first = 0  # the first turn that still fits into the context

    def take(self, line: str) -> bool:
        """Do what one line asks for; False to leave."""
        if not line.startswith("/"):
            if line.strip():
                self._say(plain(line.strip()))
            return True
        command, _, argument = line.partition(" ")
        argument = plain(argument.strip())
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
                    "Begin with a space to say it to the model"
                )
        return True

    def _say(self, text: str) -> None:
        """One turn; if it is interrupted, what was said of the answer is kept."""
        question = {"role": "user", "content": text}
        seen = [*self._opening(), *self._turns[self._first :], question]
        left_out, pieces = self._answer(seen, len(self._turns))
        if left_out and not self._first:
            _tell(
                "(the conversation is longer than the model can see: its oldest turns are left out)"
            )
        self._first += left_out
        said = ""
        try:
            for piece in map(plain, pieces):
                print(piece, end="", flush=True)
                said += piece
        finally:
            print(flush=True)
            if said.strip():
                self._turns += [question, {"role": "assistant", "content": said}]

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
            path = path.expanduser()
            with path.open("ab+") as file:
                if file.tell() and _last_byte(file) != b"\n":
                    file.write(b"\n")
                file.write(line.encode("utf-8", "replace") + b"\n")
        except (OSError, RuntimeError) as error:
            raise ResourceError(f"{path}: cannot be written: {error}") from error
        _tell(f"saved to {path}")


def _last_byte(file: io.BufferedRandom) -> bytes:
    file.seek(-1, io.SEEK_END)
    return file.read(1)


def _tell(text: str) -> None:
    """Say something that is not an answer: on stderr, so that a pipe gets the answers alone."""
    print(plain(text), file=sys.stderr, flush=True)
