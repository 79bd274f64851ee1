import math

import pytest
import torch
from torch import Tensor

from minimind.config.model import PRESETS, ModelConfig
from minimind.data.packing import IGNORED, ChatSequences, MixedDataset
from minimind.model import Transformer
from minimind.model.experts import Routing
from minimind.training.batch import TensorBatch, label_indices, to_device
from minimind.training.objectives.balance import balance_figures, balance_sums, real_tokens
from minimind.training.objectives.next_token import NextToken
from tests.support.small_runs import VOCAB, chat_shard

pytestmark = pytest.mark.numeric

EXPERTS, CHOSEN = 5, 2


def routing(*shape: int, layers: int = 1, seed: int = 0) -> Routing:
    """Of random routers; shape: windows, tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(*shape, EXPERTS, generator=generator) * 2 for _ in range(layers)]
    logits = [one.requires_grad_() for one in logits]
    return Routing(logits, [one.topk(CHOSEN).indices for one in logits])


def metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    return balance_figures({name: value.tolist() for name, value in sums.items()})


@pytest.mark.parametrize("padding", [0, 9])
def test_it_is_the_loss_of_transformers_where_the_formulas_meet(padding: int) -> None:
    """That one looks at a whole batch and adds up choices: one window, one layer, times K."""
    granite = pytest.importorskip("transformers.models.granitemoeshared.modeling_granitemoeshared")
    given = routing(1, 40)
    mask = torch.ones(1, 40)
    mask[:, 40 - padding :] = 0
    theirs = granite.load_balancing_loss_func(
        (given.logits[0].flatten(0, 1),), EXPERTS, CHOSEN, mask if padding else None
    )
    (wanted,) = torch.autograd.grad(theirs, given.logits)
    learned, segments = mask.bool(), torch.zeros(1, 40, dtype=torch.int32)
    segments[:, 40 - padding :] = 1
    loss = balance_sums(given, learned, segments)["balance"]
    assert int(loss[1]) == 40 - padding
    (found,) = torch.autograd.grad(loss[0] / loss[1], given.logits)
    torch.testing.assert_close(loss[0] / loss[1] * CHOSEN, theirs)
    torch.testing.assert_close(found * CHOSEN, wanted)


def test_even_is_one_and_one_sided_is_as_many_as_there_are_for_each_chosen() -> None:
    tokens = torch.arange(20)
    even = torch.stack((tokens, tokens + 1)).T[None] % EXPERTS
    learned = torch.ones(1, 20, dtype=torch.bool)
    sums = balance_sums(Routing([torch.zeros(1, 20, EXPERTS)], [even]), learned, None)
    found = metrics(sums)
    assert found["balance"] == pytest.approx(1.0)
    assert found["router_entropy"] == pytest.approx(math.log(EXPERTS))
    assert [found[f"expert_load/{e}"] for e in range(EXPERTS)] == [0.2] * EXPERTS
    assert found["expert_load/most"] == found["expert_load/least"] == 0.2
    logits = torch.tensor([50.0, 50, 0, 0, 0]).expand(1, 20, EXPERTS)
    sums = balance_sums(Routing([logits], [logits.topk(2).indices]), learned, None)
    found = metrics(sums)
    assert found["balance"] == pytest.approx(EXPERTS / CHOSEN)
    assert found["router_entropy"] == pytest.approx(math.log(2))
    assert (found["expert_load/most"], found["expert_load/least"]) == (0.5, 0.0)
    assert found["dropped_tokens"] == 0


def test_layers_are_not_mixed() -> None:
    """An expert that is idle in one layer is seen, though its namesake in the next is not."""
    first, second = torch.zeros(1, 8, EXPERTS), torch.zeros(1, 8, EXPERTS)
    chosen = [torch.tensor([0, 1]).expand(1, 8, 2), torch.tensor([2, 3]).expand(1, 8, 2)]
    learned = torch.ones(1, 8, dtype=torch.bool)
    found = metrics(balance_sums(Routing([first, second], chosen), learned, None))
    assert [found[f"expert_load/{e}"] for e in range(EXPERTS)] == [0.25] * 4 + [0]
    assert (found["expert_load/most"], found["expert_load/least"]) == (0.5, 0.0)


def test_a_choice_that_nobody_computed_would_be_counted() -> None:
    sums = balance_sums(routing(2, 6), torch.ones(2, 6, dtype=torch.bool), None)
    assert metrics(sums)["dropped_tokens"] == 0
    sums["expert_tokens"][0, 0] -= 3
    assert metrics(sums)["dropped_tokens"] == 3


def test_any_split_adds_up_to_the_same() -> None:
    given = routing(6, 30, layers=3)
    learned = torch.rand(6, 30, generator=torch.Generator().manual_seed(1)) < torch.tensor(
        [[1.0], [0.1], [0.0], [0.5], [0.9], [0.3]]
    )
    segments = torch.arange(30).expand(6, 30) // 7
    whole = balance_sums(given, learned, segments)
    for size in (3, 2, 1):
        parts = [
            balance_sums(
                Routing([x[rows] for x in given.logits], [x[rows] for x in given.chosen]),
                learned[rows],
                segments[rows],
            )
            for rows in torch.arange(6).split(size)
        ]
        for name, value in whole.items():
            torch.testing.assert_close(sum(part[name] for part in parts), value)


def test_padding_does_not_count() -> None:
    """Real windows of conversations: what the padding holds changes nothing."""
    data = MixedDataset([ChatSequences([chat_shard(9)], 48, pad=0, seed=1)], [1.0], 1)
    batch = to_device(data.batch(0, data.order.epoch_size), torch.device("cpu"))
    learned = batch.labels != IGNORED
    real = real_tokens(learned, batch.segments)
    assert 0 < int((~real).sum()) < real.numel() / 2
    lengths = [6 + (number * 17) % 40 for number in range(9)]
    assert int(real.sum()) == sum(lengths) - 9  # the last token of each is only a label
    assert real[learned].all()
    given = routing(*batch.tokens.shape, layers=2)
    other = routing(*batch.tokens.shape, layers=2, seed=9)
    changed = Routing(
        [
            torch.where(real[..., None], a, b)
            for a, b in zip(given.logits, other.logits, strict=True)
        ],
        [
            torch.where(real[..., None], a, b)
            for a, b in zip(given.chosen, other.chosen, strict=True)
        ],
    )
    before = balance_sums(given, learned, batch.segments)
    after = balance_sums(changed, learned, batch.segments)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert int(before["expert_tokens"].sum()) == int(real.sum()) * 2 * CHOSEN


def moe() -> Transformer:
    torch.manual_seed(1)
    return Transformer(ModelConfig(**(PRESETS["nano-moe"] | {"vocab_size": VOCAB})))


def objective(router_balance: float) -> NextToken:
    token_bytes = [0, *(1 + token % 3 for token in range(1, VOCAB))]
    return NextToken(token_bytes, torch.device("cpu"), router_balance=router_balance)


def packed_batch() -> TensorBatch:
    torch.manual_seed(2)
    tokens, labels = torch.randint(VOCAB, (2, 3, 32))
    return TensorBatch(tokens, labels, None, label_indices(labels))


def test_the_objective_adds_it_and_shows_the_loss_without_it() -> None:
    results = {}
    for weight in (0.0, 0.5):
        model = moe()
        loss, count, sums = objective(weight).loss(model, packed_batch())
        loss.backward()
        assert not any(value.requires_grad for value in sums.values())
        read = {name: value.tolist() for name, value in sums.items()}
        found = objective(weight).metrics(float(loss.detach()) / int(count), read)
        router = model.model.layers[0].block_sparse_moe.router.layer.weight
        results[weight] = float(loss.detach()) / int(count), found, router.grad
    (plain, without, one), (more, with_it, other) = results.values()
    assert 1.0 < with_it["balance"] < 1.5
    assert more - plain == pytest.approx(0.5 * with_it["balance"], rel=1e-4)
    assert with_it["loss"] == pytest.approx(without["loss"], rel=1e-6)
    assert without["loss"] == plain
    assert one is not None and other is not None and not torch.allclose(one, other)


def test_it_evens_out_what_is_one_sided() -> None:
    """Gradient descent on it alone, from routers that send most tokens to one expert."""
    model, batch = moe(), packed_batch()
    routers = [layer.block_sparse_moe.router.layer.weight for layer in model.model.layers]
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.05  # so that tokens have something in common
        for router in routers:
            router[2] += 0.05
    found = []
    for _ in range(60):
        given = Routing()
        model(batch.tokens, routing=given)
        sums = balance_sums(given, batch.labels != IGNORED, None)
        found.append(metrics({name: value.detach() for name, value in sums.items()}))
        gradients = torch.autograd.grad(sums["balance"][0] / sums["balance"][1], routers)
        with torch.no_grad():
            for router, gradient in zip(routers, gradients, strict=True):
                router -= 0.01 * gradient
    first, last = found[0], found[-1]
    assert first["balance"] > 1.2 and first["expert_load/most"] > 0.45
    assert last["balance"] < 1.05 and last["expert_load/most"] < 0.35


def test_a_dense_model_has_none() -> None:
    model = Transformer(ModelConfig(**(PRESETS["nano"] | {"vocab_size": VOCAB})))
    loss, _, sums = objective(0.5).loss(model, packed_batch())
    plain, _, _ = objective(0.0).loss(model, packed_batch())
    assert torch.equal(loss, plain)
    assert sums.keys() == {"nats", "bytes"}
