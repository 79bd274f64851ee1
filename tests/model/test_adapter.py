"""Adapter files compared with peft."""

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minimind.config.settings import LoRASettings
from minimind.errors import MinimindError, ModelError
from minimind.model import (
    Transformer,
    apply_lora,
    load_model,
    merge_adapter,
    resolve_adapter_directory,
    resolve_model_directory,
    save_adapter,
)
from minimind.model.lora import LoRALinear
from tests.support.rounding import (
    gradient_rounding,
    largest_difference,
    logits_rounding,
    relative_difference,
    rounding,
)

# peft calls a deprecated function of transformers. Other warnings remain errors: peft reports
# missing tensors by a warning.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"qk_norm": True},
    {"tie_word_embeddings": False},
    {"preset": "nano-moe"},
]
RANK = 4
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def adapted(directory: Path, **settings: Any) -> tuple[Transformer, LoRASettings]:
    """Load a model and add adapters with nonzero B."""
    torch.manual_seed(3)
    lora = LoRASettings(**{"rank": RANK, "alpha": 10.0} | settings)
    model = apply_lora(load_model(directory), lora).eval()
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.05)
    return model, lora


def peft_model(directory: Path, adapter: Path, **options: Any) -> Any:
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if base.config.model_type == "granitemoeshared":
        base.set_experts_implementation("eager")  # sums in the same order as ours
    return PeftModel.from_pretrained(base, adapter, **options)


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens))


def adapted_rounding(model: Transformer, tokens: Tensor) -> float:
    """Return a bound on the relative difference of logits; adapters add two sums per matrix."""
    sums = [RANK, model.config.hidden_size] * 7 * model.config.num_hidden_layers
    return logits_rounding(model.config, tokens.shape[1]) + rounding(*sums)


@pytest.mark.numeric
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", [["all"], ["attention"], ["mlp", "q_proj"]])
def test_peft_loads_our_adapters_and_computes_the_same(
    base: Callable[..., Path],
    tokens: Tensor,
    tmp_path: Path,
    layout: dict[str, Any],
    targets: list[str],
) -> None:
    directory = base(**layout)
    model, settings = adapted(directory, targets=targets)
    save_adapter(tmp_path / "adapter", model, settings, directory)
    theirs = peft_model(directory, tmp_path / "adapter", is_trainable=True).eval()
    expected = theirs(tokens).logits
    actual = logits(model, tokens)
    plain = logits(load_model(directory), tokens)
    assert largest_difference(actual, plain) > 1e-2, "the adapters have an effect"
    assert largest_difference(actual, expected) <= adapted_rounding(model, tokens)
    actual.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == len(trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None
        peft_grad = gradients[f"base_model.model.{name}.default.weight"]
        assert peft_grad is not None
        bound = gradient_rounding(model.config, tokens.shape[1], tokens.numel())
        assert relative_difference(parameter.grad, peft_grad) <= bound, name


@pytest.mark.numeric
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merging_equals_peft_and_the_trained_model(
    base: Callable[..., Path], tokens: Tensor, tmp_path: Path, layout: dict[str, Any]
) -> None:
    directory = base(**layout)
    model, settings = adapted(directory)
    save_adapter(tmp_path / "adapter", model, settings, directory)
    merged = load_model(directory)
    merge_adapter(merged, tmp_path / "adapter")
    expected = peft_model(directory, tmp_path / "adapter").merge_and_unload().state_dict()
    plain = load_model(directory).state_dict()
    adapted_names = {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    for name, tensor in merged.state_dict().items():
        if name.removesuffix(".weight") in adapted_names:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert tensor.equal(plain[name])
    with torch.no_grad():
        actual, expected = logits(merged, tokens), logits(model, tokens)
        assert largest_difference(actual, expected) <= adapted_rounding(model, tokens)


@pytest.mark.numeric
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r"model\.layers\.[01]\.(self_attn|mlp)\..*_proj"},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"up_proj": 7, r".*\.0\.self_attn\.q_proj": 1},
        },
        {"target_modules": ["o_proj"], "lora_dropout": 0.5, "init_lora_weights": "gaussian"},
    ],
)
def test_adapters_of_peft_are_merged_as_peft_merges_them(
    base: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    directory = base()
    config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12} | options)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config)
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    theirs.save_pretrained(tmp_path / "adapter")
    before, merged = load_model(directory), load_model(directory)
    merge_adapter(merged, tmp_path / "adapter")
    expected = theirs.merge_and_unload().state_dict()
    changed = [n for n, t in merged.state_dict().items() if not t.equal(before.state_dict()[n])]
    assert len(changed) == sum(
        name.endswith("lora_A.weight") for name in load_file(weights(tmp_path))
    )
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def weights(folder: Path) -> Path:
    return folder / "adapter" / "adapter_model.safetensors"


@pytest.fixture
def adapter(base: Callable[..., Path], tmp_path: Path) -> Path:
    """Directory of a saved adapter; its base model is in the sibling directory `base`."""
    directory = base()
    model, settings = adapted(directory)
    save_adapter(tmp_path / "adapter", model, settings, directory)
    return tmp_path / "adapter"


