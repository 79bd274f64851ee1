import bz2
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from minimind.data import compression, formats
from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_records
from tests.support.data_files import (
    COMPRESSIONS,
    FORMATS,
    RECORDS,
    parquet_bytes,
    reason_of,
    records_of,
    texts_of,
)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_reads_with_each_compression(
    kind: str, compression: str, tmp_path: Path
) -> None:
    path = tmp_path / f"part.0.{kind.upper()}{compression}"
    path.write_bytes(COMPRESSIONS[compression](FORMATS[kind](RECORDS)))
    invalid, steps = InvalidRecords(), list[int]()
    records = list(read_records([path], invalid=invalid, progress=steps.append))
    assert invalid.total == 0
    assert sum(steps) == path.stat().st_size
    assert min(steps) > 0
    if kind == "txt":
        assert [r.text for r in records] == ["\n".join(r["q"] + r["a"] for r in RECORDS)]
        return
    contents = [[message["content"] for message in record.messages or []] for record in records]
    assert contents == [[record["q"], record["a"]] for record in RECORDS]
    assert {record.schema for record in records} == {"qa"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl.gz", b'{"text": "a"}', "the content is not gzip"),
        (
            "a.jsonl.zst",
            gzip.compress(b"x", mtime=0),
            "the content is gzip, but the name ends in .zst",
        ),
        ("a.jsonl", zstandard.compress(b"x"), "rename it so that it ends in .zst"),
        ("a.csv", bz2.compress(b"x"), "rename it so that it ends in .bz2"),
        ("a.txt", bz2.compress(b""), "the content is bzip2"),
        ("a.jsonl", parquet_bytes(RECORDS), "the content is Parquet"),
        ("a.jsonl.gz", gzip.compress(parquet_bytes(RECORDS), mtime=0), "the content is Parquet"),
        ("a.parquet", b"no table", "cannot be read as Parquet"),
        ("a.parquet", parquet_bytes(RECORDS)[:-20], "cannot be read as Parquet"),
        ("a.parquet.xz", lzma.compress(b"no table"), "cannot be read as Parquet"),
        ("a.docx", b"x", "unsupported file format; supported are .jsonl"),
        ("a.gz", gzip.compress(b"x", mtime=0), "unsupported file format"),
        ("a.jsonl", '{"text": "好"}'.encode("utf-16"), "iconv -f UTF-16"),
        ("a.csv", "text\n好\n".encode("utf-16-le"), "iconv -f UTF-16"),
        ("a.json", '["好"]'.encode("gbk"), "iconv -f GB18030"),
        ("a.csv", "问题,text\n".encode("gbk"), "iconv -f GB18030"),
        ("a.csv", b'"text,a\n1,2\n', "the header, which names the columns, is not CSV"),
        ("a.csv", b"text,text\n1,2\n", "two columns have the same name"),
    ],
)
def test_unreadable_files_give_the_reason(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    assert reason in reason_of(tmp_path / name, content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \r\n\n"),
        ("a.jsonl.zst", zstandard.compress(b"")),
        ("a.txt.gz", gzip.compress(b"", mtime=0)),
        ("a.txt", b"\n  \n"),
        ("a.json", b"[]"),
        ("a.json", b" \n "),
        ("a.csv", b"q,a\n"),
        ("a.parquet", parquet_bytes(RECORDS[:1])),
    ],
)
def test_empty_files_are_an_error(name: str, content: bytes, tmp_path: Path) -> None:
    if name.endswith(".parquet"):
        stream = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), stream)
        content = stream.getvalue()
    assert "leave it out, or download it again" in reason_of(tmp_path / name, content)


