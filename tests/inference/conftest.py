"""A tiny random model, its directory, and engines that run it."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minimind.inference.engine import Engine
from minimind.model import PRESETS, ModelConfig, Transformer, save_model
from minimind.tokenizer import Tokenizer

_TEXTS = ["长江", "泰山在哪里？", "The river", "黄河", "海水为什么是咸的？", "你好", "a", "b"]


@pytest.fixture(scope="package")
def model(tokenizer: Tokenizer) -> Transformer:
    """A model whose greedy tokens vary."""
    torch.manual_seed(1)
    model = Transformer(ModelConfig(**PRESETS["nano"] | {"vocab_size": tokenizer.vocab_size}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(60)
            elif parameter.ndim == 2:
                parameter.mul_(5 if name.endswith("embed_tokens.weight") else 6)
    return model.eval()


@pytest.fixture(scope="package")
def model_dir(
    model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same model as a directory, which tests must not change."""
    directory = tmp_path_factory.mktemp("run") / "model"
    save_model(directory, model, tokenizer)
    return directory


@pytest.fixture(scope="module")
def engine(model: Transformer, tokenizer: Tokenizer) -> Iterator[Engine]:
    with Engine(model, tokenizer, slots=9) as engine:
        yield engine


@pytest.fixture(scope="module")
def sequential_engine(model: Transformer, tokenizer: Tokenizer) -> Iterator[Engine]:
    """An engine that runs one request at a time."""
    with Engine(model, tokenizer, slots=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """100 prompts of various lengths."""
    rng = random.Random(0)
    return [
        tokenizer.encode("".join(rng.choices(_TEXTS, k=rng.randrange(1, 30)))) for _ in range(100)
    ]
