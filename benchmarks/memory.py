"""Peak memory of training steps compared with the estimate of `minimind/training/memory.py`.

    python benchmarks/memory.py

Each case runs two steps (forward, backward, optimizer) on random tokens in a separate process. Its
peak is the peak resident memory minus the memory before the model was created.
"""

import json
import subprocess
import sys

CASES = [
    ("small", 4, 512, False, "muon"),
    ("small", 16, 512, False, "muon"),
    ("small", 4, 512, True, "muon"),
    ("small", 16, 512, True, "muon"),
    ("small", 4, 512, False, "adamw"),
    ("base", 4, 512, False, "muon"),
    ("base", 4, 512, True, "muon"),
    ("base", 1, 512, True, "muon"),
    ("moe", 4, 512, False, "muon"),
    ("moe", 4, 512, True, "muon"),
]


def main() -> None:
    """Print a table of all cases, or measure the case in the JSON argument."""
    if len(sys.argv) > 1:
        print(measure(*json.loads(sys.argv[1])))
        return
    print("| model | sequences × tokens | activations | optimizer | peak | estimate |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        preset, sequences, seq_len, checkpointing, optimizer = case
        command = [sys.executable, __file__, json.dumps(case)]
        cells = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        activations = "recomputed" if checkpointing else "stored"
        shape = f"`{preset}` | {sequences} × {seq_len}"
        print(f"| {shape} | {activations} | {optimizer} | {cells.strip()} |", flush=True)


def measure(preset: str, sequences: int, seq_len: int, checkpointing: bool, optimizer: str) -> str:
    """Return the peak and the estimate of one case, in MB."""
    from pathlib import Path

    import psutil
    import torch

    from minimind.config.settings import OptimSettings
    from minimind.model import PRESETS, ModelConfig, Transformer, fused
    from minimind.training.batch import TensorBatch, label_indices
    from minimind.training.memory import Footprint
    from minimind.training.objectives.next_token import NextToken
    from minimind.training.optimizers import Optimizers, count_moments
    from minimind.training.precision import Precision

    torch.set_num_threads(1)
    config = ModelConfig(**PRESETS[preset])
    warm_up = torch.randn(64, 64).bfloat16()
    (warm_up @ warm_up).sum()
    before = psutil.Process().memory_info().rss
    model, settings = Transformer(config), OptimSettings(name=optimizer)
    model.activation_checkpointing = checkpointing
    optimizers = Optimizers(model, settings)
    objective = NextToken([1] * config.vocab_size, torch.device("cpu"))
    for _ in range(2):
        tokens = torch.randint(0, config.vocab_size, (sequences, seq_len))
        with Precision("bf16", "cpu").autocast():
            batch = TensorBatch(tokens, tokens, None, label_indices(tokens))
            loss = objective.loss(model, batch).loss_sum
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    number = sum(parameter.numel() for parameter in model.parameters())
    moments = count_moments(model, settings)
    scores = fused.unavailable_reason() is not None
    footprint = Footprint(
        config, number, number, moments, seq_len, "cpu", checkpointing, stores_scores=scores
    )
    return f"{(peak - before) / 1e6:,.0f} MB | {footprint.total(sequences) / 1e6:,.0f} MB"


if __name__ == "__main__":
    main()
