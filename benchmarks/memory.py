"""Peak memory of training steps against the estimate of `minimind/training/memory.py`.

    python benchmarks/memory.py

Two steps (forward, backward, optimizer) on random tokens, each case in a process of its own: the
peak of its resident memory less what it held before the model was made.
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
    """Print a table of all cases, or measure the one that is given as JSON."""
    if len(sys.argv) > 1:
        print(measure(*json.loads(sys.argv[1])))
        return
    print("| model | windows × tokens | activations | optimizer | peak | estimate |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        preset, sequences, seq_len, checkpointing, optimizer = case
        command = [sys.executable, __file__, json.dumps(case)]
        metrics = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        kept = "computed again" if checkpointing else "kept"
        print(
            f"| `{preset}` | {sequences} × {seq_len} | {kept} | {optimizer} | {metrics.strip()} |",
            flush=True,
        )


def measure(preset: str, sequences: int, seq_len: int, checkpointing: bool, optimizer: str) -> str:
    """Peak and estimate of one case, in MB."""
    from pathlib import Path

    import psutil
    import torch

    from minimind.config.settings import OptimSettings
    from minimind.model import PRESETS, ModelConfig, Transformer
    from minimind.training.batch import TensorBatch, label_indices
    from minimind.training.memory import Footprint
    from minimind.training.objectives.next_token import NextToken
    from minimind.training.optimizers import Optimizers, count_moments
    from minimind.training.precision import Precision

    torch.set_num_threads(1)
    config = ModelConfig(**PRESETS[preset])
    warm = torch.randn(64, 64).bfloat16()
    (warm @ warm).sum()
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
    footprint = Footprint(config, number, number, moments, seq_len, "cpu", checkpointing)
    return f"{(peak - before) / 1e6:,.0f} MB | {footprint.total(sequences) / 1e6:,.0f} MB"


if __name__ == "__main__":
    main()
