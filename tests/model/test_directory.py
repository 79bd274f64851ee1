"""Finding, checking and loading model directories."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimind.errors import ModelError
from minimind.model import (
    Transformer,
    load_model,
    resolve_model_directory,
)
from tests.support.config_json import change_config


def test_a_run_directory_resolves_to_its_model(saved: Path) -> None:
    assert resolve_model_directory(saved) == saved
    assert resolve_model_directory(saved.parent) == saved


def test_paths_that_are_no_model_directory_are_refused_with_a_reason(
    saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    for path, message in [
        (tmp_path / "nowhere", "there is no such directory"),
        (tmp_path / "unfinished", "a run that has not finished"),
        (tmp_path, "is not a model directory: it has no config.json"),
        (saved / "config.json", "is not a model directory"),
    ]:
        with pytest.raises(ModelError, match=message):
            resolve_model_directory(path)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(
    saved: Path, model: Transformer
) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, path)
    assert torch.equal(load_model(saved).head_weight, model.head_weight)
    for other in (head + 1e-3, head[:-1].contiguous(), head.bfloat16()):
        save_file(tensors | {"lm_head.weight": other}, path)
        with pytest.raises(
            ModelError, match=r"lm_head\.weight differs from .*\(tie_word_embeddings\)"
        ):
            load_model(saved)
    save_file(tensors | {"lm_head.weight": head + 1e-3}, path)
    change_config(saved, tie_word_embeddings=False)
    assert torch.equal(load_model(saved).head_weight, head + 1e-3)


def test_weights_of_unsupported_dtypes_and_formats_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.to(torch.int32) for name, tensor in tensors.items()}, path)
    with pytest.raises(ModelError, match="has the dtype I32; supported are F32, BF16, F16, F64"):
        load_model(saved)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file({name: tensor.double() for name, tensor in tensors.items()}, path)
    assert load_model(saved).head_weight.dtype == torch.float32
    path.unlink()
    with pytest.raises(ModelError, match=r"there is no model\.safetensors"):
        load_model(saved)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a valid index of weights"),
        ("{}", "not a valid index of weights"),
        ("[" * 100_000, "not a valid index of weights"),
        ('{"weight_map": ["a"]}', "not a valid index of weights"),
        ('{"weight_map": {"a": ["b"]}}', "not a valid index of weights"),
        (
            '{"weight_map": {"a": 5}}',
            "5 is not the name of a safetensors file in the same directory",
        ),
        ('{"weight_map": {"a": "../model.safetensors"}}', "is not the name of a safetensors file"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "is not the name of a safetensors file"),
        ('{"weight_map": {"a": "b\\\\c.safetensors"}}', "is not the name of a safetensors file"),
        ('{"weight_map": {"a": "b.bin"}}', '"b.bin" is not the name of a safetensors file'),
        (
            '{"weight_map": {"a": "b.safetensors"}}',
            "b.safetensors, which .*index.json names, is missing",
        ),
        ('{"weight_map": {"a": "part.safetensors"}}', "the tensor a is missing, but .* lists it"),
        ('{"weight_map": {"model.norm.weight": "part.safetensors"}}', "says 2 layers"),
        ('{"weight_map": {}}', "says 2 layers"),
    ],
)
def test_an_invalid_index_of_weights_is_refused(saved: Path, index: str, message: str) -> None:
    (saved / "model.safetensors").rename(saved / "part.safetensors")
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        load_model(saved)


def test_tensors_that_the_index_does_not_list_are_not_read(saved: Path, model: Transformer) -> None:
    tensors = load_file(saved / "model.safetensors")
    weight_map = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        weight_map[name] = f"part-{number}.safetensors"
        stray = {"stray": torch.zeros(1)} if number == 0 else {}
        save_file({name: tensor} | stray, saved / weight_map[name])
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = load_model(saved).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_loaded_model_is_independent_of_its_file(saved: Path, model: Transformer) -> None:
    loaded = load_model(saved)
    with torch.no_grad():
        loaded.head_weight[0] = 7.0
    assert torch.equal(load_model(saved).head_weight, model.head_weight)
    shutil.rmtree(saved)
    assert torch.equal(loaded.head_weight[1:], model.head_weight[1:])
