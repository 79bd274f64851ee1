"""Row 14 of the reliability promises: LoRA against peft, and the files of both."""

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
from minimind.errors import ConfigError, MinimindError, ModelError
from minimind.model import (
    Transformer,
    apply_lora,
    load_model,
    merge_adapter,
    resolve_adapter_directory,
    resolve_model_directory,
    save_adapter,
    save_model,
)
from minimind.model.lora import LoRALinear
from minimind.tokenizer import Tokenizer
from tests.support.rounding import (
    gradient_rounding,
    largest_difference,
    logits_rounding,
    relative_difference,
    rounding,
)

# peft asks transformers in the old way. All other warnings stay errors: by one, peft tells of
# tensors that are missing.
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


@pytest.fixture
def base(
    random_model: Callable[..., Transformer], tokenizer: Tokenizer, tmp_path: Path
) -> Callable[..., Path]:
    """Saves a random model of a layout."""

    def save(preset: str = "nano", **layout: bool) -> Path:
        save_model(tmp_path / "base", random_model(preset, **layout), tokenizer)
        return tmp_path / "base"

    return save


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 600, (3, 40), generator=torch.Generator().manual_seed(5))


def adapted(directory: Path, **settings: Any) -> tuple[Transformer, LoRASettings]:
    """A model with adapters that do something."""
    torch.manual_seed(3)
    chosen = LoRASettings(**{"rank": RANK, "alpha": 10.0} | settings)
    model = apply_lora(load_model(directory), chosen).eval()
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.05)
    return model, chosen


def peft_model(directory: Path, adapter: Path, **options: Any) -> Any:
    base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if base.config.model_type == "granitemoeshared":
        base.set_experts_implementation("eager")  # in our order of sums
    return PeftModel.from_pretrained(base, adapter, **options)


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens))


