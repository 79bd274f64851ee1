"""`.pth` files of MiniMind v1, v2 and v3: the imported model computes the same logits."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind.errors import MinimindError, ModelError, TokenizerError, UsageError
from minimind.export.pth_import import import_pth
from minimind.model import Transformer, load_model, read_config
from minimind.model.directory import stored_dtype
from minimind.tokenizer import Tokenizer
from tests.support.minimind_reference import Sizes, State, logits, random_state
from tests.support.rounding import largest_difference, logits_rounding

V1 = Sizes(interleaved=True)
EARLY_V2 = Sizes(interleaved=True, heads=8, kv_heads=2, head_dim=4, theta=1e6)
V2 = Sizes(heads=8, kv_heads=2, head_dim=4, theta=1e6)
V3 = Sizes(qk_norm=True, head_dim=16, theta=1e6, eps=1e-6)
EXPERTS: dict[str, Any] = {"routed": 4, "shared": 1}
# The settings that the defaults of the generation do not already give.
CASES: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "v1": (V1, {"num_attention_heads": 4}),
    "v1-moe": (Sizes(interleaved=True, **EXPERTS), {"num_attention_heads": 4}),
    "v2-early": (EARLY_V2, {}),
    "v2-early-moe": (Sizes(**(vars(EARLY_V2) | EXPERTS)), {}),
    "v2": (V2, {}),
    "v2-moe": (Sizes(**(vars(V2) | {"routed": 5, "shared": 2, "chosen": 3})),
               {"num_experts_per_tok": 3}),
    "v2-moe-without-shared": (Sizes(**(vars(V2) | {"routed": 4})), {}),
    "v3": (V3, {}),
}  # fmt: skip


def save(path: Path, state: Any, **config: Any) -> Path:
    torch.save(state, path)
    if config:
        path.with_suffix(".json").write_text(json.dumps({"model_type": "minimind"} | config))
    return path


@torch.no_grad()
def assert_same_logits(model: Transformer, state: State, sizes: Sizes) -> None:
    ids = torch.randint(sizes.vocab, (40,))
    expected = logits(state, sizes, ids)
    assert expected.std() > 0.1
    actual = model.logits(model(ids[None]))[0]
    assert largest_difference(actual, expected) <= logits_rounding(model.config, len(ids))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_reference(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    sizes, settings = CASES[name]
    state = random_state(sizes)
    report = import_pth(save(tmp_path / "x.pth", state), tmp_path / "out", tokenizer, settings)
    model = load_model(tmp_path / "out").eval()
    assert_same_logits(model, state, sizes)
    assert report.num_parameters == sum(p.numel() for p in model.parameters())
    unique = {tensor.data_ptr(): tensor.numel() for tensor in state.values()}
    assert report.num_parameters == sum(unique.values())
    assert report.generation.startswith(f"MiniMind {name[:2]}")
    assert Tokenizer.load(tmp_path / "out").sha256 == tokenizer.sha256


def test_every_assumed_setting_is_reported(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", random_state(V1), n_heads=4, norm_eps=1e-6, dropout=0.1)
    report = import_pth(path, tmp_path / "out", tokenizer, {"rope_theta": 5e4})
    assert report.settings == [
        ("num_attention_heads", 4, str(path.with_suffix(".json"))),
        ("max_position_embeddings", 512, "default of MiniMind v1"),
        ("rope_theta", 5e4, "given"),
        ("rms_norm_eps", 1e-6, str(path.with_suffix(".json"))),
    ]
    config = read_config(tmp_path / "out")
    assert (config.rope_theta, config.rms_norm_eps, config.head_dim) == (5e4, 1e-6, 8)


def test_a_checkpoint_of_the_trainer_with_buffers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The state dict under "model", prefixes of torch.compile, tables, and half precision."""
    state = random_state(V2)
    content = {f"_orig_mod.{name}": tensor.half() for name, tensor in state.items()}
    content["_orig_mod.model.freqs_cos"] = torch.zeros(4)
    path = save(tmp_path / "x.pth", {"model": content, "optimizer": {"lr": 0.1}, "epoch": 3})
    import_pth(path, tmp_path / "out", tokenizer)
    assert stored_dtype(tmp_path / "out") == "float16"
    rounded = {name: tensor.half().float() for name, tensor in state.items()}
    assert_same_logits(load_model(tmp_path / "out").eval(), rounded, V2)


