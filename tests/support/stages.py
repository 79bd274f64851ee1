"""Training stages on files that are killed and resumed, for tests and reliability benchmarks."""

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from minimind.config import dump_recipe, load_recipe
from minimind.config.settings import Recipe
from minimind.errors import MinimindError
from minimind.training.stage import StageResult, run_stage
from tests.support.small_runs import (
    ForkServer,
    RecordingReporter,
    lora_settings,
    metrics,
    nano_settings,
    steps_done,
)

MakeRecipe = Any  # (objective, out, **settings) -> Recipe
STEPS = 60
INTERRUPTED = 130


def train(recipe: Recipe, reporter: RecordingReporter | None = None, **options: Any) -> StageResult:
    """Run a stage in this process."""
    return run_stage(recipe, reporter=reporter or RecordingReporter(), **options)


def refused(recipe: Recipe, error: type[MinimindError], **options: Any) -> str:
    """Return the message of the error that running the stage raises."""
    with pytest.raises(error) as caught:
        train(recipe, **options)
    return str(caught.value)


def write_corpus(folder: Path) -> Path:
    """Write text.jsonl (400 short texts), chat.jsonl and pairs.jsonl (200 each) into `folder`."""
    rivers, mouths = ("长江", "黄河", "珠江", "淮河", "汉江"), ("东海", "渤海", "南海", "洪泽湖")
    texts, chats, pairs = [], [], []
    for number in range(200):
        river, mouth = rivers[number % 5], mouths[number % 4]
        texts.append(f"{river}很长，第{number}段长{number * 7}公里。{river}最后流入{mouth}。")
        texts.append(f"Part {number} of the river is {number * 3} kilometres long.")
        turns = [("user", f"{river}的第{number}段有多长？"), ("assistant", f"{number * 7}公里。")]
        if number % 3 == 0:
            turns += [("user", "它流到哪里？"), ("assistant", f"流入{mouth}。")]
        chats.append([{"role": role, "content": content} for role, content in turns])
        question, wrong = turns[0][1], ("不知道。", f"{number * 9}米。{mouth}。")[number % 2]
        pairs.append({"prompt": question, "chosen": turns[1][1], "rejected": wrong})
    with (folder / "text.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    with (folder / "chat.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"conversations": chat}) + "\n" for chat in chats)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(pair) + "\n" for pair in pairs)
    return folder


def fingerprints(run: Path) -> dict[str, str]:
    """Return sha256 hashes of the model or adapter, and of the tensors of the last checkpoint."""
    last = max((run / "checkpoints").iterdir())
    [*paths] = [*run.glob("model/*.safetensors"), *run.glob("adapter/*.safetensors")]
    assert len(paths) == 1
    paths += [last / f"{name}.safetensors" for name in ("model", "optimizer")]
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }


def assert_same(run: Path, other: Path) -> None:
    """Assert that weights, moments, metrics and kept checkpoints are identical."""
    assert fingerprints(run) == fingerprints(other)
    assert metrics(run) == metrics(other)
    assert saved_steps(run) == saved_steps(other)


def saved_steps(run: Path) -> list[int]:
    """Return the steps of all checkpoints, complete or not."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


class Stage:
    """A stage on files: its settings, and an uninterrupted run to compare with."""

    def __init__(
        self, objective: str, folder: Path, fork_server: ForkServer, **settings: Any
    ) -> None:
        self.objective, self.folder, self.fork_server = objective, folder, fork_server
        self.overrides = settings
        self.uninterrupted = folder / f"{objective}-uninterrupted"
        assert fork_server.run("train", settings=self.settings(self.uninterrupted)) == 0, (
            fork_server.output.read_text()
        )
        assert steps_done(self.uninterrupted) == STEPS // settings.get("training__log_every", 1)
        before = "model__init" in settings  # the base model is validated too
        assert len(metrics(self.uninterrupted, "validation")) == STEPS // 10 + before

    def settings(self, run: Path, **more: Any) -> dict[str, Any]:
        fixed = {
            "training__steps": STEPS,
            "checkpoint__every": 7,
            "data__store": str(self.folder / "stores"),
            "data__validation_fraction": 0.1,
        }
        return nano_settings(self.objective, run, **fixed, **self.overrides, **more)

    def arguments(self, run: Path) -> list[str]:
        """Return the command line of the stage."""
        recipe = self.folder / "recipe.toml"
        recipe.write_text(dump_recipe(load_recipe(None, flags=self.settings(run)).recipe))
        return ["train", str(recipe)]

    def finish(self, run: Path) -> None:
        """Resume a run and let it finish."""
        settings = self.settings(run)
        assert self.fork_server.run("train", settings=settings) == 0, (
            self.fork_server.output.read_text()
        )


KINDS = ("pretrain", "moe", "sft", "lora", "dpo")


def make_stage(
    kind: str,
    corpus: Path,
    tokenizer: Path,
    start: Path | None,
    folder: Path,
    fork_server: ForkServer,
) -> Stage:
    """Create the stage of a kind. start: the run whose model it fine-tunes, if it needs one."""
    text, chat, pairs = ([str(corpus / f"{name}.jsonl")] for name in ("text", "chat", "pairs"))
    new = {"data__sources": text, "tokenizer": str(tokenizer)}
    old = {"model__init": str(start and start / "model")}
    match kind:
        case "pretrain":
            return Stage("pretrain", folder, fork_server, **new)
        case "moe":  # a partly accumulated metrics line has several sums
            more = {"model__preset": "nano-moe", "training__log_every": 2}
            return Stage("pretrain", folder, fork_server, **new, **more)
        case "sft":  # checkpoints of odd steps have a partly accumulated line
            return Stage(
                "sft", folder, fork_server, training__log_every=2, data__sources=chat, **old
            )
        case "lora":
            return Stage("sft", folder, fork_server, **lora_settings(data__sources=chat, **old))
        case "dpo":
            return Stage("dpo", folder, fork_server, data__seq_len=64, data__sources=pairs, **old)
    raise ValueError(kind)


def kill_repeatedly(stage: Stage, run: Path, dice: random.Random, kills: int) -> int:
    """Kill a run soon after each of `kills` random steps, resume it each time, and let it finish.

    Returns the number of kills during a save.
    """
    saving = 0
    settings = stage.settings(run)
    for step in sorted(dice.sample(range(1, STEPS - 8), kills)):
        child = stage.fork_server.start("train", settings=settings, pause_at=step)
        child.wait_for("reached")
        time.sleep(dice.uniform(0, 0.05))
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, stage.fork_server.output.read_text()
        assert not (run / "model").exists() and not (run / "adapter").exists()
        saving += any((run / "checkpoints").glob(".tmp-*"))
    stage.finish(run)
    return saving
