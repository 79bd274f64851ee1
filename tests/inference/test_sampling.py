import math
import random

import pytest
import torch

from minimind.errors import UsageError
from minimind.inference.sampling import Penalties, Sampling, candidates, sample

pytestmark = pytest.mark.numeric

SETTINGS = [
    Sampling(temperature=1, top_p=1),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.5, top_p=0.5),
    Sampling(temperature=0.5, top_p=1, top_k=5),
    Sampling(temperature=1, top_p=0.8, top_k=20, repetition_penalty=1.3),
    Sampling(temperature=1, top_p=1, repetition_penalty=0.7),
    Sampling(temperature=1, top_p=1e-9),
    Sampling(temperature=1, top_p=1, top_k=1),
    Sampling(temperature=1, top_p=1, top_k=10**9),
    Sampling(temperature=1, top_p=1, min_p=0.1),
    Sampling(temperature=2, top_p=0.7, top_k=40, min_p=0.05),
    Sampling(temperature=5, top_p=0.999),
    Sampling(temperature=1, top_p=0.9, top_k=100),
    Sampling(temperature=1, top_p=1, presence_penalty=0.5, frequency_penalty=-1.5),
    Sampling(temperature=1, top_p=1, logit_bias={3: 5.0, 7: -100.0}),
]


def probabilities(
    logits: torch.Tensor, generated: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """Return sampling probabilities [B, vocab] after the prompt [0] and `generated` [B, T]."""
    rows = []
    for row, tokens in zip(logits, generated.tolist(), strict=True):
        penalties = Penalties(sampling, [0], len(row), logits.device)
        for token in tokens:
            penalties.add(token)
        rows.append(penalties.apply(row))
    ids, weights = candidates(torch.stack(rows), [sampling] * len(rows))
    actual = torch.zeros_like(logits).scatter(-1, ids, weights)
    if ids.shape[-1] < logits.shape[-1]:  # padding must not have overwritten a weight
        assert (weights.sum(-1) - actual.sum(-1)).abs().max() < 1e-5
    return actual / actual.sum(-1, keepdim=True)


def reference(logits: list[float], generated: list[int], sampling: Sampling) -> list[float]:
    """Return the same probabilities by their definition, in plain Python."""
    scores = list(logits)
    for token in {0, *generated}:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in generated:
        scores[token] -= sampling.frequency_penalty
    for token in set(generated):
        scores[token] -= sampling.presence_penalty
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    scores = [score / sampling.temperature for score in scores]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    order = order[: sampling.top_k or None]
    weights = {i: math.exp(scores[i] - scores[order[0]]) for i in order}
    total, kept, mass = sum(weights.values()), [], 0.0
    for i in order:
        if mass >= sampling.top_p:
            break
        kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= sampling.min_p]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(scores))]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_probabilities_follow_the_definition(sampling: Sampling) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    logits = torch.randn(20, 150) * 3
    generated = torch.tensor([rng.choices(range(50), k=8) for _ in range(20)])
    actual = probabilities(logits, generated, sampling)
    expected = [reference(logits[i].tolist(), generated[i].tolist(), sampling) for i in range(20)]
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampling", SETTINGS)
def test_probabilities_equal_those_of_transformers(sampling: Sampling) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    logits, generated = torch.randn(20, 300) * 3, torch.randint(300, (20, 30))
    if sampling.presence_penalty or sampling.logit_bias:
        pytest.skip("transformers has no such penalties")
    generated[:, 0] = 0  # the prompt
    steps = [
        transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        transformers.TemperatureLogitsWarper(float(sampling.temperature)),
    ]
    if sampling.top_k:
        steps.append(transformers.TopKLogitsWarper(sampling.top_k))
    steps.append(transformers.TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p:
        steps.append(transformers.MinPLogitsWarper(sampling.min_p))
    theirs = logits
    for step in steps:
        theirs = step(generated, theirs)
    actual = probabilities(logits, generated, sampling)
    torch.testing.assert_close(actual, theirs.softmax(-1), atol=1e-6, rtol=1e-4)


def draw(logits: torch.Tensor, sampling: Sampling, seed: int = 0) -> torch.Tensor:
    numbers = random.Random(seed)
    return sample(logits, [sampling] * len(logits), [numbers.random() for _ in logits])


@pytest.mark.parametrize("sampling", [Sampling(1, 0.95), Sampling(1, 1), Sampling(3, 1, 100)])
def test_draws_follow_the_probabilities(sampling: Sampling) -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(1, 130) * 2, 20_000
    shares = draw(logits.expand(draws, -1), sampling).bincount(minlength=130) / draws
    ids, weights = candidates(logits, [sampling])
    expected = torch.zeros(1, 130).scatter_add(-1, ids, weights)[0]
    expected /= expected.sum()
    assert (expected == 0).any() == sampling.truncates
    assert torch.equal(shares[expected == 0], torch.zeros_like(shares[expected == 0]))
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((shares - expected).abs() <= 5 * deviation).all()


def test_rows_are_sampled_independently() -> None:
    """Rows have different settings; flat distributions need a full sort, peaked ones do not."""
    torch.manual_seed(0)
    rng = random.Random(0)
    logits = torch.randn(60, 300) * torch.logspace(-2, 1, 60)[:, None]
    samplings = [rng.choice([*SETTINGS, Sampling(0)]) for _ in range(60)]
    numbers = [rng.random() for _ in range(60)]
    single = [sample(logits[i : i + 1], [samplings[i]], [numbers[i]]).item() for i in range(60)]
    for _ in range(5):
        order = rng.sample(range(60), 40)
        batched = sample(logits[order], [samplings[i] for i in order], [numbers[i] for i in order])
        assert batched.tolist() == [single[i] for i in order]


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_extreme_random_numbers_give_valid_tokens(sampling: Sampling, number: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(30, 300) * 5
    ids, weights = candidates(logits, [sampling] * 30)
    chosen = sample(logits, [sampling] * 30, [number] * 30)
    assert (weights.gather(-1, (ids == chosen[:, None]).int().argmax(-1)[:, None]) > 0).all()


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-9])
def test_zero_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(10, 40) * 1000
    assert torch.equal(draw(logits, Sampling(temperature)), logits.argmax(-1))


