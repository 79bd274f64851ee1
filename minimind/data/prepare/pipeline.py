"""Run the stages in order, continue an interrupted preparation, and collect the results."""

import hashlib
import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from minimind.data.locations import Location, UrlPath, new_files, write_json
from minimind.data.prepare.duplicates import BYTES_PER_DOCUMENT, BYTES_PER_KEY
from minimind.data.prepare.engine import Engine, EngineName, Task, open_engine
from minimind.data.prepare.progress import repeatedly, running_tasks
from minimind.data.prepare.report import write_report
from minimind.data.prepare.settings import PrepareSettings
from minimind.data.prepare.space import check_space
from minimind.data.prepare.stages import (
    cluster,
    filter_shard,
    match_range,
    new_samples,
    read_file,
    write_shard,
)
from minimind.data.prepare.workspace import FORMAT, Workspace, check_unchanged, list_inputs
from minimind.data.store import store_key, store_spec
from minimind.data.store_writer import finish_store
from minimind.environment import num_cores
from minimind.errors import DataError, UsageError
from minimind.files import fsync
from minimind.files import write_json as write_local_json
from minimind.tokenizer import Tokenizer
from minimind.units import format_size

# Measured by benchmarks/data_preparation.py: resident memory of the processes, in bytes.
_MAIN_BYTES = 130_000_000
_WORKER_BYTES = 130_000_000
_TOKENIZER_BYTES = 80_000_000
_QUESTION_TABLES_BYTES = 70_000_000
_BYTES_PER_QUESTION_CHARACTER = 40
_QUESTIONS = "questions.json"
_CLUSTER = "all"


class ProgressReporter(Protocol):
    """Shows the progress of one stage at a time."""

    def start(self, title: str, total: int, done: int = 0, unit: str = "step") -> None: ...

    def progress(self, done: int, total: int, note: str = "") -> None: ...

    def stop(self) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class Preparation:
    """A preparation: inputs and settings, which determine the output.

    questions: benchmark questions (id to text) that the output must not contain.
    """

    files: Sequence[Location]
    settings: PrepareSettings
    tokenizer: Path | None = None
    questions: Mapping[str, str] | None = None

    def questions_json(self) -> str:
        """Return the questions as the text of a JSON file."""
        return json.dumps(dict(self.questions or {}), ensure_ascii=False, sort_keys=True)

    @cached_property  # as the inputs were at the beginning; they may be removed later
    def identity(self) -> dict[str, Any]:
        """Everything that determines the output, except for the content of the inputs."""
        return {
            "format": FORMAT,
            "settings": self.settings.model_dump(),
            "inputs": [
                {"path": str(file.resolve()), "bytes": file.stat().st_size} for file in self.files
            ],
            "tokenizer": Tokenizer.load(self.tokenizer).sha256 if self.tokenizer else None,
            "questions": _sha256(self.questions_json()) if self.questions else None,
            "unicode": unicodedata.unidata_version,
        }


