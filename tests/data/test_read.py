import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from minimind.data import read
from minimind.data.read import InvalidRecords, batches, list_files, read_records, read_texts
from minimind.data.schemas import Record
from minimind.data.strict_json import parse_json
from minimind.errors import DataError, ResourceError

RECORDS = [{"q": f"第{n}个问题？", "a": f'第{n}个"回答"，\n有两行, and a comma'} for n in range(30)]


def _delimited(records: list[dict[str, Any]], delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, fieldnames=list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue().encode()


def _parquet(records: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), stream)
    return stream.getvalue()


def _json_lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": _json_lines,
    "ndjson": _json_lines,
    "json": lambda records: json.dumps(records).encode(),
    "csv": lambda records: _delimited(records, ","),
    "tsv": lambda records: _delimited(records, "\t"),
    "parquet": _parquet,
    "txt": lambda records: "\n".join(r["q"] + r["a"] for r in records).encode(),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def records_of(path: Path, bad: InvalidRecords | None = None, schema: str = "auto") -> list[Record]:
    return list(read_records([path], bad=bad or InvalidRecords(), schema=schema))


def texts_of(path: Path, content: bytes, bad: InvalidRecords | None = None) -> list[str | None]:
    path.write_bytes(content)
    return [record.text for record in records_of(path, bad)]


def reason_of(path: Path, content: bytes) -> str:
    """The message of the DataError with which the file cannot be read."""
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        records_of(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_with_each_compression(kind: str, compression: str, tmp_path: Path) -> None:
    path = tmp_path / f"part.0.{kind.upper()}{compression}"
    path.write_bytes(COMPRESSIONS[compression](FORMATS[kind](RECORDS)))
    bad, steps = InvalidRecords(), list[int]()
    records = list(read_records([path], bad=bad, progress=steps.append))
    assert bad.total == 0
    assert sum(steps) == path.stat().st_size
    assert min(steps) > 0
    if kind == "txt":
        assert [r.text for r in records] == ["\n".join(r["q"] + r["a"] for r in RECORDS)]
        return
    said = [[message["content"] for message in record.messages or []] for record in records]
    assert said == [[record["q"], record["a"]] for record in RECORDS]
    assert {record.schema for record in records} == {"qa"}


@pytest.mark.parametrize("compression", [ending for ending in COMPRESSIONS if ending])
def test_a_compressed_file_that_is_cut_or_damaged_is_an_error(
    compression: str, tmp_path: Path
) -> None:
    rng = random.Random(4)
    lines = [{"text": "".join(rng.choices("江河湖海山川", k=50))} for _ in range(2_000)]
    whole = COMPRESSIONS[compression](_json_lines(lines))
    path = tmp_path / f"cut.jsonl{compression}"
    cuts = [1, 2, 3, 5, 9, len(whole) // 2, *range(len(whole) - 9, len(whole))]
    for cut in cuts:
        assert "get it again" in reason_of(path, whole[:cut]) or cut < 10
    path.write_bytes(whole + whole)  # what `cat a.gz b.gz` gives
    assert len(records_of(path)) == 2 * len(lines)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl.gz", b'{"text": "a"}', "its name says gzip, but it is not"),
        (
            "a.jsonl.zst",
            gzip.compress(b"x", mtime=0),
            "compressed with gzip, but its name says zstd",
        ),
        ("a.jsonl", zstandard.compress(b"x"), "give it a name that ends in .zst"),
        ("a.csv", bz2.compress(b"x"), "give it a name that ends in .bz2"),
        ("a.txt", bz2.compress(b""), "compressed with bzip2"),
        ("a.jsonl", _parquet(RECORDS), "it is Parquet inside"),
        ("a.jsonl.gz", gzip.compress(_parquet(RECORDS)), "it is Parquet inside"),
        ("a.parquet", b"no table", "cannot be read as Parquet"),
        ("a.parquet", _parquet(RECORDS)[:-20], "cannot be read as Parquet"),
        ("a.parquet.xz", lzma.compress(b"no table"), "cannot be read as Parquet"),
        ("a.docx", b"x", "unknown kind of file; known are .jsonl"),
        ("a.gz", gzip.compress(b"x", mtime=0), "unknown kind of file"),
        ("a.jsonl", '{"text": "好"}'.encode("utf-16"), "iconv -f UTF-16"),
        ("a.csv", "text\n好\n".encode("utf-16-le"), "iconv -f UTF-16"),
        ("a.json", '["好"]'.encode("gbk"), "iconv -f GB18030"),
        ("a.csv", "问题,text\n".encode("gbk"), "iconv -f GB18030"),
        ("a.csv", b'"text,a\n1,2\n', "the header, which names the columns, is not CSV"),
        ("a.csv", b"text,text\n1,2\n", "two columns have the same name"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
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
        ("a.parquet", _parquet(RECORDS[:1])),
    ],
)
def test_files_with_nothing_in_them(name: str, content: bytes, tmp_path: Path) -> None:
    if name.endswith(".parquet"):
        stream = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), stream)
        content = stream.getvalue()
    assert "leave it out, or get it again" in reason_of(tmp_path / name, content)


