"""`.pth` files in the code of the public MiniMind itself.

Needs a git clone of https://github.com/jingyaogong/minimind with its history:

    MINIMIND_CLONE=path pytest -m slow tests/export/test_against_minimind.py
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.export.pth_export import export_pth
from minimind.export.pth_import import import_pth
from minimind.model import load_model
from minimind.tokenizer import Tokenizer
from tests.export.test_pth_export import KINDS, make_model
from tests.support.rounding import largest_difference, logits_rounding

CLONE = os.environ.get("MINIMIND_CLONE")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not CLONE, reason="MINIMIND_CLONE is not set"),
]
# Commit, module, configuration class and model class of each generation.
GENERATIONS = {
    "v1": ("minimind-v1", "model", "LMConfig", "Transformer"),
    "v2-early": ("5b65bc7", "model", "LMConfig", "MiniMindLM"),
    "v2": ("9d89857", "model_minimind", "MiniMindConfig", "MiniMindForCausalLM"),
    "v3": ("d65ef2c", "model_minimind", "MiniMindConfig", "MiniMindForCausalLM"),
}
OLD = {"dim": 64, "n_layers": 2, "vocab_size": 600, "max_seq_len": 64}
NEW = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 600, "max_position_embeddings": 64}
SIZES: dict[str, dict[str, Any]] = {"v1": OLD, "v2-early": OLD, "v2": NEW, "v3": NEW}


@pytest.fixture
def their_classes(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Any]:
    """(configuration class, model class) of a generation, from the files of its commit."""
    commit, module, config, model = GENERATIONS[request.param]
    package = tmp_path / "their_model"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in {module, config} - {"MiniMindConfig"}:
        shown = subprocess.run(
            ["git", "-C", str(CLONE), "show", f"{commit}:model/{name}.py"],
            capture_output=True,
            check=True,
        )
        (package / f"{name}.py").write_bytes(shown.stdout)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in [name for name in sys.modules if name.startswith("their_model")]:
        monkeypatch.delitem(sys.modules, name)
    loaded = importlib.import_module(f"their_model.{module}")
    return getattr(loaded, config), getattr(loaded, model)


@torch.no_grad()
def their_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocab]; v1 computes all of them only when it has targets too."""
    is_v1 = type(model).__name__ == "Transformer"
    out = model(ids[None], targets=ids[None]) if is_v1 else model(ids[None])
    return out.logits[0]


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("their_classes", ["v1", "v2-early", "v2", "v3"], indirect=True)
@torch.no_grad()
def test_their_weights_here(
    their_classes: tuple[Any, Any],
    use_moe: bool,
    request: pytest.FixtureRequest,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    generation = request.node.callspec.params["their_classes"]
    if generation == "v3" and use_moe:
        pytest.skip("QK-norm with experts cannot be represented")
    make_config, make_model = their_classes
    theirs = make_model(make_config(use_moe=use_moe, **SIZES[generation])).eval()
    for parameter in theirs.parameters():
        parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.rand_like(parameter))
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    import_pth(tmp_path / "x.pth", tmp_path / "out", tokenizer)  # all settings are defaults
    ours = load_model(tmp_path / "out").eval()
    ids = torch.randint(600, (40,))
    expected, actual = their_logits(theirs, ids), ours.logits(ours(ids[None]))[0]
    assert largest_difference(actual, expected) <= logits_rounding(ours.config, len(ids))


@pytest.mark.parametrize(
    ("kind", "their_classes"),
    [(kind, "v3" if kind.startswith("qk") else "v2") for kind in KINDS],
    indirect=["their_classes"],
)
@torch.no_grad()
def test_our_weights_there(
    kind: str, their_classes: tuple[Any, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    ours = make_model(tmp_path / "model", tokenizer, **KINDS[kind])
    config = export_pth(tmp_path / "model", tmp_path / "x.pth")
    make_config, their_model = their_classes
    theirs = their_model(make_config(**config)).eval()
    theirs.load_state_dict(torch.load(tmp_path / "x.pth", weights_only=True), strict=True)
    ids = torch.randint(600, (40,))
    expected, actual = their_logits(theirs, ids), ours.logits(ours(ids[None]))[0]
    assert largest_difference(actual, expected) <= logits_rounding(ours.config, len(ids))
