"""Model directories of every architecture and stage, made by real training runs of few steps."""

from pathlib import Path
from typing import Any

import pytest

from minimind.config import load_recipe
from minimind.training.stage import run_stage
from tests.support.small_runs import RecordingReporter, lora_settings, nano_settings
from tests.support.stages import write_corpus

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"model__qk_norm": True},
    "granitemoeshared": {"model__preset": "nano-moe"},
}
STAGES = ("pretrain", "sft", "dpo")


class Runs:
    """Run directories by architecture and stage; a run is made when it is first used."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.tokenizer, self.corpus = folder, tokenizer, write_corpus(folder)

    def model(self, architecture: str, stage: str = "sft") -> Path:
        return self._run(architecture, stage) / "model"

    def adapter(self, architecture: str) -> Path:
        return self._run(architecture, "lora") / "adapter"

    def _run(self, architecture: str, stage: str) -> Path:
        run = self.folder / f"{architecture}-{stage}"
        if run.exists():
            return run
        more = dict(ARCHITECTURES[architecture])
        if stage == "pretrain":
            # vLLM has kernels for heads of 32 and more dimensions.
            more |= {"tokenizer": str(self.tokenizer)}
            more |= {"model__hidden_size": 128, "model__head_dim": 32}
        else:
            before = {"sft": "pretrain", "dpo": "sft", "lora": "sft"}[stage]
            more = {"model__init": str(self.model(architecture, before))}
        data = {"pretrain": "text.jsonl", "dpo": "pairs.jsonl"}.get(stage, "chat.jsonl")
        more |= {
            "data__sources": [str(self.corpus / data)],
            "data__store": str(self.folder / "stores"),
            "data__validation_fraction": 0.1,
            "training__steps": 5,
            "optim__lr": 1e-2,
        }
        if stage == "dpo":
            more["data__seq_len"] = 64
        if stage == "lora":
            more = lora_settings(**more)
        objective = "sft" if stage == "lora" else stage
        recipe = load_recipe(None, flags=nano_settings(objective, run, **more)).recipe
        run_stage(recipe, reporter=RecordingReporter())
        return run


@pytest.fixture(scope="session")
def runs(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), tokenizer_dir)
