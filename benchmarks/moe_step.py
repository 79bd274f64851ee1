"""Training step of `moe` compared with a dense model with the same number of active parameters.

    python -m benchmarks.moe_step [--rounds 5] [--json benchmarks/records/moe-step.json] [--quick]

Both have the same attention, and 2,816 + 2 * 1,408 = 5,632 feed-forward units per token. A step is
that of the training loop: forward and backward over the micro-batches of the recipe's batch, then
Muon and AdamW. A measurement is one micro-batch and one optimizer step; the time of a step is that
of the micro-batch times their number plus that of the optimizers. On a busy machine, give
--threads 1 and compare CPU seconds. Also measured: one layer of routed experts, grouped by expert
as in training, and the reference implementation in which every expert computes every token.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.rounds import (
    add_options,
    answer_requests,
    clocked,
    comparison,
    measure_in_turns,
    over_rounds,
    recording,
    this_script,
)

_MODELS, _LAYERS = ("dense", "moe"), ("experts, reference", "experts, grouped")
_COLUMNS = {
    "tokens_per_second": ("tokens/s", 0),
    "tokens_per_cpu_second": ("tokens per CPU second", 0),
    "micro_batch_s": ("micro-batch, s", 3),
    "optimizer_s": ("Muon and AdamW, s", 3),
    "peak_mb": ("peak MB", 0),
}


def main() -> None:
    """Measure both models and both layers, print tables, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser, rounds=5)
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences per micro-batch")
    parser.add_argument("--preset", default="moe")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.quick:
        args.preset, args.micro_batch, args.rounds = "nano-moe", 2, 1
    if args.contender in _MODELS:
        answer_requests(model_measurement(args))
        return
    if args.contender:
        answer_requests(layer_measurement(args))
        return
    with recording(args) as record, tempfile.TemporaryDirectory() as work:
        args.work = Path(work)
        record |= {"over_rounds": {}, "rounds": {}, "markdown": []}
        for names in (_MODELS, _LAYERS):
            contenders = [this_script(args, name) for name in names]
            rounds = measure_in_turns(contenders, args.rounds, args.threads, args.work)
            record["rounds"] |= rounds
            record["over_rounds"] |= over_rounds(rounds)
            for metric in ("tokens_per_second", "tokens_per_cpu_second"):
                table = comparison(rounds, _COLUMNS, metric=metric, reference=names[0])
                record["markdown"] += [f"Ratios of {metric.replace('_', ' ')}:", "", *table, ""]


def model_measurement(args: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """Return a function that measures a micro-batch and an optimizer step of a model."""
    import torch

    from minimind.config import load_recipe
    from minimind.config.model import MOE_FIELDS
    from minimind.model import PRESETS, ModelConfig, Transformer
    from minimind.model.device import choose_device
    from minimind.training.batch import TensorBatch, label_indices
    from minimind.training.objectives.next_token import NextToken
    from minimind.training.optimizers import Optimizers
    from minimind.training.precision import choose_precision

    device, recipe = choose_device(args.device), load_recipe("pretrain-moe").recipe
    precision = choose_precision("bf16", device)
    shape = ModelConfig(**PRESETS[args.preset])
    if args.contender == "dense":
        dense = {k: v for k, v in PRESETS[args.preset].items() if k not in MOE_FIELDS}
        shape = ModelConfig(**dense | {"intermediate_size": shape.active_intermediate_size})
    seq_len = min(recipe.data.seq_len, shape.max_position_embeddings)
    torch.manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (args.micro_batch, seq_len + 1), device=device)
    batch = TensorBatch(tokens[:, :-1], tokens[:, 1:], None, label_indices(tokens[:, 1:]))
    objective = NextToken([1] * shape.vocab_size, device, router_aux_loss_coef=0.01)
    model = Transformer(shape).to(device)
    optimizers = Optimizers(model, recipe.optim)

    def micro_batch() -> None:
        with precision.autocast():
            loss = objective.loss(model, batch).loss_sum
        (loss / tokens.numel()).backward()

    def step() -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        torch._foreach_mul_(gradients, 1 / (norm + 1e-6))
        optimizers.step()

    def measure() -> dict[str, float]:
        (pass_s, pass_cpu_s), (step_s, step_cpu_s) = (
            clocked(work, device) for work in (micro_batch, step)
        )
        optimizers.zero_grad()
        number = recipe.training.global_batch_size // args.micro_batch
        num_tokens = recipe.training.global_batch_size * seq_len
        return {
            "tokens_per_second": num_tokens / (number * pass_s + step_s),
            "tokens_per_cpu_second": num_tokens / (number * pass_cpu_s + step_cpu_s),
            "micro_batch_s": pass_s,
            "optimizer_s": step_s,
            "active_parameters": model.num_active_parameters,
        }

    measure()  # warm-up
    return measure


def layer_measurement(args: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """Return a function that measures one layer of routed experts, forward and backward."""
    import torch

    from minimind.model import PRESETS, ModelConfig, Transformer
    from minimind.model.device import choose_device
    from minimind.model.experts import moe, moe_reference
    from minimind.training.precision import choose_precision

    device = choose_device(args.device)
    precision, shape = choose_precision("bf16", device), ModelConfig(**PRESETS[args.preset])
    with torch.device(device):
        experts = Transformer(shape.model_copy(update={"num_hidden_layers": 1}))
    experts = experts.model.layers[0].block_sparse_moe
    x = torch.randn(args.micro_batch * 512, shape.hidden_size, device=device).requires_grad_()
    scores = torch.randn(len(x), shape.num_local_experts, device=device)
    best, chosen = scores.topk(shape.num_experts_per_tok)
    weights = best.softmax(-1).bfloat16()
    function = moe if args.contender == "experts, grouped" else moe_reference

    def layer() -> None:
        with precision.autocast():
            out = function(
                x.bfloat16(),
                chosen,
                weights,
                experts.input_linear.weight,
                experts.output_linear.weight,
            )
        out.float().sum().backward()

    def measure() -> dict[str, float]:
        seconds, cpu_s = clocked(layer, device)
        return {"tokens_per_second": len(x) / seconds, "tokens_per_cpu_second": len(x) / cpu_s}

    measure()  # warm-up
    return measure


if __name__ == "__main__":
    main()
