"""Training data of a chain of runs, and conflicts between licences."""

import json
from pathlib import Path

import pytest

from minimind.export.training_data import TrainingData, licence_conflicts, training_data_of
from minimind.reporting.runs import find_runs
from tests.support.run_folders import write_run


def sources(*paths: str) -> str:
    """Return the settings of a recipe with these data sources."""
    entries = ", ".join(f"{{path = {json.dumps(path)}}}" for path in paths)
    return f"[data]\nsources = [{entries}]\n"


def test_data_of_all_stages_in_the_order_of_first_use(tmp_path: Path) -> None:
    data = sources("minimind:pretrain_mini", "/home/me/own.jsonl")
    first = write_run(tmp_path / "a", more=data)
    data = sources("belle-3.5m", "/home/me/own.jsonl")
    write_run(tmp_path / "b", init=str(first), objective="sft", more=data)
    assert training_data_of(find_runs([tmp_path / "b"])) == [
        TrainingData(
            "minimind:pretrain_mini",
            ("pretrain",),
            "apache-2.0, cc-by-nc-2.0",
            {"modelscope": "gongjy/minimind_dataset", "hf": "jingyaogong/minimind_dataset"},
            ("zh", "en"),
        ),
        TrainingData("own.jsonl", ("pretrain", "sft")),
        TrainingData(
            "belle-3.5m:train", ("sft",), "gpl-3.0", {"hf": "BelleGroup/train_3.5M_CN"}, ("zh",)
        ),
    ]


def test_data_of_adapters_is_left_out(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", objective="sft", more=sources("own.jsonl"))
    more = sources("belle-3.5m") + "[lora]\nrank = 4\n"
    write_run(tmp_path / "b", init=str(first), objective="sft", more=more)
    assert [data.name for data in training_data_of(find_runs([tmp_path]))] == ["own.jsonl"]


@pytest.mark.parametrize(
    ("licence", "model", "words"),
    [
        ("apache-2.0", None, None),
        ("mit (unchecked)", "apache-2.0", None),
        ("cc-by-nc-4.0", "cc-by-nc-4.0", None),
        ("cc-by-sa-3.0", "cc-by-sa-3.0", None),
        ("unknown", "mit", "licence is unknown"),
        ("cc-by-nc-2.0", "apache-2.0", "forbids commercial use"),
        ("cc-by-nc-sa-4.0", None, "published without a licence"),
        ("gpl-3.0", "apache-2.0", "under the same licence"),
        ("cc-by-sa-3.0, gfdl", "cc-by-sa-3.0", "gfdl requires"),
        ("Skywork community", "apache-2.0", "terms of its own"),
    ],
)
def test_conflicts(licence: str, model: str | None, words: str | None) -> None:
    conflicts = licence_conflicts([TrainingData("set", ("sft",), licence)], model)
    if words is None:
        assert conflicts == []
    else:
        assert len(conflicts) == 1 and words in conflicts[0] and conflicts[0].startswith("set: ")
