"""Run directories in the format of training, written without training."""

import json
from pathlib import Path
from typing import Any

SEQ_LEN, BATCH_SIZE = 32, 4


def train(step: int, **more: Any) -> dict[str, Any]:
    metrics = {"loss": 9 / step, "bits_per_byte": 3 / step, "tokens_per_second": 5e4 + step}
    metrics |= {
        "tokens": step * SEQ_LEN * BATCH_SIZE,
        "elapsed_s": step / 2,
        "peak_memory_bytes": 1 << 28,
    }
    return {"kind": "train", "step": step, "lr/adamw": 3e-4, "lr/muon": 2e-2} | metrics | more


def validation(step: int, **more: Any) -> dict[str, Any]:
    metrics = {"loss": 9.5 / step, "bits_per_byte": 3.2 / step}
    return {"kind": "validation", "step": step} | metrics | more


def sample(step: int, text: str, prompt: str = "长江是") -> dict[str, Any]:
    return {"kind": "sample", "step": step, "prompt": prompt, "text": text}


def usual_metrics() -> list[dict[str, Any]]:
    return [*map(train, range(1, 60)), validation(30), validation(59), sample(59, "中国的河。")]


def write_run(
    folder: Path,
    metrics: list[dict[str, Any]] | None = None,
    *,
    init: str | None = None,
    objective: str = "pretrain",
    more: str = "",
    **summary: Any,
) -> Path:
    """Write a run. summary: extra keys of summary.json; finished=False omits the file."""
    folder.mkdir(parents=True)
    lines = usual_metrics() if metrics is None else metrics
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    recipe = f'objective = "{objective}"\n[model]\nhidden_size = 8\n'
    recipe = recipe if init is None else f'objective = "{objective}"\n[model]\ninit = "{init}"\n'
    (folder / "recipe.toml").write_text(recipe + more, encoding="utf-8")
    if summary.pop("finished", True):
        metrics = {"objective": objective, "parameters": 1234567, "steps": 59, "tokens": 7552}
        metrics |= {"seconds": 61.7, "loss": 0.16, "bits_per_byte": 0.054, "device": "cpu"}
        metrics |= {"unigram_bits_per_byte": 2.25} if objective == "pretrain" else {}
        (folder / "summary.json").write_text(json.dumps(metrics | summary), encoding="utf-8")
    return folder
