"""Last step of `minimind demo`: evaluate the models, write `summary.json`, print results."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind.cli import console
from minimind.cli.steps import STAGE_METRICS, continue_as_dialogue, show_next_commands
from minimind.files import write_json

if TYPE_CHECKING:
    from minimind.config.settings import Recipe
    from minimind.data.textbook import QuizQuestion
    from minimind.evaluation.quiz import ScoredAnswer

ADAPTER_IDENTITY = {"name": "小满", "author": "阿青"}  # what the LoRA adapter teaches the model
_QUIZ_QUESTIONS = 400
_MAX_ANSWER_TOKENS = 64
_ANSWERS_SHOWN = ("after_pretraining", "after_fine_tuning", "after_preferences")


def evaluate_demo(
    out: Path,
    pretrain: "Recipe",
    stages: dict[str, dict[str, Any]],
    total_seconds: Callable[[], float],
    *,
    seed: int,
) -> dict[str, Any]:
    """Evaluate the models of all stages and write `summary.json`.

    stages: the training summary of each stage.
    """
    from minimind.data.textbook import demo_questions, sample_quiz

    device = pretrain.device
    questions, quiz = demo_questions(), sample_quiz(_QUIZ_QUESTIONS, seed=seed)
    before_training, after_pretraining = _continuations(out, pretrain, questions)
    eight_tuned, quiz_tuned = _answer(out / "sft-multi", device, questions, quiz)
    eight_final, quiz_final = _answer(out / "model", device, questions, quiz)
    dpo = stages["dpo"]
    summary = {
        "training_seconds": sum(stage["seconds"] for stage in stages.values()),
        "total_seconds": total_seconds(),
        "device": device,
        "parameters": stages["pretrain"]["parameters"],
        "stages": {
            name: {key: stage[key] for key in STAGE_METRICS if key in stage}
            for name, stage in stages.items()
        },
        "unigram_bits_per_byte": stages["pretrain"]["unigram_bits_per_byte"],
        "quiz": _quiz_metrics(quiz_tuned, quiz_final),
        "preferences": {key: dpo[key] for key in ("first_accuracy", "accuracy", "rewards/margin")},
        "identity": ADAPTER_IDENTITY | _identity_metrics(out, device, stages["identity"]),
        "questions": [
            {
                "question": question.question,
                "before_training": before_training[i],
                "after_pretraining": after_pretraining[i],
                "after_fine_tuning": eight_tuned[i].answer,
                "after_preferences": eight_final[i].answer,
                "correct": eight_final[i].correct,
                "fluent": eight_final[i].fluent,
            }
            for i, question in enumerate(questions)
        ],
    }
    write_json(out / "summary.json", summary)
    return summary


def _continuations(
    out: Path, pretrain: "Recipe", questions: "Sequence[QuizQuestion]"
) -> tuple[list[str], list[str]]:
    """Return the continuations of each question by the untrained and the pretrained model."""
    from minimind.inference.generate import continue_all
    from minimind.inference.load import load_for_inference
    from minimind.model.device import choose_device
    from minimind.training.build import build_initial_model

    pretrained, tokenizer = load_for_inference(out / "pretrain", pretrain.device)
    untrained = build_initial_model(pretrain, tokenizer).to(choose_device(pretrain.device))
    prompts = [question.question for question in questions]
    before = continue_all(untrained, tokenizer, prompts, max_new_tokens=24)
    return before, continue_as_dialogue(pretrained, tokenizer, prompts, _MAX_ANSWER_TOKENS)


def _answer(
    run: Path, device: str, questions: "Sequence[QuizQuestion]", quiz: "Sequence[QuizQuestion]"
) -> tuple[list["ScoredAnswer"], list["ScoredAnswer"]]:
    """Return the scored answers of a chat model to the eight questions and to the quiz."""
    from minimind.evaluation.quiz import score_answers
    from minimind.inference.generate import answer_all
    from minimind.inference.load import load_for_inference

    model, tokenizer = load_for_inference(run, device)
    prompts = [question.question for question in questions]
    answers = answer_all(model, tokenizer, prompts, max_new_tokens=_MAX_ANSWER_TOKENS)
    reporter = console.RichReporter()
    reporter.start("answering the quiz", len(quiz), unit="question")
    quiz_answers = answer_all(
        model,
        tokenizer,
        [question.question for question in quiz],
        max_new_tokens=_MAX_ANSWER_TOKENS,
        progress=reporter.progress,
    )
    reporter.stop()
    return score_answers(questions, answers), score_answers(quiz, quiz_answers)


def _quiz_metrics(
    tuned: "Sequence[ScoredAnswer]", final: "Sequence[ScoredAnswer]"
) -> dict[str, Any]:
    """Return the quiz metrics of the final model, scored by keywords and by fluency.

    See minimind/data/textbook/quiz.py and fluency.py for the scores.
    """
    from minimind.evaluation.quiz import by_subject

    return {
        "correct": sum(answer.correct for answer in final),
        "fluent": sum(answer.fluent for answer in final),
        "correct_before_preferences": sum(answer.correct for answer in tuned),
        "questions": len(final),
        "by_subject": {
            subject: {"correct": correct, "questions": count}
            for subject, (correct, count) in by_subject(final).items()
        },
        "wrong": [
            {
                "question": answer.question.question,
                "answer": answer.answer,
                "expected": answer.question.answer,
            }
            for answer in final
            if not answer.correct
        ],
    }


def _identity_metrics(out: Path, device: str, training: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the LoRA adapter on held-out phrasings of "who are you?", and its forgetting."""
    from minimind.data.textbook import held_out_identity
    from minimind.inference.generate import answer_all
    from minimind.inference.load import load_for_inference

    questions = held_out_identity()
    prompts = [question.question for question in questions]
    base, tokenizer = load_for_inference(out / "model", device)
    before = answer_all(base, tokenizer, prompts)
    adapted, _ = load_for_inference(out / "model", device, adapter=out / "identity")
    after = answer_all(adapted, tokenizer, prompts)
    answers = [
        {
            "question": question.question,
            "before": base_answer,
            "after": adapted_answer,
            "right": question.is_correct(adapted_answer, ADAPTER_IDENTITY),
        }
        for question, base_answer, adapted_answer in zip(questions, before, after, strict=True)
    ]
    return {
        "correct": sum(answer["right"] for answer in answers),
        "questions": len(answers),
        # Loss on other questions: the cost of learning a name.
        "retention_loss_before": training["first_retention_loss"],
        "retention_loss_after": training["retention_loss"],
        "answers": answers,
    }


