"""`minimind tokenizer train` and `minimind tokenizer inspect`."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind.cli import console
from minimind.cli.downloads import Yes, ensure_downloaded
from minimind.cli.options import Json
from minimind.errors import UsageError
from minimind.files import write_json

if TYPE_CHECKING:
    from minimind.data.invalid import InvalidRecords
    from minimind.tokenizer.stats import Usage, Vocabulary

app = typer.Typer(help="Train and inspect tokenizers.", no_args_is_help=True)
_INSPECTED_MB = 8


@app.command()
def train(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA", help="Files, folders, globs (quoted) or dataset names."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer.")],
    vocab_size: Annotated[
        int, typer.Option(help="Vocabulary size, including control tokens and the 256 bytes.")
    ] = 6400,
    sample_mb: Annotated[
        int, typer.Option(min=1, help="Megabytes of text to train on; each takes 100 MB of memory.")
    ] = 12,
    yes: Yes = False,
) -> None:
    """Train a byte-level BPE tokenizer on a sample of the data."""
    from minimind.data.invalid import FIX_OR_LEAVE_OUT, InvalidRecords
    from minimind.tokenizer import train_tokenizer

    if (out / "tokenizer.json").exists():
        raise UsageError(
            f"{out} already contains a tokenizer that models may depend on; "
            "choose another --out, or delete it"
        )
    ensure_downloaded(data, yes)
    invalid = InvalidRecords(advice=FIX_OR_LEAVE_OUT)
    texts = read_with_progress(data, invalid)
    out.mkdir(parents=True, exist_ok=True)  # an unusable folder fails before the long work
    tokenizer = train_tokenizer(
        announce_training(texts), vocab_size=vocab_size, sample_bytes=sample_mb << 20
    )
    tokenizer.save(out)
    report_invalid(invalid)
    if tokenizer.vocab_size < vocab_size:
        console.say(f"The data is too small for more than {tokenizer.vocab_size:,} tokens.")
    console.say(f"The tokenizer with {tokenizer.vocab_size:,} tokens is in {out}.")
    console.say(f"Inspect it: {console.command('tokenizer', 'inspect', out)}")


@app.command()
def inspect(
    tokenizers: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="Tokenizer or model directories.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on instead of built-in sentences; repeatable."),
    ] = None,
    yes: Yes = False,
    json: Json = None,
) -> None:
    """Compare the vocabulary and compression of tokenizers.

    The vocabulary is counted by script, compression as characters per token by language.
    """
    from minimind.data.invalid import FIX_OR_LEAVE_OUT, InvalidRecords
    from minimind.tokenizer.bpe import load_bpe
    from minimind.tokenizer.stats import SAMPLE_TEXTS, describe_vocabulary, measure
    from minimind.tokenizer.train import sample_uniformly

    loaded = {str(directory): load_bpe(directory) for directory in tokenizers}
    texts = SAMPLE_TEXTS
    if data:
        ensure_downloaded(data, yes)
        invalid = InvalidRecords(advice=FIX_OR_LEAVE_OUT)
        texts = sample_uniformly(read_with_progress(data, invalid), _INSPECTED_MB << 20)
        report_invalid(invalid)
    vocabularies = {name: describe_vocabulary(bpe) for name, bpe in loaded.items()}
    usages = {name: measure(bpe, texts) for name, bpe in loaded.items()}
    _show_vocabularies(vocabularies)
    _show_usages(usages, data or [])
    if json:
        metrics = {name: asdict(vocabularies[name]) | asdict(usages[name]) for name in loaded}
        write_json(json, {"measured_on": data or [], "tokenizers": metrics})


def read_with_progress(data: list[str], invalid: "InvalidRecords") -> Iterator[str]:
    """Yield all texts of the data under a progress bar. Raises DataError if none is valid."""
    from minimind.data.input_files import list_files

    files = [file for path in data for file in list_files(path)]
    return _read(files, invalid)


def _read(files: list[Path], invalid: "InvalidRecords") -> Iterator[str]:
    from minimind.data.read import read_texts

    with console.make_progress("byte") as bar:
        task = bar.add_task("reading", total=sum(file.stat().st_size for file in files), note="")
        yield from read_texts(
            files, invalid=invalid, progress=lambda count: bar.advance(task, count)
        )
    if not invalid.num_valid:
        invalid.check(0.0, final=True)


def report_invalid(invalid: "InvalidRecords") -> None:
    """Report the records that were left out, if there are any."""
    if invalid.total:
        console.say(f"{invalid.describe()}. They are left out")


def announce_training(texts: Iterator[str]) -> Iterator[str]:
    yield from texts
    console.say("training the tokenizer…")  # takes half a minute without progress


def _show_vocabularies(vocabularies: dict[str, "Vocabulary"]) -> None:
    columns = [
        [
            f"{v.num_tokens:,}",
            v.num_control,
            *(_share(n, v.num_tokens) for n in v.by_script.values()),
        ]
        for v in vocabularies.values()
    ]
    kinds = ["all", "control tokens", *next(iter(vocabularies.values())).by_script]
    rows = list(zip(kinds, *columns, strict=True))
    console.show(console.table("Vocabulary", ["kind", *vocabularies], rows, numbers=len(columns)))
    longest = [
        [name, script, " ".join(repr(token).replace(" ", "␣") for token in tokens)]
        for name, vocabulary in vocabularies.items()
        for script, tokens in vocabulary.longest.items()
        if tokens
    ]
    console.show(console.table("Longest tokens", ["tokenizer", "script", "tokens"], longest))


def _share(part: int, total: int) -> str:
    return f"{part:,} ({part / total:.0%})"


def _show_usages(usages: dict[str, "Usage"], data: list[str]) -> None:
    languages = next(iter(usages.values())).characters_per_token
    columns = ["tokenizer", *languages, "bytes per token", "unused tokens"]
    rows = [
        [name, *usage.characters_per_token.values(), usage.bytes_per_token, usage.num_unused]
        for name, usage in usages.items()
    ]
    if not data:  # a few sentences leave nearly all tokens unused
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    title = f"Characters per token, on {', '.join(data) or 'a few built-in sentences'}"
    console.show(console.table(title, columns, rows, numbers=len(columns) - 1))
