"""Models by transformers: of those that both can read, the same figures."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimind.errors import ModelError
from minimind.evaluation.catalogue import make_task
from minimind.evaluation.models import LocalModel
from minimind.evaluation.scoring import Row, windows
from minimind.evaluation.tasks import Answer, GenerationConfig
from minimind.evaluation.transformers_model import TransformersModel
from minimind.inference import load
from minimind.tokenizer import Tokenizer
from tests.support.foreign import make_tokenizer
from tests.support.small_exams import CHINESE

transformers = pytest.importorskip("transformers")
GREEDY = GenerationConfig(8)
TEXT = '{"text": "泰山在山东省，泰山的日出很美。"}\n{"text": "Why is the sea salty?"}\n'


@pytest.mark.numeric
@pytest.mark.parametrize("style", ["chat", "letter", "answer"])
def test_exams_come_out_alike(
    varied_dir: Path, local: LocalModel, ceval_dir: Path, style: str
) -> None:
    task = make_task("ceval", data=[str(ceval_dir)], style=style, shots=2)  # type: ignore[arg-type]
    theirs = {r["id"]: r for r in task.run(TransformersModel(varied_dir / "model", "cpu"), ())}
    ours = {r["id"]: r for r in task.run(local, ())}
    assert theirs.keys() == ours.keys()
    for name, result in ours.items():
        assert theirs[name]["scores"] == pytest.approx(result["scores"], abs=1e-4)
        assert theirs[name]["right"] == result["right"]


@pytest.mark.numeric
def test_texts_come_out_alike(
    varied_dir: Path, local: LocalModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Whatever stands before a text: ours is no token that transformers knows as such."""
    model = TransformersModel(varied_dir / "model", "cpu")
    scorer, words = model.scorer()
    texts = ["泰山在山东省，泰山的日出很美。" * 60, "Why is the sea salty?"]
    ids = words.encode_batch(texts)
    assert ids == tokenizer.encode_batch(texts)
    rows = [row for text in ids for row in windows(text, [tokenizer.end_of_text], 64)]
    [ours], [theirs] = local.scorer()[0].score([rows]), scorer.score([rows])
    assert theirs == pytest.approx(ours, abs=1e-3)
    (tmp_path / "a.jsonl").write_text(TEXT, encoding="utf-8")
    task = make_task(f"bpb:{tmp_path / 'a.jsonl'}")
    assert task.summary(list(task.run(model, ())))["bytes"] == 66


def test_a_fault_in_one_item_is_its_own(varied_dir: Path) -> None:
    """A word that the model does not have, beside items that are read together with it."""
    scorer, _ = TransformersModel(varied_dir / "model", "cpu").scorer()
    items = [[Row((1, 2, 3), 1)], [Row((1, 99_999, 3), 1)], [Row((4, 5, 6, 7), 2)]]
    first, wrong, last = scorer.score(items)
    assert isinstance(wrong, IndexError)
    assert [first, last] == [
        pytest.approx(one) for [one] in map(scorer.score, (items[:1], items[2:]))
    ]


def answers(
    model: LocalModel | TransformersModel, asked: list[str], manner: GenerationConfig = GREEDY
) -> dict[int, Answer | Exception]:
    """Without the time that they took."""
    found = model.answers(asked, manner)
    return {place: replace(one, seconds=0) for place, one in found if isinstance(one, Answer)}


def test_answers_come_out_alike(
    varied_dir: Path, local: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 by both, whatever is asked beside it."""
    monkeypatch.setattr(load, "inference_dtype", lambda device: torch.float32)
    model = TransformersModel(varied_dir / "model", "cpu")
    asked = ["泰山在哪里？", "Why?", "长江？"]
    said = answers(model, asked)
    assert sorted(said) == [0, 1, 2]
    for place, question in enumerate(asked):
        assert answers(model, [question]) == {0: said[place]}
    assert answers(local, asked) == said
    drawn = GenerationConfig(8, temperature=1, seed=3)
    assert answers(model, asked, drawn)[1] == answers(model, asked[1:2], drawn)[0]
    assert answers(model, asked, drawn) != said


def test_a_kind_that_is_not_ours_to_read(ceval_dir: Path, tmp_path: Path) -> None:
    """GPT-2, which has another architecture, and a tokenizer without a chat format."""
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
    results = list(task.run(model, ()))
    assert len(results) == 7
    assert len({tuple(result["scores"]) for result in results}) == 7
    chat = make_task("ceval", data=[str(ceval_dir)], style="chat")
    told = list(chat.run(model, ()))
    assert all("--style letter" in result["error"] for result in told)


def test_what_transformers_cannot_load_either(varied_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(ModelError, match="nor can transformers load it"):
        TransformersModel(tmp_path, "cpu")