@dataclass(frozen=True)
class Resources:
    """Number of workers, and bytes of memory that a task may use beyond a worker's own.

    alone_bytes: the same for a task that runs while the other workers are idle.
    """

    workers: int
    task_bytes: int
    alone_bytes: int

    @classmethod
    def plan(cls, preparation: Preparation, memory_bytes: int, workers: int | None) -> "Resources":
        """Choose the number of workers, if not given, and divide the memory.

        Raises UsageError if the memory is too small for them.
        """
        worker = _WORKER_BYTES
        if preparation.tokenizer:
            worker += _TOKENIZER_BYTES
        if preparation.questions:
            characters = sum(map(len, preparation.questions.values()))
            worker += _QUESTION_TABLES_BYTES + _BYTES_PER_QUESTION_CHARACTER * characters
        fitting = (memory_bytes - _MAIN_BYTES) // worker
        chosen = workers or max(min(num_cores(), fitting), 1)
        if chosen > fitting:
            needed = _MAIN_BYTES + chosen * worker
            fewer = f", or --workers {fitting}" if fitting > 0 else ""
            need = "worker needs" if chosen == 1 else "workers need"
            suggested = math.ceil(needed / 1e8) / 10
            raise UsageError(
                f"{chosen} {need} {format_size(needed)} of memory, and --memory allows "
                f"{format_size(memory_bytes)}; give --memory {suggested:.1f}{fewer}"
            )
        # A worker's memory includes room for batches of text, which matching does not need.
        spare = memory_bytes - _MAIN_BYTES - chosen * worker
        return cls(chosen, spare // chosen + worker // 2, spare + worker // 2)


def prepare(
    paths: Sequence[str],
    out: Location,
    settings: PrepareSettings,
    *,
    tokenizer: Path | None = None,
    questions: Mapping[str, str] | None = None,
    workers: int | None = None,
    memory_bytes: int = 1_000_000_000,
    engine: EngineName = "pool",
    reporter: ProgressReporter,
) -> dict[str, Any]:
    """Prepare the files that `paths` name for pretraining, and return the manifest.

    An interrupted preparation is continued. Files in `out` are no input. Raises DataError for input
    that cannot be read, UsageError for a folder that belongs to another preparation or too little
    memory, and ResourceError for too little disk space or when a worker is lost.
    """
    files = list_inputs(paths, out)
    preparation = Preparation(files, settings, tokenizer, questions)
    workspace = Workspace(out)
    with workspace.lock():
        if manifest := workspace.begin(preparation.identity):
            inputs = {str(i): entry for i, entry in enumerate(manifest["inputs"])}
            check_unchanged(files, {k: {"input": v} for k, v in inputs.items()}, str)
            reporter.say(f"{out} is prepared already")
            return manifest
        if isinstance(out, Path):
            check_space(out, files, settings, tokenizer)
        resources = Resources.plan(preparation, memory_bytes, workers)
        with ExitStack() as stack:
            stack.callback(reporter.stop)
            opened = stack.enter_context(open_engine(engine, resources.workers))
            return _Run(preparation, workspace, resources, opened, reporter).run()


@dataclass
class _Run:
    """A preparation in progress."""

    preparation: Preparation
    workspace: Workspace
    resources: Resources
    engine: Engine
    reporter: ProgressReporter

    def run(self) -> dict[str, Any]:
        read = self._read()
        shards = [shard for result in read for shard in result["shards"]]
        filtered = self._filter(shards)
        if not any(result["documents"] for result in filtered):
            raise DataError(_nothing_left([*read, *filtered]))
        self.workspace.remove_files("read")
        first_ids = [0]
        for result in filtered:
            first_ids.append(first_ids[-1] + result["documents"])
        clusters = self._find_duplicates(filtered, first_ids)
        written = self._write(filtered, first_ids, clusters)
        return self._finish(read, filtered, clusters, written)

    def _stage(self, name: str, title: str, tasks: Sequence[Task]) -> list[dict[str, Any]]:
        """Run the tasks of a stage that are not finished; return all results in order."""
        results = self.workspace.results(name)
        pending = [task for task in tasks if task.name not in results]
        if pending:
            total = sum(task.size for task in tasks)
            done = total - sum(task.size for task in pending)
            sizes = {task.name: task.size for task in pending}

            def show_running() -> None:
                running = running_tasks(self.workspace.stage(name), sizes.keys() - results.keys())
                if within := sum(min(size, sizes[task]) for task, size in running.items()):
                    self.reporter.progress(done + within, total)

            self.reporter.start(title, total, done, unit="byte")
            with repeatedly(show_running):
                for task, result in self.engine.run(pending):
                    results[task.name] = self.workspace.record(name, task.name, result)
                    done += task.size
                    self.reporter.progress(done, total)
            self.reporter.stop()
        return [results[task.name] for task in tasks]

    def _read(self) -> list[dict[str, Any]]:
        files = list(self.preparation.files)
        check_unchanged(files, self.workspace.results("read"), _number)
        settings = self.preparation.settings.model_dump()
        tasks = [
            Task(
                _number(index),
                read_file,
                (
                    file,
                    index,
                    self.workspace.stage("read"),
                    self.workspace.invalid / f"{_number(index)}.jsonl",
                    settings,
                ),
                file.stat().st_size,
            )
            for index, file in enumerate(files)
        ]
        return self._stage("read", "reading", tasks)

    def _filter(self, shards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        questions = None
        if self.preparation.questions:
            text = self.preparation.questions_json()
            path = self.workspace.folder / "work" / _QUESTIONS
            write_json(path, json.loads(text))
            questions = (path, _sha256(text))
        settings = self.preparation.settings.model_dump()
        tasks = [
            Task(
                _stem(shard),
                filter_shard,
                (
                    self.workspace.stage("read") / shard["name"],
                    self.workspace.stage("filter"),
                    settings,
                    questions,
                ),
                shard["text_bytes"],
            )
            for shard in shards
        ]
        return self._stage("filter", "filtering", tasks)

    def _find_duplicates(
        self, filtered: Sequence[dict[str, Any]], first_ids: Sequence[int]
    ) -> dict[str, Any]:
        """Match the keys of all bands, then connect the documents with equal keys."""
        num_documents = first_ids[-1]
        missing = num_documents * BYTES_PER_DOCUMENT - self.resources.alone_bytes
        if missing > 0:
            raise UsageError(
                f"finding duplicates among {num_documents:,} documents needs "
                f"{format_size(missing)} more; raise --memory or lower --workers and run the same "
                "command again: finished work is kept"
            )
        folder = self.workspace.stage("filter")
        files = [
            (folder / result["keys"]["name"], folder / result["rows"]["name"], first)
            for result, first in zip(filtered, first_ids, strict=False)
        ]
        parts = -(-num_documents * BYTES_PER_KEY // self.resources.task_bytes)
        matches = self.workspace.stage("match")
        num_bands = 1 + self.preparation.settings.near_duplicates.bands
        tasks = []
        for band in range(num_bands):
            for part in range(parts):
                name = f"{band:03}-{part:05}-of-{parts:05}"
                arguments = (files, band, part, parts, matches / f"{name}.npy")
                tasks.append(Task(name, match_range, arguments, 12 * num_documents // parts))
        # Not matched again if the clusters are known: their inputs are removed.
        if not self.workspace.results("cluster"):
            self._stage("match", "finding duplicates", tasks)
        edges = [task.arguments[-1] for task in tasks]
        inputs = (num_documents, edges[:parts], edges[parts:], self.workspace.stage("cluster"))
        [result] = self._stage(
            "cluster",
            "clustering",
            [Task(_CLUSTER, cluster, inputs, num_documents * BYTES_PER_DOCUMENT)],
        )
        self.workspace.remove_files("match")
        self.workspace.remove_files("filter", "*.npy")
        return result

    def _write(
        self,
        filtered: Sequence[dict[str, Any]],
        first_ids: Sequence[int],
        clusters: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        wanted = sorted({document for pair in clusters["pairs"] for document in pair})
        decided = self.workspace.stage("cluster") / clusters["actions"]["name"]
        tasks = []
        for index, (result, first) in enumerate(zip(filtered, first_ids, strict=False)):
            within = [d - first for d in wanted if first <= d < first + result["documents"]]
            tokens = None
            if self.preparation.tokenizer:
                fraction = self.preparation.settings.validation_fraction
                folder = self.workspace.token_parts
                tokenizer = self.preparation.tokenizer.resolve()
                sha256 = self.preparation.identity["tokenizer"]
                tokens = (tokenizer, sha256, index, folder, fraction)
            arguments = (
                self.workspace.stage("filter") / result["name"],
                (decided, first, result["documents"]),
                within,
                self.workspace.text / f"part-{_number(index)}.jsonl.zst",
                tokens,
            )
            tasks.append(Task(_number(index), write_shard, arguments, result["text_bytes"]))
        title = "writing and tokenizing" if self.preparation.tokenizer else "writing"
        return self._stage("write", title, tasks)

    def _finish(
        self,
        read: Sequence[dict[str, Any]],
        filtered: Sequence[dict[str, Any]],
        clusters: Mapping[str, Any],
        written: Sequence[dict[str, Any]],
    ) -> dict[str, Any]:
        identity = self.preparation.identity
        outputs = [result for result in written if result["documents"]]
        manifest = {
            "identity": identity,
            "inputs": [
                entry | result["input"] | {"invalid": result["invalid"]}
                for entry, result in zip(identity["inputs"], read, strict=True)
            ],
            "documents": sum(r["documents"] for r in written),
            "characters": sum(r["characters"] for r in written),
            "text_bytes": sum(r["text_bytes"] for r in written),
            "input_documents": sum(
                sum(r["dropped"].values()) + sum(s["documents"] for s in r["shards"]) for r in read
            ),
            "input_text_bytes": sum(s["text_bytes"] for r in read for s in r["shards"]),
            **_dropped([*read, *filtered, *written]),
            "lengths": {
                name: _sum(r["lengths"].get(name, {}) for r in (*filtered, *written))
                for name in ("before", "after")
            },
            "cluster_sizes": clusters["cluster_sizes"],
            "stages": {
                "read": {s["name"]: s["sha256"] for r in read for s in r["shards"]},
                "filter": {
                    entry["name"]: entry["sha256"]
                    for r in filtered
                    for entry in (r, r["keys"], r["rows"])
                },
                "cluster": {clusters["actions"]["name"]: clusters["actions"]["sha256"]},
            },
            "files": [
                {key: result[key] for key in ("name", "bytes", "sha256", "documents")}
                for result in outputs
            ],
            "tokens": self._finish_tokens(outputs),
        }
        texts: dict[str, str] = {}
        for result in written:
            texts |= result["excerpts"]
        pairs = [
            {"removed": texts[str(removed)], "kept": texts[str(kept)]}
            for removed, kept in clusters["pairs"]
        ]
        with new_files(self.workspace.folder) as folder:
            write_local_json(folder / "near-duplicates.json", pairs)
            write_report(manifest, pairs, folder / "report.html")
        self.workspace.finish(manifest)
        return manifest

    def _finish_tokens(self, outputs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """Turn the token shards into a store that training finds by the output files."""
        if self.preparation.tokenizer is None:
            return None
        files = [self.workspace.text / result["name"] for result in outputs]
        tokenizer = Tokenizer.load(self.preparation.tokenizer)
        fraction = self.preparation.settings.validation_fraction
        spec = store_spec(files, tokenizer, "text", "auto", {}, fraction)
        parts = [result["tokens"] for result in outputs]
        sha256s = [result["sha256"] for result in outputs]
        store = self.workspace.token_parts
        target = self.workspace.tokens / store_key(spec)
        if isinstance(target, UrlPath) or not target.exists():  # else interrupted before the end
            with new_files(store) as folder:
                finish_store(folder, files, sha256s, tokenizer, spec, parts)
        if isinstance(target, Path) and isinstance(store, Path) and not target.exists():
            target.parent.mkdir(exist_ok=True)
            os.replace(store, target)
            fsync(target.parent)
        return {
            split: sum(part[split]["tokens"] for part in parts) for split in ("train", "validation")
        }


def _number(index: int) -> str:
    return f"{index:05}"


def _stem(shard: Mapping[str, Any]) -> str:
    return str(shard["name"]).partition(".")[0]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _sum(counts: Iterator[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for part in counts:
        total.update(part)
    return dict(total)


def _dropped(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the counts and samples of dropped documents of all tasks, in order."""
    samples = new_samples()
    for result in results:
        samples.merge(result["samples"])
    documents = _sum(result["dropped"] for result in results)
    characters = _sum(result["dropped_characters"] for result in results)
    return {
        "dropped": {
            reason: {
                "documents": count,
                "characters": characters[reason],
                "samples": [text for _, text in samples.by_reason[reason]],
            }
            for reason, count in sorted(documents.items(), key=lambda item: (-item[1], item[0]))
        }
    }


def _nothing_left(results: Sequence[Mapping[str, Any]]) -> str:
    dropped = _dropped(results)["dropped"]
    reasons = ", ".join(f"{entry['documents']:,} {reason}" for reason, entry in dropped.items())
    return (
        f"no document passes the filters ({reasons}). KEY=VALUE changes a threshold, such as "
        "language.min_chinese=0 for text in other languages; then choose another --out"
    )
