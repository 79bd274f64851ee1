"""What a model says of itself, and what it still knows of the textbook, with and without adapters.

    python benchmarks/lora_identity.py BASE RUN... --name NAME --author AUTHOR --json FILE

Identity: all ways of asking that are held out, a right answer names what it has to. Knowledge: a
sample of the textbook's quiz. All answers are greedy.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from minimind.data.textbook import held_out_identity, sample_quiz
from minimind.evaluation.quiz import score_answers
from minimind.inference.generate import answer_all
from minimind.inference.load import load_for_inference

SHOWN = 8


def metrics(base: Path, adapter: Path | None, fill: dict[str, str], size: int) -> dict[str, Any]:
    model, tokenizer = load_for_inference(base, adapter=adapter)
    asked = held_out_identity()
    answers = answer_all(model, tokenizer, [one.question for one in asked], max_new_tokens=64)
    right = [one.is_right(said, fill) for one, said in zip(asked, answers, strict=True)]
    quiz = sample_quiz(size, seed=1)
    told = answer_all(model, tokenizer, [one.question for one in quiz], max_new_tokens=64)
    step = max(1, len(asked) // SHOWN)
    return {
        "adapter": str(adapter) if adapter else None,
        "identity": {"right": sum(right), "asked": len(asked)},
        "quiz": {"right": sum(one.right for one in score_answers(quiz, told)), "asked": len(quiz)},
        "answers": [
            {"question": one.question, "answer": said, "right": good}
            for one, said, good in list(zip(asked, answers, right, strict=True))[::step]
        ],
        "wrong": [
            {"question": one.question, "answer": said}
            for one, said, good in zip(asked, answers, right, strict=True)
            if not good
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
    given = parser.parse_args()
    fill = {"name": given.name, "author": given.author}
    found = [metrics(given.base, run, fill, given.quiz) for run in (None, *given.runs)]
    for run, figure in zip(given.runs, found[1:], strict=True):
        summary = json.loads((run / "summary.json").read_text("utf-8"))
        keys = ("retention_loss", "first_retention_loss", "loss", "first_loss", "seconds", "steps")
        figure |= {key: summary[key] for key in keys if key in summary}
    given.json.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", "utf-8")
    for figure in found:
        print({key: figure[key] for key in ("adapter", "identity", "quiz")})


if __name__ == "__main__":
    main()
