"""C-Eval and CMMLU by `minimind eval` and by lm-eval itself, question by question.

    pip install -c constraints.txt -e '.[lm-eval]'
    python benchmarks/against_lm_eval.py MODEL --exam ceval --data DIR [--shots 5] [--subjects N]

lm-eval's own task files give its prompts, its `hf` model its likelihoods; only where the questions
lie is another place, files made of ours instead of a hub. Questions that do not fit into the
model's context with all their examples are left out: lm-eval cuts them elsewhere. On small files
tests/evaluation/test_against_lm_eval.py does the same.
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
    """Compare, and print how far apart the two are at most."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--exam", choices=FIELDS, default="ceval")
    parser.add_argument("--data", required=True)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--subjects", type=int, help="only so many of them")
    args = parser.parse_args()
    task = make_task(args.exam, data=[args.data], style="letter", shots=args.shots)
    assert isinstance(task, MultipleChoice)
    subjects = list(dict.fromkeys(q.subject for q in task.questions))[: args.subjects]
    task.questions = [q for q in task.questions if q.subject in subjects]
    with tempfile.TemporaryDirectory() as work:
        theirs = by_lm_eval(task, args.model, args.shots, Path(work))
    ours = {result["id"]: result for result in task.run(LocalModel(args.model, "cpu"), ())}
    assert ours.keys() == theirs.keys()
    whole = [n for n, r in ours.items() if r["shots"] == args.shots and not r.get("cut")]
    apart = max(
        abs(one - other)
        for name in whole
        for one, other in zip(ours[name]["scores"], theirs[name].scores, strict=True)
    )
    same = sum(ours[name]["right"] == theirs[name].right for name in whole)
    right = sum(ours[n]["right"] for n in whole), sum(theirs[n].right for n in whole)
    print(f"{args.exam}, {args.shots} shots: {len(whole):,} of {len(ours):,} questions of "
          f"{len(subjects)} subjects compared")  # fmt: skip
    print(f"log-probabilities are at most {apart:.1e} apart; {same:,} are marked alike; "
          f"right: {right[0]:,} by minimind, {right[1]:,} by lm-eval")  # fmt: skip


@dataclass(frozen=True)
class Theirs:
    """What lm-eval makes of a question: each letter's log-probability, and whether it is right."""

    prompt: str
    scores: list[float]
    right: bool


def by_lm_eval(
    task: MultipleChoice, model: Path, shots: int, work: Path, service: str | None = None
) -> dict[str, Theirs]:
    """All questions by lm-eval, by id. work: a folder for the files that it reads.

    service: the URL of a service of the model, which is then asked in place of lm-eval's own code.
    """
    exam, manager = task.benchmark.name, TaskManager()
    by_subject: dict[str, list[Question]] = {}
    for question in task.questions:
        by_subject.setdefault(question.subject, []).append(question)
    tasks = []
    for subject, questions in by_subject.items():
        files = {
            SPLITS[exam]: records(exam, work / f"{subject}.jsonl", questions),
            "dev": records(exam, work / f"{subject}-dev.jsonl", task.examples[subject]),
        }
        entry: Any = manager.task_index[PREFIX[exam] + subject]
        where = {"dataset_path": "json", "dataset_name": None}
        where |= {"dataset_kwargs": {"data_files": files, "cache_dir": str(work / "cache")}}
        tasks.append(load_yaml(entry.yaml_path) | where)
    arguments: dict[str, Any] = {"pretrained": str(model), "dtype": "float32"}
    if service is not None:
        url = f"{service}/v1/completions"
        arguments = {"model": "tiny", "base_url": url, "tokenizer": str(model)}
    found = lm_eval.simple_evaluate(
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
        by_subject[name.removeprefix(PREFIX[exam])][sample["doc_id"]].id: Theirs(
            _prompt(sample["arguments"]),
            [float(response[0][0]) for response in sample["resps"]],
            bool(sample["acc"]),
        )
        for name, samples in found["samples"].items()
        for sample in samples
    }


def _prompt(arguments: Any) -> str:
    """What stands before the first letter; lm-eval has two ways of logging it."""
    if isinstance(arguments, dict):
        return arguments["gen_args_0"]["arg_0"]
    return arguments[0][0]


def records(exam: str, path: Path, questions: list[Question]) -> str:
    """A file of questions with the fields that lm-eval's task names."""
    question, answer = FIELDS[exam]
    rows = (
        {question: q.question, answer: q.letter} | dict(zip(LETTERS, q.options, strict=False))
        for q in questions
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


if __name__ == "__main__":
    main()
