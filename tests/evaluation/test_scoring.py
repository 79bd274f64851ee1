import random

import pytest
import torch
from small_exams import make_varied

from minimind.errors import ModelError
from minimind.evaluation.scoring import Row, Scorer, windows
from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.tokenizer import Tokenizer


def alone(model: Transformer, row: Row) -> float:
    """The same by the definition, one row at a time."""
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([row.tokens[:-1]])))[0].double()
    scores = logits.log_softmax(-1)
    return sum(float(scores[i - 1, row.tokens[i]]) for i in range(row.start, len(row.tokens)))


def random_rows(vocab_size: int, number: int, prefix: int, longest: int) -> list[Row]:
    rng = random.Random(prefix)
    shared = tuple(rng.randrange(vocab_size) for _ in range(prefix))
    rows = []
    for _ in range(number):
        tokens = shared + tuple(rng.randrange(vocab_size) for _ in range(rng.randint(3, longest)))
        rows.append(Row(tokens, rng.randint(prefix + 1, len(tokens) - 1)))
    return rows


@pytest.mark.parametrize("prefix", [0, 20, 100])
@pytest.mark.parametrize("shape", ["nano", "nano-moe"])
def test_many_rows_score_as_each_alone(
    tokenizer: Tokenizer, prefix: int, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind.evaluation.scoring._TOKENS", 300)  # several batches
    monkeypatch.setattr("minimind.evaluation.scoring._LOGITS", 10_000)  # several slices
    model = make_varied(tokenizer, **{k: v for k, v in PRESETS[shape].items()})
    rows = random_rows(tokenizer.vocab_size, 30, prefix, 60)
    letters = [Row((*rows[0].tokens[:-1], letter), len(rows[0].tokens) - 1) for letter in range(4)]
    rows += letters
    scores = Scorer(model).score(rows)
    assert scores == pytest.approx([alone(model, row) for row in rows], abs=1e-4)
    assert scores != pytest.approx([scores[0]] * len(rows))


def test_what_rows_begin_with_is_read_once(
    varied: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    forward = Transformer.forward

    def counting(self: Transformer, tokens: torch.Tensor, **others: object) -> torch.Tensor:
        read.append(tokens.numel())
        return forward(self, tokens, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(Transformer, "forward", counting)
    rows = [Row((*range(200), a, b), 201) for a in range(5) for b in range(3)]
    Scorer(varied).score(rows)
    assert sum(read) == 200 + 5


def test_scaling_that_depends_on_the_length_sees_each_text_alone(tokenizer: Tokenizer) -> None:
    model = make_varied(tokenizer, context=64)
    model.extend_context(256, "dynamic")
    rows = random_rows(tokenizer.vocab_size, 12, 70, 50)
    assert Scorer(model).score(rows) == pytest.approx([alone(model, r) for r in rows], abs=1e-4)


def test_scores_that_are_no_numbers_are_told(tokenizer: Tokenizer) -> None:
    model = Transformer(ModelConfig(**PRESETS["nano"] | {"vocab_size": tokenizer.vocab_size}))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        Scorer(model).score([Row((1, 2, 3), 1)])


@pytest.mark.parametrize("context", [2, 7, 16, 1000])
@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 40, 41])
def test_windows_score_each_token_once(length: int, context: int) -> None:
    tokens = tuple(range(100, 100 + length))
    rows = windows(tokens, [1, 2], context)
    assert [t for row in rows for t in row.tokens[row.start :]] == list(tokens)
    assert all(len(row.tokens) <= context + 1 for row in rows)
    text = (1, 2, *tokens)
    for row in rows:  # each row stands together in the text
        begin = text.index(row.tokens[0])
        assert text[begin : begin + len(row.tokens)] == row.tokens
    assert all(row.start >= context // 2 for row in rows[1:])


def test_a_context_below_the_models_own_holds(varied: Transformer) -> None:
    assert Scorer(varied).context == 512
    assert Scorer(varied, 16).context == 16
    assert Scorer(varied, 9999).context == 512
