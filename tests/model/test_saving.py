"""Model directories are written atomically, or not at all."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minimind.errors import ModelError, ResourceError, UsageError
from minimind.model import (
    Transformer,
    load_model,
    save_model,
)
from minimind.model.saving import check_new_directory
from minimind.tokenizer import Tokenizer

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("nano", {}),
        ("nano", {"qk_norm": True}),
        ("nano", {"tie_word_embeddings": False}),
        ("nano-moe", {}),
        ("nano-moe", {"shared_intermediate_size": 0, "logits_scaling": 6.0}),
        ("nano-moe", {"attention_multiplier": 0.5, "tie_word_embeddings": False}),
    ],
)
def test_a_saved_model_loads_with_equal_config_and_weights(
    random_model: Callable[..., Transformer],
    tokenizer: Tokenizer,
    tmp_path: Path,
    preset: str,
    changes: dict[str, float],
) -> None:
    model = random_model(preset, **changes)
    save_model(tmp_path / "parent" / "model", model, tokenizer)
    loaded = load_model(tmp_path / "parent" / "model")
    assert loaded.config == model.config
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert os.listdir(tmp_path / "parent") == ["model"]
    assert set(os.listdir(tmp_path / "parent" / "model")) == FILES


def test_saving_replaces_all_files_of_an_existing_model(
    saved: Path, random_model: Callable[..., Transformer], tokenizer: Tokenizer
) -> None:
    (saved / "notes.txt").write_text("of the existing model")
    newer = random_model("nano", seed=1)
    save_model(saved, newer, tokenizer)
    assert torch.equal(load_model(saved).head_weight, newer.head_weight)
    assert set(os.listdir(saved)) == FILES
    assert os.listdir(saved.parent) == ["model"]


def test_all_files_are_flushed_before_the_rename(
    tmp_path: Path, model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def record_replace(source: Path, target: Path) -> None:
        if Path(target).name == "model":
            events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    save_model(tmp_path / "model", model, tokenizer)
    rename = events.index("renamed")
    assert {*FILES, ".model.new"} <= set(events[:rename])
    assert events[rename + 1 :] == [tmp_path.name]


def test_a_failed_save_leaves_the_existing_model_unchanged(
    saved: Path, random_model: Callable[..., Transformer]
) -> None:
    class Broken:
        end_of_text, stop_ids, model_ids = 0, (0,), {"eos_token_id": 0}

        def save(self, directory: Path) -> None:
            raise OSError(28, "No space left on device")

    before = {name: (saved / name).read_bytes() for name in FILES}
    newer = random_model("nano", seed=1)
    with pytest.raises(ResourceError, match=r"No space left.*needs 151,168 bytes, and [\d,]+ are"):
        save_model(saved, newer, Broken())
    assert {name: (saved / name).read_bytes() for name in FILES} == before
    assert os.listdir(saved.parent) == ["model"]


def test_leftovers_of_a_killed_save_are_removed(
    saved: Path, model: Transformer, tokenizer: Tokenizer
) -> None:
    partial = saved.with_name(".model.new")
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"partial")
    save_model(saved, model, tokenizer)
    assert os.listdir(saved.parent) == ["model"]
    # Killed between the two renames: the old model is restored when the new one fails too.
    saved.rename(saved.with_name(".model.old"))
    with pytest.raises(AttributeError):
        save_model(saved, model, object())  # type: ignore[arg-type]
    assert load_model(saved).config == model.config
    assert os.listdir(saved.parent) == ["model"]


def test_only_models_and_empty_directories_are_replaced(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for path in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ModelError, match="is not a model; give another directory"):
            save_model(path, model, tokenizer)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty", model, tokenizer)
    assert set(os.listdir(tmp_path / "empty")) == FILES


def test_hidden_files_of_the_user_are_not_removed(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for name in (".git", ".DS_Store"):  # a folder is no file of a file manager
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "HEAD").touch()
        with pytest.raises(ModelError, match="is not a model; give another directory"):
            save_model(tmp_path / name, model, tokenizer)
        assert (tmp_path / name / name / "HEAD").is_file()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / ".env").write_text("mine")
    with pytest.raises(UsageError, match="notes already exists and would be overwritten"):
        check_new_directory(tmp_path / "notes")
    (tmp_path / "other").mkdir()
    for name in (".DS_Store", "._x", ".nfs01", "Thumbs.db", "desktop.ini"):
        (tmp_path / "other" / name).touch()
    check_new_directory(tmp_path / "other")
    save_model(tmp_path / "other", model, tokenizer)
    assert set(os.listdir(tmp_path / "other")) == FILES


def test_the_current_folder_is_not_replaced(
    saved: Path, model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (saved / "model.safetensors").read_bytes()
    (saved.parent / "empty").mkdir()
    for folder in (saved, saved.parent / "empty"):
        monkeypatch.chdir(folder)
        message = "is the current folder, which cannot be replaced; give another"
        for path in (Path("."), folder):
            with pytest.raises(ModelError, match=rf"^{re.escape(str(path))} {message} directory$"):
                save_model(path, model, tokenizer)
            with pytest.raises(UsageError, match=rf"^{re.escape(str(path))} {message} --out$"):
                check_new_directory(path)
    assert (saved / "model.safetensors").read_bytes() == before
    assert not os.listdir()


def test_the_target_of_a_path_is_replaced(
    saved: Path, random_model: Callable[..., Transformer], tokenizer: Tokenizer
) -> None:
    newer = random_model("nano", seed=1)
    save_model(saved.parent / "new" / ".." / "model", newer, tokenizer)
    assert torch.equal(load_model(saved).head_weight, newer.head_weight)
    link = saved.parent / "link"
    link.symlink_to(saved)
    newest = random_model("nano", seed=2)
    save_model(link, newest, tokenizer)
    assert torch.equal(load_model(saved).head_weight, newest.head_weight)
    assert link.is_symlink() and sorted(os.listdir(saved.parent)) == ["link", "model"]


def test_saving_below_a_file_is_refused(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="model could not be written"):
        save_model(tmp_path / "file" / "model", model, tokenizer)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="root may write everywhere",
)
def test_saving_into_a_read_only_directory_is_refused(
    model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ResourceError, match="Permission denied"):
            save_model(tmp_path / "model", model, tokenizer)
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.skipif(not os.path.exists("/proc/version"), reason="needs Linux's /proc")
def test_saving_where_no_directory_can_be_created_is_refused(
    model: Transformer, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ResourceError, match="model could not be written"):
        save_model(Path("/proc/minimind/model"), model, tokenizer)
