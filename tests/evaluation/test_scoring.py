import random
from collections.abc import Iterable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from minimind.errors import ModelError, UsageError
from minimind.evaluation.scoring import EngineScorer, Row, sliding_windows
from minimind.inference.batched_model import BatchedModel, Part
from minimind.model import PRESETS, Transformer
from minimind.tokenizer import Tokenizer
from tests.support.small_benchmarks import make_varied


def score_by_definition(model: Transformer, row: Row) -> float:
    """Return the log-likelihood of one row, computed without the engine."""
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


def scores_of(scorer: EngineScorer, rows: Sequence[Row]) -> list[float]:
    """Score rows as one item."""
    [(_, scores)] = scorer.score([(None, rows)])
    assert isinstance(scores, list), scores
    return scores


def score_all(
    scorer: EngineScorer, items: Iterable[Sequence[Row]]
) -> list[list[float] | Exception]:
    """Score items; check that their keys come back in order."""
    pairs = list(scorer.score(enumerate(items)))
    assert [key for key, _ in pairs] == list(range(len(pairs)))
    return [scores for _, scores in pairs]


@pytest.mark.numeric
@pytest.mark.parametrize("prefix", [0, 20, 100])
@pytest.mark.parametrize("shape", ["nano", "nano-moe"])
def test_scores_of_a_batch_are_those_of_the_definition(
    tokenizer: Tokenizer, prefix: int, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimind.inference.scheduler.MAX_LOGITS", 10_000)  # a few tokens
    model = make_varied(tokenizer, **{k: v for k, v in PRESETS[shape].items()})
    rows = random_rows(tokenizer.vocab_size, 30, prefix, 100)
    letters = [Row((*rows[0].tokens[:-1], letter), len(rows[0].tokens) - 1) for letter in range(4)]
    scorer = EngineScorer(model, tokenizer)
    expected = [score_by_definition(model, row) for row in (*rows, *letters)]
    assert scores_of(scorer, [*rows, *letters]) == pytest.approx(expected, abs=1e-4)
    scored = score_all(scorer, [*([row] for row in rows), [], letters])
    assert [len(scores) for scores in scored if isinstance(scores, list)] == [*[1] * 30, 0, 4]
    flat = [score for scores in scored if isinstance(scores, list) for score in scores]
    assert flat == pytest.approx(expected, abs=1e-4)
    assert flat != pytest.approx([expected[0]] * len(expected))


@pytest.mark.numeric
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", ["nano", "nano-moe"])
def test_scores_do_not_depend_on_the_batch(
    tokenizer: Tokenizer, shape: str, threads: int, request: pytest.FixtureRequest
) -> None:
    """To the bit, for prompts of all lengths, with shared prefixes and long continuations."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    rng = random.Random(0)
    model = make_varied(tokenizer, **{k: v for k, v in PRESETS[shape].items()})
    scorer = EngineScorer(model, tokenizer)
    shared = tuple(rng.choices(range(600), k=130))
    items = []
    for number in range(24):
        begins = shared[: rng.choice((0, 70, 130))]
        prompt = (*begins, *rng.choices(range(600), k=rng.randrange(1, 60)))
        longest = 2 if number % 3 else 66
        continuations = [rng.choices(range(600), k=rng.randrange(1, longest)) for _ in range(4)]
        items.append([Row((*prompt, *c), len(prompt)) for c in continuations])
    together = score_all(scorer, items)
    assert [score_all(scorer, [item]) for item in items] == [[scores] for scores in together]
    assert score_all(scorer, items[::-1]) == together[::-1]


@pytest.mark.numeric
def test_a_shared_prefix_is_computed_once(
    varied: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    forward = BatchedModel.forward

    def counting(self: BatchedModel, singles: Sequence[Part], chunks: Sequence[Part]) -> Tensor:
        read.append(sum(len(part.tokens) for part in chunks))
        return forward(self, singles, chunks)

    monkeypatch.setattr(BatchedModel, "forward", counting)
    examples = tuple(range(128))  # only complete chunks are shared
    items = [[Row((*examples, *[a] * 30, a, b), 159) for b in range(3)] for a in range(5)]
    score_all(EngineScorer(varied, tokenizer), items)
    assert sum(read) == 128 + 5 * 31
    assert len(read) == 2
    read.clear()
    rows = [Row((*examples[:30], *[a] * 4), 30) for a in range(5)]
    score_all(EngineScorer(varied, tokenizer), [rows])
    assert sum(read) == 30 + 5 * 3  # the prompt once, and each continuation


@pytest.mark.numeric
def test_slots_grow_for_a_longer_text(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is recreated with larger slots, at most as large as the context."""
    monkeypatch.setattr("minimind.evaluation.scoring._MIN_SLOT_TOKENS", 16)
    model = make_varied(tokenizer, context=2048)
    rng = random.Random(2)
    texts = [tuple(rng.choices(range(600), k=k)) for k in (5, 12, 300, 17, 18, 2049, 9)]
    rows = [Row(text, 3) for text in texts]
    scored = score_all(EngineScorer(model, tokenizer), ([row] for row in rows))
    assert [scores for [scores] in map(_scores, scored)] == pytest.approx(
        [score_by_definition(model, row) for row in rows], rel=1e-5
    )


def _scores(scores: list[float] | Exception) -> list[float]:
    assert isinstance(scores, list), scores
    return scores


@pytest.mark.numeric
def test_dynamic_rope_scaling_uses_the_length_of_each_row(tokenizer: Tokenizer) -> None:
    model = make_varied(tokenizer, context=64)
    model.extend_context(256, "dynamic")
    rows = random_rows(tokenizer.vocab_size, 12, 70, 50)
    rows += [Row((*rows[0].tokens[:80], *[9] * more), 80) for more in range(1, 30)]
    expected = [score_by_definition(model, row) for row in rows]
    assert scores_of(EngineScorer(model, tokenizer), rows) == pytest.approx(expected, abs=1e-4)


def test_non_finite_scores_are_an_error_of_their_item_only(tokenizer: Tokenizer) -> None:
    """Items with a token whose embedding is NaN fail; all others have the same scores."""
    model = make_varied(tokenizer, tie_word_embeddings=False)
    bad = 17
    rows = random_rows(16, 40, 70, 60)
    expected = score_all(EngineScorer(model, tokenizer), ([row] for row in rows))
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = float("nan")
    damaged = [
        [Row((*row.tokens[:at], bad, *row.tokens[at:]), 72)] for row in rows for at in (3, 70)
    ]
    items = [
        item for row, two in zip(rows, batched(damaged), strict=True) for item in ([row], *two)
    ]
    scored = score_all(EngineScorer(model, tokenizer), items)
    assert scored[::3] == expected
    for error in (*scored[1::3], *scored[2::3]):
        assert isinstance(error, ModelError)
        assert "not finite" in str(error)


def test_a_token_outside_the_vocabulary_is_an_error_of_its_item_only(
    varied: Transformer, tokenizer: Tokenizer
) -> None:
    items = [[Row((1, 2, 3), 1)], [Row((1, 2, 600), 1)], [Row((4, 5, 6, 7), 2)]]
    first, wrong, last = score_all(EngineScorer(varied, tokenizer), items)
    assert isinstance(wrong, UsageError)
    assert [first, last] == score_all(EngineScorer(varied, tokenizer), [items[0], items[2]])


def batched(items: list[list[Row]]) -> list[list[list[Row]]]:
    return [items[at : at + 2] for at in range(0, len(items), 2)]


@pytest.mark.parametrize("context", [2, 7, 16, 1000])
@pytest.mark.parametrize("length", [0, 1, 6, 7, 8, 40, 41])
def test_sliding_windows_score_each_token_once(length: int, context: int) -> None:
    tokens = tuple(range(100, 100 + length))
    rows = sliding_windows(tokens, [1, 2], context)
    assert [t for row in rows for t in row.tokens[row.start :]] == list(tokens)
    assert all(len(row.tokens) <= context + 1 for row in rows)
    text = (1, 2, *tokens)
    for row in rows:  # each row is contiguous in the text
        begin = text.index(row.tokens[0])
        assert text[begin : begin + len(row.tokens)] == row.tokens
    assert all(row.start >= context // 2 for row in rows[1:])


@pytest.mark.numeric
def test_the_context_is_limited_by_the_models(varied: Transformer, tokenizer: Tokenizer) -> None:
    assert EngineScorer(varied, tokenizer).context == 512
    assert EngineScorer(varied, tokenizer, 16).context == 16
    assert EngineScorer(varied, tokenizer, 9999).context == 512
