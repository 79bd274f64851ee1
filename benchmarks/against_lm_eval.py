"""Compare the C-Eval and CMMLU scores of `minimind eval` and lm-eval on every question.

    pip install -c constraints.txt -e '.[lm-eval]'
    python benchmarks/against_lm_eval.py MODEL --data DIR [--benchmark ceval] \
        [--shots 5] [--subjects N]

lm-eval uses its own task files for the prompts and its `hf` model for the log-likelihoods; only
the questions come from local files instead of the hub. Questions that do not fit into the context
with all their examples are skipped, because lm-eval truncates them differently.
tests/evaluation/test_against_lm_eval.py does the same with small files.
"""

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from minimind.evaluation.benchmarks import LETTERS, Question
from minimind.evaluation.catalogue import make_task
from minimind.evaluation.models import LocalModel
from minimind.evaluation.multiple_choice import MultipleChoice

FIELDS = {"ceval": ("question", "answer"), "cmmlu": ("Question", "Answer")}
SPLITS = {"ceval": "val", "cmmlu": "test"}
PREFIX = {"ceval": "ceval-valid_", "cmmlu": "cmmlu_"}


def main() -> None:
    """Compare both on every question and print the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--benchmark", choices=FIELDS, default="ceval")
    parser.add_argument("--data", required=True)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--subjects", type=int, help="number of subjects; default: all")
    args = parser.parse_args()
    task = make_task(args.benchmark, data=[args.data], style="letter", shots=args.shots)
    assert isinstance(task, MultipleChoice)
    subjects = list(dict.fromkeys(q.subject for q in task.questions))[: args.subjects]
    task.questions = [q for q in task.questions if q.subject in subjects]
    with tempfile.TemporaryDirectory() as work:
        theirs = by_lm_eval(task, args.model, args.shots, Path(work))
    ours = {result["id"]: result for result in task.run(LocalModel(args.model, "cpu"), ())}
    assert ours.keys() == theirs.keys()
    complete = [n for n, r in ours.items() if r["shots"] == args.shots and not r.get("cut")]
    difference = max(
        abs(one - other)
        for name in complete
        for one, other in zip(ours[name]["scores"], theirs[name].scores, strict=True)
    )
    same = sum(ours[name]["right"] == theirs[name].right for name in complete)
    right = sum(ours[n]["right"] for n in complete), sum(theirs[n].right for n in complete)
    print(f"{args.benchmark}, {args.shots} shots: {len(complete):,} of {len(ours):,} questions of "
          f"{len(subjects)} subjects compared")  # fmt: skip
    print(f"log-probabilities differ by at most {difference:.1e}; {same:,} have the same mark; "
          f"correct: {right[0]:,} by minimind, {right[1]:,} by lm-eval")  # fmt: skip


@dataclass(frozen=True)
class LmEvalResult:
    """Result of lm-eval for a question: prompt, log-probability of each letter, correctness."""

    prompt: str
    scores: list[float]
    right: bool


def by_lm_eval(
    task: MultipleChoice, model: Path, shots: int, work: Path, service: str | None = None
) -> dict[str, LmEvalResult]:
    """Return the results of lm-eval by question id. work: a folder for the files that it reads.

    service: URL of a service that serves the model, to use instead of the `hf` model.
    """
    benchmark, manager = task.benchmark.name, TaskManager()
    by_subject: dict[str, list[Question]] = {}
    for question in task.questions:
        by_subject.setdefault(question.subject, []).append(question)
    tasks = []
    for subject, questions in by_subject.items():
        files = {
            SPLITS[benchmark]: records(benchmark, work / f"{subject}.jsonl", questions),
            "dev": records(benchmark, work / f"{subject}-dev.jsonl", task.examples[subject]),
        }
        entry: Any = manager.task_index[PREFIX[benchmark] + subject]
        dataset = {"dataset_path": "json", "dataset_name": None}
        dataset |= {"dataset_kwargs": {"data_files": files, "cache_dir": str(work / "cache")}}
        tasks.append(load_yaml(entry.yaml_path) | dataset)
    arguments: dict[str, Any] = {"pretrained": str(model), "dtype": "float32"}
    if service is not None:
        url = f"{service}/v1/completions"
        arguments = {"model": "tiny", "base_url": url, "tokenizer": str(model)}
    results = lm_eval.simple_evaluate(
        model="hf" if service is None else "local-completions",
        model_args=arguments,
        device="cpu",
        batch_size=16,
        tasks=tasks,
        num_fewshot=shots,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    return {
        by_subject[name.removeprefix(PREFIX[benchmark])][sample["doc_id"]].id: LmEvalResult(
            _prompt(sample["arguments"]),
            [float(response[0][0]) for response in sample["resps"]],
            bool(sample["acc"]),
        )
        for name, samples in results["samples"].items()
        for sample in samples
    }


def _prompt(arguments: Any) -> str:
    """Return the prompt before the first letter, from either log format of lm-eval."""
    if isinstance(arguments, dict):
        return arguments["gen_args_0"]["arg_0"]
    return arguments[0][0]


def records(benchmark: str, path: Path, questions: list[Question]) -> str:
    """Write questions with the field names of the lm-eval task; return the path."""
    question, answer = FIELDS[benchmark]
    rows = (
        {question: q.question, answer: q.letter} | dict(zip(LETTERS, q.options, strict=False))
        for q in questions
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


if __name__ == "__main__":
    main()
