"""Data files in every format and compression, and shortcuts to read them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from minimind.data.invalid import InvalidRecords
from minimind.data.read import read_records
from minimind.data.schemas import Record
from minimind.errors import DataError

RECORDS = [{"q": f"第{n}个问题？", "a": f'第{n}个"回答"，\n有两行, and a comma'} for n in range(30)]


def delimited_bytes(records: list[dict[str, Any]], delimiter: str) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, fieldnames=list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue().encode()


def parquet_bytes(records: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), stream)
    return stream.getvalue()


def json_lines_bytes(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": json_lines_bytes,
    "ndjson": json_lines_bytes,
    "json": lambda records: json.dumps(records).encode(),
    "csv": lambda records: delimited_bytes(records, ","),
    "tsv": lambda records: delimited_bytes(records, "\t"),
    "parquet": parquet_bytes,
    "txt": lambda records: "\n".join(r["q"] + r["a"] for r in records).encode(),
}


def zip_bytes(content: bytes, *names: str) -> bytes:
    """A zip archive with the same content in each of its files, one by default."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names or ("file",):
            archive.writestr(name, content)
    return stream.getvalue()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zip": zip_bytes,
}


def records_of(
    path: Path, invalid: InvalidRecords | None = None, schema: str = "auto"
) -> list[Record]:
    return list(read_records([path], invalid=invalid or InvalidRecords(), schema=schema))


def texts_of(path: Path, content: bytes, invalid: InvalidRecords | None = None) -> list[str | None]:
    path.write_bytes(content)
    return [record.text for record in records_of(path, invalid)]


def reason_of(path: Path, content: bytes) -> str:
    """Return the message of the DataError that reading the content raises."""
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        records_of(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)
