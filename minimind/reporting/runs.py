"""Training runs and benchmark results, read from disk; damaged parts are skipped and reported."""

import glob
import hashlib
import itertools
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy

Axis = Literal["tokens", "seconds"]
Metrics = dict[str, Any]
_RESULTS_DEPTH = 3  # folders below a source that are searched for results
_MAX_RESULT_BYTES = 10_000_000  # of a file with results


@dataclass
class Run:
    """A run directory.

    history: the lines of metrics.jsonl. recipe: the text of recipe.toml; settings: the same,
    parsed. problems: messages about missing or damaged files. varied: the settings that a sweep
    varies, with their values in this run.
    """

    name: str
    folder: Path
    summary: Metrics
    history: list[Metrics]
    recipe: str = ""
    settings: Metrics = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    varied: Metrics = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """True if training wrote the summary of a finished run."""
        return "steps" in self.summary

    @property
    def kind(self) -> str:
        """The kind of stage: pretrain, sft, dpo, or lora."""
        if self.settings.get("lora"):
            return "lora"
        objective = self.settings.get("objective") or self.summary.get("objective")
        return str(objective or "training")

    @property
    def metrics(self) -> Metrics:
        """The summary; metrics that it lacks are from the newest lines of the history."""
        newest: Metrics = {}
        for line in self.history:
            if line["kind"] == "train":
                newest |= {"steps": line["step"], "seconds": line.get("elapsed_s")}
                newest |= {key: line.get(key) for key in ("tokens", "peak_memory_bytes")}
            elif line["kind"] == "validation":
                newest |= {key: line.get(key) for key in ("loss", "bits_per_byte", "accuracy")}
        newest = {key: value for key, value in newest.items() if _is_number(value)}
        if newest.get("seconds") and "tokens" in newest:
            newest["tokens_per_second"] = newest["tokens"] / newest["seconds"]
        return newest | self.summary

    def tokenizer(self) -> str:
        """Return a hash of the tokenizer, or its path in the recipe if the file is missing."""
        for path in (self.folder / folder / "tokenizer.json" for folder in (".tokenizer", "model")):
            with suppress(OSError):
                return hashlib.sha256(path.read_bytes()).hexdigest()
        return str(self.settings.get("tokenizer"))

    def curves(self, key: str, axis: Axis) -> dict[str, list[tuple[float, float]]]:
        """Return the curves of a metric as (tokens or seconds, value), by name for the legend.

        A key without a final slash is a metric; its curves are train, validation and retention. A
        key with a final slash is the prefix of several training metrics, with a curve each.
        """
        by_name: dict[str, list[tuple[int, float]]] = {}
        for line in self.history:
            for metric, value in line.items():
                name = _curve_name(key, metric, line["kind"])
                if name is not None and _is_number(value):
                    by_name.setdefault(name, []).append((line["step"], float(value)))
        # Training comes first, so that each kind has the same color in all plots.
        ordered = sorted(by_name.items(), key=lambda curve: curve[0] != "train")
        steps, positions = self._axis_positions(axis)
        if len(steps) < 2:
            return {}
        return {
            name: list(
                zip(
                    numpy.interp([step for step, _ in points], steps, positions).tolist(),
                    (value for _, value in points),
                    strict=True,
                )
            )
            for name, points in ordered
        }

    def _axis_positions(self, axis: Axis) -> tuple[list[int], list[float]]:
        """Return steps and their tokens or seconds, which only training lines have."""
        key = "tokens" if axis == "tokens" else "elapsed_s"
        known = {0: 0.0} | {
            line["step"]: float(line[key])
            for line in self.history
            if line["kind"] == "train" and _is_number(line.get(key))
        }
        steps = sorted(known)
        return steps, [known[step] for step in steps]


def _curve_name(key: str, metric: str, kind: str) -> str | None:
    """Return the name of the curve that a metric of a line belongs to, None if to none."""
    if metric == f"retention_{key}":
        return "retention"
    if key.endswith("/"):
        return metric.removeprefix(key) if metric.startswith(key) and kind == "train" else None
    return kind if metric == key else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and not isinstance(value, bool)


