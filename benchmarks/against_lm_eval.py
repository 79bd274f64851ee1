"""C-Eval and CMMLU by `minimind eval` and by lm-eval itself, question by question.

    pip install -c constraints.txt -e '.[lm-eval]'
    python benchmarks/against_lm_eval.py MODEL --exam ceval --data DIR [--shots 5] [--subjects N]

lm-eval's own task files give its prompts, its `hf` model its likelihoods; only where the questions
lie is another place, files made of ours instead of a hub. Questions that do not fit into the
model's context with all their examples are left out: lm-eval cuts them elsewhere. The same on small
files is a test, tests/evaluation/test_against_lm_eval.py.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from minimind.evaluation.catalogue import make_task
from minimind.evaluation.choice import Choice
from minimind.evaluation.exams import LETTERS, Question
from minimind.evaluation.models import LocalModel

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
    assert isinstance(task, Choice)
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
        for one, other in zip(ours[name]["scores"], theirs[name][0], strict=True)
    )
    same = sum(ours[name]["right"] == theirs[name][1] for name in whole)
    print(f"{args.exam}, {args.shots} shots: {len(whole):,} of {len(ours):,} questions compared")
    print(f"log-probabilities are at most {apart:.1e} apart; {same:,} are marked alike")


def by_lm_eval(
    task: Choice, model: Path, shots: int, work: Path
) -> dict[str, tuple[list[float], bool]]:
    """For each question the letters' log-probabilities, and whether its answer is right."""
    exam, manager = task.exam.name, TaskManager()
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
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32"},
        device="cpu",
        batch_size=16,
        tasks=tasks,
        num_fewshot=shots,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    return {
        by_subject[name.removeprefix(PREFIX[exam])][sample["doc_id"]].id: (
            [float(response[0][0]) for response in sample["resps"]],
            bool(sample["acc"]),
        )
        for name, samples in found["samples"].items()
        for sample in samples
    }


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