# --- Lines


def _bad_lines() -> list[tuple[bytes, str]]:
    asks, answers = '{"role": "user", "content": "问"}', '{"role": "assistant", "content": "答"}'
    good = f'{{"conversations": [{asks}, {answers}]}}'
    return [
        (good.encode()[:20] + b"\xff\xfe" + good.encode()[20:], "not UTF-8"),
        (good.encode("gbk"), "not UTF-8"),
        (good.replace("问", "\x00").encode(), "a NUL character"),
        (good.replace("问", "\\u0000").encode(), "a NUL character"),
        (good.encode()[:-9], "not JSON: "),
        (b"[" * 100_000, "nested too deeply"),
        (good.replace('"答"', "NaN").encode(), "NaN is not JSON"),
        (good.replace('"答"', "-Infinity").encode(), "-Infinity is not JSON"),
        (good.replace("答", "\\ud83d").encode(), "lone surrogate"),
        (good.replace("答", "\\uDE00").encode(), "lone surrogate"),
        (good.replace('"role": "user"', '"role": "user", "role": "user"').encode(), "comes twice"),
        (good.replace("user", "narrator").encode(), "unknown role 'narrator'"),
        (good.replace('"答"', '" "').encode(), "an answer is empty"),
        (good.replace('"答"', "null").encode(), "holds no text"),
        (b'{"conversations": []}', "the list of messages is empty"),
        (b"{}", "its fields are: none"),
        (b'{"text": ""}', "the text is empty"),
        (b'{"text": 3.5}', "not text"),
        (b"42", "a JSON int instead of an object"),
        (b'{"text": "a", "n": ' + b"9" * 5_000 + b"}", "thousands of digits"),
    ]


def test_five_bad_lines_in_a_hundred_are_each_put_aside(tmp_path: Path) -> None:
    """Row 8 of the reliability matrix."""
    rng = random.Random(8)
    path, aside = tmp_path / "lines.jsonl", tmp_path / "aside.jsonl"
    kinds = _bad_lines()
    places = rng.sample(range(2, 10_001), 499)
    wrong = {line: kinds[i % len(kinds)] for i, line in enumerate(places)}
    long_line = next(line for line in range(5_000, 10_001) if line not in wrong)
    expected = {line: reason for line, (_, reason) in wrong.items()}
    expected[long_line] = "a line of more than 16 MB"
    with path.open("wb") as stream:
        stream.write(b"\xef\xbb\xbf")
        for line in range(1, 10_001):
            if line == long_line:
                stream.write(b'{"text": "' + b"x" * 50_000_000 + b'"}\n')
            elif line in wrong:
                stream.write(wrong[line][0] + b"\n")
            else:
                stream.write(f'{{"text": "{line}：好"}}'.encode() + rng.choice([b"\n", b"\r\n"]))
    bad = InvalidRecords(aside, max_fraction=0.1)
    texts = [record.text for record in records_of(path, bad)]
    assert texts == [f"{line}：好" for line in range(1, 10_001) if line not in expected]
    assert (bad.good, bad.total) == (9_500, 500)
    entries = [json.loads(line) for line in aside.read_text("utf-8").splitlines()]
    assert [entry["line"] for entry in entries] == sorted(expected)
    assert {entry["file"] for entry in entries} == {str(path)}
    for entry in entries:
        assert expected[entry["line"]] in entry["reason"]
        assert len(entry["text"]) <= 200
    assert sum(bad.reasons.values()) == 500
    first = min(line for line, reason in expected.items() if reason == "not UTF-8")
    assert bad.places["not UTF-8"][0] == f"{path}:{first}"


