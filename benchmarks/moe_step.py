"""Training step of `moe` compared with a dense model with the same number of active parameters.

    python benchmarks/moe_step.py [--rounds 5] [--json benchmarks/records/moe-step.json]

Both have the same attention, and 2,816 + 2 * 1,408 = 5,632 feed-forward units per token. A step is
that of the training loop: forward and backward over the micro-batches of the recipe's batch, then
Muon and AdamW. Micro-batches of the two models alternate in one process, and so do their optimizer
steps; the time of a step is the median micro-batch times their number plus the median optimizer
step. Both wall-clock and CPU seconds are recorded: on a busy machine, give --threads 1 and compare
CPU seconds. Also measured: one layer of routed experts, grouped by expert as in training, and the
reference implementation in which every expert computes every token.
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

from benchmarks.rounds import machine
from minimind.config import load_recipe
from minimind.config.model import MOE_FIELDS
from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.model.device import choose_device
from minimind.model.experts import moe_reference
from minimind.training.batch import TensorBatch, label_indices
from minimind.training.objectives.next_token import NextToken
from minimind.training.optimizers import Optimizers
from minimind.training.precision import choose_precision


def main() -> None:
    """Measure both models, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences per micro-batch")
    parser.add_argument("--preset", default="moe")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick test")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args()
    device = choose_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    precision = choose_precision("bf16", device)
    recipe = load_recipe("pretrain-moe").recipe
    shape = PRESETS[args.preset] | ({"num_hidden_layers": args.layers} if args.layers else {})
    moe = ModelConfig(**shape)
    dense_shape = {key: value for key, value in shape.items() if key not in MOE_FIELDS}
    dense = ModelConfig(**dense_shape | {"intermediate_size": moe.active_intermediate_size})
    seq_len, num_micro = recipe.data.seq_len, recipe.training.global_batch_size // args.micro_batch
    torch.manual_seed(0)
    tokens = torch.randint(moe.vocab_size, (args.micro_batch, seq_len + 1), device=device)
    batch = TensorBatch(tokens[:, :-1], tokens[:, 1:], None, label_indices(tokens[:, 1:]))
    objective = NextToken([1] * moe.vocab_size, device, router_aux_loss_coef=0.01)
    models = {"moe": Transformer(moe).to(device), "dense": Transformer(dense).to(device)}
    optimizers = {name: Optimizers(model, recipe.optim) for name, model in models.items()}

    def micro_batch(name: str) -> Callable[[], None]:
        def run() -> None:
            with precision.autocast():
                loss = objective.loss(models[name], batch).loss_sum
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
        x = torch.randn(args.micro_batch * seq_len, moe.hidden_size, device=device)
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

    micro = time_alternately({name: micro_batch(name) for name in models}, args.rounds, device)
    steps = time_alternately({name: step(name) for name in models}, args.rounds, device)
    layers = time_alternately(
        {"sorted": layer(moe), "plain": layer(moe_reference)}, args.rounds, device
    )
    record = {
        "date": date.today().isoformat(),
        "machine": f"{machine()}, {torch.get_num_threads()} threads, {device}",
        "command": " ".join(["python", *sys.argv]),
        "batch_of_sequences": [recipe.training.global_batch_size, seq_len],
        "micro_batch": args.micro_batch,
        "rounds": args.rounds,
    }
    for name, model in models.items():
        record[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "active_parameters": model.num_active_parameters,
        }
    for clock in ("clock", "processor"):
        one, opt, layer_s = (
            {name: statistics.median(row[clock] for row in rows) for name, rows in which.items()}
            for which in (micro, steps, layers)
        )
        step_s = {name: num_micro * one[name] + opt[name] for name in models}
        ratios = [a[clock] / b[clock] for a, b in zip(micro["moe"], micro["dense"], strict=True)]
        record[f"seconds_of_the_{clock}"] = {
            "ratio_of_steps": round(step_s["moe"] / step_s["dense"], 3),
            "ratios_of_micro_batches": [round(ratio, 3) for ratio in ratios],
            "step": _rounded(step_s),
            "micro_batch": _rounded(one),
            "optimizer": _rounded(opt),
            "routed_layer": _rounded(layer_s),
        }
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def time_alternately(
    work: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, list[dict[str, float]]]:
    """Return the wall-clock and CPU seconds of each function in each round, after a warm-up."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            wait(device)
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            wait(device)
            elapsed = {
                "clock": time.perf_counter() - start,
                "processor": time.process_time() - cpu_start,
            }
            seconds[name].append(elapsed)
    return {name: times[1:] for name, times in seconds.items()}


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
