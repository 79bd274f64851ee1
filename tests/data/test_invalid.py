import json
import random
from pathlib import Path

import pytest

from minimind.data import invalid as invalid_module
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_records
from minimind.errors import DataError, ResourceError
from tests.support.data_files import records_of, texts_of


def _invalid_lines() -> list[tuple[bytes, str]]:
    asks, answers = '{"role": "user", "content": "问"}', '{"role": "assistant", "content": "答"}'
    valid = f'{{"conversations": [{asks}, {answers}]}}'
    return [
        (valid.encode()[:20] + b"\xff\xfe" + valid.encode()[20:], "not UTF-8"),
        (valid.encode("gbk"), "not UTF-8"),
        (valid.replace("问", "\x00").encode(), "a NUL character"),
        (valid.replace("问", "\\u0000").encode(), "a NUL character"),
        (valid.encode()[:-9], "not JSON: "),
        (b"[" * 100_000, "nested too deeply"),
        (valid.replace('"答"', "NaN").encode(), "NaN is not JSON"),
        (valid.replace('"答"', "-Infinity").encode(), "-Infinity is not JSON"),
        (valid.replace("答", "\\ud83d").encode(), "lone surrogate"),
        (valid.replace("答", "\\uDE00").encode(), "lone surrogate"),
        (
            valid.replace('"role": "user"', '"role": "user", "role": "user"').encode(),
            "a duplicate key",
        ),
        (valid.replace("user", "narrator").encode(), "unknown role 'narrator'"),
        (valid.replace('"答"', '" "').encode(), "an answer is empty"),
        (valid.replace('"答"', "null").encode(), "has no text"),
        (b'{"conversations": []}', "the list of messages is empty"),
        (b"{}", "its fields are: none"),
        (b'{"text": ""}', "the text is empty"),
        (b'{"text": 3.5}', "not text"),
        (b"42", "a JSON int instead of an object"),
        (b'{"text": "a", "n": ' + b"9" * 5_000 + b"}", "more than 4,000 digits"),
    ]


def test_five_percent_of_invalid_lines_are_all_quarantined(tmp_path: Path) -> None:
    rng = random.Random(8)
    path, quarantine = tmp_path / "lines.jsonl", tmp_path / "quarantine.jsonl"
    kinds = _invalid_lines()
    positions = rng.sample(range(2, 10_001), 499)
    damaged = {line: kinds[i % len(kinds)] for i, line in enumerate(positions)}
    long_line = next(line for line in range(5_000, 10_001) if line not in damaged)
    expected = {line: reason for line, (_, reason) in damaged.items()}
    expected[long_line] = "a line of more than 16 MB"
    with path.open("wb") as stream:
        stream.write(b"\xef\xbb\xbf")
        for line in range(1, 10_001):
            if line == long_line:
                stream.write(b'{"text": "' + b"x" * 50_000_000 + b'"}\n')
            elif line in damaged:
                stream.write(damaged[line][0] + b"\n")
            else:
                stream.write(f'{{"text": "{line}：好"}}'.encode() + rng.choice([b"\n", b"\r\n"]))
    invalid = InvalidRecords(quarantine, max_fraction=0.1)
    texts = [record.text for record in records_of(path, invalid)]
    assert texts == [f"{line}：好" for line in range(1, 10_001) if line not in expected]
    assert (invalid.num_valid, invalid.total) == (9_500, 500)
    entries = [json.loads(line) for line in quarantine.read_text("utf-8").splitlines()]
    assert [entry["line"] for entry in entries] == sorted(expected)
    assert {entry["file"] for entry in entries} == {str(path)}
    for entry in entries:
        assert expected[entry["line"]] in entry["reason"]
        assert len(entry["text"]) <= 200
    assert sum(invalid.reasons.values()) == 500
    first = min(line for line, reason in expected.items() if reason == "not UTF-8")
    assert invalid.locations["not UTF-8"][0] == f"{path}:{first}"


def test_too_many_invalid_records_stop_the_reading(tmp_path: Path) -> None:
    path, quarantine = tmp_path / "lines.jsonl", tmp_path / "quarantine.jsonl"
    path.write_bytes((b'{"text": "a"}\n' * 18 + b"{broken\n" * 2) * 100_000)
    read_so_far = list[int]()
    invalid = InvalidRecords(quarantine, max_fraction=0.05)
    with pytest.raises(
        DataError, match=r"of 1,000 records are invalid .100 × not JSON.*lines.jsonl:19: "
    ):
        list(read_records([path], invalid=invalid, progress=read_so_far.append))
    assert sum(read_so_far) < path.stat().st_size / 2
    assert len(quarantine.read_text("utf-8").splitlines()) == 100
    few = InvalidRecords()
    texts_of(path, b'{"text": "a"}\n' * 9 + b"{broken\n", few)
    few.check(0.1, final=True)
    few.check(0.05)  # too few records to judge
    with pytest.raises(DataError, match="1 of 10 records are invalid"):
        few.check(0.05, final=True)


def test_gbk_gives_a_hint_how_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "好"}\n'.encode("gbk") * 3)
    invalid = InvalidRecords()
    assert records_of(path, invalid) == []
    with pytest.raises(DataError, match=r"3 × not UTF-8.*iconv -f GB18030"):
        invalid.check(0.05, final=True)


def test_quarantine_and_reasons_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invalid_module, "_MAX_QUARANTINED", 1_000)
    invalid = InvalidRecords(tmp_path / "quarantine.jsonl")
    reason, content = "\x1b[31m" + "!" * 1_000, {"key": ["长" * 1_000]}
    for line in range(1_500):
        invalid.add(Path("x.jsonl"), line, f"{line}{reason}", content)
    assert invalid.total == sum(invalid.reasons.values()) == 1_500
    assert len(invalid.reasons) <= 101
    assert max(map(len, invalid.reasons)) <= 200
    assert "\x1b" not in invalid.first
    assert invalid.path
    assert len(invalid.path.read_text("utf-8").splitlines()) == 1_000
    assert invalid.path.stat().st_size < 1_500_000
    with pytest.raises(DataError, match="The first 1,000 are in"):
        invalid.check(0.5, final=True)


def test_a_full_disk_during_quarantine_is_a_resource_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(ResourceError, match=r"/dev/full: .*data\.store=DIR"):
        InvalidRecords(Path("/dev/full")).add(Path("x.jsonl"), 1, "invalid")


def test_merge_adds_the_counts() -> None:
    one, other = InvalidRecords(num_valid=5), InvalidRecords(num_valid=7)
    one.add(Path("x"), 1, "red")
    for line in range(1, 6):
        other.add(Path("y"), line, "red")
    one.merge(other)
    assert (one.num_valid, one.total, one.reasons["red"]) == (12, 6, 6)
    assert one.locations["red"] == ["x:1", "y:1", "y:2"]
    assert one.first == "x:1: red"
