"""The command `minimind`: its verbs, and what a user sees when something goes wrong."""

import contextlib
import errno
import io
import os
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from minimind.cli import (
    chat,
    checkpoints,
    data,
    demo,
    doctor,
    export,
    generate,
    launcher,
    merge,
    plan,
    report,
    serve,
    sweep,
    tokenizer,
    train,
    web,
)
from minimind.cli.compare import compare
from minimind.cli.eval import evaluate
from minimind.errors import MinimindError, is_out_of_memory
from minimind.version import __version__

_OUT_OF_MEMORY = (
    "too little memory{detail}. In training, lower training.micro_batch_size (windows at once) or "
    "data.seq_len; else take a smaller model, or another --device"
)
_FIRST_TO_SPEAK_S = 2.0  # what several processes all run into is said once


class _Verbs(TyperGroup):
    """The verbs; whatever one of them raises ends here."""

    def invoke(self, ctx: Any) -> Any:
        with errors_as_messages():
            return super().invoke(ctx)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn what users and their machines can cause into one line on stderr and an exit status.

    1 for an error, 130 for Ctrl-C. What is left over, with its traceback, is a bug of ours.
    """
    try:
        yield
        sys.stdout.flush()  # so that a closed pipe is met here, not while Python shuts down
    except MinimindError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except MemoryError:
        _fail(_OUT_OF_MEMORY.format(detail=""))
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        _fail(_system_error(error))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        _fail(_OUT_OF_MEMORY.format(detail=f" ({str(error).splitlines()[0]})"))


def _fail(message: str) -> NoReturn:
    if not launcher.is_first_process():  # which says the same as a rule, and then all are ended
        time.sleep(_FIRST_TO_SPEAK_S)
    print(f"error: {message}", file=sys.stderr, flush=True)
    if launcher.is_one_of_several():
        # What the processes talk through has threads of its own. They end with the run; after an
        # error they are still there, and while Python shuts down they would abort it now and then.
        sys.stdout.flush()
        os._exit(1)
    raise typer.Exit(1)


def _system_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return (
            f"{where}the disk is full. Free some space and give the same command again: "
            "what is finished is kept"
        )
    return f"{where}{error.strerror or error}"


app = typer.Typer(
    name="minimind",
    cls=_Verbs,
    # Plain help pages: rich would cost as much time as all the rest of `minimind --help`.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    add_completion=False,
)

_FIRST_STEPS = """Train a small GPT from zero on your own computer.

  minimind demo                                             a whole small model in 10 to 20 minutes
  minimind chat out/demo                                    talk to it
  minimind tokenizer train TEXTS --out out/tokenizer        your own text: a tokenizer,
  minimind pretrain --tokenizer out/tokenizer --data TEXTS --out out/base     pretraining,
  minimind sft --model out/base --data CHATS --out out/chat                   and fine-tuning

All commands: minimind --help"""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"minimind {__version__}")
        raise typer.Exit()


@app.callback()
def _start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Train a small GPT from zero on your own computer.

    Begin with `minimind demo`. KEY=VALUE changes a setting of a recipe, such as optim.lr=3e-4.
    """
    if context.invoked_subcommand is None:
        print(_FIRST_STEPS)


for _verb in (
    *(demo.demo, train.pretrain, train.sft, train.lora, train.dpo, train.train, sweep.sweep),
    *(plan.plan, report.report, merge.merge, chat.chat, generate.generate, serve.serve, web.web),
    doctor.doctor,
):
    app.command()(_verb)
app.command("eval")(evaluate)
app.command()(compare)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(export.app, name="export")


def _open_missing_streams() -> None:
    """Connect standard streams that were closed before the start to the null device."""
    # In this order, so that each gets its own descriptor and no file opened later does.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _use_utf_8() -> None:
    """Make pipes and files UTF-8 on every platform; a terminal keeps its own encoding."""
    # A terminal that lacks a character shows "?" for it rather than stopping the run.
    for stream, errors in (
        (sys.stdin, "strict"),
        (sys.stdout, "replace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=errors)


def main() -> None:
    """Run the command line."""
    _open_missing_streams()
    _use_utf_8()
    app(prog_name="minimind")
