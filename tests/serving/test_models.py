import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch

from minimind.config.settings import LoRASettings
from minimind.errors import ModelError, UsageError
from minimind.model import apply_lora, load_model, merge_adapter, save_adapter, save_model
from minimind.model.lora import LoRALinear
from minimind.serving.limits import Limits
from minimind.serving.models import Source, find_adapters, find_models
from minimind.tokenizer import Tokenizer
from tests.support.services import InProcess, make_model


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., None]:
    """Return a function that creates empty files, or adapter configs that name `base`."""

    def files(*paths: str, base: object = None) -> None:
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            content = json.dumps({"base_model_name_or_path": base}) if base else ""
            (tmp_path / path).write_text(content)

    return files


@pytest.mark.parametrize(
    ("files", "path", "name"),
    [
        (["a/model/config.json"], "a", "a"),  # a run, since it has a model
        (["a/model/config.json"], "a/model", "model"),
        (["a/model/config.json", "a/recipe.toml"], "a/model", "a"),
        (["a/model/config.json", "a/checkpoints/1"], "a/model", "a"),
        (["a/config.json", "recipe.toml"], "a", "a"),
    ],
)
def test_the_name_of_a_model_comes_from_its_directory(
    tmp_path: Path, make: Callable[..., None], files: list[str], path: str, name: str
) -> None:
    make(*files)
    assert list(find_models([tmp_path / path])) == [name]


