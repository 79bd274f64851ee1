"""One step of trl's trainers on model directories, and what they save read by minimind."""

from pathlib import Path
from typing import Any

import pytest

from tests.compatibility.conftest import ARCHITECTURES, Runs
from tests.compatibility.test_transformers import assert_changed

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
PROMPT = [{"role": "user", "content": "黄河流到哪里？"}]
GOOD = [{"role": "assistant", "content": "流入渤海。"}]
BAD = [{"role": "assistant", "content": "不知道。"}]


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl")


@pytest.fixture(scope="module")
def datasets() -> Any:
    return pytest.importorskip("datasets")


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    fixed = {
        "output_dir": str(folder / "out"),
        "max_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    return fixed | more


def train(trainer: Any, before: Path, folder: Path) -> None:
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    assert_changed(before, folder / "saved")


@every_architecture
def test_sft(architecture: str, runs: Runs, tmp_path: Path, trl: Any, datasets: Any) -> None:
    directory = runs.model(architecture, "pretrain")
    trainer = trl.SFTTrainer(
        str(directory),
        args=trl.SFTConfig(**settings(tmp_path)),
        train_dataset=datasets.Dataset.from_list([{"messages": PROMPT + GOOD}] * 8),
    )
    train(trainer, directory, tmp_path)


@every_architecture
def test_dpo(architecture: str, runs: Runs, tmp_path: Path, trl: Any, datasets: Any) -> None:
    directory = runs.model(architecture)
    pair = {"prompt": PROMPT, "chosen": GOOD, "rejected": BAD}
    trainer = trl.DPOTrainer(
        str(directory),
        args=trl.DPOConfig(**settings(tmp_path)),
        train_dataset=datasets.Dataset.from_list([pair] * 8),
    )
    train(trainer, directory, tmp_path)


@every_architecture
def test_grpo(architecture: str, runs: Runs, tmp_path: Path, trl: Any, datasets: Any) -> None:
    """The reward differs within a group: otherwise every advantage is 0 and nothing changes."""
    directory = runs.model(architecture)

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(index) for index in range(len(completions))]

    trainer = trl.GRPOTrainer(
        str(directory),
        reward_funcs=reward,
        args=trl.GRPOConfig(**settings(tmp_path, num_generations=4, max_completion_length=8)),
        train_dataset=datasets.Dataset.from_list([{"prompt": PROMPT}] * 8),
    )
    train(trainer, directory, tmp_path)
