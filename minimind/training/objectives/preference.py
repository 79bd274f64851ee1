"""Direct preference optimization (DPO): make the chosen of two answers more likely.

With r(answer) = log p(answer | prompt) - log p_reference(answer | prompt), in nats, and the
difference d = r(chosen) - r(rejected), the loss of a pair is

    sigmoid       -log sigmoid(beta d)       Rafailov et al. 2023, equation 7
    ipo           (d - 1 / (2 beta))^2       Azar et al. 2023, equation 17
    sigmoid_norm  -log sigmoid(beta d)       Lambert et al. 2024 (Tülu 3), section 5.1

where r is a sum over the answer's tokens for sigmoid, and a mean for ipo and sigmoid_norm.

    unlikelihood  -mean log p(token) + weight mean -log(1 - p(token))
                                             Welleck et al. 2020, section 5.2

where the first mean is over the chosen answer, and the second one over the tokens that end a
repeated 4-gram of the rejected one; it is 0 if there are none. weight: `dpo.unlikelihood_weight`.

With label smoothing e, the sigmoid losses become (1 - e) times the loss of the pair plus e times
the loss of the pair with its sides swapped (Mitchell 2023, "cDPO").

Shapes: B sequences of T tokens, with both sides of a pair in the same sequence; P pairs in the
batch, chosen side first; N label tokens; D hidden size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.config.settings import DPOSettings
from minimind.data.packing import IGNORED
from minimind.model import Transformer
from minimind.model.experts import Routing
from minimind.training.batch import TensorBatch
from minimind.training.objectives import LossOutput
from minimind.training.objectives.balance import with_balance, without_balance
from minimind.training.objectives.next_token import linear_cross_entropy

_WARN_AFTER = 0.3  # fraction of the run
_NGRAM = 4  # tokens of a repeated n-gram
_CERTAIN = 1e-6  # 1 - p below which rounding dominates
_MIN_CHANGE = 0.01  # a loss within this fraction of its initial value has not changed
_SIDE_SUMS = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
_PAIR_MEANS = (*_SIDE_SUMS, "accuracy", "ranking_accuracy")


class Preference:
    """The DPO loss of each pair: in nats for the sigmoid losses, without a unit for ipo."""

    count_name = "num_pairs"

    def __init__(self, settings: DPOSettings, *, router_aux_loss_coef: float = 0.0) -> None:
        self._settings, self._router_aux_loss_coef = settings, router_aux_loss_coef
        self._warned = False

    def loss(self, model: Transformer, batch: TensorBatch) -> LossOutput:
        """Sum the loss over the P pairs; also rewards, log-probabilities and accuracies.

        For an MoE model the loss includes the weighted load-balancing loss.
        """
        assert batch.pairs is not None, "the batch has no preference pairs"
        settings, reference = self._settings, batch.pairs.reference  # [P, 2]
        routing = Routing() if model.config.num_local_experts else None
        answers = answer_tokens(model, batch, routing)
        logps, lengths = answers.sum_per_answer(answers.logps), answers.lengths()  # [P, 2] each
        log_ratios = logps - reference  # [P, 2]
        if settings.loss in ("ipo", "sigmoid_norm"):
            log_ratios = log_ratios / lengths
        # --8<-- [start:dpo]
        margins = log_ratios[:, 0] - log_ratios[:, 1]  # [P], d in the formulas above
        if settings.loss == "unlikelihood":
            weighted = settings.unlikelihood_weight * answers.unlikelihood()[:, 1]
            losses = weighted - logps[:, 0] / lengths[:, 0]
        elif settings.loss == "ipo":
            losses = (margins - 1 / (2 * settings.beta)).square()
        else:
            smoothing, scaled = settings.label_smoothing, settings.beta * margins
            losses = -F.logsigmoid(scaled) * (1 - smoothing) - F.logsigmoid(-scaled) * smoothing
        # --8<-- [end:dpo]
        side_sums = torch.cat([settings.beta * log_ratios, logps], 1).detach().sum(0)  # [4]
        correct = (margins.detach().sign() + 1) / 2  # [P], 0.5 for a tie
        count = torch.tensor(len(reference))
        sums = {
            "accuracy": correct.sum(),
            "ranking_accuracy": (logps[:, 0] > logps[:, 1]).sum().float(),
            "pairs": count.float(),
        } | dict(zip(_SIDE_SUMS, side_sums.unbind(), strict=True))
        loss_sum = losses.sum()
        if routing:
            assert batch.segments is not None, "the pairs are not packed"
            label_mask = batch.labels != IGNORED  # [B, T]
            last_segment = torch.where(label_mask, batch.segments, -1).amax(1)  # [B]
            pairs_per_sequence = (last_segment + 1) // 2  # [B]
            loss_sum, balance = with_balance(
                loss_sum,
                self._router_aux_loss_coef,
                routing,
                label_mask,
                batch.segments,
                pairs_per_sequence,
            )
            sums |= balance
        return LossOutput(loss_sum, count, sums)

    def metrics(self, loss: float, sums: dict[str, Any]) -> dict[str, float]:
        """Return means over pairs.

        rewards/chosen, /rejected: beta r; rewards/margin: their difference.
        accuracy: fraction of pairs with a positive margin.
        ranking_accuracy: fraction of pairs whose chosen answer is the more likely one under the
        model itself, without the reference.
        logps/chosen, /rejected: log-probability of the answer in nats.
        loss: without the load-balancing loss.
        """
        means = {key: sums[key] / max(sums["pairs"], 1.0) for key in _PAIR_MEANS}
        means["rewards/margin"] = means["rewards/chosen"] - means["rewards/rejected"]
        loss, balance = without_balance(loss, self._router_aux_loss_coef, sums)
        return {"loss": loss} | means | balance

    def note(self, metrics: dict[str, float]) -> str:
        """Format loss, accuracy and margin."""
        return (
            f"loss {metrics['loss']:.3f} accuracy {metrics['accuracy']:.0%} "
            f"margin {metrics['rewards/margin']:.2f}"
        )

    def warning(self, progress: float, metrics: dict[str, float]) -> str | None:
        """Warn once if the loss is still at its initial value: the learning rate is too low."""
        if self._settings.loss == "unlikelihood":
            return None  # its initial value depends on the data
        beta = self._settings.beta
        initial = 1 / (2 * beta) ** 2 if self._settings.loss == "ipo" else math.log(2)
        has_changed = abs(metrics["loss"] - initial) > _MIN_CHANGE * initial
        if self._warned or progress < _WARN_AFTER or has_changed:
            return None
        self._warned = True
        return (
            f"after {progress:.0%} of the run the loss is {metrics['loss']:.4f}, and it began at "
            f"{initial:.4f}: the model is not learning. Start over, with --fresh, with higher "
            "learning rates (optim.lr, and optim.muon_lr with Muon), for example tenfold, or check "
            "that the chosen answers differ from the rejected ones in a systematic way"
        )


@dataclass(frozen=True)
class AnswerTokens:
    """The N label tokens of a batch, which are those of the answers of all P pairs, in order.

    logps: [N], log-probabilities in nats. labels: [N], token ids. answers: [N], 2 pair + side.
    """

    logps: Tensor
    labels: Tensor
    answers: Tensor
    num_pairs: int

    def sum_per_answer(self, values: Tensor) -> Tensor:
        """Return the sums of `values`, [N], over each answer, [P, 2]: chosen, rejected."""
        # --8<-- [start:answer-logps]
        zeros = values.new_zeros(2 * self.num_pairs)  # [2 P]
        return zeros.index_add(0, self.answers, values).view(-1, 2)
        # --8<-- [end:answer-logps]

    def lengths(self) -> Tensor:
        """Return the number of tokens of each answer, float32 [P, 2]."""
        return self.sum_per_answer(torch.ones_like(self.logps))

    def unlikelihood(self) -> Tensor:
        """Return the mean of -log(1 - p) over the repeated tokens of each answer, [P, 2]."""
        repeated = self.repeated()  # [N]
        # Continued linearly from 1 - p = _CERTAIN on: there -log(1 - p) is not exact, but the most
        # certain repetitions need a gradient too.
        linear = (self.logps.clamp(min=-_CERTAIN) + _CERTAIN) / _CERTAIN
        losses = linear - torch.log(-torch.expm1(self.logps.clamp(max=-_CERTAIN)))
        losses = torch.where(repeated, losses, 0.0)
        return self.sum_per_answer(losses) / self.sum_per_answer(repeated.to(losses.dtype)).clamp(
            min=1
        )

    def repeated(self) -> Tensor:
        """Return which tokens end a 4-gram that occurred before in the same answer, bool [N]."""
        result = torch.zeros_like(self.labels, dtype=torch.bool)
        if len(self.labels) < _NGRAM:
            return result
        rows = torch.stack([self.answers, self.labels], 1).unfold(0, _NGRAM, 1)  # [N - 3, 2, 4]
        in_one_answer = (rows[:, 0] == rows[:, 0, :1]).all(1)
        grams = torch.cat([rows[:, 0, :1], rows[:, 1]], 1)  # [N - 3, 5]
        _, number = torch.unique(grams, dim=0, return_inverse=True)  # [N - 3]
        positions = torch.arange(len(number), device=number.device)
        first = positions.new_full((len(number),), len(number))
        first = first.scatter_reduce(0, number, positions, "amin")
        result[_NGRAM - 1 :] = in_one_answer & (positions > first[number])
        return result


def answer_tokens(
    model: Transformer, batch: TensorBatch, routing: Routing | None = None
) -> AnswerTokens:
    """Return the log-probabilities of the tokens of all answers."""
    assert batch.pairs is not None, "the batch has no preference pairs"
    hidden = model(
        batch.tokens, segments=batch.segments, bounds=batch.bounds, routing=routing
    )  # [B, T, D]
    hidden = hidden.flatten(0, 1).index_select(0, batch.label_indices)  # [N, D]
    labels = batch.labels.flatten()[batch.label_indices]  # [N]
    losses = linear_cross_entropy(hidden, model.head_weight, labels, uniform_grad=False)  # [N]
    # Packing numbers the answers of a batch as 2 pair + side.
    answers = batch.pairs.side_ids.flatten()[batch.label_indices]  # [N]
    return AnswerTokens(-losses, labels, answers, len(batch.pairs.reference))


def answer_logps(model: Transformer, batch: TensorBatch) -> tuple[Tensor, Tensor]:
    """Return ([P, 2] log-probability in nats, [P, 2] number of tokens) of the answers of all pairs.

    Column 0 is the chosen answer, column 1 the rejected one.
    """
    answers = answer_tokens(model, batch)
    return answers.sum_per_answer(answers.logps), answers.lengths()
