import math
import random

import pytest
import torch

from minimind.errors import UsageError
from minimind.inference.sampling import Sampling, choose, probabilities

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
]


def by_hand(logits: list[float], seen: list[int], sampling: Sampling) -> list[float]:
    """The same, one token after the other, in Python's own floats."""
    scores = list(logits)
    for token in set(seen):
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
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
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(scores))]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_probabilities_are_those_of_the_definition(sampling: Sampling) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    logits = torch.randn(20, 50) * 3
    seen = torch.tensor([rng.choices(range(50), k=8) for _ in range(20)])
    found = probabilities(logits, seen, sampling)
    found /= found.sum(-1, keepdim=True)
    wanted = [by_hand(logits[i].tolist(), seen[i].tolist(), sampling) for i in range(20)]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sampling", SETTINGS)
def test_probabilities_are_those_of_transformers(sampling: Sampling) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    logits, seen = torch.randn(20, 300) * 3, torch.randint(300, (20, 30))
    steps = [
        transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        transformers.TemperatureLogitsWarper(float(sampling.temperature)),
    ]
    if sampling.top_k:
        steps.append(transformers.TopKLogitsWarper(sampling.top_k))
    steps.append(transformers.TopPLogitsWarper(float(sampling.top_p)))
    theirs = logits
    for step in steps:
        theirs = step(seen, theirs)
    found = probabilities(logits, seen, sampling)
    found /= found.sum(-1, keepdim=True)
    torch.testing.assert_close(found, theirs.softmax(-1), atol=1e-6, rtol=1e-4)


def test_draws_follow_the_probabilities() -> None:
    torch.manual_seed(0)
    sampling = Sampling(temperature=1, top_p=0.95, repetition_penalty=1.2)
    logits, seen = torch.randn(1, 30) * 2, torch.tensor([[3, 4, 5]])
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = choose(logits.expand(draws, -1), seen.expand(draws, -1), sampling, generator)
    shares = drawn.bincount(minlength=30) / draws
    wanted = probabilities(logits, seen, sampling)[0]
    wanted /= wanted.sum()
    assert (wanted == 0).any()
    assert torch.equal(shares[wanted == 0], torch.zeros_like(shares[wanted == 0]))
    deviation = (wanted * (1 - wanted) / draws).sqrt()
    assert ((shares - wanted).abs() <= 5 * deviation).all()


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-9])
def test_no_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = torch.randn(10, 40) * 1000
    seen, generator = torch.zeros(10, 1, dtype=torch.long), torch.Generator()
    chosen = choose(logits, seen, Sampling(temperature), generator)
    assert torch.equal(chosen, logits.argmax(-1))


def test_the_penalty_turns_a_greedy_choice_too() -> None:
    logits, seen = torch.tensor([[2.0, 1.9, -1.0]]), torch.tensor([[0, 0, 2]])
    generator = torch.Generator()
    assert choose(logits, seen, Sampling(0, repetition_penalty=1.0), generator).item() == 0
    assert choose(logits, seen, Sampling(0, repetition_penalty=1.2), generator).item() == 1


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
    ],
)
def test_values_out_of_range_are_named(setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{setting.replace('_', '-')} is {value}; it must be"):
        Sampling(**{setting: value})


@pytest.mark.parametrize(
    "sampling", [Sampling(100, 1, 0, 100), Sampling(100, 1e-9, 0, 0.01), Sampling(2e-5, 1, 3, 100)]
)
def test_the_ends_of_the_ranges_work(sampling: Sampling) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    assert choose(logits, torch.tensor([[0, 1]]), sampling, generator).item() in range(4)
