"""`minimind data prepare IN… --out DIR`: from raw text to filtered, deduplicated shards."""

import glob
import math
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from minimind.cli import console
from minimind.cli.downloads import Yes, ensure_downloaded
from minimind.cli.options import Json
from minimind.errors import UsageError
from minimind.files import write_json

if TYPE_CHECKING:
    from minimind.data.locations import Location

_SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
_BYTES_PER_GB = 1_000_000_000


_Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="IN... [KEY=VALUE]...",
        help="Files, folders, globs (quoted), URLs such as s3://bucket/folder, or dataset names; "
        "and settings of the recipe.",
    ),
]
_Benchmarks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:PATH]",
        help="Drop documents with questions of this benchmark, as in `eval --task`; "
        "repeatable. It is downloaded, unless PATH is given.",
    ),
]


def prepare(
    arguments: _Arguments,
    out: Annotated[
        str, typer.Option(help="Output folder or URL; an interrupted preparation is continued.")
    ],
    recipe: Annotated[
        str, typer.Option(help="Recipe of thresholds: a TOML file, or a packaged one.")
    ] = "zh",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer or model directory: also write a token store.")
    ] = None,
    decontaminate: _Benchmarks = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of processes. [default: one per core, as far as --memory allows]"
        ),
    ] = None,
    memory: Annotated[float, typer.Option(help="Memory of all processes together, in GB.")] = 1.0,
    engine: Annotated[
        Literal["pool", "ray"],
        typer.Option(
            help="Processes of this machine, or a Ray cluster with a shared disk or object store."
        ),
    ] = "pool",
    yes: Yes = False,
    json: Json = None,
) -> None:
    """Prepare text for pretraining: filter, deduplicate, tokenize.

    The output is the same for any number of workers and any engine. Every dropped document is
    counted; OUT/report.html shows reasons, samples and plots.
    """
    from minimind.data.locations import location
    from minimind.data.prepare.pipeline import prepare as run
    from minimind.data.prepare.settings import load_prepare_settings

    overrides = [
        arg
        for arg in arguments
        if _SETTING.match(arg)
        and not os.path.exists(arg)
        and not any(glob.iglob(arg, recursive=True))
    ]
    paths = [arg for arg in arguments if arg not in overrides]
    if not paths:
        raise UsageError("no input is given; name files, folders or quoted globs")
    if not 0 < memory < math.inf:
        raise UsageError(f"--memory {memory}: give a number of GB above 0")
    settings = load_prepare_settings(recipe, overrides)
    benchmarks = decontaminate or []
    ensure_downloaded([*paths, *(name for name in benchmarks if ":" not in name)], yes)
    questions = _read_questions(benchmarks)
    folder = location(out)
    start = time.monotonic()
    try:
        manifest = run(
            paths,
            folder,
            settings,
            tokenizer=tokenizer,
            questions=questions,
            workers=workers,
            memory_bytes=int(memory * _BYTES_PER_GB),
            engine=engine,
            reporter=console.RichReporter(),
        )
    except KeyboardInterrupt:
        console.say("\nstopped; run the same command again to continue")
        raise typer.Exit(130) from None
    _show(manifest, folder, time.monotonic() - start, tokenizer)
    if not decontaminate:
        console.say(
            "Benchmark questions were not removed; --decontaminate NAME does it, "
            "for example --decontaminate ceval"
        )
    if json:
        write_json(json, manifest)


def _read_questions(benchmarks: list[str]) -> dict[str, str]:
    """Return the questions of all benchmarks, by name and id."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    if not benchmarks:
        return {}
    # In another process, because the evaluation package loads torch, which takes 200 MB.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        questions = executor.submit(questions_of, benchmarks).result()
    console.say(f"decontamination: {len(questions):,} questions")
    return questions


def questions_of(specs: list[str]) -> dict[str, str]:
    """Return the questions of benchmarks NAME:PATH; without PATH they are downloaded already.

    They are named NAME/ID, or NAME:PATH/ID for benchmarks that have names of questions in common.
    Raises UsageError for a name without questions, DataError for missing files.
    """
    from minimind.evaluation.catalogue import make_task

    texts_of: dict[str, dict[str, str]] = {}
    for spec in specs:
        texts_of[spec] = make_task(spec).texts()
        if not texts_of[spec]:
            raise UsageError(f"--decontaminate {spec}: it has no questions; leave it out")
    names = Counter((_name(spec), key) for spec, texts in texts_of.items() for key in texts)
    questions: dict[str, str] = {}
    for spec, texts in texts_of.items():
        is_ambiguous = any(names[_name(spec), key] > 1 for key in texts)
        prefix = spec if is_ambiguous else _name(spec)
        questions |= {f"{prefix}/{key}": text for key, text in texts.items()}
    return questions


def _name(spec: str) -> str:
    return spec.partition(":")[0]


def _show(
    manifest: dict[str, Any], out: "Location", seconds: float, tokenizer: Path | None
) -> None:
    before = manifest["input_documents"]
    rows = [
        [reason, entry["documents"], f"{entry['documents'] / max(before, 1):.2%}"]
        for reason, entry in manifest["dropped"].items()
    ]
    rows.append(["kept", manifest["documents"], f"{manifest['documents'] / max(before, 1):.2%}"])
    console.show(console.table("Documents", ["reason", "documents", "share"], rows, numbers=2))
    megabytes = manifest["input_text_bytes"] / 1e6
    console.say(
        f"{megabytes:,.1f} MB of text in {seconds:,.0f} s, {manifest['text_bytes'] / 1e6:,.1f} MB "
        f"kept. Report: {out / 'report.html'}"
    )
    if invalid := sum(entry["invalid"]["records"] for entry in manifest["inputs"]):
        console.say(f"{invalid:,} invalid records are in {out / 'invalid'}")
    # Training maps its data into memory, so it needs a copy on a disk.
    folder = out if isinstance(out, Path) else Path("COPY")
    words: list[str | Path] = ["pretrain", "--data", folder / "text"]
    if tokenizer:
        console.say(f"{sum(manifest['tokens'].values()):,} tokens in {out / 'tokens'}")
        fraction = manifest["identity"]["settings"]["validation_fraction"]
        words += ["--tokenizer", tokenizer, f"data.store={folder / 'tokens'}"]
        words += [f"data.validation_fraction={fraction}"]
    else:
        words += ["--tokenizer", "TOKENIZER"]
    first = "" if folder == out else f"Copy {out} to a folder COPY on a disk. "
    console.say(f"{first}Train on it: {console.command(*words, '--out', 'DIR')}")