def test_it_starts_from_the_same_matrices_on_every_device(
    random_model: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator of another device would give other numbers; only the CPU's is used."""
    drawn: list[str] = []
    real = torch.nn.init.kaiming_uniform_

    def draw(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if len(tensor) == 3:  # the rank, and no width of the model
            drawn.append(tensor.device.type)
        return real(tensor, *arguments, **options)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", draw)
    model = random_model("nano").to("meta")
    apply_lora(model, LoRASettings(rank=3, targets=["q_proj"]))
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert drawn == ["cpu"] * len(adapted) != []
    assert {module.lora_A.device.type for module in adapted} == {"meta"}


def adapted_rounding(model: Transformer, tokens: Tensor) -> float:
    """Bound on the relative difference of logits: each matrix has two more sums, by its adapter."""
    sums = [RANK, model.config.hidden_size] * 7 * model.config.num_hidden_layers
    return logits_rounding(model.config, tokens.shape[1]) + rounding(*sums)


@pytest.mark.numeric
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", [["all"], ["attention"], ["mlp", "q_proj"]])
def test_peft_loads_ours_and_computes_the_same(
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
    found = logits(model, tokens)
    plain = logits(load_model(directory), tokens)
    assert largest_difference(found, plain) > 1e-2, "they do something"
    assert largest_difference(found, expected) <= adapted_rounding(model, tokens)
    found.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == len(trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None
        of_peft = gradients[f"base_model.model.{name}.default.weight"]
        assert of_peft is not None
        close = gradient_rounding(model.config, tokens.shape[1], tokens.numel())
        assert relative_difference(parameter.grad, of_peft) <= close, name


@pytest.mark.numeric
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_is_what_peft_merges_and_what_was_trained(
    base: Callable[..., Path], tokens: Tensor, tmp_path: Path, layout: dict[str, Any]
) -> None:
    directory = base(**layout)
    model, settings = adapted(directory)
    save_adapter(tmp_path / "adapter", model, settings, directory)
    merged = load_model(directory)
    merge_adapter(merged, tmp_path / "adapter")
    expected = peft_model(directory, tmp_path / "adapter").merge_and_unload().state_dict()
    plain = load_model(directory).state_dict()
    adapted_ones = {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    for name, tensor in merged.state_dict().items():
        if name.removesuffix(".weight") in adapted_ones:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert tensor.equal(plain[name])
    with torch.no_grad():
        found, wanted = logits(merged, tokens), logits(model, tokens)
        assert largest_difference(found, wanted) <= adapted_rounding(model, tokens)


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
def test_adapters_made_by_peft_are_merged_as_peft_does(
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


@pytest.mark.numeric
def test_it_begins_as_the_model_that_it_is_put_into(
    base: Callable[..., Path], tokens: Tensor
) -> None:
    directory = base()
    plain, model = load_model(directory), apply_lora(load_model(directory), LoRASettings(rank=64))
    assert logits(model, tokens).equal(logits(plain, tokens))
    adapters = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for module in adapters:
        bound = module.in_features**-0.5  # Kaiming, as peft's own
        assert float(module.lora_A.detach().abs().max()) == pytest.approx(bound, rel=0.05)
        assert float(module.lora_A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert len(trained) == 2 * len(adapters)


@pytest.mark.numeric
def test_dropout_is_on_the_input_of_the_adapter_and_off_in_eval() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 8, bias=False)
    module = LoRALinear(plain, 4, 8.0, 0.5)
    torch.nn.init.normal_(module.lora_B)
    x = torch.randn(5, 64)
    through = (x @ module.lora_A.T) @ module.lora_B.T * 2
    torch.testing.assert_close(module.eval()(x), plain(x) + through)
    torch.manual_seed(7)
    found = module.train()(x)
    torch.manual_seed(7)
    kept = torch.nn.functional.dropout(x, 0.5)
    assert 0 < int((kept == 0).sum()) < kept.numel()
    expected = plain(x) + (kept @ module.lora_A.T) @ module.lora_B.T * 2
    torch.testing.assert_close(found, expected)


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all"], ATTENTION | MLP),
        (["attention"], ATTENTION),
        (["mlp"], MLP),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["attention", "up_proj", "q_proj"], ATTENTION | {"up_proj"}),
    ],
)
def test_targets_are_names_or_groups(
    random_model: Callable[..., Transformer], targets: list[str], expected: set[str]
) -> None:
    model = apply_lora(random_model("nano"), LoRASettings(targets=targets))
    found = [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert {name.rpartition(".")[2] for name in found} == expected
    assert len(found) == len(expected) * model.config.num_hidden_layers


@pytest.mark.numeric
def test_of_a_mixture_the_shared_experts_are_adapted(
    random_model: Callable[..., Transformer],
) -> None:
    model = apply_lora(random_model("nano-moe"), LoRASettings(targets=["mlp"]))
    found = {name for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    layers = range(model.config.num_hidden_layers)
    assert found == {
        f"model.layers.{i}.shared_mlp.{name}_linear" for i in layers for name in ("input", "output")
    }


@pytest.mark.numeric
def test_an_unknown_target_is_told_with_the_nearest(
    random_model: Callable[..., Transformer],
) -> None:
    with pytest.raises(ConfigError, match="no 'q_porj'; did you mean q_proj") as caught:
        apply_lora(random_model("nano"), LoRASettings(targets=["q_porj"]))
    assert "attention, mlp, all" in str(caught.value)
    with pytest.raises(ConfigError, match="no 'lm_head'"):
        apply_lora(random_model("nano"), LoRASettings(targets=["lm_head"]))


# Files.


@pytest.fixture
def adapter(base: Callable[..., Path], tmp_path: Path) -> Path:
    """An adapter of ours beside its base model."""
    directory = base()
    model, settings = adapted(directory)
    save_adapter(tmp_path / "adapter", model, settings, directory)
    return tmp_path / "adapter"


def change(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps(config), encoding="utf-8")


def refused(adapter: Path) -> str:
    with pytest.raises(ModelError) as caught:
        merge_adapter(load_model(adapter.parent / "base"), adapter)
    return str(caught.value)


@pytest.mark.numeric
def test_an_adapter_says_what_it_is(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(adapter.parent / "base")
    assert set(config["target_modules"]) == ATTENTION | MLP
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 10.0, "LORA")
    assert {file.name for file in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not list(adapter.parent.glob(".*")), "nothing is left beside it"


@pytest.mark.numeric
def test_an_adapter_replaces_an_adapter_and_nothing_else(adapter: Path, tmp_path: Path) -> None:
    model, settings = adapted(tmp_path / "base")
    before = (adapter / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    save_adapter(adapter, model, settings, tmp_path / "base")
    assert (adapter / "adapter_model.safetensors").read_bytes() != before
    with pytest.raises(ModelError, match="is there and is not a LoRA adapter"):
        save_adapter(tmp_path / "base", model, settings, tmp_path / "base")
    assert resolve_model_directory(tmp_path / "base").is_dir()


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; LORA is"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_to_transform": 0}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"from_the_future": {"x": 1}}, "from_the_future"),
        ({"r": 0}, "r is missing"),
        ({"r": 8}, "has the shape"),
        ({"r": "4"}, "r is missing, or of the wrong kind"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": ["nowhere"]}, "none of the modules"),
        ({"target_modules": ["q_proj"]}, "has tensors that the model lacks"),
        ({"target_modules": "(a+)+b"}, "is broken, or takes too long"),
        ({"target_modules": "(.*.*.*)*x"}, "is broken, or takes too long"),
        ({"target_modules": "(q_proj"}, "is broken, or takes too long"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
        ({"alpha_pattern": {"[": 1}}, "is broken"),
    ],
)
def test_what_is_more_than_plain_lora_is_named(
    adapter: Path, changes: dict[str, Any], words: str
) -> None:
    change(adapter, **changes)
    assert words in refused(adapter)


@pytest.mark.numeric
def test_tensors_that_are_missing_unknown_or_of_another_shape(adapter: Path) -> None:
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
    assert "is of the kind I32" in refused(adapter)
    path.unlink()
    assert "there is no adapter_model.safetensors" in refused(adapter)


@pytest.mark.numeric
def test_what_is_no_adapter_and_what_is_no_model(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(ModelError, match="is not a LoRA adapter"):
        resolve_adapter_directory(run)
    with pytest.raises(ModelError, match="there is no such directory"):
        resolve_adapter_directory(tmp_path / "nowhere")
    adapter.rename(run / "adapter")
    assert resolve_adapter_directory(run) == resolve_adapter_directory(run / "adapter")
    for place in (run, run / "adapter"):
        with pytest.raises(ModelError, match=r"holds a LoRA adapter.*minimind merge MODEL"):
            resolve_model_directory(place)


def test_damaged_adapters_are_refused_or_merged_and_never_crash(adapter: Path) -> None:
    """Row 18 for adapters: some hundred damages give our errors alone, or numbers that fit."""
    model = load_model(adapter.parent / "base")
    paths = [adapter / "adapter_config.json", adapter / "adapter_model.safetensors"]
    sound = [path.read_bytes() for path in paths]
    config = json.loads(sound[0])
    values = [-1, 0, 10**30, 1.5, float("nan"), "x", "", [], {}, [[]], True, {"(": 1}, ["", 3]]
    keys = [*config, "use_rslora", "rank_pattern", "alpha_pattern"]
    mutants = [(0, json.dumps(config | {key: value}).encode()) for key in keys for value in values]
    rng = random.Random(0)
    header = 8 + struct.unpack("<Q", sound[1][:8])[0]
    for which, end in ((0, len(sound[0])), (1, header)):
        for at in [*range(8), *(rng.randrange(end) for _ in range(120))]:
            damaged = bytearray(sound[which])
            damaged[at] ^= 1 << rng.randrange(8)
            mutants.append((which, bytes(damaged)))
        mutants += [(which, sound[which][: len(sound[which]) * n // 8]) for n in range(8)]
    mutants += [(0, b"[" * 100_000), (0, b"[]"), (1, bytes(1000))]
    refusals = 0
    for which, content in mutants:
        paths[which].write_bytes(content)
        try:
            merge_adapter(copy.deepcopy(model), adapter)
        except MinimindError:
            refusals += 1
        paths[which].write_bytes(sound[which])
    assert refusals > len(mutants) / 2
    merge_adapter(model, adapter)
