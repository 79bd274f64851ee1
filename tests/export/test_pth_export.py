"""`.pth` files for MiniMind: what they hold, and what comes back when they are imported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.errors import ModelError, ResourceError, UsageError
from minimind.export.pth_export import export_pth
from minimind.export.pth_import import import_pth
from minimind.model import ModelConfig, Transformer, extend_context, save_model
from minimind.tokenizer import Tokenizer
from tests.support.minimind_reference import Sizes, logits
from tests.support.rounding import largest_difference, logits_rounding

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "rope_theta": 3e4,
    "rms_norm_eps": 1e-6,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "qk-norm": {"qk_norm": True, "head_dim": 16},
    "qk-norm-untied": {"qk_norm": True, "tie_word_embeddings": False},
    "experts": EXPERTS,
    "experts-without-shared": EXPERTS | {"shared_intermediate_size": 0},
}


def make_model(directory: Path, tokenizer: Tokenizer, dtype: str = "float32",
               **changes: Any) -> Transformer:  # fmt: skip
    config = ModelConfig(**SHAPE | {"vocab_size": tokenizer.vocab_size} | changes)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.rand_like(parameter))
    save_model(directory, model, tokenizer, dtype=dtype)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_gives_the_same_bytes(
    kind: str, dtype: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make_model(tmp_path / "model", tokenizer, dtype, **KINDS[kind])
    export_pth(tmp_path / "model", tmp_path / "new" / "x.pth")
    import_pth(tmp_path / "new" / "x.pth", tmp_path / "again", tokenizer)
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    after = {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}
    assert before == after


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_minimind_computes_the_same(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tokenizer, **KINDS[kind])
    content = export_pth(tmp_path / "model", tmp_path / "x.pth")
    assert json.loads((tmp_path / "x.json").read_text()) == content
    assert content["model_type"] == "minimind" and content["max_position_embeddings"] == 96
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    sizes = Sizes(
        vocab=content["vocab_size"],
        hidden=content["hidden_size"],
        inner=content["intermediate_size"],
        heads=content["num_attention_heads"],
        kv_heads=content["num_key_value_heads"],
        head_dim=content.get("head_dim", 8),
        theta=content["rope_theta"],
        eps=content["rms_norm_eps"],
        routed=content.get("n_routed_experts", 0),
        shared=content.get("n_shared_experts", 0),
        chosen=content.get("num_experts_per_tok", 0),
        qk_norm=kind.startswith("qk"),
    )
    ids = torch.randint(tokenizer.vocab_size, (40,))
    actual = model.logits(model(ids[None]))[0]
    expected = logits(state, sizes, ids)
    assert largest_difference(actual, expected) <= logits_rounding(model.config, len(ids))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 16}, r"head_dim \(16\) is not hidden_size / num_attention_heads"),
        ({"tie_word_embeddings": False}, "its output head is not tied"),
        (EXPERTS | {"logits_scaling": 2.0}, "logits_scaling = 2.0"),
        (EXPERTS | {"attention_multiplier": 0.1}, "attention_multiplier = 0.1"),
        (EXPERTS | {"num_experts_per_tok": 1}, "one expert per token"),
        (EXPERTS | {"shared_intermediate_size": 40}, r"\(40\) is not a multiple of"),
    ],
)
def test_what_minimind_lacks_is_refused(
    changes: dict[str, Any], reason: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make_model(tmp_path / "model", tokenizer, **changes)
    with pytest.raises(ModelError, match=reason):
        export_pth(tmp_path / "model", tmp_path / "x.pth")
    assert not list(tmp_path.glob("x.*"))


def test_an_extended_context_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = ModelConfig(**SHAPE | {"vocab_size": tokenizer.vocab_size})
    save_model(tmp_path / "model", Transformer(extend_context(config, 200)), tokenizer)
    with pytest.raises(ModelError, match="its context is extended by yarn scaling"):
        export_pth(tmp_path / "model", tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["x.pth", "x.json"])
def test_existing_files_stay(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    make_model(tmp_path / "model", tokenizer)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=rf"{name} already exists; delete it or choose another"):
        export_pth(tmp_path / "model", tmp_path / "x.pth")
    assert [path.name for path in tmp_path.glob("x.*")] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["x.json", "x.JSON"])
def test_the_weights_do_not_have_the_name_of_their_configuration(
    name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    make_model(tmp_path / "model", tokenizer)
    message = rf"{name} is the name of the configuration beside the weights; give .*x\.pth$"
    with pytest.raises(UsageError, match=message):
        export_pth(tmp_path / "model", tmp_path / name)
    assert not list(tmp_path.glob("x.*"))


def test_a_folder_is_no_name_for_weights(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model", tokenizer)
    monkeypatch.chdir(tmp_path)
    for name in (".", "model"):
        with pytest.raises(UsageError, match=rf"^{name} is a directory; give a file name, such as"):
            export_pth(tmp_path / "model", Path(name))


def test_a_file_that_cannot_be_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    make_model(tmp_path / "model", tokenizer)
    (tmp_path / "file").write_text("")
    message = "x.pth: cannot be written: .*file is a file, not a folder; choose another --out"
    with pytest.raises(ResourceError, match=message):
        export_pth(tmp_path / "model", tmp_path / "file" / "x.pth")
