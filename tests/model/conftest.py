"""Random models whose greedy continuations are diverse and free of near-ties."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minimind.model import PRESETS, ModelConfig, Transformer, save_model
from minimind.tokenizer import Tokenizer

PROMPTS = [
    "长江是中国最长的河流，全长约六千三百公里。",
    "泰山在山东省，是五岳之首。很多人在夜里上山。",
    "海水为什么是咸的？因为河流把盐带到海里。",
    "问：世界上最高的山峰是什么？答：珠穆朗玛峰。",
    "大熊猫的主要食物是竹子，一天要吃很多竹子。",
    "你好，你叫什么名字？我是一个小小的语言模型。",
    "一年有四个季节：春天、夏天、秋天和冬天。",
    "The Yangtze is the longest river in China.",
    "Why is the sea salty? Rivers carry salt into it.",
    "What's the capital of France? It's Paris, on the Seine.",
    "def double(number):\n    return number * 2\n",
    "A giant panda sleeps, and eats bamboo again.",
    "I'm a small language model; we're going to talk.",
    "Once upon a time there was a mountain by the sea.",
    "Python 是一种编程语言，用 print('你好') 打印一行字。",
    "1949年10月1日，中华人民共和国成立。It was a Saturday.",
    "长江的英文是 the Yangtze River，黄河是 the Yellow River。",
    "圆周率 π ≈ 3.14159，e ≈ 2.71828，1 + 1 = 2。",
    "🐼 熊猫 loves 竹子！\n\n第二行：bamboo, 竹笋。",
    "Mount Tai（泰山）在 Shandong 省，高 1,545 米。",
]


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Chinese, English and mixed prompts of at least 12 tokens each."""
    return PROMPTS


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Transformer]:
    """Return a function that makes a random model of a preset, with changed settings."""

    def make(preset: str, *, seed: int = 0, **changes: int | float) -> Transformer:
        torch.manual_seed(seed)
        shape = PRESETS[preset] | {"vocab_size": 600, "max_position_embeddings": 512} | changes
        model = Transformer(ModelConfig(**shape)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith(("o_proj.weight", "down_proj.weight", "output_linear.weight")):
                    parameter.mul_(60)  # so that the layers outweigh the residual stream
                elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                    parameter.mul_(5 if preset.startswith("nano") else 1)
                else:
                    parameter.mul_(6)
        return model

    return make


@pytest.fixture
def model(random_model: Callable[..., Transformer]) -> Transformer:
    """A random model of the preset nano."""
    return random_model("nano")


@pytest.fixture
def saved(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Directory of the saved `model`, inside a run directory."""
    save_model(tmp_path / "run" / "model", model, tokenizer)
    return tmp_path / "run" / "model"


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 600, (3, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def base(
    random_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path
) -> Callable[..., Path]:
    """Return a function that saves a random model of a layout."""

    def save(preset: str = "nano", **layout: bool) -> Path:
        save_model(tmp_path / "base", random_model(preset, **layout), tokenizer)
        return tmp_path / "base"

    return save
