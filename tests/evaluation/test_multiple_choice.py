from pathlib import Path

import pytest
import torch

from minimind.errors import ModelError
from minimind.evaluation.benchmark_prompts import Style
from minimind.evaluation.catalogue import make_task
from minimind.evaluation.models import LocalModel
from minimind.evaluation.multiple_choice import MultipleChoice
from minimind.model import Transformer, save_model
from minimind.tokenizer import Tokenizer
from tests.support.small_benchmarks import CHINESE, make_varied


def ceval(folder: Path, style: Style = "letter", **options: int) -> MultipleChoice:
    task = make_task("ceval", data=[str(folder)], style=style, **options)
    assert isinstance(task, MultipleChoice)
    return task


@pytest.mark.parametrize("style", ["chat", "letter", "answer"])
def test_every_question_is_scored_and_counted(
    ceval_dir: Path, local: LocalModel, style: Style
) -> None:
    task = ceval(ceval_dir, style, shots=2)
    results = list(task.run(local, {}))
    assert sorted(r["id"] for r in results) == sorted(q.id for q in task.questions)
    assert {r["shots"] for r in results} == ({0} if style == "chat" else {2})
    for result in results:
        if style != "answer":  # the most likely letter
            index = max(range(4), key=result["scores"].__getitem__)
            assert result["answer"] == "ABCD"[index]
        assert result["right"] == (result["answer"] == result["expected"])
    summary = task.summary(results)
    right = sum(r["right"] for r in results)
    assert (summary["correct"], summary["questions"], summary["chance"]) == (right, 7, 0.25)
    assert sum(part["correct"] for part in summary["by_subject"].values()) == right
    assert {n: p["questions"] for n, p in summary["by_group"].items()} == {
        "humanities": 4,
        "other": 3,
    }
    assert sum(summary["answers"].values()) == 7
    assert (summary["fewest_shots"], summary["cut"]) == (0 if style == "chat" else 2, 0)


def test_scores_do_not_depend_on_other_questions(ceval_dir: Path, local: LocalModel) -> None:
    """To the bit, with and without a shared prefix in the cache."""
    task = ceval(ceval_dir)
    batched = {r["id"]: r for r in task.run(local, {})}
    for question in task.questions:
        others = {name: result for name, result in batched.items() if name != question.id}
        [single] = task.run(local, others)
        assert single["scores"] == batched[question.id]["scores"]


def test_chance_depends_on_the_number_of_options(tmp_path: Path, local: LocalModel) -> None:
    path = tmp_path / "two.csv"
    path.write_text("question,A,B,C,D,answer\na?,1,2,,,A\nb?,1,2,3,4,D\n", encoding="utf-8")
    task = make_task(f"choice:{path}")
    summary = task.summary(list(task.run(local, {})))
    assert summary["chance"] == 0.375
    assert list(summary["by_subject"]) == ["two"]


def test_an_error_in_one_question_does_not_affect_the_others(
    ceval_dir: Path, varied: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """One question has a token whose embedding is NaN."""
    model = make_varied(tokenizer, tie_word_embeddings=False)
    save_model(tmp_path / "sound", model, tokenizer)
    task = ceval(ceval_dir, "chat")
    texts = [question.as_text() for question in task.questions]
    tokens = [set(tokenizer.encode(text)) for text in texts]
    others = set().union(*tokens[:2], *tokens[3:])
    bad = next(token for token in tokens[2] - others)
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("nan")
    save_model(tmp_path / "damaged", model, tokenizer)

    before = {r["id"]: r for r in task.run(LocalModel(tmp_path / "sound", "cpu"), {})}
    after = {r["id"]: r for r in task.run(LocalModel(tmp_path / "damaged", "cpu"), {})}
    wrong = task.questions[2].id
    assert "logits are not finite" in after[wrong]["error"]
    assert after.keys() == before.keys()
    for name in before.keys() - {wrong}:
        assert after[name] == before[name]


def test_a_model_that_always_fails_stops_the_task(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = "".join(f"{n}?,1,2,A\n" for n in range(30))
    path = tmp_path / "many.csv"
    path.write_text("question,A,B,answer\n" + rows, encoding="utf-8")
    model = make_varied(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    save_model(tmp_path / "bad", model, tokenizer)
    run = make_task(f"choice:{path}").run(LocalModel(tmp_path / "bad", "cpu"), {})
    results = []
    with pytest.raises(ModelError, match="not finite"):
        for result in run:
            results.append(result)
    assert len(results) == 9


def test_limit_takes_evenly_spaced_questions(ceval_dir: Path) -> None:
    task = ceval(ceval_dir, limit=3)
    assert [q.subject for q in task.questions] == ["accountant", "accountant", "logic"]
    assert len(ceval(ceval_dir, limit=100)) == 7


def test_a_table_per_subject(ceval_dir: Path, local: LocalModel) -> None:
    task = ceval(ceval_dir, "chat")
    results = list(task.run(local, {}))
    tables = task.tables(results[:-1])
    assert {name: len(rows) for name, rows in tables.items()} == {"accountant": 3, "logic": 4}
    first = tables["accountant"][0]
    question, options, letter = CHINESE[4]
    assert first["question"] == question
    assert [first[x] for x in "ABCD"] == options
    assert (first["answer"], first["model_answer"]) == (letter, results[0]["answer"])
    assert first["right"] == int(results[0]["right"])
    assert tables["logic"][-1]["right"] == ""