def test_too_many_bad_lines_stop_the_reading(tmp_path: Path) -> None:
    path, aside = tmp_path / "lines.jsonl", tmp_path / "aside.jsonl"
    path.write_bytes((b'{"text": "a"}\n' * 18 + b"{broken\n" * 2) * 100_000)
    read_so_far = list[int]()
    bad = InvalidRecords(aside, max_fraction=0.05)
    with pytest.raises(
        DataError, match=r"of 1,000 lines are bad .100 × not JSON.*lines.jsonl:19: "
    ):
        list(read_records([path], bad=bad, progress=read_so_far.append))
    assert sum(read_so_far) < path.stat().st_size / 2
    assert len(aside.read_text("utf-8").splitlines()) == 100
    few = InvalidRecords()
    texts_of(path, b'{"text": "a"}\n' * 9 + b"{broken\n", few)
    few.check(0.1, final=True)
    few.check(0.05)  # too little has been seen to judge
    with pytest.raises(DataError, match="1 of 10 lines are bad"):
        few.check(0.05, final=True)


def test_gbk_in_a_file_of_lines_is_told_with_a_way_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "好"}\n'.encode("gbk") * 3)
    bad = InvalidRecords()
    assert records_of(path, bad) == []
    with pytest.raises(DataError, match=r"3 × not UTF-8.*iconv -f GB18030"):
        bad.check(0.05, final=True)


def test_what_is_put_aside_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_MOST_KEPT", 1_000)
    bad = InvalidRecords(tmp_path / "aside.jsonl")
    reason, content = "\x1b[31m" + "!" * 1_000, {"key": ["长" * 1_000]}
    for line in range(1_500):
        bad.add(Path("x.jsonl"), line, f"{line}{reason}", content)
    assert bad.total == sum(bad.reasons.values()) == 1_500
    assert len(bad.reasons) <= 101
    assert max(map(len, bad.reasons)) <= 200
    assert "\x1b" not in bad.first
    assert bad.path
    assert len(bad.path.read_text("utf-8").splitlines()) == 1_000
    assert bad.path.stat().st_size < 1_500_000
    with pytest.raises(DataError, match="The first 1,000 are in"):
        bad.check(0.5, final=True)


def test_a_full_disk_while_putting_lines_aside() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(ResourceError, match=r"/dev/full: .*data\.store=DIR"):
        InvalidRecords(Path("/dev/full")).add(Path("x.jsonl"), 1, "bad")


def test_counts_of_two_readings_add_up() -> None:
    one, other = InvalidRecords(good=5), InvalidRecords(good=7)
    one.add(Path("x"), 1, "red")
    for line in range(1, 6):
        other.add(Path("y"), line, "red")
    one.merge(other)
    assert (one.good, one.total, one.reasons["red"]) == (12, 6, 6)
    assert one.places["red"] == ["x:1", "y:1", "y:2"]
    assert one.first == "x:1: red"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{broken", "not JSON: "),
        ("", "not JSON: "),
        ('{"a": 1} {"a": 1}', "Extra data"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "\x00"}', "a NUL character"),
        ('{"a": {"\\u0000": 1}}', "a NUL character"),
        ('{"a": [{"b": "\\udc00"}]}', "lone surrogate"),
        ('{"\\uD800": 1}', "lone surrogate"),
        ('{"a": {"b": 1, "b": 1}}', "comes twice"),
        ('{"a": [Infinity]}', "Infinity is not JSON"),
    ],
)
def test_what_json_leaves_open_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_what_only_looks_like_a_bad_escape_is_good_json() -> None:
    assert parse_json('{"text": "\\\\u0000 and \\\\ud800"}') == {"text": "\\u0000 and \\ud800"}
    assert parse_json('"\\ud83d\\ude00 \\uac00"') == "😀 가"


def test_marks_ends_and_strings(tmp_path: Path) -> None:
    lines = ['{"text": "a"}\r', "\r", '\ufeff{"text": "b"}', '"好"', '{"text": "c"}']
    content = "\ufeff" + "\n".join(lines)
    assert texts_of(tmp_path / "a.jsonl", content.encode()) == ["a", "b", "好", "c"]
    content = '\ufefftext\r\na\r\n\r\n"b\r\nb"\r\n'
    assert texts_of(tmp_path / "a.csv", content.encode()) == ["a", "b\r\nb"]
    assert texts_of(tmp_path / "a.txt", b"\xef\xbb\xbfa\r\nb\n") == ["a\nb\n"]
    assert texts_of(tmp_path / "a.json", b'\xef\xbb\xbf["a", {"text": "b"}]') == ["a", "b"]


