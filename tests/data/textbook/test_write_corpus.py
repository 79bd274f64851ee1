import json
from pathlib import Path

import pytest

from minimind.data.input_files import list_files
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_records
from minimind.data.textbook import write_corpus

SIZES = {
    "prose_characters": 60_000,
    "held_out_characters": 9_000,
    "single_turn": 150,
    "multi_turn": 120,
    "preference_pairs": 90,
    "multiple_choice_questions": 60,
    "identity_dialogues": 70,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "new" / "folder", seed=4, **SIZES)


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


def test_files_have_the_requested_sizes(corpus: dict[str, Path]) -> None:
    assert {name: path.name for name, path in corpus.items()} == {
        name: f"{name}.jsonl"
        for name in (
            *(
                "pretrain",
                "held-out",
                "sft-single",
                "sft-multi",
                "dpo",
                "multiple-choice",
                "identity",
            ),
        )
    }
    for name, key in (("pretrain", "prose_characters"), ("held-out", "held_out_characters")):
        written = texts(corpus[name])
        assert sum(map(len, written[:-1])) < SIZES[key] <= sum(map(len, written))
    for name, key in (
        ("sft-single", "single_turn"),
        ("sft-multi", "multi_turn"),
        ("dpo", "preference_pairs"),
        ("multiple-choice", "multiple_choice_questions"),
        ("identity", "identity_dialogues"),
    ):
        assert len(corpus[name].read_text("utf-8").splitlines()) == SIZES[key]


@pytest.mark.parametrize(
    "name", ["pretrain", "held-out", "sft-single", "sft-multi", "dpo", "identity"]
)
def test_files_are_valid_training_data(corpus: dict[str, Path], name: str) -> None:
    invalid = InvalidRecords()
    records = list(read_records(list_files(str(corpus[name])), invalid=invalid))
    assert invalid.total == 0
    assert len(records) == len(corpus[name].read_text("utf-8").splitlines())
    first = json.loads(corpus[name].read_text("utf-8").splitlines()[0])
    if name in ("pretrain", "held-out"):
        assert records[0].text == first["text"]
    elif name == "dpo":
        contents = [message["content"] for message in first["chosen"]]
        assert all(text in records[0].texts for text in contents)
    else:
        assert [dict(message) for message in records[0].messages] == first["conversations"]


def test_the_same_seed_gives_the_same_bytes(corpus: dict[str, Path], tmp_path: Path) -> None:
    again = write_corpus(tmp_path / "again", seed=4, **SIZES)
    other = write_corpus(tmp_path / "other", seed=5, **SIZES)
    for name, path in corpus.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes() != other[name].read_bytes()


def test_no_text_is_both_in_training_and_held_out_data(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    for paths in (
        corpus,
        write_corpus(tmp_path, **(SIZES | {"seed": 1, "prose_characters": 900_000})),
    ):
        trained, held_out = set(texts(paths["pretrain"])), set(texts(paths["held-out"]))
        assert trained and held_out and not trained & held_out
