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
    """Return (losses, gradient of hidden, gradient of weight) of torch and of ours."""
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


@pytest.mark.parametrize("count", [1, 50, 1024, 2500])  # chunks are 1024 tokens
@pytest.mark.parametrize("factor", [1.0, 1 / 64, 512.0])
def test_linear_cross_entropy_is_that_of_torch(count: int, factor: float) -> None:
    theirs, ours = both(count, factor)
    for expected, actual in zip(theirs, ours, strict=True):
        width, vocab = inputs(count)[1].shape[1], inputs(count)[1].shape[0]
        assert largest_difference(actual, expected) <= rounding(width, vocab, vocab, count)


def test_bf16_is_close_to_float32() -> None:
    theirs, _ = both(300, 1.0)
    hidden, weight, labels = inputs(300)
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_cross_entropy(hidden, weight, labels)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert hidden.grad is not None and weight.grad is not None
    assert weight.grad.dtype == torch.float32
    for expected, actual in zip(theirs, (losses, hidden.grad, weight.grad), strict=True):
        assert (actual - expected).norm() < 0.02 * expected.norm()


def test_gradient_has_the_dtype_of_the_hidden_states() -> None:
    hidden, weight, labels = inputs(10, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, weight, labels).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert hidden.grad.any()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = inputs(20)
    losses = linear_cross_entropy(hidden * 1e4, weight, labels)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_losses_are_the_same_without_gradients() -> None:
    hidden, weight, labels = inputs(60)
    with torch.no_grad():
        plain = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(plain, linear_cross_entropy(hidden, weight, labels).detach())
    assert not plain.requires_grad


def test_no_label_tokens_give_no_losses() -> None:
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


def labeled(fractions: list[float]) -> TensorBatch:
    """Return a sequence for each of the given fractions of label tokens."""
    torch.manual_seed(2)
    tokens, labels = torch.randint(VOCAB, (2, len(fractions), 32))
    label_mask = torch.rand(len(fractions), 32) < torch.tensor(fractions)[:, None]
    return make_batch(tokens, torch.where(label_mask, labels, IGNORED))


def make_batch(tokens: Tensor, labels: Tensor) -> TensorBatch:
    return TensorBatch(tokens, labels, None, label_indices(labels))


def gradient(model: Transformer) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_only_label_tokens_count() -> None:
    """Loss and gradient of a model are those of torch's cross_entropy with ignore_index."""
    ours, theirs = model(), model()
    batch = labeled([0.3, 0.0, 1.0])
    output = objective().loss(ours, batch)
    scores = theirs.logits(theirs(batch.tokens)).flatten(0, 1)
    expected = F.cross_entropy(
        scores, batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert int(output.count) == int((batch.labels != IGNORED).sum())
    tolerance = gradient_rounding(ours.config, batch.tokens.shape[1], batch.tokens.numel())
    loss = float(output.loss_sum.detach())
    assert loss == pytest.approx(float(expected.detach()), rel=tolerance)
    output.loss_sum.backward()
    expected.backward()
    assert relative_difference(gradient(ours), gradient(theirs)) <= tolerance


def test_bits_per_byte_leaves_out_control_tokens() -> None:
    ours = model()
    batch = labeled([1.0, 0.5])
    batch.labels[0, :10] = 0  # a control token, which stands for no bytes
    with torch.no_grad():
        output = objective().loss(ours, batch)
        logprobs = torch.log_softmax(ours.logits(ours(batch.tokens)), -1)
    mean = float(output.loss_sum / output.count)
    metrics = objective().metrics(mean, {k: float(v) for k, v in output.metric_sums.items()})
    nats = num_bytes = 0.0
    for label, row in zip(batch.labels.flatten().tolist(), logprobs.flatten(0, 1), strict=True):
        if label > 0:
            nats -= float(row[label])
            num_bytes += 1 + label % 3
    assert metrics["loss"] == mean
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_gradient_accumulation_gives_the_gradient_of_the_batch() -> None:
    """As in the training loop: divide each loss by a constant, and the total by the label count."""
    fractions = [1.0, 0.02, 0.0, 0.4, 0.9, 0.1]
    batch = labeled(fractions)
    results = []
    for size in (6, 3, 2, 1):
        ours = model()
        total, number = 0.0, 0
        for start in range(0, len(fractions), size):
            part = make_batch(
                batch.tokens[start : start + size], batch.labels[start : start + size]
            )
            output = objective().loss(ours, part)
            (output.loss_sum / 192).backward()
            total += float(output.loss_sum.detach())
            number += int(output.count)
        results.append((total / number, gradient(ours) * 192 / number))
    loss, gradient_of_batch = results[0]
    for other_loss, other in results[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert (other - gradient_of_batch).norm() < 1e-5 * gradient_of_batch.norm()


def test_sequences_without_labels_do_not_give_nan() -> None:
    ours = model()
    output = objective().loss(ours, labeled([0.0, 0.0]))
    output.loss_sum.backward()
    assert (float(output.loss_sum.detach()), int(output.count)) == (0.0, 0)
    assert float(output.metric_sums["bytes"]) == 0.0
    assert not gradient(ours).any()
    assert objective().metrics(0.0, {"nats": 0.0, "bytes": 0.0})["bits_per_byte"] == 0.0