def read_run(folder: Path) -> Run:
    """Read the run in `folder`, finished or not."""
    run = Run(folder.resolve().name, folder, {}, [])
    run.recipe = _read_text(run, "recipe.toml") or ""
    try:
        run.settings = tomllib.loads(run.recipe)
    except (ValueError, RecursionError) as error:
        run.problems.append(f"recipe.toml: not TOML: {error}")
    _read_metrics(run)
    if (folder / "summary.json").is_file():
        run.summary = _parse_object(_read_text(run, "summary.json"))
        if not run.finished:
            run.problems.append("summary.json: not the summary of a finished run")
    if not run.finished:
        steps = run.settings.get("training", {}).get("steps")
        last = run.metrics.get("steps")
        done = f"{last:,}" + (f" of {steps:,}" if steps else "") if last else "no"
        run.problems.append(f"not finished: {done} steps are logged")
    return run


def _read_metrics(run: Run) -> None:
    bad = 0
    for text in (_read_text(run, "metrics.jsonl") or "").split("\n"):
        line = _parse_object(text)
        kind, step = line.get("kind"), line.get("step")
        if isinstance(kind, str) and isinstance(step, int) and not isinstance(step, bool):
            run.history.append(line)
        elif text.strip():
            bad += 1
    if bad:
        run.problems.append(f"metrics.jsonl: {bad:,} lines cannot be read")


def _read_text(run: Run, name: str) -> str | None:
    """Read a file of the run, with U+FFFD for invalid UTF-8; note a problem if it is missing."""
    try:
        return (run.folder / name).read_text("utf-8", errors="replace")
    except FileNotFoundError:
        run.problems.append(f"{name} is missing")
    except OSError as error:
        run.problems.append(f"{name}: cannot be read: {error.strerror}")
    return None


def _parse_object(text: str | None) -> Metrics:
    """Parse a JSON object; return an empty one if the text is something else."""
    try:
        value = json.loads(text or "")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass
class Inputs:
    """Everything that the sources of a report contain.

    chains: lists of runs, each starting from the run before it. benchmarks: results of `minimind
    eval`. demo: the summary of `minimind demo`. failed: messages about failed runs of sweeps.
    missing: sources without runs or results.
    """

    chains: list[list[Run]] = field(default_factory=list)
    benchmarks: list[Metrics] = field(default_factory=list)
    demos: dict[Path, Metrics] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """All runs, chain by chain."""
        return [run for chain in self.chains for run in chain]


def find_runs(sources: Sequence[Path]) -> Inputs:
    """Read the sources: run directories, folders of them, and results of `minimind eval`."""
    inputs = Inputs()
    folders: dict[Path, None] = {}
    varied: dict[Path, Metrics] = {}  # by the folder of the run, as are the failures
    failed: dict[Path, str] = {}
    for source in sources:
        if source.name == "model" and _is_run(source.parent):
            source = source.parent
        sweep = _read_object(source / "sweep.json")
        variants, failures = (sweep.get(key) for key in ("settings", "failed"))
        failures = failures if isinstance(failures, dict) else {}
        if _is_run(source):
            run_folders = [source]
        else:
            run_folders = sorted(recipe.parent for recipe in source.glob("*/recipe.toml"))
        if isinstance(variants, dict):  # the others are of earlier sweeps
            own = {*variants, *failures}
            run_folders = [folder for folder in run_folders if folder.name in own]
        folders |= dict.fromkeys(run_folders)
        benchmarks = _read_benchmarks(source)
        inputs.benchmarks += [result for result in benchmarks if result not in inputs.benchmarks]
        if _is_run(source):
            continue
        summary = _read_object(source / "summary.json")
        if "stages" in summary:
            inputs.demos[source.resolve()] = summary
        if isinstance(variants, dict):
            varied |= {(source / name).resolve(): each for name, each in variants.items()}
            failed |= {(source / name).resolve(): reason for name, reason in failures.items()}
        if not source.exists():
            inputs.missing.append(f"{source}: no such file or folder")
        elif not run_folders and not benchmarks:
            inputs.missing.append(f"{source}: contains no run and no benchmark results")
    order = {folder: number for number, folder in enumerate(varied)}
    in_order = sorted(folders, key=lambda folder: order.get(folder.resolve(), len(order)))
    runs = [read_run(folder) for folder in _with_origins(in_order)]
    for run in runs:
        run.varied = varied.get(run.folder.resolve(), {})
        if run.finished:  # later than the sweep in which it failed
            failed.pop(run.folder.resolve(), None)
    inputs.chains = _chains(runs)
    _make_names_unique(inputs.runs)
    names = {run.folder.resolve(): run.name for run in runs}
    inputs.failed = [f"{names.get(path, path.name)}: {reason}" for path, reason in failed.items()]
    return inputs


