import csv
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import ResourceError, UsageError
from minimind.evaluation.catalogue import make_task
from minimind.evaluation.contamination import Contamination
from minimind.evaluation.models import LocalModel, name_of
from minimind.evaluation.runner import evaluate, file_name, read_results
from minimind.evaluation.tasks import Model, Result, Task
from minimind.version import __version__

ME = {"model": "1"}


class Interrupted(RuntimeError):
    pass


def lines(folder: Path) -> list[dict[str, Any]]:
    [path] = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def ceval(folder: Path) -> Task:
    return make_task("ceval", data=[str(folder)], shots=1, style="letter")


def stopping(task: Task, after: int) -> Task:
    """Make a task raise Interrupted after some results."""
    run = task.run

    def interrupted(model: Model, done: Collection[str]) -> Iterator[Result]:
        for number, result in enumerate(run(model, done)):
            if number == after:
                raise Interrupted
            yield result

    task.run = interrupted  # type: ignore[method-assign]
    return task


def test_results_metrics_and_tables_are_written(
    ceval_dir: Path, local: LocalModel, tmp_path: Path
) -> None:
    steps: list[tuple[int, int]] = []
    report = steps.append
    summary = evaluate(
        ceval(ceval_dir), local, tmp_path, identity=ME, progress=lambda *counts: report(counts)
    )
    assert steps == [(n, 7) for n in range(8)]
    header, *results = lines(tmp_path)
    assert header["model"] == "1"
    assert header["style"] == "letter"
    assert len(results) == 7
    written = json.loads((tmp_path / "ceval-letter-1-shots.json").read_text("utf-8"))
    assert written["correct"] == summary["correct"] == sum(r["right"] for r in results)
    with (tmp_path / "ceval-letter-1-shots" / "logic.csv").open(encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert sum(int(row["right"]) for row in rows) == summary["by_subject"]["logic"]["correct"]


@pytest.mark.parametrize("partial", [b"", b'{"id": "accountant-1", "right": tr', b"{"])
def test_an_interrupted_evaluation_is_resumed(
    ceval_dir: Path, local: LocalModel, tmp_path: Path, partial: bytes
) -> None:
    uninterrupted = evaluate(ceval(ceval_dir), local, tmp_path / "uninterrupted", identity=ME)
    folder = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        evaluate(stopping(ceval(ceval_dir), 2), local, folder, identity=ME)
    [path] = folder.glob("*.jsonl")
    with path.open("ab") as file:
        file.write(partial)
    steps: list[int] = []
    summary = evaluate(
        ceval(ceval_dir), local, folder, identity=ME, progress=lambda done, _: steps.append(done)
    )
    assert steps == [2, 3, 4, 5, 6, 7]
    assert summary["asked_now"] == 5
    # With other batches only the last digits may differ.
    for full, resumed in zip(lines(tmp_path / "uninterrupted")[1:], lines(folder)[1:], strict=True):
        assert full | {"scores": 0} == resumed | {"scores": 0}
        assert full["scores"] == pytest.approx(resumed["scores"], abs=1e-4)
    assert summary["correct"] == uninterrupted["correct"]
    again = evaluate(ceval(ceval_dir), local, folder, identity=ME)
    assert (again["asked_now"], again["correct"]) == (0, uninterrupted["correct"])


def test_failed_items_are_tried_again(ceval_dir: Path, local: LocalModel, tmp_path: Path) -> None:
    task = ceval(ceval_dir)
    run = task.run

    def failing(model: Model, done: Collection[str]) -> Iterator[Result]:
        for number, result in enumerate(run(model, done)):
            yield {"id": result["id"], "error": "no luck"} if number == 3 else result

    task.run = failing  # type: ignore[method-assign]
    first = evaluate(task, local, tmp_path, identity=ME)
    assert (first["questions"], first["failed"]) == (6, 1)
    assert list(first["errors"].values()) == ["no luck"]
    second = evaluate(ceval(ceval_dir), local, tmp_path, identity=ME)
    assert (second["questions"], second["failed"]) == (7, 0)
    assert len(lines(tmp_path)) == 8


def test_results_of_another_evaluation_are_not_overwritten(
    ceval_dir: Path, local: LocalModel, tmp_path: Path
) -> None:
    evaluate(ceval(ceval_dir), local, tmp_path, identity=ME)
    before = lines(tmp_path)
    with pytest.raises(UsageError, match=r"another evaluation \(model differ\); remove it"):
        evaluate(ceval(ceval_dir), local, tmp_path, identity={"model": "2"})
    assert lines(tmp_path) == before
    evaluate(ceval(ceval_dir), local, tmp_path, identity={"model": "2"}, fresh=True)
    assert lines(tmp_path)[0]["model"] == "2"


def test_a_new_evaluation_leaves_no_metrics_of_the_earlier_one(
    ceval_dir: Path, local: LocalModel, tmp_path: Path
) -> None:
    evaluate(ceval(ceval_dir), local, tmp_path, identity=ME)
    assert list(tmp_path.glob("*.json"))
    with pytest.raises(Interrupted):
        evaluate(stopping(ceval(ceval_dir), 2), local, tmp_path, identity=ME, fresh=True)
    assert not list(tmp_path.glob("*.json"))


def test_a_truncated_header_counts_as_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_results(path, ME) == {}
    path.write_bytes(b'{"mod')
    assert read_results(path, ME) == {}
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UsageError, match="another evaluation"):
        read_results(path, ME)


