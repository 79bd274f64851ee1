"""Runs and exam results as they lie on the disk; what is damaged is told, and the rest read."""

import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy

Axis = Literal["tokens", "seconds"]
Metrics = dict[str, Any]
_EXAMS_BELOW = 3  # folders deep


@dataclass
class Run:
    """A run directory. `recipe` is its text, `settings` the same read; `problems` for people."""

    name: str
    folder: Path
    summary: Metrics
    history: list[Metrics]
    recipe: str = ""
    settings: Metrics = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return "steps" in self.summary

    @property
    def kind(self) -> str:
        """What it trained: pretrain, sft, dpo, or lora."""
        if self.settings.get("lora"):
            return "lora"
        told = self.settings.get("objective") or self.summary.get("objective") or "training"
        return str(told)

    @property
    def metrics(self) -> Metrics:
        """The summary; what it lacks, or all if there is none yet, from the newest lines."""
        found: Metrics = {}
        for line in self.history:
            if line["kind"] == "train":
                found |= {"steps": line["step"], "seconds": line.get("elapsed_s")}
                found |= {key: line.get(key) for key in ("tokens", "peak_memory_bytes")}
            elif line["kind"] == "validation":
                found |= {key: line.get(key) for key in ("loss", "bits_per_byte", "accuracy")}
        found = {key: value for key, value in found.items() if _is_number(value)}
        if found.get("seconds") and "tokens" in found:
            found["tokens_per_second"] = found["tokens"] / found["seconds"]
        return found | self.summary

    def curves(self, key: str, axis: Axis) -> dict[str, list[tuple[float, float]]]:
        """(tokens or seconds, value) of each line of a plot, by its name in the legend.

        A `key` that ends in a slash means all that begins so, in training.
        """
        found: dict[str, list[tuple[int, float]]] = {}
        many = key.endswith("/")
        for line in self.history:
            for name, value in line.items():
                is_retention = name == f"retention_{key}"
                begins = name.startswith(key) and line["kind"] == "train"
                wanted = is_retention or (begins if many else name == key)
                if wanted and _is_number(value):
                    legend = name.removeprefix(key) if many else line["kind"]
                    legend = "retention" if is_retention else legend
                    found.setdefault(legend, []).append((line["step"], float(value)))
        # Training first, so that a kind has one colour in all plots.
        ordered = sorted(found.items(), key=lambda line: line[0] != "train")
        steps, places = self._places(axis)
        if len(steps) < 2:
            return {}
        return {
            name: list(
                zip(
                    numpy.interp([step for step, _ in points], steps, places).tolist(),
                    (value for _, value in points),
                    strict=True,
                )
            )
            for name, points in ordered
        }

    def _places(self, axis: Axis) -> tuple[list[int], list[float]]:
        """Steps, and where they stand on the axis: only lines of training tell tokens and time."""
        key = "tokens" if axis == "tokens" else "elapsed_s"
        known = {0: 0.0} | {
            line["step"]: float(line[key])
            for line in self.history
            if line["kind"] == "train" and _is_number(line.get(key))
        }
        steps = sorted(known)
        return steps, [known[step] for step in steps]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and not isinstance(value, bool)


def read_run(folder: Path) -> Run:
    """The run in `folder`, whatever state it is in."""
    run = Run(folder.resolve().name, folder, {}, [])
    run.recipe = _text(run, "recipe.toml") or ""
    try:
        run.settings = tomllib.loads(run.recipe)
    except tomllib.TOMLDecodeError as error:
        run.problems.append(f"recipe.toml: not TOML: {error}")
    _read_metrics(run)
    if (folder / "summary.json").is_file():
        run.summary = _object(_text(run, "summary.json"))
        if not run.finished:
            run.problems.append("summary.json: not the figures of a run")
    if not run.finished:
        steps = run.settings.get("training", {}).get("steps")
        last = run.metrics.get("steps")
        done = f"{last:,}" + (f" of {steps:,}" if steps else "") if last else "no"
        run.problems.append(f"not finished: {done} steps are logged")
    return run


def _read_metrics(run: Run) -> None:
    bad = 0
    for text in (_text(run, "metrics.jsonl") or "").split("\n"):
        line = _object(text)
        kind, step = line.get("kind"), line.get("step")
        if isinstance(kind, str) and isinstance(step, int) and not isinstance(step, bool):
            run.history.append(line)
        elif text.strip():
            bad += 1
    if bad:
        run.problems.append(f"metrics.jsonl: {bad:,} lines cannot be read")


def _text(run: Run, name: str) -> str | None:
    """What stands in a file of the run; what is not UTF-8 in it as �."""
    try:
        return (run.folder / name).read_text("utf-8", errors="replace")
    except FileNotFoundError:
        run.problems.append(f"{name} is missing")
    except OSError as error:
        run.problems.append(f"{name}: cannot be read: {error.strerror}")
    return None


def _object(text: str | None) -> Metrics:
    try:
        value = json.loads(text or "")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@dataclass
