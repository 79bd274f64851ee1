from pathlib import Path

import pytest

from minimind.data.registry import data_folder, downloaded_file, find, is_name, registry
from minimind.data.schemas import SCHEMAS
from minimind.errors import DataError, UsageError

FILES = [f"{set_name}:{file}" for set_name, entry in registry().items() for file in entry.files]


def test_every_row_of_the_registry_is_complete() -> None:
    assert len(registry()) == 22
    for name, entry in registry().items():
        assert entry.hf or entry.modelscope, name
        assert entry.files or entry.pattern, name
        assert entry.default is None or entry.default in entry.files, name
        assert entry.source and entry.licence and entry.title, name
    places = [find(name).path_in(Path("data")) for name in FILES]
    assert len(set(places)) == len(places)
    for name in FILES:
        published = find(name)
        assert published.name == name
        benchmark = published.stage == "eval"
        assert published.record_schema in (("benchmark",) if benchmark else SCHEMAS), name
        assert published.repositories()


@pytest.mark.parametrize(
    ("name", "path", "place"),
    [
        ("minimind:sft_mini", "sft_t2t_mini.jsonl", "minimind/sft_mini.jsonl"),
        ("minimind:sft_t2t_mini", "sft_t2t_mini.jsonl", "minimind/sft_mini.jsonl"),
        (
            "skypile:2021-04_zh_middle_0012",
            "data/2021-04_zh_middle_0012.jsonl",
            "skypile/2021-04_zh_middle_0012.jsonl",
        ),
        ("fineweb-edu-zh-v2.1:4_5/a", "4_5/a.parquet", "fineweb-edu-zh-v2.1/4_5/a.parquet"),
        (
            "seq-monkey",
            "mobvoi_seq_monkey_general_open_corpus.zip",
            "seq-monkey/corpus.jsonl.zip",
        ),
        ("ceval", "ceval-exam.zip", "ceval-exam.zip"),
    ],
)
def test_names_of_files(name: str, path: str, place: str) -> None:
    published = find(name)
    assert published.file.path == path
    assert published.path_in(Path("data")) == Path("data", place)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("skypil:x", "there is no dataset 'skypil'; did you mean skypile?"),
        ("minimind", "minimind has several files; name one: minimind:pretrain_mini, "),
        ("minimind:sft_mimi", "minimind has no file 'sft_mimi'; did you mean sft_mini?"),
        ("skypile:../../etc", "skypile has no file '../../etc'; it has "),
        ("skypile:/etc", "skypile:NAME for the file data/NAME.jsonl"),
    ],
)
def test_wrong_names_have_suggestions(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        find(name)
    assert message in str(caught.value)


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINIMIND_DATA", raising=False)
    assert data_folder() == Path("data")
    monkeypatch.setenv("MINIMIND_DATA", str(tmp_path / "disk"))
    assert is_name("gsm8k") and is_name("skypile:x") and not is_name("texts.jsonl")
    with pytest.raises(DataError, match=r"gsm8k is not in .*disk; download it first: minimind"):
        downloaded_file("gsm8k")
    place = tmp_path / "disk" / "gsm8k.parquet"
    place.parent.mkdir()
    place.touch()
    assert downloaded_file("gsm8k") == place
    Path("gsm8k").touch()
    assert not is_name("gsm8k"), "a path that exists"
