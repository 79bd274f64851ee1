from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minimind.config import load_recipe
from minimind.errors import ConfigError, DataError, ResourceError
from minimind.model import PRESETS, ModelConfig, Transformer
from minimind.planning.plan import flops_per_token, make_plan
from minimind.tokenizer import Tokenizer
from tests.support.small_runs import nano_recipe


def test_a_plan_without_data_describes_the_model(tmp_path: Path) -> None:
    plan = make_plan(nano_recipe("pretrain", tmp_path), seconds=0)
    assert (plan.parameters, plan.data_tokens, plan.steps) == (223_392, None, None)
    assert plan.tokens_per_second is plan.seconds is None
    assert not list(tmp_path.iterdir())


def test_a_plan_does_not_depend_on_the_trial(tmp_path: Path) -> None:
    recipe = nano_recipe("pretrain", tmp_path)
    measured = make_plan(recipe, memory=2 << 30, seconds=0.01)
    assert measured.tokens_per_second
    plan = make_plan(recipe, memory=2 << 30, seconds=0)  # without weights
    assert plan == replace(measured, tokens_per_second=None, seconds=None)


def test_data_and_a_trial_give_steps_and_time(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    texts = tmp_path / "texts.txt"
    texts.write_text("长江是中国最长的河流。\n" * 500, encoding="utf-8")
    plan = make_plan(
        nano_recipe(
            "pretrain",
            tmp_path / "run",
            tokenizer=str(tmp_path / "tokenizer"),
            data__sources=[f"{texts}@2"],
            data__validation_fraction=0.0,
            training__epochs=3.0,
        ),
        seconds=0.2,
    )
    num_tokens = len(tokenizer.encode("长江是中国最长的河流。\n"))
    assert plan.data_tokens == pytest.approx(2 * 500 * num_tokens, rel=0.05)
    assert plan.steps == -(-3 * plan.data_tokens // (32 * 4))
    assert plan.tokens == plan.steps * 32 * 4
    assert plan.tokens_per_second and plan.seconds
    assert plan.seconds == pytest.approx(plan.tokens / plan.tokens_per_second)
    assert not (tmp_path / "run").exists()


def test_memory_determines_the_micro_batch_size(tmp_path: Path) -> None:
    recipe = nano_recipe(
        "pretrain", tmp_path, training__global_batch_size=64, training__micro_batch_size=None
    )
    unlimited = make_plan(recipe, memory=64 << 30, seconds=0)
    needed = next(
        c["bytes"]
        for c in unlimited.choices
        if c["micro_batch_size"] == 8 and not c["activation_checkpointing"]
    )
    assert unlimited.micro_batch_size == 64
    assert make_plan(recipe, memory=needed, seconds=0).micro_batch_size == 8
    assert make_plan(recipe, memory=1 << 20, seconds=0).micro_batch_size is None


def test_sequences_longer_than_the_context_are_refused_as_in_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.seq_len \(2048\) is longer .*max_position"):
        make_plan(nano_recipe("pretrain", tmp_path, data__seq_len=2048))


def test_data_without_a_valid_record_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": 5.5}\n{bad\n', encoding="utf-8")
    settings = {"tokenizer": str(tmp_path / "tokenizer"), "data__sources": [str(bad)]}
    with pytest.raises(DataError, match=r"bad.jsonl: there is nothing to train on"):
        make_plan(nano_recipe("pretrain", tmp_path / "run", **settings), seconds=0)


def test_a_plan_for_a_missing_device_needs_its_memory(tmp_path: Path) -> None:
    recipe = nano_recipe("pretrain", tmp_path, device="cuda:9")
    plan = make_plan(recipe, memory=2 << 30)
    assert (plan.device, plan.tokens_per_second) == ("cuda:9", None)
    with pytest.raises(ResourceError, match="cuda:9 is not available"):
        make_plan(recipe)
    mistyped = nano_recipe("pretrain", tmp_path, device="cuda:one")
    with pytest.raises(ResourceError, match="cuda:one"):
        make_plan(mistyped, memory=2 << 30)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("pretrain-small", "training.micro_batch_size=8"),
        ("pretrain-base", "training.activation_checkpointing=true"),
    ],
)
def test_packaged_recipes_fit_a_gpu_of_2_gb(name: str, setting: str) -> None:
    recipe = load_recipe(name, overrides=[setting], flags={"device": "cuda:9"}).recipe
    plan = make_plan(recipe, memory=2 << 30)
    assert plan.micro_batch_size
    assert sum(plan.memory.values()) <= 2 << 30


@pytest.mark.parametrize("preset", ["small", "base"])
def test_flops_match_the_counter_of_torch(preset: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shape = PRESETS[preset] | {"num_hidden_layers": 2}
    model, tokens = Transformer(ModelConfig(**shape)), torch.zeros(1, 512, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens)).sum().backward()
    # Torch does not count attention on a CPU: on average half a sequence of keys and values.
    config, seq_len = model.config, 512
    attention = 2 * config.num_hidden_layers * config.hidden_size * seq_len * 3
    counted = counter.get_total_flops() / seq_len
    assert flops_per_token(model, seq_len) == pytest.approx(counted + attention, rel=1e-3)