def change_adapter(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps(config), encoding="utf-8")


def refused(adapter: Path) -> str:
    with pytest.raises(ModelError) as caught:
        merge_adapter(load_model(adapter.parent / "base"), adapter)
    return str(caught.value)


@pytest.mark.numeric
def test_an_adapter_has_the_files_of_peft(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(adapter.parent / "base")
    assert set(config["target_modules"]) == ATTENTION | MLP
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 10.0, "LORA")
    assert {file.name for file in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not list(adapter.parent.glob(".*")), "temporary directories are removed"


@pytest.mark.numeric
def test_saving_replaces_only_adapters(adapter: Path, tmp_path: Path) -> None:
    model, settings = adapted(tmp_path / "base")
    before = (adapter / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    save_adapter(adapter, model, settings, tmp_path / "base")
    assert (adapter / "adapter_model.safetensors").read_bytes() != before
    with pytest.raises(ModelError, match="already exists and is not a LoRA adapter"):
        save_adapter(tmp_path / "base", model, settings, tmp_path / "base")
    assert resolve_model_directory(tmp_path / "base").is_dir()


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; only LORA is"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_to_transform": 0}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"from_the_future": {"x": 1}}, "from_the_future"),
        ({"r": 0}, "r is missing"),
        ({"r": 8}, "has the shape"),
        ({"r": "4"}, "r is missing or has an invalid value"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": ["nowhere"]}, "none of the modules"),
        ({"target_modules": ["q_proj"]}, "has tensors that the model lacks"),
        ({"target_modules": "(a+)+b"}, "is invalid or too complex"),
        ({"target_modules": "(.*.*.*)*x"}, "is invalid or too complex"),
        ({"target_modules": "(q_proj"}, "is invalid or too complex"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"alpha_pattern": {"[": 1}}, "is invalid"),
    ],
)
def test_unsupported_or_invalid_configurations_are_refused(
    adapter: Path, changes: dict[str, Any], message: str
) -> None:
    change_adapter(adapter, **changes)
    assert message in refused(adapter)


@pytest.mark.numeric
def test_tensors_that_do_not_match_are_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert name in tensors
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    assert f"lacks {name}" in refused(adapter)
    save_file(tensors | {"base_model.model.strange.lora_A.weight": tensors[name].clone()}, path)
    assert "has tensors that the model lacks: base_model.model.strange" in refused(adapter)
    for table in ("model.embed_tokens.lora_embedding_A", "lm_head.lora_A.weight"):
        save_file(tensors | {f"base_model.model.{table}": tensors[name].clone()}, path)
        assert f"changes {table.split('.')[-3 + ('embed' in table)]}, which is not" in refused(
            adapter
        )
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, path)
    assert "has the shape" in refused(adapter)
    save_file(tensors | {name: tensors[name].to(torch.int32)}, path)
    assert "has the dtype I32" in refused(adapter)
    path.unlink()
    assert "there is no adapter_model.safetensors" in refused(adapter)


@pytest.mark.numeric
def test_adapter_and_model_directories_are_distinguished(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ModelError, match="is not a LoRA adapter"):
        resolve_adapter_directory(run)
    with pytest.raises(ModelError, match="there is no such directory"):
        resolve_adapter_directory(tmp_path / "nowhere")
    adapter.rename(run / "adapter")
    assert resolve_adapter_directory(run) == resolve_adapter_directory(run / "adapter")
    for path in (run, run / "adapter"):
        with pytest.raises(ModelError, match=r"holds a LoRA adapter.*minimind merge MODEL"):
            resolve_model_directory(path)


def test_damaged_adapters_raise_our_errors_or_merge(adapter: Path) -> None:
    """Several hundred mutated files raise no exceptions other than ours."""
    model = load_model(adapter.parent / "base")
    paths = [adapter / "adapter_config.json", adapter / "adapter_model.safetensors"]
    valid = [path.read_bytes() for path in paths]
    config = json.loads(valid[0])
    values = [-1, 0, 10**30, 1.5, float("nan"), "x", "", [], {}, [[]], True, {"(": 1}, ["", 3]]
    keys = [*config, "use_rslora", "rank_pattern", "alpha_pattern"]
    mutants = [(0, json.dumps(config | {key: value}).encode()) for key in keys for value in values]
    rng = random.Random(0)
    header = 8 + struct.unpack("<Q", valid[1][:8])[0]
    for index, end in ((0, len(valid[0])), (1, header)):
        for offset in [*range(8), *(rng.randrange(end) for _ in range(120))]:
            damaged = bytearray(valid[index])
            damaged[offset] ^= 1 << rng.randrange(8)
            mutants.append((index, bytes(damaged)))
        mutants += [(index, valid[index][: len(valid[index]) * n // 8]) for n in range(8)]
    mutants += [(0, b"[" * 100_000), (0, b"[]"), (1, bytes(1000))]
    refusals = 0
    for index, content in mutants:
        paths[index].write_bytes(content)
        try:
            merge_adapter(copy.deepcopy(model), adapter)
        except MinimindError:
            refusals += 1
        paths[index].write_bytes(valid[index])
    assert refusals > len(mutants) / 2
    merge_adapter(model, adapter)
