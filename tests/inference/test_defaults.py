import json
from pathlib import Path

import pytest

from minimind.errors import ModelError, UsageError
from minimind.inference.defaults import GenerationDefaults, read_generation_defaults
from minimind.inference.sampling import Sampling


def read(directory: Path, **content: object) -> GenerationDefaults:
    (directory / "config.json").write_text("{}", encoding="utf-8")
    text = json.dumps(content)
    (directory / "generation_config.json").write_text(text, encoding="utf-8")
    return read_generation_defaults(directory)


def test_files_of_published_models(tmp_path: Path) -> None:
    qwen3 = dict(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, eos_token_id=[7, 9])
    assert read(tmp_path, **qwen3) == GenerationDefaults(Sampling(0.6, 0.95, 20))
    assert read(tmp_path, top_k=-1, max_new_tokens=9) == GenerationDefaults(Sampling(), 9)
    assert read(tmp_path, top_k=None) == GenerationDefaults()
    assert read(tmp_path, do_sample=False) == GenerationDefaults()  # like vLLM
    (tmp_path / "generation_config.json").unlink()
    assert read_generation_defaults(tmp_path) == GenerationDefaults()


def test_without_settings_sampling_is_neutral() -> None:
    neutral = Sampling()
    assert (neutral.temperature, neutral.top_p, neutral.top_k, neutral.min_p) == (1, 1, 0, 0)
    assert not neutral.truncates
    assert not neutral.changes_logits


def test_settings_override_defaults_unless_they_are_none() -> None:
    defaults = GenerationDefaults(Sampling(0.6, 0.95, 20))
    assert defaults.sampling_with({"top_k": 0, "top_p": None}) == Sampling(0.6, 0.95, 0)
    with pytest.raises(UsageError, match="temperature is 101"):
        defaults.sampling_with({"temperature": 101})


def test_a_run_directory_stands_for_its_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert read(tmp_path / "model", top_k=5).sampling.top_k == 5
    assert read_generation_defaults(tmp_path).sampling.top_k == 5
    with pytest.raises(ModelError, match="no such directory"):
        read_generation_defaults(tmp_path / "nowhere")