# --- JSON


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
def test_json_is_a_list_or_one_value_after_the_other(
    write: Callable[[Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs = ' ] } { [ , “好” \\ " '
    lines = [{"text": f"{n}{signs}" + "字" * (n % 50), "n": [n, None]} for n in range(400)]
    monkeypatch.setattr(read, "READ_AHEAD", 97)  # so that records lie across its borders
    path = tmp_path / "a.json"
    path.write_text(write(lines), encoding="utf-8", newline="")
    assert [record.text for record in records_of(path)] == [line["text"] for line in lines]


def test_bad_members_of_a_json_list_are_put_aside(tmp_path: Path) -> None:
    bad = InvalidRecords()
    content = b'[{"text": "a"},\n{"text": NaN},\n{"text": "b", "text": "c"}, 7,\n\n{"text": "d"}]'
    assert texts_of(tmp_path / "a.json", content, bad) == ["a", "d"]
    assert [place.rpartition(":")[2] for places in bad.places.values() for place in places] == [
        *("2", "3", "3")
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"text": "a"}, {"text": "b"}', "cut short"),
        (b'[{"text": "a"},\n{"text": "b', "line 2: not JSON: Unterminated string"),
        (b'[{"text": "a"}]\n[{"text": "b"}]', "line 2: something follows the end"),
        (b'[{"text": "a"} oops]', "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "a"', "line 1: not JSON"),
    ],
)
def test_json_files_that_cannot_be_read(content: bytes, reason: str, tmp_path: Path) -> None:
    assert reason in reason_of(tmp_path / "a.json", content)


# --- CSV


def _rows(damage: dict[int, str], num_rows: int) -> bytes:
    lines = [f"问题{n},{'回答' * (n % 9)}{n}" for n in range(2, num_rows + 2)]
    for line, text in damage.items():
        lines[line - 2] = text
    return ("\r\n".join(["q,a", *lines]) + "\r\n").encode()


@pytest.mark.parametrize("num_rows", [200, 10_000])
def test_a_lone_quote_costs_one_row(
    num_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "_MAX_ROW", 50_000)
    good = {60: '"two\r\nlines","of ""one"" row"'}
    damage = {
        50: '"问题,回答',
        100: '问题,"回答',
        110: '",',
        150: 'a,"b" c',
        160: '"a,b',
        170: 'a",b,c',
    }
    damage |= {num_rows: '"到头"了,"', num_rows + 1: '问题,"'}
    bad = InvalidRecords(tmp_path / "aside.jsonl")
    path = tmp_path / "a.csv"
    path.write_bytes(_rows(damage | good, num_rows))
    records = records_of(path, bad)
    asked = [record.messages[0]["content"] for record in records if record.messages]
    assert asked == [
        "two\r\nlines" if n in good else f"问题{n}"
        for n in range(2, num_rows + 2)
        if n not in damage
    ]
    assert bad.total == len(damage)
    entries = map(json.loads, (tmp_path / "aside.jsonl").read_text("utf-8").splitlines())
    assert [entry["line"] for entry in entries] == sorted(n + (n > 60) for n in damage)


def test_rows_that_do_not_fit_the_header(tmp_path: Path) -> None:
    bad = InvalidRecords()
    path = tmp_path / "a.tsv"
    rows = [b"q\ta", b"x\ty", b"x", b"x\ty\tz", b"x\t\0", b"x\t\xff", b"x\t" + b"y" * (17 << 20)]
    path.write_bytes(b"\n".join([*rows, b"x\ty"]))
    assert len(records_of(path, bad)) == 2
    assert dict(bad.reasons) == {
        "not CSV: 1 fields where the header has 2": 1,
        "not CSV: 3 fields where the header has 2": 1,
        "a NUL character": 1,
        "not UTF-8": 1,
        "not CSV: a line of more than 16 MB": 1,
    }
    places = [place for places in bad.places.values() for place in places]
    assert places == [f"{path}:{number}" for number in range(3, 8)]


# --- Plain text


def test_text_is_cut_into_documents_and_nothing_is_lost(tmp_path: Path) -> None:
    rng = random.Random(1)
    paragraphs = ["，".join(["天地玄黄"] * rng.randrange(1, 60)) + "。\n" for _ in range(4_000)]
    whole = "".join(p + "\n" * rng.randrange(2) for p in paragraphs) + "宇宙" * 200_000 + "终"
    texts = [t or "" for t in texts_of(tmp_path / "a.txt", whole.encode())]
    assert "".join(texts) == whole
    assert max(map(len, texts)) <= 2 * (1 << 16)
    assert texts[0].endswith("\n\n")


def test_bad_lines_of_plain_text(tmp_path: Path) -> None:
    bad = InvalidRecords(max_fraction=0.1)
    lines = [f"第{n}行\n".encode() for n in range(1, 2_001)]
    lines[6], lines[1_999] = b"\xff\xfe\n", "好".encode()[:-1]
    lines[8] = b"a\0b\n"
    [text] = texts_of(tmp_path / "a.txt", b"".join(lines), bad)
    assert (text or "").splitlines() == [f"第{n}行" for n in range(1, 2_000) if n not in (7, 9)]
    assert bad.places["not UTF-8"] == [f"{tmp_path / 'a.txt'}:7", f"{tmp_path / 'a.txt'}:2000"]
    assert bad.places["a NUL character"] == [f"{tmp_path / 'a.txt'}:9"]


# --- Parquet


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    values = [b"good", b"\xff\xfe", b"a\0b", None, b"of the year 292277", b"better"]
    unchecked = pyarrow.array(values, "binary").view("string")
    dates = pyarrow.array([0, 0, 0, 0, 2**63 - 1, None], "int64").view(pyarrow.timestamp("us"))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": unchecked, "date": dates}), path)
    bad = InvalidRecords()
    assert [record.text for record in records_of(path, bad)] == ["good", "better"]
    assert [place for places in bad.places.values() for place in places] == [
        *(f"{path}:{row}" for row in (2, 3, 4, 5))
    ]


# --- Paths


def test_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.txt.zst", "a/d.md", ".hidden.jsonl", ".git/x.txt", "a/e.TSV"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    here = str(tmp_path)
    names = ["a/c.txt.zst", "a/e.TSV", "b.jsonl"]
    assert list_files(here) == [tmp_path / name for name in names]
    assert list_files(f"{here}/**/*") == [tmp_path / name for name in names]
    assert list_files(f"{here}/*.jsonl") == [tmp_path / "b.jsonl"]
    assert list_files(f"{here}/a/d.md") == [tmp_path / "a/d.md"]  # reading it will tell
    (tmp_path / "x[1].jsonl").write_text("x")
    assert list_files(f"{here}/x[1].jsonl") == [tmp_path / "x[1].jsonl"]


NAMES = ["[v1]", "a@2", "x*", "a,b", "a b", "q?", "[!x]", "{a}", "~", "a@0.5", "**"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_exists_wins_over_syntax_in_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("v", "a", "xy", "q1", "b", f"deep/{name}", "deep/v", name):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "1.jsonl").write_text("x")
    here = Path(name) if name != "~" else Path("./~")
    asked = str(here) if name != "~" else "./~"
    if name != "~":
        assert list_files(asked) == [here / "1.jsonl"]
        assert list_files(f"{asked}/*.jsonl") == [here / "1.jsonl"]
        assert list_files(f"deep/{asked}/*.jsonl") == [Path("deep", name, "1.jsonl")]
    assert list_files(f"{tmp_path}/{name}/[0-9].jsonl") == [tmp_path / name / "1.jsonl"]
    file = Path(f"{name}.jsonl")
    file.write_text("x")
    assert list_files(f"{tmp_path}/{file}") == [tmp_path / file]


def test_in_each_folder_of_a_pattern_a_name_wins(tmp_path: Path) -> None:
    for folder in ("1/[v]", "1/v", "2/v"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jsonl").write_text("x")
    found = list_files(f"{tmp_path}/*/[v]/*.jsonl")
    assert found == [tmp_path / "1/[v]/a.jsonl", tmp_path / "2/v/a.jsonl"]


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ("a.jsonl,b c.jsonl", "--data a.jsonl --data b --data c.jsonl"),
        ("a.jsonl, b.jsonl", "--data a.jsonl --data b.jsonl"),
        ("a.jsonl b.jsonl", "--data a.jsonl --data b.jsonl"),
        ("*.jsonl,a.jsonl", "--data '*.jsonl' --data a.jsonl"),
        ("gone.jsonl，b.jsonl", "--data gone.jsonl --data b.jsonl"),
        ("a.jsonl@2,b.jsonl@1", ""),
    ],
)
def test_several_paths_in_one_are_told_apart(
    asked: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text('{"text": "x"}')
    with pytest.raises(DataError) as caught:
        list_files(asked)
    assert (f"Give each path by itself: repeat --data ({options})" in str(caught.value)) == bool(
        options
    )


def test_paths_that_mean_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "note.md").write_text("x")
    (tmp_path / "pretrain.jsonl").write_text("x")
    monkeypatch.chdir(tmp_path)
    for path, reason in [
        ("docs", "the folder holds no file that can be read; known are .jsonl"),
        ("docs/*", "none of the 1 files can be read"),
        ("docs/*.jsonl", "no file matches"),
        ("pretrian.jsonl", "no such file or folder; . holds pretrain.jsonl"),
        ("dosc/a/b.jsonl", "no such file or folder; . holds docs"),
        (f"{tmp_path}/docs/a/b.jsonl", f"; the folder {tmp_path}/docs exists, but holds no a"),
        ("a\0b", "no such file"),
        ("a" * 5_000, "aaa: "),  # the system says why
    ]:
        with pytest.raises(DataError) as caught:
            list_files(path)
        assert reason in str(caught.value)


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder of another user's, with a closed folder and a closed file in it."""
    if not hasattr(os, "geteuid"):
        pytest.skip("permissions are of another kind here")
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    try:
        (folder / "closed").mkdir()
        (folder / "closed" / "a.jsonl").write_text('{"text": "a"}')
        (folder / "b.jsonl").write_text('{"text": "b"}')
        (folder / "b.jsonl").chmod(0)
        (folder / "closed").chmod(0)
        folder.chmod(0o755)
        if user == 0:
            os.seteuid(65534)  # root may read everything
        yield folder
    finally:
        if user == 0:
            os.seteuid(0)
        (folder / "closed").chmod(0o755)
        shutil.rmtree(folder)


def test_what_may_not_be_read_is_named(locked: Path) -> None:
    for path in (locked / "closed", locked / "closed" / "a.jsonl", locked):
        with pytest.raises(DataError, match=r"closed.*: no permission to read it"):
            list_files(str(path))
    with pytest.raises(DataError, match=r"b\.jsonl: no permission to read it"):
        records_of(locked / "b.jsonl")


# --- All together


def test_batches_are_bounded_in_records_and_in_characters() -> None:
    records = [Record(text="字" * (1 + 300_000 * (n % 600 == 599))) for n in range(6_000)]
    made = list(batches(iter(records)))
    assert [record for batch in made for record in batch] == records
    assert max(map(len, made)) == 512
    long = [Record(text="字" * 700_000)] * 5
    assert [len(batch) for batch in batches(long)] == [2, 2, 1]


def test_texts_of_any_schema(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "问", "a": "答"}\n{"text": "文"}\n', encoding="utf-8")
    assert list(read_texts([path, path], bad=InvalidRecords())) == ["问\n答", "文"] * 2


def test_a_forced_schema_says_what_it_misses(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [], "id": 3}\n')
    bad = InvalidRecords()
    assert records_of(path, bad, schema="text") == []
    assert bad.first == f"{path}:1: no field text; its fields are: messages, id"


def test_no_damage_leads_to_anything_but_our_errors(tmp_path: Path) -> None:
    rng = random.Random(99)
    outcomes = {"read": 0, "error": 0}
    for kind in FORMATS:
        for compression, compress in COMPRESSIONS.items():
            whole = compress(FORMATS[kind](RECORDS))
            for number in range(12):
                content = bytearray(whole)
                for _ in range(rng.randrange(1, 6)):
                    place = rng.randrange(len(content))
                    match rng.randrange(4):
                        case 0:
                            content[place] ^= 1 << rng.randrange(8)
                        case 1:
                            del content[place : place + rng.randrange(1, 40)]
                        case 2:
                            content[place:place] = rng.choice(b'"\0\xff\n[},').to_bytes()
                        case _:
                            content[place:place] = rng.randbytes(rng.randrange(1, 9))
                    content = content or bytearray(b"x")
                path = tmp_path / f"{number}.{kind}{compression}"
                path.write_bytes(content)
                with contextlib.suppress(DataError):
                    records_of(path)
                    outcomes["read"] += 1
                    outcomes["error"] -= 1
                outcomes["error"] += 1
    assert outcomes["read"] > 50
    assert outcomes["error"] > 50
