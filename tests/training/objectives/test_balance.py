import math

import pytest
import torch
from torch import Tensor

from minimind.config.model import PRESETS, ModelConfig
from minimind.data.packing import IGNORED, ChatSequences, MixedDataset
from minimind.model import Transformer
from minimind.model.experts import Routing
from minimind.training.batch import TensorBatch, label_indices, to_device
from minimind.training.objectives.balance import balance_metrics, balance_sums, padding_mask
from minimind.training.objectives.next_token import NextToken
from tests.support.small_runs import VOCAB, chat_shard

pytestmark = pytest.mark.numeric

EXPERTS, CHOSEN = 5, 2


def routing(*shape: int, layers: int = 1, seed: int = 0) -> Routing:
    """Return the choices of random routers; shape: (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(*shape, EXPERTS, generator=generator) * 2 for _ in range(layers)]
    logits = [x.requires_grad_() for x in logits]
    return Routing(logits, [x.topk(CHOSEN).indices for x in logits])


def metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    return balance_metrics({name: value.tolist() for name, value in sums.items()})


@pytest.mark.parametrize("padding", [0, 9])
def test_balance_loss_is_that_of_transformers_where_the_formulas_agree(padding: int) -> None:
    """Theirs sums over a batch and over choices: equal for one sequence and layer, times K."""
    granite = pytest.importorskip("transformers.models.granitemoeshared.modeling_granitemoeshared")
    routed = routing(1, 40)
    mask = torch.ones(1, 40)
    mask[:, 40 - padding :] = 0
    theirs = granite.load_balancing_loss_func(
        (routed.logits[0].flatten(0, 1),), EXPERTS, CHOSEN, mask if padding else None
    )
    (expected,) = torch.autograd.grad(theirs, routed.logits)
    label_mask, segments = mask.bool(), torch.zeros(1, 40, dtype=torch.int32)
    segments[:, 40 - padding :] = 1
    loss = balance_sums(routed, label_mask, segments)["balance"]
    assert int(loss[1]) == 40 - padding
    (actual,) = torch.autograd.grad(loss[0] / loss[1], routed.logits)
    torch.testing.assert_close(loss[0] / loss[1] * CHOSEN, theirs)
    torch.testing.assert_close(actual * CHOSEN, expected)


def test_balance_loss_of_uniform_and_of_collapsed_routing() -> None:
    tokens = torch.arange(20)
    uniform = torch.stack((tokens, tokens + 1)).T[None] % EXPERTS
    label_mask = torch.ones(1, 20, dtype=torch.bool)
    sums = balance_sums(Routing([torch.zeros(1, 20, EXPERTS)], [uniform]), label_mask, None)
    actual = metrics(sums)
    assert actual["balance_loss"] == pytest.approx(1.0)
    assert actual["router_entropy"] == pytest.approx(math.log(EXPERTS))
    assert [actual[f"expert_load/{e}"] for e in range(EXPERTS)] == [0.2] * EXPERTS
    assert actual["expert_load/max"] == actual["expert_load/min"] == 0.2
    logits = torch.tensor([50.0, 50, 0, 0, 0]).expand(1, 20, EXPERTS)
    sums = balance_sums(Routing([logits], [logits.topk(2).indices]), label_mask, None)
    actual = metrics(sums)
    assert actual["balance_loss"] == pytest.approx(EXPERTS / CHOSEN)
    assert actual["router_entropy"] == pytest.approx(math.log(2))
    assert (actual["expert_load/max"], actual["expert_load/min"]) == (0.5, 0.0)
    assert actual["dropped_tokens"] == 0


def test_equal_indices_in_different_layers_are_different_experts() -> None:
    """An unused expert of one layer shows although the same index is used in the next layer."""
    first, second = torch.zeros(1, 8, EXPERTS), torch.zeros(1, 8, EXPERTS)
    chosen = [torch.tensor([0, 1]).expand(1, 8, 2), torch.tensor([2, 3]).expand(1, 8, 2)]
    label_mask = torch.ones(1, 8, dtype=torch.bool)
    actual = metrics(balance_sums(Routing([first, second], chosen), label_mask, None))
    assert [actual[f"expert_load/{e}"] for e in range(EXPERTS)] == [0.25] * 4 + [0]
    assert (actual["expert_load/max"], actual["expert_load/min"]) == (0.5, 0.0)


def test_choices_that_no_expert_computed_are_counted() -> None:
    sums = balance_sums(routing(2, 6), torch.ones(2, 6, dtype=torch.bool), None)
    assert metrics(sums)["dropped_tokens"] == 0
    sums["expert_tokens"][0, 0] -= 3
    assert metrics(sums)["dropped_tokens"] == 3


def test_any_split_of_a_batch_gives_the_same_sums() -> None:
    routed = routing(6, 30, layers=3)
    label_mask = torch.rand(6, 30, generator=torch.Generator().manual_seed(1)) < torch.tensor(
        [[1.0], [0.1], [0.0], [0.5], [0.9], [0.3]]
    )
    segments = torch.arange(30).expand(6, 30) // 7
    expected = balance_sums(routed, label_mask, segments)
    for size in (3, 2, 1):
        parts = [
            balance_sums(
                Routing([x[rows] for x in routed.logits], [x[rows] for x in routed.chosen]),
                label_mask[rows],
                segments[rows],
            )
            for rows in torch.arange(6).split(size)
        ]
        for name, value in expected.items():
            torch.testing.assert_close(sum(part[name] for part in parts), value)


def test_padding_is_left_out() -> None:
    """Packed conversations: the routing of padding tokens changes nothing."""
    data = MixedDataset([ChatSequences([chat_shard(9)], 48, pad_id=0, seed=1)], [1.0], 1)
    batch = to_device(data.batch(0, data.order.epoch_size), torch.device("cpu"))
    label_mask = batch.labels != IGNORED
    mask = padding_mask(label_mask, batch.segments)
    assert 0 < int((~mask).sum()) < mask.numel() / 2
    lengths = [6 + (number * 17) % 40 for number in range(9)]
    assert int(mask.sum()) == sum(lengths) - 9  # the last token of each is only a label
    assert mask[label_mask].all()
    routed = routing(*batch.tokens.shape, layers=2)
    other = routing(*batch.tokens.shape, layers=2, seed=9)
    changed = Routing(
        [
            torch.where(mask[..., None], a, b)
            for a, b in zip(routed.logits, other.logits, strict=True)
        ],
        [
            torch.where(mask[..., None], a, b)
            for a, b in zip(routed.chosen, other.chosen, strict=True)
        ],
    )
    before = balance_sums(routed, label_mask, batch.segments)
    after = balance_sums(changed, label_mask, batch.segments)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert int(before["expert_tokens"].sum()) == int(mask.sum()) * 2 * CHOSEN


def moe() -> Transformer:
    torch.manual_seed(1)
    return Transformer(ModelConfig(**(PRESETS["nano-moe"] | {"vocab_size": VOCAB})))


def objective(router_aux_loss_coef: float) -> NextToken:
    token_bytes = [0, *(1 + token % 3 for token in range(1, VOCAB))]
    return NextToken(token_bytes, torch.device("cpu"), router_aux_loss_coef=router_aux_loss_coef)


def packed_batch() -> TensorBatch:
    torch.manual_seed(2)
    tokens, labels = torch.randint(VOCAB, (2, 3, 32))
    return TensorBatch(tokens, labels, None, label_indices(labels))


def test_objective_adds_the_balance_loss_and_logs_the_loss_without_it() -> None:
    results = {}
    for weight in (0.0, 0.5):
        model = moe()
        output = objective(weight).loss(model, packed_batch())
        output.loss_sum.backward()
        assert not any(value.requires_grad for value in output.metric_sums.values())
        sums = {name: value.tolist() for name, value in output.metric_sums.items()}
        mean = float(output.loss_sum.detach()) / int(output.count)
        actual = objective(weight).metrics(mean, sums)
        router = model.model.layers[0].block_sparse_moe.router.layer.weight
        results[weight] = mean, actual, router.grad
    (loss, without, gradient), (total, with_it, other) = results.values()
    assert 1.0 < with_it["balance_loss"] < 1.5
    assert total - loss == pytest.approx(0.5 * with_it["balance_loss"], rel=1e-4)
    assert with_it["loss"] == pytest.approx(without["loss"], rel=1e-6)
    assert without["loss"] == loss
    assert gradient is not None and other is not None
    assert not torch.allclose(gradient, other)


def test_minimizing_the_balance_loss_balances_the_experts() -> None:
    """Gradient descent on the balance loss alone, from routers that prefer one expert."""
    model, batch = moe(), packed_batch()
    routers = [layer.block_sparse_moe.router.layer.weight for layer in model.model.layers]
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.05  # a component that all tokens share
        for router in routers:
            router[2] += 0.05
    actual = []
    for _ in range(60):
        routed = Routing()
        model(batch.tokens, routing=routed)
        sums = balance_sums(routed, batch.labels != IGNORED, None)
        actual.append(metrics({name: value.detach() for name, value in sums.items()}))
        gradients = torch.autograd.grad(sums["balance"][0] / sums["balance"][1], routers)
        with torch.no_grad():
            for router, gradient in zip(routers, gradients, strict=True):
                router -= 0.01 * gradient
    first, last = actual[0], actual[-1]
    assert first["balance_loss"] > 1.2 and first["expert_load/max"] > 0.45
    assert last["balance_loss"] < 1.05 and last["expert_load/max"] < 0.35


def test_dense_model_has_no_balance_loss() -> None:
    model = Transformer(ModelConfig(**(PRESETS["nano"] | {"vocab_size": VOCAB})))
    output = objective(0.5).loss(model, packed_batch())
    without = objective(0.0).loss(model, packed_batch())
    assert torch.equal(output.loss_sum, without.loss_sum)
    assert output.metric_sums.keys() == {"nats", "bytes"}
