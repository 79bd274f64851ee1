"""`minimind tokenizer train` and `minimind tokenizer inspect`."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minimind.cli import console
from minimind.errors import UsageError, shell_words

if TYPE_CHECKING:
    from minimind.data.invalid import InvalidRecords
    from minimind.tokenizer.stats import Usage, Vocabulary

app = typer.Typer(help="Train a tokenizer, or look into some.", no_args_is_help=True)
_INSPECTED_MB = 8


@app.command()
def train(
    data: Annotated[
        list[str], typer.Argument(metavar="DATA", help="Files, folders or globs (quoted).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer.")],
    vocab_size: Annotated[
        int, typer.Option(help="Words, control tokens and single bytes included.")
    ] = 6400,
    sample_mb: Annotated[
        int, typer.Option(min=1, help="Text to learn from; each MB takes 100 MB of memory.")
    ] = 12,
) -> None:
    """Train a byte-level BPE tokenizer on an even sample of the data."""
    from minimind.data.invalid import InvalidRecords
    from minimind.tokenizer import train_tokenizer

    if (out / "tokenizer.json").exists():
        raise UsageError(
            f"{out} already holds a tokenizer, which models may depend on; "
            "give another --out, or delete it"
        )
    bad = InvalidRecords()
    texts = _texts(data, bad)
    out.mkdir(parents=True, exist_ok=True)  # so that a bad folder is met before the long work
    tokenizer = train_tokenizer(
        _announced(texts), vocab_size=vocab_size, sample_bytes=sample_mb << 20
    )
    tokenizer.save(out)
    if bad.total:
        console.say(f"bad lines left out: {bad.total:,}; the first: {bad.first}")
    if tokenizer.vocab_size < vocab_size:
        console.say(f"The text has pairs for only {tokenizer.vocab_size:,} words.")
    console.say(f"A tokenizer of {tokenizer.vocab_size:,} words is in {out}.")
    console.say(f"Look into it: minimind {shell_words('tokenizer', 'inspect', out)}")


@app.command()
def inspect(
    tokenizers: Annotated[
        list[Path], typer.Argument(metavar="DIR", help="Tokenizer or model directories.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on, instead of a few sentences; may be repeated."),
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Show the vocabulary and the characters per token by language, of one tokenizer or several."""
    from minimind.data.invalid import InvalidRecords
    from minimind.tokenizer.bpe import load_bpe
    from minimind.tokenizer.stats import SAMPLE_TEXTS, describe_vocabulary, measure
    from minimind.tokenizer.train import sample_evenly

    loaded = {str(directory): load_bpe(directory) for directory in tokenizers}
    texts = SAMPLE_TEXTS
    if data:
        texts = sample_evenly(_texts(data, InvalidRecords()), _INSPECTED_MB << 20)
    vocabularies = {name: describe_vocabulary(bpe) for name, bpe in loaded.items()}
    usages = {name: measure(bpe, texts) for name, bpe in loaded.items()}
    _show_vocabularies(vocabularies)
    _show_usages(usages, data or [])
    if json:
        metrics = {name: asdict(vocabularies[name]) | asdict(usages[name]) for name in loaded}
        console.write_json(json, {"measured_on": data or [], "tokenizers": metrics})


def _texts(data: list[str], bad: "InvalidRecords") -> Iterator[str]:
    """All texts of the data, read under a progress bar. Raises DataError when nothing is good."""
    from minimind.data.input_files import list_files

    files = [file for path in data for file in list_files(path)]
    return _read(files, bad)


def _read(files: list[Path], bad: "InvalidRecords") -> Iterator[str]:
    from minimind.data.read import read_texts

    with console.make_progress("byte") as bar:
        task = bar.add_task("reading", total=sum(file.stat().st_size for file in files), note="")
        yield from read_texts(files, invalid=bad, progress=lambda count: bar.advance(task, count))
    if not bad.num_valid:
        bad.check(0.0, final=True)


def _announced(texts: Iterator[str]) -> Iterator[str]:
    yield from texts
    console.say("learning the words…")  # half a minute without a sign of life


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
        [name, script, " ".join(repr(word).replace(" ", "␣") for word in words)]
        for name, vocabulary in vocabularies.items()
        for script, words in vocabulary.longest.items()
        if words
    ]
    console.show(console.table("Longest words", ["tokenizer", "script", "words"], longest))


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.0%})"


def _show_usages(usages: dict[str, "Usage"], data: list[str]) -> None:
    languages = next(iter(usages.values())).characters_per_token
    columns = ["tokenizer", *languages, "bytes a token", "unused words"]
    rows = [
        [name, *usage.characters_per_token.values(), usage.bytes_per_token, usage.num_unused]
        for name, usage in usages.items()
    ]
    if not data:  # a few sentences leave nearly all words unused
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    title = f"Characters a token, on {', '.join(data) or 'a few built-in sentences'}"
    console.show(console.table(title, columns, rows, numbers=len(columns) - 1))