@pytest.mark.parametrize("vocab", [40, 300])
@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1, top_k=1), Sampling(1, top_p=1e-9)])
def test_the_lowest_id_of_equal_logits_is_chosen(sampling: Sampling, vocab: int) -> None:
    torch.manual_seed(0)
    logits = torch.randint(0, 40, (50, vocab)).float()
    assert torch.equal(draw(logits, sampling), logits.argmax(-1))


def test_the_repetition_penalty_changes_greedy_tokens() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0])
    for penalty, best in ((1.0, 0), (1.2, 1)):
        sampling = Sampling(0, repetition_penalty=penalty)
        penalties = Penalties(sampling, [0, 0, 2], 3, logits.device)
        assert sample(penalties.apply(logits)[None], [sampling], [0.0]).item() == best


def test_presence_and_frequency_penalties_ignore_the_prompt() -> None:
    sampling = Sampling(presence_penalty=2, frequency_penalty=0.5)
    penalties = Penalties(sampling, [0, 0, 1], 3, torch.device("cpu"))
    for token in (1, 2, 2):
        penalties.add(token)
    assert penalties.apply(torch.zeros(3)).tolist() == [0, -2.5, -3]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
    ],
)
def test_values_out_of_range_are_named(setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{setting.replace('_', '-')} is {value}; it must be"):
        Sampling(**{setting: value})


def test_a_bias_out_of_range_is_named() -> None:
    for bias in (101, -100.5, math.nan):
        with pytest.raises(UsageError, match=f"logit-bias is {bias}; it must be from -100 to 100"):
            Sampling(logit_bias={1: 5, 2: bias})


@pytest.mark.parametrize(
    "sampling", [Sampling(100, 1, 0, 100), Sampling(100, 1e-9, 0, 0.01), Sampling(2e-5, 1, 3, 100)]
)
def test_the_limits_of_the_ranges_work(sampling: Sampling) -> None:
    penalties = Penalties(sampling, [0, 1], 4, torch.device("cpu"))
    logits = penalties.apply(torch.tensor([1e4, -1e4, 0.0, 1.0]))
    assert draw(logits[None], sampling).item() in range(4)