class Found:
    """What places hold: chains of runs, each the next stage of the one before; exams; the rest.

    demo: the summary of `minimind demo`; swept: what `minimind sweep` varied, by run; failed:
    runs of a sweep that did not end well; missing: places that hold nothing.
    """

    chains: list[list[Run]] = field(default_factory=list)
    exams: list[Metrics] = field(default_factory=list)
    demo: Metrics = field(default_factory=dict)
    swept: dict[str, Metrics] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return [run for chain in self.chains for run in chain]


def find(places: Sequence[Path]) -> Found:
    """Read everything in the places: run directories, folders of them, results of exams."""
    found = Found()
    folders: dict[Path, None] = {}
    failed: dict[str, str] = {}
    for place in places:
        if place.name == "model" and _is_run(place.parent):
            place = place.parent
        inside = [place] if _is_run(place) else sorted(map(_parent, place.glob("*/recipe.toml")))
        folders |= dict.fromkeys(inside)
        exams = _exams(place)
        found.exams += [exam for exam in exams if exam not in found.exams]
        if _is_run(place):
            continue
        summary = _read(place / "summary.json")
        if "stages" in summary:
            found.demo = summary
        swept = _read(place / "sweep.json")
        if isinstance(swept.get("settings"), dict):
            found.swept |= swept["settings"]
            told = swept.get("failed")
            failed |= told if isinstance(told, dict) else {}
        if not place.exists():
            found.missing.append(f"{place}: there is nothing")
        elif not inside and not exams:
            found.missing.append(f"{place}: holds no run and no results of exams")
    order = {name: number for number, name in enumerate(found.swept)}
    in_order = sorted(folders, key=lambda folder: order.get(folder.name, len(order)))
    runs = [read_run(folder) for folder in _with_origins(in_order)]
    mended = {run.name for run in runs if run.finished}  # since the sweep told of them
    found.failed = [f"{name}: {why}" for name, why in failed.items() if name not in mended]
    found.chains = _chains(runs)
    _name_apart(found.chains)
    return found


def _is_run(place: Path) -> bool:
    return (place / "recipe.toml").is_file() or (place / "metrics.jsonl").is_file()


def _parent(path: Path) -> Path:
    return path.parent


def _read(path: Path) -> Metrics:
    try:
        return _object(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _with_origins(folders: Iterable[Path]) -> list[Path]:
    """The folders, and the runs that they started from, if those are still there."""
    wanted: list[Path] = []
    seen: set[Path] = set()

    def add(folder: Path) -> None:
        if folder.resolve() in seen:
            return
        seen.add(folder.resolve())
        origin = _origin(_settings(folder))
        if origin is not None and _is_run(origin):
            add(origin)
        wanted.append(folder)

    for folder in folders:
        add(folder)
    return wanted


def _settings(folder: Path) -> Metrics:
    try:
        return tomllib.loads((folder / "recipe.toml").read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _origin(settings: Mapping[str, Any]) -> Path | None:
    """The run that the recipe starts from."""
    model = settings.get("model", {})
    init = model.get("init") if isinstance(model, dict) else None
    if not isinstance(init, str):
        return None
    path = Path(init)
    return path.parent if path.name == "model" else path


def _chains(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs in the order in which they followed each other.

    A folder may have been moved since: then the name that the recipe gives is looked for beside.
    Of several runs that start from one, only the first goes on with its chain, or all are stages
    of it where none of them is of a kind twice (a model, and adapters for it).
    """
    by_place = {run.folder.resolve(): run for run in runs}
    after: dict[Path, list[Run]] = {}
    first: list[Run] = []
    for run in runs:
        origin = _origin(run.settings)
        candidates = [origin, run.folder.parent / origin.name] if origin else []
        before = next((p.resolve() for p in candidates if p.resolve() in by_place), None)
        if before is None or before == run.folder.resolve():
            first.append(run)
        else:
            after.setdefault(before, []).append(run)

    def chain(run: Run) -> list[list[Run]]:
        nexts = after.pop(run.folder.resolve(), [])
        kinds = [one.kind for one in nexts]
        if len(set(kinds)) == len(kinds):
            return [[run, *(later for one in nexts for part in chain(one) for later in part)]]
        return [[run], *(part for one in nexts for part in chain(one))]

    chains = [part for run in first for part in chain(run)]
    reached = {id(run) for part in chains for run in part}
    return chains + [[run] for run in runs if id(run) not in reached]  # recipes in a circle


def _name_apart(chains: Sequence[Sequence[Run]]) -> None:
    """Give runs of one name the folders around them too."""
    runs = [run for chain in chains for run in chain]
    for name in {run.name for run in runs}:
        alike = [run for run in runs if run.name == name]
        if len(alike) > 1:
            for run in alike:
                run.name = f"{run.folder.resolve().parent.name}/{name}"


def _exams(place: Path) -> list[Metrics]:
    """Results of `minimind eval` in the folder or a few below it."""
    found = []
    for depth in range(_EXAMS_BELOW):
        for path in sorted(place.glob("*/" * depth + "*.json")):
            metrics = _read(path) if path.stat().st_size < 10_000_000 else {}
            if {"task", "model", "settings"} <= metrics.keys():
                found.append(metrics)
    return found
