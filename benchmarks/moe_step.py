"""A training step of `moe` against one of a dense model with as many parameters at work.

    python benchmarks/moe_step.py [--rounds 5] [--json benchmarks/records/moe-step.json]

Same attention, and feed-forward 2,816 + 2 * 1,408 = 5,632 wide for each token in both. A step is
what the training loop does: forward, backward, as many micro-batches as the recipe's batch has,
then Muon and AdamW. Micro-batches of the contenders take turns, in one process, and so do their
optimizer steps; a step is the median micro-batch times their number and the median optimizer step.
Beside it: one layer of routed experts, sorted by expert as in training, against the plain
definition in which every expert reads every token.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from training_speed import machine

from minimind.config import load_recipe
from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.model.device import choose_device
from minimind.model.experts import routed, routed_plainly
from minimind.training.batch import TensorBatch
from minimind.training.objectives.next_token import NextToken
from minimind.training.optimizers import Optimizers
from minimind.training.precision import choose_precision


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batch", type=int, default=8, help="windows at once")
    parser.add_argument("--preset", default="moe")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the record here")
    args = parser.parse_args()
    device = choose_device(args.device)
    precision = choose_precision("bf16", device)
    recipe = load_recipe("pretrain-moe").recipe
    moe = ModelConfig(**PRESETS[args.preset])
    dense = ModelConfig(
        **{
            key: value
            for key, value in PRESETS[args.preset].items()
            if key not in ("num_local_experts", "num_experts_per_tok", "shared_intermediate_size")
        }
        | {"intermediate_size": moe.active_intermediate_size}
    )
    window, num_micro = recipe.data.window, recipe.training.batch // args.micro_batch
    torch.manual_seed(0)
    tokens = torch.randint(moe.vocab_size, (args.micro_batch, window + 1), device=device)
    batch = TensorBatch(tokens[:, :-1], tokens[:, 1:], None)
    objective = NextToken([1] * moe.vocab_size, device, router_balance=0.01)
    models = {"moe": Transformer(moe).to(device), "dense": Transformer(dense).to(device)}
    optimizers = {name: Optimizers(model, recipe.optim) for name, model in models.items()}

    def micro_batch(name: str) -> Callable[[], None]:
        def run() -> None:
            with precision.autocast():
                loss, _, _ = objective.loss(models[name], batch)
            (loss / tokens.numel()).backward()

        return run

    def step(name: str) -> Callable[[], None]:
        gradients = [p.grad for p in models[name].parameters()]

        def run() -> None:
            norm = float(torch.nn.utils.get_total_norm(gradients))
            torch._foreach_mul_(gradients, 1 / (norm + 1e-6))
            optimizers[name].step()

        return run

    def layer(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
        experts = models["moe"].model.layers[0].block_sparse_moe
        x = torch.randn(args.micro_batch * window, moe.hidden_size, device=device)
        x = x.requires_grad_()
        best, chosen = torch.randn(len(x), moe.num_local_experts, device=device).topk(
            moe.num_experts_per_tok
        )
        weights = best.softmax(-1)
        into, back = experts.input_linear.weight, experts.output_linear.weight

        def run() -> None:
            with precision.autocast():
                out = function(x.bfloat16(), chosen, weights.bfloat16(), into, back)
            out.float().sum().backward()

        return run

    micro = take_turns({name: micro_batch(name) for name in models}, args.rounds, device)
    steps = take_turns({name: step(name) for name in models}, args.rounds, device)
    layers = take_turns(
        {"sorted": layer(routed), "plain": layer(routed_plainly)}, args.rounds, device
    )
    record = {
        "date": date.today().isoformat(),
        "machine": f"{machine()}, {torch.get_num_threads()} threads, {device}",
        "command": " ".join(["python", *sys.argv]),
        "windows_of_tokens": [recipe.training.batch, window],
        "windows_at_once": args.micro_batch,
        "rounds": args.rounds,
    }
    for name, model in models.items():
        record[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "active_parameters": model.num_active_parameters,
            "micro_batch_s": round(statistics.median(micro[name]), 4),
            "optimizer_s": round(statistics.median(steps[name]), 4),
            "step_s": round(
                num_micro * statistics.median(micro[name]) + statistics.median(steps[name]), 2
            ),
        }
    record["ratio"] = round(record["moe"]["step_s"] / record["dense"]["step_s"], 3)
    ratios = [a / b for a, b in zip(micro["moe"], micro["dense"], strict=True)]
    record["ratios_of_micro_batches"] = [round(ratio, 3) for ratio in ratios]
    record["routed_layer_s"] = {
        name: round(statistics.median(times), 4) for name, times in layers.items()
    }
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def take_turns(
    work: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each piece of work in each round, after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