def _is_run(source: Path) -> bool:
    return (source / "recipe.toml").is_file() or (source / "metrics.jsonl").is_file()


def _read_object(path: Path, max_bytes: int | None = None) -> Metrics:
    """Read a JSON object; return an empty one if there is none, or a larger file."""
    try:
        if max_bytes is not None and path.stat().st_size > max_bytes:
            return {}
        return _parse_object(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _with_origins(folders: Iterable[Path]) -> list[Path]:
    """Return the folders, each after the run that it started from, if that still exists."""
    result: list[Path] = []
    seen: set[Path] = set()

    def add(folder: Path) -> None:
        if folder.resolve() in seen:
            return
        seen.add(folder.resolve())
        try:
            origin = _origin(tomllib.loads((folder / "recipe.toml").read_text("utf-8")))
        except (OSError, ValueError):
            origin = None
        if origin is not None and _is_run(origin):
            add(origin)
        result.append(folder)

    for folder in folders:
        add(folder)
    return result


def _origin(settings: Mapping[str, Any]) -> Path | None:
    """Return the run directory that a recipe starts from."""
    model = settings.get("model", {})
    init = model.get("init") if isinstance(model, dict) else None
    if not isinstance(init, str):
        return None
    path = Path(init)
    return path.parent if path.name == "model" else path


def _chains(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs into chains in which each run starts from the one before.

    If the origin of a run was moved, a run with its name in the same folder is used instead.
    Several runs with the same origin follow it in one chain if they are of different kinds (such
    as a model and an adapter for it). Otherwise each of them starts a new chain.
    """
    by_folder = {run.folder.resolve(): run for run in runs}
    successors: dict[Path, list[Run]] = {}
    first: list[Run] = []
    for run in runs:
        origin = _origin(run.settings)
        candidates = [origin, run.folder.parent / origin.name] if origin else []
        before = next((p.resolve() for p in candidates if p.resolve() in by_folder), None)
        if before is None or before == run.folder.resolve():
            first.append(run)
        else:
            successors.setdefault(before, []).append(run)

    def chains_from(run: Run) -> list[list[Run]]:
        following = successors.pop(run.folder.resolve(), [])
        rest = [chain for successor in following for chain in chains_from(successor)]
        kinds = [successor.kind for successor in following]
        if len(set(kinds)) == len(kinds):
            return [[run, *(later for chain in rest for later in chain)]]
        return [[run], *rest]

    chains = [chain for run in first for chain in chains_from(run)]
    reached = {id(run) for chain in chains for run in chain}
    return chains + [[run] for run in runs if id(run) not in reached]  # cycles of origins


def _make_names_unique(runs: Sequence[Run]) -> None:
    """Prefix the names of runs with the same name by as few parent folders as possible."""
    for name in {run.name for run in runs}:
        namesakes = [run for run in runs if run.name == name]
        paths = [run.folder.resolve() for run in namesakes]
        for depth in itertools.count(1):
            names = [Path(*path.parts[-depth:]).as_posix() for path in paths]
            if len(set(names)) == len(names):
                break
        for run, unique in zip(namesakes, names, strict=True):
            run.name = unique


def _read_benchmarks(source: Path) -> list[Metrics]:
    """Read results of `minimind eval` in a folder or a few levels below it."""
    results = []
    for depth in range(_RESULTS_DEPTH):
        # A running training removes checkpoints meanwhile; Path.glob would raise an error then.
        names = glob.glob("*/" * depth + "*.json", root_dir=source, include_hidden=True)
        for path in sorted(source / name for name in names):
            metrics = _read_object(path, max_bytes=_MAX_RESULT_BYTES)
            if {"task", "model", "settings"} <= metrics.keys():
                results.append(metrics)
    return results
