import shutil
from pathlib import Path
from typing import Any

import pytest

from minimind.errors import CheckpointError, UsageError
from minimind.tokenizer import train_tokenizer
from minimind.training.extract import extract_checkpoint
from minimind.training.run import write_recipe
from tests.support.small_runs import lora_settings
from tests.support.stages import MakeRecipe, train


@pytest.mark.parametrize("kind", ["pretrain", "lora", "dpo"])
def test_a_checkpoint_is_extracted_as_a_model_or_an_adapter(
    recipe: MakeRecipe, run: Path, corpus: Path, tmp_path: Path, kind: str
) -> None:
    train(recipe())
    settings: dict[str, Any] = {"checkpoint__every": 1, "checkpoint__keep": 9}
    own = tmp_path / "tokenizer"
    if kind == "pretrain":
        shutil.copytree(recipe().tokenizer or "", own)
        settings["tokenizer"] = str(own)
    if kind != "pretrain":
        settings["model__init"] = str(run)
    if kind == "lora":
        settings |= lora_settings()
    if kind == "dpo":
        settings |= {"data__sources": [str(corpus / "pairs.jsonl")], "data__seq_len": 64}
    again = tmp_path / "again"
    result = train(recipe("sft" if kind == "lora" else kind, again, **settings))
    output, weights = result.model or result.adapter, []
    assert output and result.summary["best_step"] == 5
    for step in (None, 5, 2):
        out = tmp_path / f"{step}"
        assert extract_checkpoint(again, step, out) == (step or 5)
        files = files_in(out)
        assert files.keys() == {path.name for path in output.iterdir()}
        weights.append(next(files[name] for name in files if name.endswith("model.safetensors")))
    assert (
        weights[0] == weights[1] == (output / next(iter(output.glob("*.safetensors")))).read_bytes()
    )
    assert weights[2] != weights[0]
    if kind == "pretrain":  # another tokenizer under the name in the recipe
        shutil.rmtree(own)
        train_tokenizer(["abc"] * 9, vocab_size=280).save(own)
        assert extract_checkpoint(again, 5, tmp_path / "later") == 5
        assert files_in(tmp_path / "later") == files_in(tmp_path / "5")
    before = files_in(out)
    recipe_file = again / "recipe.toml"
    for existing in (out, output, recipe_file):
        with pytest.raises(UsageError, match=r"already exists .* another --out, or move it"):
            extract_checkpoint(again, 5, existing)
    assert files_in(out) == before and recipe_file.is_file()
    out = tmp_path / "empty"
    out.mkdir()
    (out / ".DS_Store").touch()
    assert extract_checkpoint(again, 2, out) == 2 and files_in(out) == before


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_missing_or_damaged_checkpoint_is_not_extracted(
    recipe: MakeRecipe, run: Path, tmp_path: Path
) -> None:
    train(recipe(data__validation_fraction=0.0))
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; available: 5"):
        extract_checkpoint(run, 3, out)
    with pytest.raises(CheckpointError, match="no validation is recorded"):
        extract_checkpoint(run, None, out)
    weights = run / "checkpoints" / "step-00000005" / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(CheckpointError, match=r"step-00000005 is damaged: .*model.safetensors"):
        extract_checkpoint(run, 5, out)
    assert not out.exists()


def test_a_checkpoint_is_extracted_without_the_backend_that_wrote_it(
    recipe: MakeRecipe, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = recipe(optim__name="adamw")
    train(begun)
    training = begun.training.model_copy(update={"backend": "deepspeed"})
    write_recipe(run, begun.model_copy(update={"training": training}))
    monkeypatch.setattr("minimind.training.build.find_spec", lambda name: None)
    assert extract_checkpoint(run, 5, tmp_path / "out") == 5
    assert "model.safetensors" in files_in(tmp_path / "out")
