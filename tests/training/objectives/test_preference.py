"""DPO against trl's trainer, with the same data and weights."""

import copy
import json
import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.config.model import PRESETS, ModelConfig
from minimind.config.settings import DPOSettings
from minimind.data.packing import IGNORED, MixedDataset, PairSequences
from minimind.data.store import open_store
from minimind.model import Transformer, save_model
from minimind.tokenizer import Tokenizer
from minimind.training.batch import TensorBatch, label_indices, to_device
from minimind.training.objectives.next_token import linear_cross_entropy
from minimind.training.objectives.preference import (
    AnswerTokens,
    Preference,
    answer_logps,
)
from tests.support.rounding import gradient_rounding, relative_difference, rounding
from tests.support.small_runs import VOCAB, pair_shard

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]
CPU = torch.device("cpu")
FIRST = [("user", "长江有多长？"), ("assistant", "约六千三百公里。")]
PAIRS = [
    ([("user", "泰山在哪里？")], "在山东省，是五岳之首。", "我不知道。"),
    ([("user", "What is the capital of France?")], "Paris.", "It's on the Seine, in the east."),
    ([("system", "只用一句话回答。"), ("user", "大熊猫吃什么？")], "竹子。", "石头和盐。"),
    ([*FIRST, ("user", "它流到哪里？")], "最后流入东海。", "渤海。渤海。渤海。"),
    (
        [*FIRST, ("user", "And the Yellow River?")],
        "It ends in\n\nthe Bohai Sea.",
        "一年有四个季节。",
    ),
    ([("user", "海水为什么是咸的？")], "因为河流把盐带到海里。", "因为河流把盐带到海里！"),
]
LOSSES = [("sigmoid", 0.0), ("ipo", 0.0), ("sigmoid_norm", 0.0)]
SMOOTHED = [("sigmoid", 0.1), ("sigmoid", 0.3), ("sigmoid_norm", 0.2)]


def to_messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def records() -> list[dict[str, Any]]:
    return [
        {
            side: to_messages([*prompt, ("assistant", answer)])
            for side, answer in zip(SIDES, answers, strict=True)
        }
        for prompt, *answers in PAIRS
    ]


SIDES = ("chosen", "rejected")


def model(seed: int, vocab: int = 600, preset: str = "nano", **changes: Any) -> Transformer:
    """Return a model with weights large enough for the answers to differ in likelihood."""
    torch.manual_seed(seed)
    shape = PRESETS[preset] | {"vocab_size": vocab, "max_position_embeddings": 512} | changes
    model = Transformer(ModelConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True},
    "moe": {"preset": "nano-moe"},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def ours(architecture: dict[str, Any]) -> Transformer:
    return model(1, **architecture)


@pytest.fixture(scope="module")
def reference(architecture: dict[str, Any]) -> Transformer:
    return model(2, **architecture)


