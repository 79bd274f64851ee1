"""LoRA layers: initial values, dropout, targets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minimind.config.settings import LoRASettings
from minimind.errors import ConfigError
from minimind.model import (
    Transformer,
    apply_lora,
    load_model,
)
from minimind.model.lora import LoRALinear

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    return model.logits(model(tokens))


def test_initial_values_come_from_the_cpu_generator_on_every_device(
    random_model: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generators of other devices would draw other values."""
    drawn: list[str] = []
    real = torch.nn.init.kaiming_uniform_

    def draw(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if len(tensor) == 3:  # equals the rank and no width of the model
            drawn.append(tensor.device.type)
        return real(tensor, *arguments, **options)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", draw)
    model = random_model("nano").to("meta")
    apply_lora(model, LoRASettings(rank=3, targets=["q_proj"]))
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert drawn == ["cpu"] * len(adapted) != []
    assert {module.lora_A.device.type for module in adapted} == {"meta"}


@pytest.mark.numeric
def test_a_new_adapter_does_not_change_the_model(base: Callable[..., Path], tokens: Tensor) -> None:
    directory = base()
    plain, model = load_model(directory), apply_lora(load_model(directory), LoRASettings(rank=64))
    assert logits(model, tokens).equal(logits(plain, tokens))
    adapters = [m for m in model.modules() if isinstance(m, LoRALinear)]
    for module in adapters:
        bound = module.in_features**-0.5  # Kaiming initialization, as in peft
        assert float(module.lora_A.detach().abs().max()) == pytest.approx(bound, rel=0.05)
        assert float(module.lora_A.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert len(trained) == 2 * len(adapters)


@pytest.mark.numeric
def test_dropout_applies_to_the_input_of_the_adapter_in_training_only() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 8, bias=False)
    module = LoRALinear(plain, 4, 8.0, 0.5)
    torch.nn.init.normal_(module.lora_B)
    x = torch.randn(5, 64)
    update = (x @ module.lora_A.T) @ module.lora_B.T * 2
    torch.testing.assert_close(module.eval()(x), plain(x) + update)
    torch.manual_seed(7)
    actual = module.train()(x)
    torch.manual_seed(7)
    dropped = torch.nn.functional.dropout(x, 0.5)
    assert 0 < int((dropped == 0).sum()) < dropped.numel()
    expected = plain(x) + (dropped @ module.lora_A.T) @ module.lora_B.T * 2
    torch.testing.assert_close(actual, expected)


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
    names = [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert {name.rpartition(".")[2] for name in names} == expected
    assert len(names) == len(expected) * model.config.num_hidden_layers


@pytest.mark.numeric
def test_in_a_mixture_of_experts_the_shared_experts_are_adapted(
    random_model: Callable[..., Transformer],
) -> None:
    model = apply_lora(random_model("nano-moe"), LoRASettings(targets=["mlp"]))
    names = {name for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    layers = range(model.config.num_hidden_layers)
    assert names == {
        f"model.layers.{i}.shared_mlp.{name}_linear" for i in layers for name in ("input", "output")
    }


@pytest.mark.parametrize("targets", [["mlp"], ["attention", "mlp"]])
def test_a_group_without_modules_is_refused(
    random_model: Callable[..., Transformer], targets: list[str]
) -> None:
    model = random_model("nano-moe", shared_intermediate_size=0)
    with pytest.raises(ConfigError, match=r"has no 'mlp'; available: .*, attention, all$"):
        apply_lora(model, LoRASettings(targets=targets))


@pytest.mark.numeric
def test_an_unknown_target_is_refused_with_a_suggestion(
    random_model: Callable[..., Transformer],
) -> None:
    with pytest.raises(ConfigError, match="no 'q_porj'; did you mean q_proj") as caught:
        apply_lora(random_model("nano"), LoRASettings(targets=["q_porj"]))
    assert "attention, mlp, all" in str(caught.value)
    with pytest.raises(ConfigError, match="no 'lm_head'"):
        apply_lora(random_model("nano"), LoRASettings(targets=["lm_head"]))