def test_byte_order_marks_line_ends_and_plain_strings(tmp_path: Path) -> None:
    lines = ['{"text": "a"}\r', "\r", '\ufeff{"text": "b"}', '"好"', '{"text": "c"}']
    content = "\ufeff" + "\n".join(lines)
    assert texts_of(tmp_path / "a.jsonl", content.encode()) == ["a", "b", "好", "c"]
    content = '\ufefftext\r\na\r\n\r\n"b\r\nb"\r\n'
    assert texts_of(tmp_path / "a.csv", content.encode()) == ["a", "b\r\nb"]
    assert texts_of(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\nb\n") == ["a\nb\n"]
    assert texts_of(tmp_path / "a.json", b'\xef\xbb\xbf["a", {"text": "b"}]') == ["a", "b"]


@pytest.mark.parametrize(
    "write",
    [
        lambda records: json.dumps(records, indent=2),
        lambda records: json.dumps(records, ensure_ascii=False, separators=(",", ":")),
        lambda records: "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n",
        lambda records: "\n".join(map(json.dumps, records)),
        lambda records: "\r\n".join(map(json.dumps, records)) + "\r\n\r\n",
        lambda records: "\n\n".join(json.dumps(r, indent=1, ensure_ascii=False) for r in records),
        lambda records: "".join(map(json.dumps, records)),
    ],
)
def test_json_is_an_array_or_concatenated_values(
    write: Callable[[Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs = ' ] } { [ , “好” \\ " '
    lines = [{"text": f"{n}{signs}" + "字" * (n % 50), "n": [n, None]} for n in range(400)]
    monkeypatch.setattr(formats, "_CHUNK_BYTES", 97)  # records span chunks
    monkeypatch.setattr(compression, "_BUFFER_BYTES", 97)
    path = tmp_path / "a.json"
    path.write_text(write(lines), encoding="utf-8", newline="")
    assert [record.text for record in records_of(path)] == [line["text"] for line in lines]


def test_invalid_elements_of_a_json_array_are_counted(tmp_path: Path) -> None:
    invalid = InvalidRecords()
    content = b'[{"text": "a"},\n{"text": NaN},\n{"text": "b", "text": "c"}, 7,\n\n{"text": "d"}]'
    assert texts_of(tmp_path / "a.json", content, invalid) == ["a", "d"]
    assert [
        location.rpartition(":")[2]
        for locations in invalid.locations.values()
        for location in locations
    ] == [*("2", "3", "3")]


@pytest.mark.parametrize("layout", ["[%s,\n%s,\n%s]", "%s\n%s\n%s"])
def test_an_integer_that_is_too_long_invalidates_one_record(layout: str, tmp_path: Path) -> None:
    invalid = InvalidRecords()
    records = ('{"text": "a", "n": %s}' % ("9" * 5_000), '{"text": "b"}', "9" * 5_000)
    content = (layout % records).encode()
    assert texts_of(tmp_path / "a.json", content, invalid) == ["b"]
    reason = "an integer of more than 4,000 digits"
    assert invalid.locations == {reason: [f"{tmp_path}/a.json:{line}" for line in (1, 3)]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"text": "a"}, {"text": "b"}', "truncated"),
        (b'[{"text": "a"},\n{"text": "b', "line 2: not JSON: Unterminated string"),
        (b'[{"text": "a"}]\n[{"text": "b"}]', "line 2: unexpected content after the end"),
        (b'[{"text": "a"} oops]', "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "a"', "line 1: not JSON"),
    ],
)
def test_malformed_json_files_give_the_line(content: bytes, reason: str, tmp_path: Path) -> None:
    assert reason in reason_of(tmp_path / "a.json", content)


def _csv_bytes(damage: dict[int, str], num_rows: int) -> bytes:
    lines = [f"问题{n},{'回答' * (n % 9)}{n}" for n in range(2, num_rows + 2)]
    for line, text in damage.items():
        lines[line - 2] = text
    return ("\r\n".join(["q,a", *lines]) + "\r\n").encode()


@pytest.mark.parametrize("num_rows", [200, 10_000])
def test_a_stray_quote_invalidates_one_row(
    num_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_MAX_ROW", 50_000)
    valid = {60: '"two\r\nlines","of ""one"" row"'}
    damage = {
        50: '"问题,回答',
        100: '问题,"回答',
        110: '",',
        150: 'a,"b" c',
        160: '"a,b',
        170: 'a",b,c',
    }
    damage |= {num_rows: '"到头"了,"', num_rows + 1: '问题,"'}
    invalid = InvalidRecords(tmp_path / "quarantine.jsonl")
    path = tmp_path / "a.csv"
    path.write_bytes(_csv_bytes(damage | valid, num_rows))
    records = records_of(path, invalid)
    questions = [record.messages[0]["content"] for record in records if record.messages]
    assert questions == [
        "two\r\nlines" if n in valid else f"问题{n}"
        for n in range(2, num_rows + 2)
        if n not in damage
    ]
    assert invalid.total == len(damage)
    entries = map(json.loads, (tmp_path / "quarantine.jsonl").read_text("utf-8").splitlines())
    assert [entry["line"] for entry in entries] == sorted(n + (n > 60) for n in damage)


def test_rows_that_do_not_match_the_header_are_invalid(tmp_path: Path) -> None:
    invalid = InvalidRecords()
    path = tmp_path / "a.tsv"
    rows = [b"q\ta", b"x\ty", b"x", b"x\ty\tz", b"x\t\0", b"x\t\xff", b"x\t" + b"y" * (17 << 20)]
    path.write_bytes(b"\n".join([*rows, b"x\ty"]))
    assert len(records_of(path, invalid)) == 2
    assert dict(invalid.reasons) == {
        "not CSV: 1 fields where the header has 2": 1,
        "not CSV: 3 fields where the header has 2": 1,
        "a NUL character": 1,
        "not UTF-8": 1,
        "not CSV: a line of more than 16 MB": 1,
    }
    locations = [location for group in invalid.locations.values() for location in group]
    assert locations == [f"{path}:{number}" for number in range(3, 8)]


def test_text_is_split_into_documents_without_loss(tmp_path: Path) -> None:
    rng = random.Random(1)
    paragraphs = ["，".join(["天地玄黄"] * rng.randrange(1, 60)) + "。\n" for _ in range(4_000)]
    content = "".join(p + "\n" * rng.randrange(2) for p in paragraphs) + "宇宙" * 200_000 + "终"
    texts = [t or "" for t in texts_of(tmp_path / "a.txt", content.encode())]
    assert "".join(texts) == content
    assert max(map(len, texts)) <= 2 * (1 << 16)
    assert texts[0].endswith("\n\n")


def test_invalid_lines_of_plain_text_are_counted(tmp_path: Path) -> None:
    invalid = InvalidRecords(max_fraction=0.1)
    lines = [f"第{n}行\n".encode() for n in range(1, 2_001)]
    lines[6], lines[1_999] = b"\xff\xfe\n", "好".encode()[:-1]
    lines[8] = b"a\0b\n"
    [text] = texts_of(tmp_path / "a.txt", b"".join(lines), invalid)
    assert (text or "").splitlines() == [f"第{n}行" for n in range(1, 2_000) if n not in (7, 9)]
    assert invalid.locations["not UTF-8"] == [
        f"{tmp_path / 'a.txt'}:7",
        f"{tmp_path / 'a.txt'}:2000",
    ]
    assert invalid.locations["a NUL character"] == [f"{tmp_path / 'a.txt'}:9"]


def test_invalid_rows_of_parquet_are_counted(tmp_path: Path) -> None:
    values = [b"good", b"\xff\xfe", b"a\0b", None, b"of the year 292277", b"better"]
    unchecked = pyarrow.array(values, "binary").view("string")
    dates = pyarrow.array([0, 0, 0, 0, 2**63 - 1, None], "int64").view(pyarrow.timestamp("us"))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": unchecked, "date": dates}), path)
    invalid = InvalidRecords()
    assert [record.text for record in records_of(path, invalid)] == ["good", "better"]
    assert [location for group in invalid.locations.values() for location in group] == [
        *(f"{path}:{row}" for row in (2, 3, 4, 5))
    ]