@pytest.mark.skipif(os.name != "posix", reason="symbolic links")
def test_a_link_names_the_model(
    tmp_path: Path, make: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make("runs/3/model/config.json", "runs/3/recipe.toml", "plain/config.json")
    (tmp_path / "in").mkdir()
    for link, target in [("run", "runs/3"), ("best", "runs/3/model"), ("other", "plain")]:
        (tmp_path / "in" / link).symlink_to(tmp_path / target)
        sources = find_models([tmp_path / "in" / link])
        expected = tmp_path / ("plain" if link == "other" else "runs/3/model")
        assert sources == {link: Source(expected.resolve())}
    assert list(find_models([tmp_path / "in"])) == ["best", "other", "run"]
    assert list(find_models([tmp_path / "in/run/model"])) == ["run"]
    monkeypatch.chdir(tmp_path / "runs/3")
    assert list(find_models([Path()])) == list(find_models([Path("model")])) == ["3"]


def test_a_folder_may_have_models_runs_and_adapters(
    tmp_path: Path, make: Callable[..., None]
) -> None:
    make("in/chat/model/config.json", "in/chat/recipe.toml", "in/plain/config.json")
    make("in/poet/adapter/adapter_config.json", base=str(tmp_path / "in/chat/model"))
    make("in/bare/adapter_config.json", base=str(tmp_path / "far"))
    make("far/config.json")
    # An unfinished run, a temporary directory, a folder of other files, a file.
    make("in/begun/checkpoints/1", "in/.new/config.json", "in/data/a.jsonl", "in/notes.txt")
    chat, far = tmp_path / "in/chat/model", tmp_path / "far"
    assert find_models([tmp_path / "in"]) == {
        "bare": Source(far, tmp_path / "in/bare"),
        "chat": Source(chat),
        "plain": Source(tmp_path / "in/plain"),
        "poet": Source(chat, tmp_path / "in/poet/adapter"),
    }
    assert find_models([tmp_path / "in/poet"]) == {
        "poet": Source(chat, tmp_path / "in/poet/adapter")
    }
    assert list(find_models([tmp_path / "in/chat", tmp_path / "in/poet"])) == ["chat", "poet"]


def test_adapters_find_their_base_in_a_moved_folder(
    tmp_path: Path, make: Callable[..., None]
) -> None:
    make("in/chat/model/config.json", "in/plain/config.json")
    make("in/poet/adapter/adapter_config.json", base="/gone/out/chat/model")
    make("in/bare/adapter_config.json", base="owner/plain")
    shutil.move(tmp_path / "in", tmp_path / "moved")
    sources = find_models([tmp_path / "moved"])
    assert sources["poet"].model == tmp_path / "moved/chat/model"
    assert sources["bare"].model == tmp_path / "moved/plain"


@pytest.mark.parametrize("base", ["/gone/chat/model", "..", ".", "/", "a" * 5000, "a\0b", 5, [1]])
def test_an_adapter_without_its_base_model_is_an_error(
    tmp_path: Path, make: Callable[..., None], base: object
) -> None:
    make("in/plain/config.json")
    make("in/poet/adapter/adapter_config.json", base=base)
    with pytest.raises(ModelError, match=r"in/poet is a LoRA .*--adapter poet=.*in/poet"):
        find_models([tmp_path / "in"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"{}", b"[" * 100_000])
def test_an_invalid_adapter_config_is_an_error(
    tmp_path: Path, make: Callable[..., None], content: bytes
) -> None:
    make("in/plain/config.json", "in/poet/adapter_config.json")
    (tmp_path / "in/poet/adapter_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"poet is a LoRA adapter.*does not name one"):
        find_models([tmp_path / "in"])


def test_folders_without_models_and_duplicate_names_are_errors(
    tmp_path: Path, make: Callable[..., None]
) -> None:
    make("a/chat/config.json", "b/chat/config.json", "c/data/x.jsonl", "d/checkpoints/1")
    make("e/chat/adapter_config.json", base=str(tmp_path / "a/chat"))
    for second in ("b", "e"):
        with pytest.raises(
            UsageError, match=rf"two models have the name chat: .*a/chat.*{second}/chat"
        ):
            find_models([tmp_path / "a", tmp_path / second])
    assert len(find_models([tmp_path / "a", tmp_path / "a/chat"])) == 1  # the same model twice
    for folder, message in [
        ("c", "is not a model dir"),
        ("d", "not finished"),
        ("no", "no such dir"),
    ]:
        with pytest.raises(ModelError, match=message):
            find_models([tmp_path / folder])


def test_adapters_are_given_as_name_and_directory(
    tmp_path: Path, make: Callable[..., None]
) -> None:
    make("in/chat/config.json")
    make("in/poet/adapter_config.json", base=str(tmp_path / "in/chat"))
    models = find_models([tmp_path / "in"])
    chat = models["chat"].model
    assert find_adapters(["a=x", "b=y=z"], models) == {
        "a": Source(chat, Path("x")),
        "b": Source(chat, Path("y=z")),
    }
    for adapters, message in [
        (["a"], "is not NAME=DIR"),
        (["=a"], "is not NAME=DIR"),
        (["poet=x"], "another model has the name poet"),
        (["a=x", "a=y"], "another model has the name a"),
    ]:
        with pytest.raises(UsageError, match=message):
            find_adapters(adapters, models)
    (tmp_path / "lr=3").mkdir()
    with pytest.raises(UsageError, match=r"write --adapter NAME=.*/lr=3$"):
        find_adapters([f"{tmp_path}/lr=3"], models)  # a path, not a name before "="
    with pytest.raises(UsageError, match=r"there are 2: chat, two"):
        find_adapters(["a=x"], models | {"two": Source(tmp_path)})
    assert find_adapters([], models | {"two": Source(tmp_path)}) == {}


def test_models_and_adapters_of_a_folder_are_served(tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = tmp_path / "chat" / "model"
    save_model(chat, make_model(tokenizer, seed=1, context=256), tokenizer)
    settings = LoRASettings(rank=4)
    adapted = apply_lora(load_model(chat), settings)
    for module in adapted.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B, std=0.5)
    save_adapter(tmp_path / "poet" / "adapter", adapted, settings, chat)
    merged = load_model(chat)
    merge_adapter(merged, tmp_path / "poet" / "adapter")
    save_model(tmp_path / "merged", merged, tokenizer)
    with InProcess(tmp_path, 2, Limits(), ()) as service:
        listed = httpx.get(f"{service.url}/v1/models").json()["data"]
        assert [model["id"] for model in listed] == ["chat", "merged", "poet"]
        assert len({model.fingerprint for model in service.models.values()}) == 3

        def answer(model: str) -> Any:
            request = {"model": model, "prompt": "长江", "max_tokens": 20, "temperature": 0}
            response = httpx.post(f"{service.url}/v1/completions", json=request).json()
            assert response["model"] == model
            return response["choices"][0]["text"]

        assert answer("poet") == answer("merged") != answer("chat")