def test_an_untied_head_of_v3(tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = random_state(V3)
    state["lm_head.weight"] = torch.randn_like(state["lm_head.weight"])
    import_pth(save(tmp_path / "x.pth", state), tmp_path / "out", tokenizer)
    assert_same_logits(load_model(tmp_path / "out").eval(), state, V3)
    assert not read_config(tmp_path / "out").tie_word_embeddings


class RunsCode:
    """An object whose unpickling creates the file `proof`."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_code_in_a_file_is_never_run(as_zip: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path, proof = tmp_path / "x.pth", tmp_path / "proof"
    content = random_state(V2) | {"hostile": RunsCode(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ModelError, match=r"more than tensors: \w+\.mkdir, .*Nothing was run"):
        import_pth(path, tmp_path / "out", tokenizer)
    assert not proof.exists() and not (tmp_path / "out").exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # the file is what this test takes it for


def refused(state: Any, tokenizer: Tokenizer, folder: Path, error: type[MinimindError],
            config: dict[str, Any] | None = None, **settings: Any) -> str:  # fmt: skip
    with pytest.raises(error) as caught:
        import_pth(
            save(folder / "x.pth", state, **config or {}), folder / "out", tokenizer, settings
        )
    assert not (folder / "out").exists()
    return str(caught.value)


def test_what_cannot_be_represented_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def message(state: Any, **more: Any) -> str:
        return refused(state, tokenizer, tmp_path, ModelError, **more)

    experts_of_v3 = random_state(Sizes(**(vars(V3) | {"routed": 4})))
    assert "self_attn.q_norm, self_attn.k_norm" in message(experts_of_v3)
    one_expert = random_state(Sizes(**(vars(V2) | EXPERTS | {"chosen": 1})))
    assert "multiplies the output" in message(one_expert, num_experts_per_tok=1)
    state = random_state(V2)
    extra = {"vision_proj.weight": torch.ones(2), "model.layers.1.mlp.bias": torch.ones(2)}
    found = message(state | extra)
    assert "has tensors that no supported class has: model.layers.1.mlp.bias, vision_proj" in found
    missing = {name: tensor for name, tensor in state.items() if "layers.1.mlp.up" not in name}
    assert "lacks model.layers.1.mlp.up_proj.weight" in message(missing)
    untied = state | {"lm_head.weight": torch.ones_like(state["lm_head.weight"])}
    assert "but MiniMind v2 ties them" in message(untied)
    wrong = state | {"model.layers.0.self_attn.o_proj.weight": torch.ones(8, 8)}
    assert "o_proj.weight has the shape [8, 8]; the other tensors" in message(wrong)
    assert "5 does not divide its 32 query" in message(state, num_attention_heads=5)
    config = {"inference_rope_scaling": True}
    assert "inference_rope_scaling = True cannot be" in message(state, config=config)
    config = {"num_hidden_layers": 3}
    assert "num_hidden_layers is 3, but the tensors have 2" in message(state, config=config)


def test_other_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def message(state: Any, error: type[MinimindError] = ModelError, **settings: Any) -> str:
        return refused(state, tokenizer, tmp_path, error, **settings)

    state = random_state(V2)
    lora = {"model.layers.0.self_attn.q_proj.lora.A.weight": torch.ones(2, 2)}
    assert "LoRA matrices without their model" in message(lora)
    assert "its tensors are not MiniMind's (transformer.wte" in message(
        {"transformer.wte.weight": torch.ones(2, 2)}
    )
    assert "it holds no state dict, but list" in message([torch.ones(2)])
    assert "'epoch' is not a named tensor" in message(state | {"epoch": 3})
    integers = state | {"model.norm.weight": torch.ones(32, dtype=torch.int64)}
    assert "model.norm.weight has the dtype torch.int64" in message(integers)
    assert "no setting 'heads'; known are num_attention" in message(state, UsageError, heads=4)
    larger = random_state(Sizes(**(vars(V2) | {"vocab": 700})))
    assert "600 tokens, but its model has 700" in message(larger, TokenizerError)
    assert "rope_theta: Input should be greater than 0" in message(state, rope_theta=-1.0)


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut", pickle.dumps([1])[:5]])
def test_damaged_files(content: bytes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(
        ModelError, match=r"x\.pth: (cannot be read as a file of|it holds no state dict)"
    ):
        import_pth(tmp_path / "x.pth", tmp_path / "out", tokenizer)
    with pytest.raises(ModelError, match=r"none\.pth: cannot be read: No such file"):
        import_pth(tmp_path / "none.pth", tmp_path / "out", tokenizer)
