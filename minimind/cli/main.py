"""The `minimind` command: its subcommands, and error messages instead of tracebacks."""

import contextlib
import errno
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from minimind.cli import (
    bench,
    chat,
    checkpoints,
    data,
    demo,
    doctor,
    export,
    export_onnx,
    generate,
    get,
    launcher,
    merge,
    minimind_pth,
    plan,
    push,
    report,
    road,
    serve,
    sweep,
    tokenizer,
    train,
    web,
)
from minimind.cli.compare import compare
from minimind.cli.eval import evaluate
from minimind.errors import MinimindError, is_out_of_memory, reason_of, same_command
from minimind.version import __version__

_OUT_OF_MEMORY = (
    "out of memory{detail}. In training, lower training.micro_batch_size or data.seq_len; "
    "otherwise use a smaller model or another --device"
)
_MAIN_PROCESS_HEAD_START_S = 2.0  # so that an error common to all ranks is printed once


class _Commands(TyperGroup):
    """A command group that reports the errors of its commands as messages."""

    def invoke(self, ctx: Any) -> Any:
        with errors_as_messages():
            return super().invoke(ctx)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Print errors that users or their machines cause as one line on stderr, and exit.

    The exit status is 1 for an error and 130 for Ctrl-C. Any other exception is a bug of minimind
    and keeps its traceback.
    """
    try:
        yield
        sys.stdout.flush()  # raises here if the pipe is closed, not while Python shuts down
    except MinimindError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
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
    if not launcher.is_main_process():  # rank 0 usually prints the same and ends all processes
        time.sleep(_MAIN_PROCESS_HEAD_START_S)
    print(f"error: {message}", file=sys.stderr, flush=True)
    if launcher.is_distributed():
        # After an error the threads of the process group still run, and they can abort the
        # interpreter while it shuts down.
        sys.stdout.flush()
        os._exit(1)
    raise typer.Exit(1)


def _system_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return (
            f"{where}the disk is full. Free some space and run {same_command()} again; "
            "finished work is kept"
        )
    return f"{where}{reason_of(error)}"


app = typer.Typer(
    name="minimind",
    cls=_Commands,
    # Importing rich for help pages would double the time of `minimind --help`.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    add_completion=False,
)

_FIRST_STEPS = """\
Train a small GPT from zero on your own computer. The first commands, in order:

  minimind demo             train a small model in 10 to 20 minutes
  minimind chat out/demo    chat with it

With your own texts and conversations:

  minimind tokenizer train TEXTS --out out/tokenizer
  minimind pretrain --tokenizer out/tokenizer --data TEXTS --out out/base
  minimind sft --model out/base --data CHATS --out out/chat

All commands: minimind --help"""


def _print_version(requested: bool) -> None:
    if requested:
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

    Begin with `minimind demo`. KEY=VALUE overrides a setting of a recipe, such as optim.lr=3e-4.
    """
    if context.invoked_subcommand is None:
        print(_FIRST_STEPS)


for _command in (
    *(demo.demo, road.road, train.pretrain, train.sft, train.lora, train.dpo, train.train),
    sweep.sweep,
    *(plan.plan, report.report, merge.merge, chat.chat, generate.generate, serve.serve, web.web),
    doctor.doctor,
    bench.bench,
    push.push,
    get.get,
):
    app.command()(_command)
app.command("eval")(evaluate)
app.command()(compare)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(data.app, name="data")
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(export.app, name="export")
export.app.command("onnx")(export_onnx.onnx)
export.app.command("torch")(minimind_pth.export_torch)
app.command("import")(minimind_pth.import_pth)


def _open_missing_streams() -> None:
    """Connect standard streams that were closed before the start to the null device."""
    # In this order, so that each gets its own descriptor (0, 1, 2).
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _use_utf_8() -> None:
    """Use UTF-8 for pipes and files on every platform; a terminal keeps its own encoding."""
    # A terminal shows "?" for a character that its encoding lacks, and the run continues.
    for stream, errors in (
        (sys.stdin, "strict"),
        (sys.stdout, "replace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors=errors)


def _with_home(word: str) -> str:
    """Expand the home directory in --OPTION=~/PATH, which most shells leave as it is."""
    option, equals, path = word.partition("=")
    if option.startswith("-") and re.match(r"~(?:$|[/\\])", path):
        return f"{option}{equals}{os.path.expanduser(path)}"
    return word


def main() -> None:
    """Run the command-line interface."""
    _open_missing_streams()
    _use_utf_8()
    sys.argv[1:] = [_with_home(word) for word in sys.argv[1:]]
    app(prog_name="minimind")