def test_a_folder_that_cannot_be_written_is_an_error(
    ceval_dir: Path, local: LocalModel, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match=r"cannot be (written|read)"):
        evaluate(ceval(ceval_dir), local, tmp_path / "file", identity=ME)


def test_metrics_without_contaminated_questions(
    ceval_dir: Path, local: LocalModel, tmp_path: Path
) -> None:
    task = ceval(ceval_dir)
    known = list(task.texts())[:3]
    contamination = Contamination(found=dict.fromkeys(known, "data.jsonl"))
    summary = evaluate(task, local, tmp_path, identity=ME, contamination=contamination)
    assert summary["questions"] == 7
    metrics = summary["contamination"]
    assert (metrics["found"], metrics["without"]["questions"]) == (3, 4)
    right = {r["id"]: r["right"] for r in lines(tmp_path)[1:]}
    without = sum(right[name] for name in right.keys() - known)
    assert metrics["without"]["correct"] == without


@pytest.mark.parametrize("key", ["version", "device", "dtype", "model"])
def test_results_of_another_version_device_or_dtype_are_not_reused(
    ceval_dir: Path, local: LocalModel, tmp_path: Path, key: str
) -> None:
    identity = local.identity()
    assert identity["version"] == __version__
    assert identity["device"] == "cpu"
    assert identity["dtype"] in ("float32", "bfloat16")
    evaluate(ceval(ceval_dir), local, tmp_path, identity=identity)
    assert lines(tmp_path)[0].items() >= identity.items()
    with pytest.raises(UsageError, match=rf"\({key} differ\)"):
        evaluate(ceval(ceval_dir), local, tmp_path, identity=identity | {key: "other"})


def test_an_item_has_a_single_line(ceval_dir: Path, local: LocalModel, tmp_path: Path) -> None:
    """Errors and repeated items that an earlier version wrote are removed."""
    evaluate(ceval(ceval_dir), local, tmp_path, identity=ME)
    [path] = tmp_path.glob("*.jsonl")
    header, *results = lines(tmp_path)
    old = [{"id": results[1]["id"], "error": "no luck"}, results[0] | {"right": None}, *results]
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *old]), encoding="utf-8")
    again = evaluate(ceval(ceval_dir), local, tmp_path, identity=ME)
    assert again["asked_now"] == 0
    stored = lines(tmp_path)
    assert sorted(line["id"] for line in stored[1:]) == sorted(line["id"] for line in results)
    assert results[0] in stored


def test_results_without_the_path_in_their_name_are_resumed(
    local: LocalModel, tmp_path: Path
) -> None:
    """Earlier versions stored them under the kind of the task; those of other data are kept."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "长江"}\n{"text": "泰山"}\n', encoding="utf-8")
    old = make_task(f"bpb:{path}")
    old.name = "bpb"
    evaluate(old, local, tmp_path / "out", identity=ME)
    kept = (tmp_path / "out" / "bpb.jsonl").read_bytes()
    again = evaluate(make_task(f"bpb:{path}"), local, tmp_path / "out", identity=ME)
    assert (again["task"], again["asked_now"], again["documents"]) == (f"bpb:{path}", 0, 2)
    other = tmp_path / "b.jsonl"
    other.write_text('{"text": "黄河"}\n', encoding="utf-8")
    new = evaluate(make_task(f"bpb:{other}"), local, tmp_path / "out", identity=ME)
    assert (new["asked_now"], new["documents"]) == (1, 1)
    assert (tmp_path / "out" / "bpb.jsonl").read_bytes() == kept


def test_a_document_counts_once_whatever_its_path(
    local: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "长江"}\n{"text": "泰山"}\n', encoding="utf-8")
    sources = ["a.jsonl", str(tmp_path / "a.jsonl"), "."]
    for source in ([sources[0]], [sources[1]], [sources[2]], sources):
        task = make_task("bpb", data=source)
        summary = evaluate(task, local, tmp_path / "out", identity=ME)
        assert (len(task), summary["documents"], summary["bytes"]) == (2, 2, 12)
    assert summary["asked_now"] == 0
    assert len(lines(tmp_path / "out")) == 3


def test_names_of_models_and_files(varied_dir: Path) -> None:
    assert name_of(varied_dir) == name_of(varied_dir / "model") == "tiny"
    assert file_name("ceval (letter, 5 shots)") == "ceval-letter-5-shots"
    assert file_name("../..") == "_"
    long = [file_name("长江" * 50 + ending) for ending in ("a", "b")]
    assert len(set(long)) == 2
    assert all(len(name.encode()) <= 200 and name.startswith("长江") for name in long)