@pytest.fixture(scope="module")
def packed_pairs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function of the sequence length that packs the pairs as a run would."""
    folder = tmp_path_factory.mktemp("pairs")
    file = folder / "pairs.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records()]
    file.write_text("".join(lines), encoding="utf-8")
    store = open_store(str(file), tokenizer, kind="pairs", folder=folder)

    def make(length: int) -> PairSequences:
        return PairSequences(store.shards("train"), length, pad_id=tokenizer.end_of_text, seed=0)

    return make


def batch_of(sequences: PairSequences, reference: Transformer) -> TensorBatch:
    """Return all pairs with their reference log-probabilities."""
    mix = MixedDataset([sequences], [1.0], 0)
    indices = [(0, index) for index in range(len(sequences))]
    logps, _ = answer_logps(reference, to_device(mix.stack(indices), CPU))
    sequences.reference[:] = logps.detach().numpy()
    return to_device(mix.stack(indices), CPU)


@pytest.fixture(scope="module")
def batch(packed_pairs: Any, reference: Transformer) -> TensorBatch:
    return batch_of(packed_pairs(256), reference)


@pytest.fixture(scope="module")
def trainer(
    ours: Transformer,
    reference: Transformer,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Return trl's trainer, with our weights loaded by transformers."""
    folder = tmp_path_factory.mktemp("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other packages
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import DPOConfig, DPOTrainer

        loaded = []
        for name, model in (("ours", ours), ("reference", reference)):
            save_model(folder / name, model, tokenizer)
            theirs = AutoModelForCausalLM.from_pretrained(folder / name, dtype="float32")
            if model.config.num_local_experts:
                theirs.set_experts_implementation("eager")
            loaded.append(theirs)
        return DPOTrainer(
            loaded[0],
            ref_model=loaded[1],
            args=DPOConfig(
                str(folder / "out"),
                beta=0.3,
                router_aux_loss_coef=0.0,  # test_balance.py tests it
                max_length=None,
                use_cpu=True,
                report_to=[],
                bf16=False,
            ),
            train_dataset=Dataset.from_list(records()),
            processing_class=AutoTokenizer.from_pretrained(folder / "ours"),
        )


@pytest.fixture(scope="module")
def inputs(trainer: Any, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return all pairs as trl collates them, without labels on the newline after each answer."""
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
    ends = (inputs["input_ids"] == tokenizer.im_end).roll(1, 1)  # the newline after <|im_end|>
    inputs["completion_mask"] = inputs["completion_mask"] * ~ends
    return dict(inputs)


def test_label_tokens_are_those_of_trl(
    trainer: Any, packed_pairs: Any, tokenizer: Tokenizer
) -> None:
    """Both sides, in the same context. trl also trains on the newline after <|im_end|>."""
    [newline] = tokenizer.encode("\n")
    theirs = []
    for row in trainer.train_dataset:
        for side in SIDES:
            answer = row[f"{side}_ids"]
            assert answer[-2:] == [tokenizer.im_end, newline]
            theirs.append(([*row["prompt_ids"], *answer][:-1], answer[:-1]))
    sequences = packed_pairs(256)
    assert len(sequences) < len(PAIRS), "several pairs share a sequence"
    actual = []
    for index in range(len(sequences)):
        tokens, labels, segments = sequences.sequence(index)
        assert segments is not None
        for segment in range(2 * len(sequences.reference[sequences.item_slice(index)])):
            here = segments == segment
            label_tokens = labels[here][labels[here] != IGNORED].tolist()
            actual.append((tokens[here].tolist(), label_tokens))
    assert sorted(actual) == sorted(theirs)


def transformers_name(name: str) -> str:
    """Return the name of a parameter in transformers; files have our names."""
    return (
        name.replace("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight")
        .replace("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj")
        .replace("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj")
    )


def rounding_of(model: Transformer, batch: TensorBatch) -> float:
    """Bound the relative difference of two implementations of a loss and its gradient."""
    return gradient_rounding(model.config, batch.tokens.shape[1], batch.tokens.numel())


def loss_of_trl(
    trainer: Any, inputs: dict[str, Tensor], loss: str, smoothing: float, beta: float
) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss and its gradient by parameter."""
    trainer.beta, trainer.label_smoothing = beta, smoothing
    pairs = [{k: v.view(2, len(PAIRS), -1)[:, i] for k, v in inputs.items()} for i in range(6)]
    weighted = [(inputs, loss, 1.0)]
    if smoothing and loss == "sigmoid":  # with one pair per batch, "aot" is cDPO
        weighted = [(pair, "aot", 1 / len(pairs)) for pair in pairs]
    elif smoothing:  # by its definition, since trl does not have it
        swapped = {key: value.roll(len(PAIRS), 0) for key, value in inputs.items()}
        weighted = [(inputs, loss, 1 - smoothing), (swapped, loss, smoothing)]
    trainer.model.zero_grad()
    total = 0.0
    for part, name, weight in weighted:
        trainer.loss_types = [name]
        value = trainer._compute_loss(trainer.model, dict(part), False) * weight
        value.backward()
        total += float(value.detach())
    return total, {n: p.grad.clone() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize(("loss", "smoothing"), LOSSES + SMOOTHED)
def test_loss_and_gradient_are_those_of_trl(
    trainer: Any,
    inputs: dict[str, Tensor],
    ours: Transformer,
    batch: TensorBatch,
    loss: Any,
    smoothing: float,
) -> None:
    expected, gradients = loss_of_trl(trainer, inputs, loss, smoothing, beta=0.3)
    settings = DPOSettings(loss=loss, beta=0.3, label_smoothing=smoothing)
    ours.zero_grad()
    output = Preference(settings).loss(ours, batch)
    (output.loss_sum / output.count).backward()
    assert int(output.count) == len(PAIRS)
    close = rounding_of(ours, batch)
    mean = float(output.loss_sum.detach()) / len(PAIRS)
    assert mean == pytest.approx(expected, rel=close)
    assert abs(expected - math.log(2)) > 0.001, "the pairs differ"
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert relative_difference(parameter.grad, gradients[transformers_name(name)]) <= close, (
            name
        )


def test_rewards_and_accuracy_are_those_of_trl(
    trainer: Any, inputs: dict[str, Tensor], ours: Transformer, batch: TensorBatch
) -> None:
    close = rounding_of(ours, batch)
    mode = "train" if trainer.model.training else "eval"
    trainer._metrics[mode].clear()
    loss_of_trl(trainer, inputs, "sigmoid", 0.0, beta=0.3)
    theirs = {key: value[-1] for key, value in trainer._metrics[mode].items()}
    objective = Preference(DPOSettings(beta=0.3))
    output = objective.loss(ours, batch)
    mean = float(output.loss_sum.detach() / output.count)
    metrics = objective.metrics(mean, {k: v.tolist() for k, v in output.metric_sums.items()})
    names = {
        "accuracy": "rewards/accuracies",
        "rewards/chosen": "rewards/chosen",
        "rewards/rejected": "rewards/rejected",
        "rewards/margin": "rewards/margins",
        "logps/chosen": "logps/chosen",
        "logps/rejected": "logps/rejected",
    }
    for name, theirs_name in names.items():
        size = abs(theirs["logps/chosen"]) + abs(
            theirs["logps/rejected"]
        )  # rewards are differences of these
        assert metrics[name] == pytest.approx(theirs[theirs_name], rel=0, abs=close * size), name


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sigmoid_norm"])
def test_packing_and_splitting_do_not_change_the_loss(
    packed_pairs: Any, ours: Transformer, reference: Transformer, loss: Any
) -> None:
    """Any number of pairs per sequence and of sequences per batch: the same loss and gradient."""
    results = []
    for length, apart in ((512, False), (512, True), (230, False), (230, True)):
        batch = batch_of(packed_pairs(length), reference)
        assert batch.pairs is not None and batch.segments is not None
        parts = [batch]
        if apart:
            parts = [one_sequence(batch, row) for row in range(len(batch.tokens))]
        ours.zero_grad()
        total, number = 0.0, 0
        for part in parts:
            output = Preference(DPOSettings(loss=loss)).loss(ours, part)
            (output.loss_sum / len(PAIRS)).backward()
            total += float(output.loss_sum.detach())
            number += int(output.count)
        assert number == len(PAIRS)
        grads = [p.grad.flatten() for p in ours.parameters() if p.grad is not None]
        results.append((total, torch.cat(grads)))
    for other, gradient in results[1:]:
        close = rounding_of(ours, batch_of(packed_pairs(512), reference))
        assert other == pytest.approx(results[0][0], rel=close)
        assert relative_difference(gradient, results[0][1]) <= close


def one_sequence(batch: TensorBatch, row: int) -> TensorBatch:
    """Return one sequence of a batch, with its pairs numbered from 0."""
    assert batch.pairs is not None and batch.segments is not None
    answers = batch.pairs.side_ids[row][batch.labels[row] != IGNORED]
    first, last = int(answers.min()) // 2, int(answers.max()) // 2
    pairs = replace(
        batch.pairs,
        side_ids=batch.pairs.side_ids[row : row + 1] - 2 * first,
        reference=batch.pairs.reference[first : last + 1],
    )
    rows = (x[row : row + 1] for x in (batch.tokens, batch.labels, batch.segments))
    return TensorBatch(*rows, label_indices(batch.labels[row]), pairs)


def test_linear_cross_entropy_with_an_upstream_gradient_per_loss() -> None:
    torch.manual_seed(0)
    results = []
    for by_torch in (True, False):
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(2500, 24, generator=generator, requires_grad=True)
        weight = torch.randn(VOCAB, 24, generator=generator, requires_grad=True)
        labels = torch.randint(VOCAB, (2500,), generator=generator)
        factors = torch.randn(2500, generator=generator)
        if by_torch:
            losses = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
        else:
            losses = linear_cross_entropy(hidden, weight, labels, uniform_grad=False)
        (losses * factors).sum().backward()
        results.append((losses.detach(), hidden.grad, weight.grad))
    for expected, actual in zip(*results, strict=True):
        assert expected is not None and actual is not None
        assert relative_difference(actual, expected) <= rounding(24, VOCAB, VOCAB, 2500)


def test_linear_cross_entropy_with_an_upstream_gradient_per_loss_in_bf16() -> None:
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 24, requires_grad=True) for n in (300, VOCAB))
    labels, factors = torch.randint(VOCAB, (300,)), torch.randn(300)
    (F.cross_entropy(hidden @ weight.T, labels, reduction="none") * factors).sum().backward()
    expected = [copy.deepcopy(x.grad) for x in (hidden, weight)]
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_cross_entropy(hidden, weight, labels, uniform_grad=False)
    (losses * factors).sum().backward()
    for there, here in zip(expected, (hidden.grad, weight.grad), strict=True):
        assert there is not None and here is not None
        assert (here - there).norm() < 0.02 * there.norm()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sigmoid_norm"])
def test_unchanged_loss_is_warned_about_once(loss: Any) -> None:
    objective = Preference(DPOSettings(loss=loss))
    start = 25.0 if loss == "ipo" else math.log(2)
    assert objective.warning(0.2, {"loss": start}) is None, "too early"
    assert objective.warning(0.4, {"loss": 0.9 * start}) is None
    assert "learning rate" in str(objective.warning(0.5, {"loss": 0.999 * start}))
    assert objective.warning(0.6, {"loss": 0.999 * start}) is None


def test_tie_counts_as_half_in_accuracy() -> None:
    ours = model(3, VOCAB)
    sequences = PairSequences([pair_shard(8)], 32, pad_id=0, seed=0)
    objective = Preference(DPOSettings())
    output = objective.loss(ours, batch_of(sequences, ours))
    mean = float(output.loss_sum.detach() / output.count)
    metrics = objective.metrics(mean, {k: float(v) for k, v in output.metric_sums.items()})
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["accuracy"] == 0.5
    assert metrics["rewards/margin"] == 0
    assert 0 < metrics["ranking_accuracy"] < 1
    assert metrics["logps/chosen"] < 0
    assert np.isfinite(sequences.reference).all()


def test_contradictory_settings_are_an_error() -> None:
    with pytest.raises(ValueError, match="label_smoothing applies to the sigmoid losses"):
        DPOSettings(loss="ipo", label_smoothing=0.1)


def test_unlikelihood_of_repeated_tokens(
    ours: Transformer, packed_pairs: Any, batch: TensorBatch
) -> None:
    """Value and gradient, against a loop over the tokens of each answer by itself."""
    weight, losses, repetitions = 0.7, [], 0
    sequences = packed_pairs(256)
    for index in range(len(sequences)):
        tokens, labels, segments = (torch.from_numpy(each) for each in sequences.sequence(index))
        for segment in range(0, 2 * len(sequences.reference[sequences.item_slice(index)]), 2):
            terms = []
            for side in range(2):
                here = segments == segment + side
                logps = F.log_softmax(ours(tokens[here][None])[0] @ ours.head_weight.T, -1)
                answer = labels[here] != IGNORED
                ids = labels[here][answer].tolist()
                own = logps[answer, ids]
                grams = [tuple(ids[max(end - 3, 0) : end + 1]) for end in range(len(ids))]
                again = [n for n, gram in enumerate(grams) if n > 3 and gram in grams[3:n]]
                if side == 0:
                    terms.append(-own.mean())
                elif again:
                    terms.append(-weight * torch.log1p(-own[again].exp()).mean())
                    repetitions += len(again)
            losses.append(sum(terms))
    assert repetitions == 3, "of 渤海。渤海。渤海。"
    parameters = list(ours.parameters())
    expected = sum(losses)
    assert isinstance(expected, Tensor)
    output = Preference(DPOSettings(loss="unlikelihood", unlikelihood_weight=weight)).loss(
        ours, batch
    )
    tolerance = rounding_of(ours, batch)
    assert float(output.loss_sum.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    actual = torch.autograd.grad(output.loss_sum, parameters, allow_unused=True)
    for ours_, theirs in zip(actual, gradients, strict=True):
        if theirs is not None and ours_ is not None:
            assert relative_difference(ours_, theirs) <= tolerance


def test_certain_repetitions_have_a_gradient() -> None:
    """Near p = 1 the gradient by the logit of the token is p, as everywhere."""
    for distance in (1e-3, 1e-5, 1e-7):
        margin = torch.tensor(-math.log(distance), requires_grad=True)
        logp = -F.softplus(-margin)  # of the first of two tokens, p = sigmoid(margin)
        logps = torch.cat([torch.full((7,), -1.0), logp[None]])
        labels = torch.tensor([1, 2, 3, 4, 1, 2, 3, 4])
        answers = AnswerTokens(logps, labels, torch.ones(8, dtype=torch.long), 1)
        answers.unlikelihood()[0, 1].backward()
        assert margin.grad is not None
        expected = 1.0 if distance >= 1e-6 else distance / 1e-6
        assert float(margin.grad) == pytest.approx(expected, rel=0.1)
