import contextlib
import random
from pathlib import Path

from minimind.data.invalid import InvalidRecords
from minimind.data.read import batches, read_texts
from minimind.data.schemas import Record
from minimind.errors import DataError
from tests.support.data_files import COMPRESSIONS, FORMATS, RECORDS, records_of


def test_batches_are_bounded_in_records_and_characters() -> None:
    records = [Record(text="字" * (1 + 300_000 * (n % 600 == 599))) for n in range(6_000)]
    found = list(batches(iter(records)))
    assert [record for batch in found for record in batch] == records
    assert max(map(len, found)) == 512
    long = [Record(text="字" * 700_000)] * 5
    assert [len(batch) for batch in batches(long)] == [2, 2, 1]


def test_read_texts_accepts_any_schema(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "问", "a": "答"}\n{"text": "文"}\n', encoding="utf-8")
    assert list(read_texts([path, path], invalid=InvalidRecords())) == ["问\n答", "文"] * 2


def test_a_given_schema_reports_the_missing_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [], "id": 3}\n')
    invalid = InvalidRecords()
    assert records_of(path, invalid, schema="text") == []
    assert invalid.first == f"{path}:1: no field text or content; its fields are: messages, id"


def test_random_damage_raises_only_data_errors(tmp_path: Path) -> None:
    rng = random.Random(99)
    outcomes = {"read": 0, "error": 0}
    for kind in FORMATS:
        for compression, compress in COMPRESSIONS.items():
            original = compress(FORMATS[kind](RECORDS))
            for number in range(12):
                content = bytearray(original)
                for _ in range(rng.randrange(1, 6)):
                    position = rng.randrange(len(content))
                    match rng.randrange(4):
                        case 0:
                            content[position] ^= 1 << rng.randrange(8)
                        case 1:
                            del content[position : position + rng.randrange(1, 40)]
                        case 2:
                            content[position:position] = rng.choice(b'"\0\xff\n[},').to_bytes()
                        case _:
                            content[position:position] = rng.randbytes(rng.randrange(1, 9))
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
