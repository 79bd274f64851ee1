"""Identity and knowledge of a model with and without adapters.

    python benchmarks/lora_identity.py BASE RUN... --name NAME --author AUTHOR --json FILE

Identity: all held-out identity questions; a right answer contains the name or the author.
Knowledge: a sample of the textbook's quiz. All answers are greedy.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from minimind.data.textbook import held_out_identity, sample_quiz
from minimind.evaluation.quiz import score_answers
from minimind.inference.generate import answer_all
from minimind.inference.load import load_for_inference

NUM_EXAMPLES = 8


def measure(
    base: Path, adapter: Path | None, variables: dict[str, str], quiz_size: int
) -> dict[str, Any]:
    """Return identity and quiz results of one model, with sample answers."""
    model, tokenizer = load_for_inference(base, adapter=adapter)
    questions = held_out_identity()
    answers = answer_all(model, tokenizer, [q.question for q in questions], max_new_tokens=64)
    results = [
        {"question": q.question, "answer": answer, "right": q.is_correct(answer, variables)}
        for q, answer in zip(questions, answers, strict=True)
    ]
    quiz = sample_quiz(quiz_size, seed=1)
    quiz_answers = answer_all(model, tokenizer, [q.question for q in quiz], max_new_tokens=64)
    marked = score_answers(quiz, quiz_answers)
    return {
        "adapter": str(adapter) if adapter else None,
        "identity": {"right": sum(r["right"] for r in results), "questions": len(results)},
        "quiz": {"right": sum(answer.right for answer in marked), "questions": len(quiz)},
        "answers": results[:: max(1, len(results) // NUM_EXAMPLES)],
        "wrong": [
            {"question": r["question"], "answer": r["answer"]} for r in results if not r["right"]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--name", default="小明")
    parser.add_argument("--author", default="李雷")
    parser.add_argument("--quiz", type=int, default=400)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    variables = {"name": args.name, "author": args.author}
    results = [measure(args.base, run, variables, args.quiz) for run in (None, *args.runs)]
    for run, result in zip(args.runs, results[1:], strict=True):
        summary = json.loads((run / "summary.json").read_text("utf-8"))
        keys = ("retention_loss", "first_retention_loss", "loss", "first_loss", "seconds", "steps")
        result |= {key: summary[key] for key in keys if key in summary}
    args.json.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", "utf-8")
    for result in results:
        print({key: result[key] for key in ("adapter", "identity", "quiz")})


if __name__ == "__main__":
    main()
