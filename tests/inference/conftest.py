"""A tiny random model, and its directory."""

from pathlib import Path

import pytest
import torch

from minimind.model import PRESETS, ModelConfig, Transformer, save_model
from minimind.tokenizer import Tokenizer


@pytest.fixture(scope="package")
def model(tokenizer: Tokenizer) -> Transformer:
    """Its greedy choices are varied."""
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
    """The same model as a directory; not to be written to."""
    directory = tmp_path_factory.mktemp("run") / "model"
    save_model(directory, model, tokenizer)
    return directory
