import json
import math
from pathlib import Path

import pytest
import torch

from minimind.errors import DataError, UsageError
from minimind.evaluation.bits_per_byte import BitsPerByte
from minimind.evaluation.models import LocalModel
from minimind.model import PRESETS, ModelConfig, Transformer, save_model
from minimind.tokenizer import Tokenizer, train_tokenizer
from tests.support.small_benchmarks import make_varied

pytestmark = pytest.mark.numeric

TEXTS = [
    "泰山在山东省，泰山的日出很美。",
    "长江是中国最长的河流。" * 40,
    "a",
    "Why is the sea salty?",
]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def test_bits_per_byte_by_the_definition(
    local: LocalModel, varied: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    task = BitsPerByte([write(tmp_path / "a.jsonl", [TEXTS[0], *TEXTS[2:]])], None)
    summary = task.summary(list(task.run(local, {})))
    nats, sizes = 0.0, 0
    for text in (TEXTS[0], *TEXTS[2:]):
        tokens = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(text)]])
        with torch.inference_mode():
            logits = varied.logits(varied(tokens[:, :-1]))
        nats += float(torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum"))
        sizes += len(text.encode())
    assert summary["bytes"] == sizes
    assert summary["bits_per_byte"] == pytest.approx(nats / math.log(2) / sizes, rel=1e-5)
    low, high = summary["interval"]
    assert low <= summary["bits_per_byte"] <= high


def test_a_uniform_model_has_the_same_bits_per_byte_for_any_context(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """With equal probabilities, the bits are tokens * log2(vocabulary size)."""
    data = write(tmp_path / "a.jsonl", TEXTS)
    for text_tokenizer, context in (
        (tokenizer, 32),
        (tokenizer, 512),
        (train_tokenizer(TEXTS, vocab_size=400), 16),
    ):
        shape = {"vocab_size": text_tokenizer.vocab_size, "max_position_embeddings": context}
        model = Transformer(ModelConfig(**PRESETS["nano"] | shape))
        with torch.no_grad():
            model.head_weight.zero_()
        folder = tmp_path / f"{text_tokenizer.vocab_size}-{context}"
        save_model(folder, model, text_tokenizer)
        task = BitsPerByte([data], None)
        summary = task.summary(list(task.run(LocalModel(folder, "cpu"), {})))
        tokens = sum(len(text_tokenizer.encode(text)) for text in TEXTS)
        size = sum(len(text.encode()) for text in TEXTS)
        assert (summary["tokens"], summary["bytes"]) == (tokens, size)
        expected = tokens * math.log2(text_tokenizer.vocab_size) / size
        assert summary["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_a_limit_takes_evenly_spaced_documents(local: LocalModel, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [TEXTS[0]] * 4)
    second = write(tmp_path / "b.jsonl", [TEXTS[2]] * 4)
    task = BitsPerByte([first, second], 4)
    results = list(task.run(local, {}))
    assert [r["id"] for r in results] == [f"{p}#{n}" for p in (first, second) for n in (0, 2)]
    assert task.settings()["documents"] == len(task) == 4
    rest = list(task.run(local, {results[0]["id"]: results[0]}))
    assert rest == results[1:]


def test_long_texts_are_scored_in_overlapping_sequences(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Each sequence but the first starts with half a context that is not scored."""
    model = make_varied(tokenizer, context=24)
    save_model(tmp_path / "m", model, tokenizer)
    task = BitsPerByte([write(tmp_path / "a.jsonl", TEXTS[1:2])], None)
    [result] = task.run(LocalModel(tmp_path / "m", "cpu"), {})
    text = [tokenizer.end_of_text, *tokenizer.encode(TEXTS[1])]
    nats = 0.0
    for at in range(1, len(text)):
        begin = 0 if at <= 24 else (at - 25) // 13 * 13 + 13
        with torch.inference_mode():
            hidden = model(torch.tensor([text[begin:at]]))
            nats -= float(model.logits(hidden)[0, -1].log_softmax(-1)[text[at]])
    assert result["nats"] == pytest.approx(nats, rel=1e-5)


def test_metrics_by_source_and_finished_documents_are_skipped(
    local: LocalModel, tmp_path: Path
) -> None:
    sources = [write(tmp_path / f"{n}.jsonl", TEXTS[n : n + 2]) for n in (0, 2)]
    task = BitsPerByte([str(tmp_path)], None)
    assert len(task) == 4
    results = list(task.run(local, {}))
    summary = task.summary(results)
    assert list(summary["by_source"]) == sources
    assert [part["documents"] for part in summary["by_source"].values()] == [2, 2]
    rest = list(task.run(local, {results[n]["id"]: results[n] for n in (0, 3)}))
    assert rest == [pytest.approx(result) for result in results[1:3]]
    assert len(BitsPerByte([str(tmp_path)], 3)) == 3


def test_missing_and_invalid_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bpb needs text"):
        BitsPerByte([], None)
    path = tmp_path / "a.jsonl"
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(DataError, match="contains no valid record; the first error"):
        BitsPerByte([str(path)], None)
    path.write_text('[1]\n{"text": "长江"}\n', encoding="utf-8")
    assert BitsPerByte([str(path)], None).invalid.total == 1
