"""Direct preference optimisation: of two answers to one prompt, make the better one likelier.

With r(answer) = log p(answer | prompt) - log p_reference(answer | prompt), in nats, and
d = r(chosen) - r(rejected), the loss of a pair is

    sigmoid       -log sigmoid(beta d)       Rafailov et al. 2023, equation 7
    ipo           (d - 1 / (2 beta))^2       Azar et al. 2023, equation 17
    sigmoid_norm  -log sigmoid(beta d)       Lambert et al. 2024 (Tülu 3), section 5.1

where ipo and sigmoid_norm take the mean over the answer's tokens for r, and sigmoid the sum.
With label smoothing e, a sigmoid loss is (1 - e) of itself and e of that of the swapped pair
(Mitchell 2023, "cDPO").
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.config.settings import DPOSettings
from minimind.data.packing import IGNORED
from minimind.model import Transformer
from minimind.model.experts import Routing
from minimind.training.batch import TensorBatch
from minimind.training.objectives.balance import with_balance, without_balance
from minimind.training.objectives.next_token import linear_cross_entropy

_JUDGED_AFTER = 0.3  # of the run
_STILL = 0.01  # a loss that is this near to where it began, as a share of it, has not moved
_TOTALS = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
_SUMS = (*_TOTALS, "accuracy", "ranking_accuracy")


class Preference:
    """The DPO loss of each pair, in nats (that of ipo in none)."""

    def __init__(self, settings: DPOSettings, *, router_balance: float = 0.0) -> None:
        self._settings, self._router_balance = settings, router_balance
        self._warned = False

    def loss(
        self, model: Transformer, batch: TensorBatch
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum over pairs, their number, and sums of rewards, log-probabilities and hits.

        Of a mixture of experts the first has the weighted balance loss in it.
        """
        assert batch.pairs is not None, "windows of preference pairs"
        settings, reference = self._settings, batch.pairs.reference
        routing = Routing() if model.config.num_local_experts else None
        logps, lengths = answer_logps(model, batch, routing)
        ratios = logps - reference
        if settings.loss != "sigmoid":
            ratios = ratios / lengths
        margins = ratios[:, 0] - ratios[:, 1]
        if settings.loss == "ipo":
            losses = (margins - 1 / (2 * settings.beta)).square()
        else:
            smoothing, scaled = settings.label_smoothing, settings.beta * margins
            losses = -F.logsigmoid(scaled) * (1 - smoothing) - F.logsigmoid(-scaled) * smoothing
        totals = torch.cat([settings.beta * ratios, logps], 1).detach().sum(0).unbind()
        won = (margins.detach().sign() + 1) / 2  # half a point for a tie
        likelier = (logps[:, 0] > logps[:, 1]).sum()
        more = {"accuracy": won.sum(), "ranking_accuracy": likelier.float()}
        count = torch.tensor(len(reference))
        more |= {"pairs": count.float()} | dict(zip(_TOTALS, totals, strict=True))
        total = losses.sum()
        if routing:
            assert batch.segments is not None, "pairs are packed"
            learned = batch.labels != IGNORED
            pairs = (torch.where(learned, batch.segments, -1).amax(1) + 1) // 2
            total, balance = with_balance(
                total, self._router_balance, routing, learned, batch.segments, pairs
            )
            more |= balance
        return total, count, more

    def metrics(self, loss: float, sums: dict[str, Any]) -> dict[str, float]:
        """Means over pairs.

        rewards/…: beta r of both sides and of their difference, the margin; accuracy: share of
        pairs with a margin above 0; ranking_accuracy: share of pairs whose chosen answer the
        model finds likelier than the rejected one, whatever the reference does; logps/…: nats.
        The loss is that of the pairs alone.
        """
        means = {key: sums[key] / max(sums["pairs"], 1.0) for key in _SUMS}
        means["rewards/margin"] = means["rewards/chosen"] - means["rewards/rejected"]
        loss, more = without_balance(loss, self._router_balance, sums)
        return {"loss": loss} | means | more

    def note(self, metrics: dict[str, float]) -> str:
        """Loss, accuracy and margin."""
        return (
            f"loss {metrics['loss']:.3f} accuracy {metrics['accuracy']:.0%} "
            f"margin {metrics['rewards/margin']:.2f}"
        )

    def warning(self, share: float, metrics: dict[str, float]) -> str | None:
        """Of a learning rate that is too small: the loss stays where it began."""
        beta = self._settings.beta
        start = 1 / (2 * beta) ** 2 if self._settings.loss == "ipo" else math.log(2)
        moved = abs(metrics["loss"] - start) > _STILL * start
        if self._warned or share < _JUDGED_AFTER or moved:
            return None
        self._warned = True
        return (
            f"after {share:.0%} of the run the loss is {metrics['loss']:.4f}, and it began at "
            f"{start:.4f}: nothing is learned. Try higher learning rates (optim.lr, and "
            "optim.muon_lr with Muon), such as ten times these; or the pairs say nothing"
        )


def answer_logps(
    model: Transformer, batch: TensorBatch, routing: Routing | None = None
) -> tuple[Tensor, Tensor]:
    """([P, 2] log-probability in nats, [P, 2] number of tokens) of both answers of each pair."""
    assert batch.pairs is not None, "windows of preference pairs"
    hidden = model(batch.tokens, segments=batch.segments, routing=routing).flatten(0, 1)
    labels = batch.labels.flatten()[batch.learned]
    losses = linear_cross_entropy(
        hidden.index_select(0, batch.learned), model.head_weight, labels, uniform_grad=False
    )
    answers = batch.pairs.side_ids.flatten()[batch.learned]
    nothing = losses.new_zeros(2 * len(batch.pairs.reference))
    logps = nothing.index_add(0, answers, -losses)
    lengths = nothing.index_add(0, answers, torch.ones_like(losses))
    return logps.view(-1, 2), lengths.view(-1, 2)
