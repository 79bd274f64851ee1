import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.config.model import PRESETS, ModelConfig
from minimind.data.packing import IGNORED
from minimind.model import Transformer
from minimind.training.batch import TensorBatch, label_indices
from minimind.training.objectives.next_token import NextToken, linear_cross_entropy
from tests.support.rounding import (
    gradient_rounding,
    largest_difference,
    relative_difference,
    rounding,
)
from tests.support.small_runs import VOCAB

pytestmark = pytest.mark.numeric

WIDTH = 24


def inputs(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(count, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    return hidden, weight, torch.randint(VOCAB, (count,))


def both(count: int, factor: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(losses, gradient of hidden, gradient of weight) by torch and by us."""
    results = []
    for ours in (False, True):
        hidden, weight, labels = inputs(count)
        if ours:
            losses = linear_cross_entropy(hidden, weight, labels)
        else:
            losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
        (losses.sum() * factor).backward()
        assert hidden.grad is not None and weight.grad is not None
        results.append((losses.detach(), hidden.grad, weight.grad))
    return results


@pytest.mark.parametrize("count", [1, 50, 1024, 2500])  # of which 1024 at once
@pytest.mark.parametrize("factor", [1.0, 1 / 64, 512.0])
def test_it_is_the_cross_entropy_of_torch(count: int, factor: float) -> None:
    theirs, ours = both(count, factor)
    for expected, found in zip(theirs, ours, strict=True):
        width, vocab = inputs(count)[1].shape[1], inputs(count)[1].shape[0]
        assert largest_difference(found, expected) <= rounding(width, vocab, vocab, count)


def test_half_precision_is_near() -> None:
    theirs, _ = both(300, 1.0)
    hidden, weight, labels = inputs(300)
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_cross_entropy(hidden, weight, labels)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert hidden.grad is not None and weight.grad is not None
    assert weight.grad.dtype == torch.float32
    for expected, found in zip(theirs, (losses, hidden.grad, weight.grad), strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_hidden_states_in_half_precision_get_their_gradient_in_it() -> None:
    hidden, weight, labels = inputs(10, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, weight, labels).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert hidden.grad.any()


def test_large_scores_do_not_overflow() -> None:
    hidden, weight, labels = inputs(20)
    losses = linear_cross_entropy(hidden * 1e4, weight, labels)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_without_gradients_the_values_are_the_same() -> None:
    hidden, weight, labels = inputs(60)
    with torch.no_grad():
        plain = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(plain, linear_cross_entropy(hidden, weight, labels).detach())
    assert not plain.requires_grad


def test_nothing_to_learn_is_a_sum_of_nothing() -> None:
    hidden, weight, labels = inputs(0)
    losses = linear_cross_entropy(hidden, weight, labels)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def objective() -> NextToken:
    return NextToken([0, *(1 + token % 3 for token in range(1, VOCAB))], torch.device("cpu"))


def model() -> Transformer:
    torch.manual_seed(1)
    return Transformer(ModelConfig(**(PRESETS["nano"] | {"vocab_size": VOCAB})))


def labelled(shares: list[float]) -> TensorBatch:
    """A window for each share of tokens that are learned."""
    torch.manual_seed(2)
    tokens, labels = torch.randint(VOCAB, (2, len(shares), 32))
    learned = torch.rand(len(shares), 32) < torch.tensor(shares)[:, None]
    return of(tokens, torch.where(learned, labels, IGNORED))


def of(tokens: Tensor, labels: Tensor) -> TensorBatch:
    return TensorBatch(tokens, labels, None, label_indices(labels))


def gradient(of: Transformer) -> Tensor:
    return torch.cat([p.grad.flatten() for p in of.parameters() if p.grad is not None])


def test_only_labelled_tokens_count() -> None:
    """Loss and gradient of a whole model are those of torch's way of leaving labels out."""
    ours, theirs = model(), model()
    batch = labelled([0.3, 0.0, 1.0])
    loss, count, _ = objective().loss(ours, batch)
    scores = theirs.logits(theirs(batch.tokens)).flatten(0, 1)
    expected = F.cross_entropy(
        scores, batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert int(count) == int((batch.labels != IGNORED).sum())
    close = gradient_rounding(ours.config, batch.tokens.shape[1], batch.tokens.numel())
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=close)
    loss.backward()
    expected.backward()
    assert relative_difference(gradient(ours), gradient(theirs)) <= close


def test_bits_count_text_and_not_control_tokens() -> None:
    ours = model()
    batch = labelled([1.0, 0.5])
    batch.labels[0, :10] = 0  # the control token: it stands for no bytes
    with torch.no_grad():
        loss, count, sums = objective().loss(ours, batch)
        logs = torch.log_softmax(ours.logits(ours(batch.tokens)), -1)
    metrics = objective().metrics(float(loss / count), {k: float(v) for k, v in sums.items()})
    nats = num_bytes = 0.0
    for label, log in zip(batch.labels.flatten().tolist(), logs.flatten(0, 1), strict=True):
        if label > 0:
            nats -= float(log[label])
            num_bytes += 1 + label % 3
    assert metrics["loss"] == float(loss / count)
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_parts_add_up_to_the_whole_however_uneven() -> None:
    """The gradient of the loop: each part over a fixed number, all over the number of labels."""
    shares = [1.0, 0.02, 0.0, 0.4, 0.9, 0.1]
    batch = labelled(shares)
    results = []
    for size in (6, 3, 2, 1):
        ours = model()
        total, number = 0.0, 0
        for at in range(0, len(shares), size):
            part = of(batch.tokens[at : at + size], batch.labels[at : at + size])
            loss, count, _ = objective().loss(ours, part)
            (loss / 192).backward()
            total, number = total + float(loss.detach()), number + int(count)
        results.append((total / number, gradient(ours) * 192 / number))
    loss, whole = results[0]
    for other_loss, other in results[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert (other - whole).norm() < 1e-5 * whole.norm()


def test_a_window_with_nothing_to_learn_gives_no_nan() -> None:
    ours = model()
    loss, count, sums = objective().loss(ours, labelled([0.0, 0.0]))
    loss.backward()
    assert (float(loss.detach()), int(count), float(sums["bytes"])) == (0.0, 0, 0.0)
    assert not gradient(ours).any()
    assert objective().metrics(0.0, {"nats": 0.0, "bytes": 0.0})["bits_per_byte"] == 0.0
