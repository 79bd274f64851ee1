"""Models loaded by transformers have the same metrics as models loaded by us."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimind.errors import ModelError
from minimind.evaluation.catalogue import make_task
from minimind.evaluation.models import LocalModel
from minimind.evaluation.scoring import Row, sliding_windows
from minimind.evaluation.tasks import Answer, GenerationConfig
from minimind.evaluation.transformers_model import TransformersModel
from minimind.inference import load
from minimind.tokenizer import Tokenizer, encode_chat
from minimind.tokenizer.chat import Message
from tests.support.foreign import make_tokenizer
from tests.support.small_benchmarks import CHINESE

transformers = pytest.importorskip("transformers")
GREEDY = GenerationConfig(8)
TEXT = '{"text": "泰山在山东省，泰山的日出很美。"}\n{"text": "Why is the sea salty?"}\n'


@pytest.mark.numeric
@pytest.mark.parametrize("style", ["chat", "letter", "answer"])
def test_benchmarks_have_the_same_scores(
    varied_dir: Path, local: LocalModel, ceval_dir: Path, style: str
) -> None:
    task = make_task("ceval", data=[str(ceval_dir)], style=style, shots=2)  # type: ignore[arg-type]
    theirs = {r["id"]: r for r in task.run(TransformersModel(varied_dir / "model", "cpu"), {})}
    ours = {r["id"]: r for r in task.run(local, {})}
    assert theirs.keys() == ours.keys()
    for name, result in ours.items():
        assert theirs[name]["scores"] == pytest.approx(result["scores"], abs=1e-4)
        assert theirs[name]["right"] == result["right"]


@pytest.mark.numeric
def test_texts_have_the_same_scores(
    varied_dir: Path, local: LocalModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A text begins with our token, which transformers does not add itself."""
    model = TransformersModel(varied_dir / "model", "cpu")
    scorer, encoder = model.scorer()
    texts = ["泰山在山东省，泰山的日出很美。" * 60, "Why is the sea salty?"]
    ids = encoder.encode_batch(texts)
    assert ids == tokenizer.encode_batch(texts)
    rows = [row for text in ids for row in sliding_windows(text, [tokenizer.end_of_text], 64)]
    [(_, ours)] = local.scorer()[0].score([(None, rows)])
    [(_, theirs)] = scorer.score([(None, rows)])
    assert theirs == pytest.approx(ours, abs=1e-3)
    (tmp_path / "a.jsonl").write_text(TEXT, encoding="utf-8")
    task = make_task(f"bpb:{tmp_path / 'a.jsonl'}")
    assert task.summary(list(task.run(model, {})))["bytes"] == 66


def test_an_error_in_one_item_does_not_affect_the_others(varied_dir: Path) -> None:
    """A token outside the vocabulary, in the same batch as valid items."""
    scorer, _ = TransformersModel(varied_dir / "model", "cpu").scorer()
    items = [[Row((1, 2, 3), 1)], [Row((1, 99_999, 3), 1)], [Row((4, 5, 6, 7), 2)]]
    first, wrong, last = (scores for _, scores in scorer.score(enumerate(items)))
    assert isinstance(wrong, IndexError)
    for scores, item in ((first, items[0]), (last, items[2])):
        [(_, single)] = scorer.score([(None, item)])
        assert scores == pytest.approx(single)


def asked(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]


def answers(
    model: LocalModel | TransformersModel,
    questions: list[str],
    generation: GenerationConfig = GREEDY,
) -> dict[int, Answer | Exception]:
    """Return the answers by index, without their times."""
    outcomes = model.answers(list(map(asked, questions)), generation)
    return {n: replace(a, seconds=0) for n, a in outcomes if isinstance(a, Answer)}


def test_answers_are_the_same(
    varied_dir: Path, local: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, one at a time and in a batch."""
    monkeypatch.setattr(load, "inference_dtype", lambda device: torch.float32)
    model = TransformersModel(varied_dir / "model", "cpu")
    questions = ["泰山在哪里？", "Why?", "长江？"]
    expected = answers(model, questions)
    assert sorted(expected) == [0, 1, 2]
    for index, question in enumerate(questions):
        assert answers(model, [question]) == {0: expected[index]}
    assert answers(local, questions) == expected
    sampling = GenerationConfig(8, temperature=1, seed=3)
    assert answers(model, questions, sampling)[1] == answers(model, questions[1:2], sampling)[0]
    assert answers(model, questions, sampling) != expected


def test_answers_respect_the_context(
    varied_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that leaves room for three tokens, and one that does not fit."""
    monkeypatch.setattr(load, "inference_dtype", lambda device: torch.float32)
    short, long = "泰山在哪里？", "长江？" * 30
    context = len(encode_chat(tokenizer, asked(short), add_generation_prompt=True)[0]) + 3
    theirs = TransformersModel(varied_dir / "model", "cpu", context=context)
    conversations = [asked(short), asked(long)]
    outcomes = dict(theirs.answers(conversations, GREEDY))
    ours = dict(LocalModel(varied_dir, "cpu", context=context).answers(conversations, GREEDY))
    assert isinstance(outcomes[0], Answer) and isinstance(ours[0], Answer)
    assert replace(outcomes[0], seconds=0) == replace(ours[0], seconds=0)
    assert (outcomes[0].tokens, outcomes[0].ended) == (3, False)
    assert str(outcomes[1]) == str(ours[1])
    assert f"the model's context is {context}; shorten it" in str(outcomes[1])


def test_other_architectures_are_evaluated_with_transformers(
    ceval_dir: Path, tmp_path: Path
) -> None:
    """GPT-2, with a tokenizer without a chat template."""
    make_tokenizer("base", tmp_path, [question for question, _, _ in CHINESE] * 20)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=600, n_positions=256
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        LocalModel(tmp_path, "cpu").check()
    model = TransformersModel(tmp_path, "cpu")
    task = make_task("ceval", data=[str(ceval_dir)], style="letter", shots=0)
    results = list(task.run(model, {}))
    assert len(results) == 7
    assert len({tuple(result["scores"]) for result in results}) == 7
    chat = make_task("ceval", data=[str(ceval_dir)], style="chat")
    errors = [result["error"] for result in chat.run(model, {})]
    assert all("--style letter" in error for error in errors)


def test_a_directory_that_transformers_cannot_load_is_an_error(
    varied_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unknown"}')
    with pytest.raises(ModelError, match="transformers cannot load it either"):
        TransformersModel(tmp_path, "cpu")