def show_results(out: Path, summary: dict[str, Any]) -> None:
    """Print the answers to the eight questions, the summary, and the commands to try next."""
    mark = {True: "✓", False: "✗", None: "–"}
    answers = [
        [
            row["question"],
            *(row[name] for name in _ANSWERS_SHOWN),
            *(mark[row.get(name)] for name in ("correct", "fluent")),
        ]
        for row in summary["questions"]
    ]
    titles = ["after pretraining", "after fine-tuning", "after preference optimization"]
    columns = ["question", *titles, "keywords", "fluent"]
    console.show(console.table("The eight questions", columns, answers))
    rows = _summary_rows(summary)
    console.show(console.table("Summary", ["metric", "value"], rows, numbers=1))
    show_next_commands(out, (out, out / "identity"))


def _summary_rows(summary: dict[str, Any]) -> list[tuple[str, object]]:
    quiz, stages = summary["quiz"], summary["stages"]
    preferences, identity = summary["preferences"], summary["identity"]
    eight_correct = sum(row["correct"] for row in summary["questions"])
    return [
        ("parameters", summary["parameters"]),
        ("device", summary["device"]),
        ("training time, all stages", f"{summary['training_seconds']:,.0f} s"),
        ("total time", f"{summary['total_seconds']:,.0f} s"),
        *(
            (f"{name}: tokens/s", round(stage["tokens_per_second"]))
            for name, stage in stages.items()
        ),
        ("bits per byte, held-out text", round(stages["pretrain"]["bits_per_byte"], 3)),
        ("bits per byte, unigram model", round(summary["unigram_bits_per_byte"], 3)),
        (
            "quiz, held-out phrasings",
            f"{quiz['correct']} of {quiz['questions']} match the keywords "
            f"({quiz['correct'] / quiz['questions']:.1%})",
        ),
        ("quiz, fluent answers", f"{quiz.get('fluent', '–')} of {quiz['questions']}"),
        (
            "quiz, before preference optimization",
            f"{quiz['correct_before_preferences']} match the keywords",
        ),
        ("the eight questions", f"{eight_correct} of 8 match the keywords"),
        (
            "preference accuracy",
            f"{preferences['accuracy']:.1%} (before: {preferences['first_accuracy']:.1%})",
        ),
        (
            f"adapter answers as {identity['name']}, by {identity['author']}",
            f"{identity['correct']} of {identity['questions']} held-out phrasings",
        ),
    ]
